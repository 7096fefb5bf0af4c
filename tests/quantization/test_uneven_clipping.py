"""Clipping that few inputs have most of."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from optuna_quantune.quantization.uneven_clipping import as_if_even
from optuna_quantune.quantization.uneven_clipping import shares_of_inputs


def test_inputs_share_what_is_cut_off_as_values_that_are_spread_evenly_do() -> None:
    # As dense in each input, evenly spread up to the largest value of each.
    largest = np.array([0.5, 1.0, 1.5, 2.0, 4.0])
    extremes = np.stack([-largest, largest], axis=1).astype(np.float32)
    values = [np.linspace(-end, end, int(20_000 * end)) for end in largest]
    for column, (low, high) in enumerate([(-3.0, np.inf), (-np.inf, 1.2)]):
        lost = np.array([np.square(v - np.clip(v, low, high)).sum() for v in values])
        found = shares_of_inputs(extremes, -3.0, 1.2)[:, column]
        np.testing.assert_allclose(found, lost / lost.mean(), rtol=1e-3)


def test_a_range_that_no_input_exceeds_cuts_off_evenly() -> None:
    extremes = np.array([[0.0, 1.0], [-1.0, 0.5]], dtype=np.float32)
    np.testing.assert_array_equal(shares_of_inputs(extremes, -2.0, 2.0), np.ones((2, 2)))
    np.testing.assert_array_equal(shares_of_inputs(extremes, -0.5, 2.0), [[0, 1], [2, 1]])


@pytest.mark.parametrize("even", [0.0, 1e-4, 1e-2])
def test_the_even_power_flips_as_many_inputs_as_the_uneven_one(even: float) -> None:
    rng = np.random.default_rng(0)
    uneven = 1e-3 * rng.exponential(size=50) ** 3
    margins = np.linspace(0.0, 20.0, 200_001)[:, None]  # much wider than the noise

    def flips(power: np.ndarray) -> float:
        return float(ndtr(-margins / np.sqrt(power)).mean())

    found = as_if_even(even, uneven)
    assert flips(np.array([found])) == pytest.approx(flips(even + uneven), rel=1e-2)
    assert found < even + uneven.mean()


def test_power_that_all_inputs_have_counts_in_full() -> None:
    assert as_if_even(0.25, np.full(7, 0.75)) == pytest.approx(1.0)
    assert as_if_even(0.25, np.zeros(0)) == 0.25
