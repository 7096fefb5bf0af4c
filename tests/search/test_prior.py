from __future__ import annotations

import numpy as np
import pytest

from optuna_quantune.search.prior import LimitLine
from optuna_quantune.search.prior import PriorLine


SPACE = np.linspace(0.0, 1.0, 101)


def test_limits_that_are_tiny_have_a_spread() -> None:
    guess = np.array([1e-301, -2e-301, 3e-301])
    assert LimitLine.fit(guess, guess[:1], np.array([-1e-301])).error > 0.0


def test_without_trials_the_prior_is_taken_as_it_is() -> None:
    line = PriorLine.fit(SPACE, np.array([]), np.array([]))
    np.testing.assert_array_equal(line(SPACE), SPACE)


def test_a_right_prior_stays_right() -> None:
    prior = np.array([0.1, 0.3, 0.2])
    line = PriorLine.fit(SPACE, prior, prior)
    np.testing.assert_allclose(line(SPACE), SPACE)


def test_a_constant_offset_is_learned_from_one_trial() -> None:
    line = PriorLine.fit(SPACE, np.array([0.2]), np.array([0.5]))
    np.testing.assert_allclose(line(SPACE), SPACE + 0.3)


def test_a_prior_in_another_unit_gets_the_unit_of_the_values() -> None:
    decibels = np.linspace(0.0, 40.0, 101)
    line = PriorLine.fit(decibels, np.array([30.0, 32.0, 34.0]), np.array([0.60, 0.64, 0.68]))
    assert line.slope == pytest.approx(0.02, rel=0.3)
    assert line(np.array([32.0])) == pytest.approx(0.64)


def test_one_trial_of_another_unit_keeps_the_order_of_the_prior() -> None:
    line = PriorLine.fit(np.linspace(0.0, 40.0, 101), np.array([40.0]), np.array([0.7]))
    assert line.slope > 0.0


def test_a_prior_that_points_the_wrong_way_is_no_longer_believed() -> None:
    rng = np.random.default_rng(0)
    prior = rng.uniform(size=30)
    assert PriorLine.fit(SPACE, prior, 1.0 - prior).slope == 0.0


def test_one_contradicting_pair_does_not_overturn_the_prior() -> None:
    line = PriorLine.fit(SPACE, np.array([0.10, 0.12]), np.array([0.12, 0.10]))
    assert line.slope > 0.9
