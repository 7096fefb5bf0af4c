from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import from_dense


def counts_of(values: NDArray[np.float32]) -> Counts:
    dense = np.zeros(BINS, dtype=np.int64)
    count_into(dense, values)
    return from_dense(dense, float(values.min()), float(values.max()))


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
        exact = np.quantile(values, quantile)
        found = np.interp(quantile * histogram.total, cumulative, histogram.edges)
        negligible = 2.0**-18 * np.abs(values).max()
        assert abs(found - exact) <= 2.0**-7 * abs(exact) + negligible


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
