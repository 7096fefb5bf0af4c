from __future__ import annotations

import numpy as np
import pytest

from optuna_quantune.search.targets import TargetTransform
from optuna_quantune.search.targets import widest_spread


def test_the_order_of_values_is_kept() -> None:
    values = np.random.default_rng(0).standard_cauchy(100)
    targets = TargetTransform.fit(values)(values)
    np.testing.assert_array_equal(np.argsort(targets), np.argsort(values))


def test_values_that_differ_by_less_than_can_be_divided_by_are_alike() -> None:
    values = np.array([3e-310, 1e-310, 4e-310, 0.0])
    transform = TargetTransform.fit(values)
    assert np.isfinite(transform(values)).all()
    assert np.isfinite(transform.slope(values)).all()


def test_scale_and_offset_of_the_values_do_not_matter() -> None:
    values = np.random.default_rng(0).normal(size=30)
    moved = 1e-3 * values - 50.0
    np.testing.assert_allclose(
        TargetTransform.fit(values)(values), TargetTransform.fit(moved)(moved), rtol=1e-6
    )


def test_collapsed_values_are_compressed_and_leave_the_rest_apart() -> None:
    good = np.array([0.28, 0.281, 0.283, 0.285, 0.289])
    collapsed = np.array([0.99, 0.999])
    targets = TargetTransform.fit(np.concatenate([good, collapsed]))(
        np.concatenate([good, collapsed])
    )
    assert targets[4] - targets[0] > 0.15 * (targets[-1] - targets[0])
    assert (good[-1] - good[0]) < 0.02 * (collapsed[-1] - good[0])


def test_infinities_count_as_the_extreme_finite_values() -> None:
    values = np.array([np.inf, 3.0, 1.0, 2.0, -np.inf])
    targets = TargetTransform.fit(values)(values)
    assert np.isfinite(targets).all()
    assert targets[0] == targets[1]
    assert targets[-1] == targets[2]


def test_values_without_spread_and_without_finite_numbers_are_zero() -> None:
    for values in (np.array([2.0]), np.full(4, 2.0), np.array([np.inf, -np.inf])):
        np.testing.assert_array_equal(TargetTransform.fit(values)(values), 0.0)


@pytest.mark.filterwarnings("error")
def test_what_lies_far_from_values_that_hardly_differ_stays_finite() -> None:
    transform = TargetTransform.fit(np.array([1e-300, 2e-300]))
    assert np.isfinite(transform(np.array([-1e30, 1e30])) ** 2).all()


def test_the_expected_scale_outweighs_two_close_trials() -> None:
    values = np.array([0.700, 0.701])
    assert TargetTransform.fit(values).scale < 0.001
    assert TargetTransform.fit(values, expected_scale=0.2).scale > 0.1


def test_the_widest_spread_is_that_of_the_first_trials_when_a_search_has_gathered() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=16)
    found = first.min() + 0.01 * rng.random(200)
    gathered = np.concatenate([first, found, [np.inf, -np.inf]])
    assert TargetTransform.fit(gathered).scale < 0.1
    assert widest_spread(gathered) >= widest_spread(first) > 0.3
    assert widest_spread(np.array([np.inf])) == 0.0
