from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import Counts


def counts_of(values: NDArray[np.float32]) -> Counts:
    accumulator = Accumulator()
    accumulator.add(values)
    return accumulator.counts()


RNG = np.random.default_rng(0)
SAMPLES = {
    "normal": RNG.standard_normal(400_000),
    "laplace": RNG.laplace(size=400_000) * 1e-3,
    "relu": np.maximum(RNG.standard_normal(400_000), 0.0),
    "heavy tail": RNG.standard_t(3, size=400_000) * 50.0,
    "shifted": RNG.standard_normal(400_000) + 30.0,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_quantiles_agree_with_the_exact_ones_to_less_than_a_bin(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    histogram = counts_of(values).histogram()
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    # Zeros stand between the negative and the positive bins.
    cumulative += np.where(histogram.edges > 0, histogram.zeros, 0.0)
    for quantile in (0.001, 0.01, 0.9, 0.99, 0.999, 0.9999):
        found = np.interp(quantile * histogram.total, cumulative, histogram.edges)
        # Between two values any threshold is the quantile.
        low, high = np.quantile(values, [quantile - 1 / values.size, quantile + 1 / values.size])
        negligible = 2.0**-18 * np.abs(values).max()
        assert low - 2.0**-9 * abs(low) - negligible <= found
        assert found <= high + 2.0**-9 * abs(high) + negligible


@pytest.mark.parametrize("name", SAMPLES)
def test_extremes_total_and_power_are_those_of_the_values(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    histogram = counts_of(values).histogram()
    assert histogram.minimum == values.min()
    assert histogram.maximum == values.max()
    assert histogram.total == values.size
    assert histogram.mean_square == pytest.approx(
        np.mean(values.astype(np.float64) ** 2), rel=2e-3
    )
    assert np.all(np.diff(histogram.edges) >= 0)


def test_sum_of_two_counts_is_the_count_of_both() -> None:
    first, second = SAMPLES["normal"].astype(np.float32), SAMPLES["heavy tail"].astype(np.float32)
    added = counts_of(first) + counts_of(second)
    together = counts_of(np.concatenate([first, second]))
    np.testing.assert_array_equal(added.bins, together.bins)
    np.testing.assert_array_equal(added.counts, together.counts)
    assert (added.minimum, added.maximum) == (together.minimum, together.maximum)


def test_exact_zeros_of_either_sign_are_kept_apart() -> None:
    histogram = counts_of(np.array([0.0, -0.0, 0.0, 1.5, -2.0], dtype=np.float32)).histogram()
    assert histogram.zeros == 3
    assert histogram.counts.sum() == 2


def test_constant_tensor_has_its_value_as_both_extremes() -> None:
    histogram = counts_of(np.full(10, 3.25, dtype=np.float32)).histogram()
    assert (histogram.minimum, histogram.maximum) == (3.25, 3.25)
    assert histogram.mean_square == pytest.approx(3.25**2)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_parts_in_which_values_are_added_make_no_difference(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    values = values[np.argsort(np.abs(values))]  # the largest come last
    accumulator = Accumulator()
    for part in np.array_split(values, 40):
        accumulator.add(part)
        accumulator.counts()
    found, expected = accumulator.counts(), counts_of(values[::-1].copy())
    np.testing.assert_array_equal(found.bins, expected.bins)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)


def test_values_half_a_step_of_8_bits_apart_fall_into_different_bins() -> None:
    half_steps = np.arange(-510, 511, dtype=np.float32) * np.float32(1e3 / 510)
    assert counts_of(half_steps).histogram().counts.max() == 1


def test_a_value_stands_for_as_many_as_its_weight() -> None:
    values = SAMPLES["laplace"].astype(np.float32)
    accumulator = Accumulator()
    accumulator.add(values[:1000], weight=7)
    accumulator.add(values[1000:1100])
    found = accumulator.counts().histogram()
    assert found.total == 7 * 1000 + 100
    positive = 7 * (values[:1000] > 0).sum() + (values[1000:1100] > 0).sum()
    assert found.counts[found.edges[:-1] >= 0].sum() == positive


def test_what_is_negligible_beside_the_largest_counts_as_zero() -> None:
    values = np.array([2.0**-24, -(2.0**-24), 2.0**-15, -1.0], dtype=np.float32)
    histogram = counts_of(values).histogram()
    assert (histogram.zeros, histogram.counts.sum()) == (2, 2)


def test_counting_goes_on_from_counts() -> None:
    first, second = SAMPLES["normal"].astype(np.float32), SAMPLES["relu"].astype(np.float32)
    accumulator = Accumulator(counts_of(first))
    accumulator.add(second)
    expected = counts_of(np.concatenate([first, second]))
    np.testing.assert_array_equal(accumulator.counts().counts, expected.counts)
    assert accumulator.counts().minimum == expected.minimum


def test_parts_without_values_change_nothing() -> None:
    counts = counts_of(np.array([0.0, 1.0, -3.0], np.float32))
    nothing = Accumulator().counts()
    for total in (nothing + counts, counts + nothing):
        np.testing.assert_array_equal(total.bins, counts.bins)
        np.testing.assert_array_equal(total.counts, counts.counts)
        assert (total.minimum, total.maximum) == (-3.0, 1.0)
