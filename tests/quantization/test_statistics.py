from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import from_dense
from optuna_quantune.quantization.statistics import Tail


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


def accumulated(
    values: NDArray[np.float32], *, step: int, bounds: tuple[float, float] | None
) -> Counts:
    """What is counted when every `step`-th value and both tails are seen, in many small parts."""
    accumulator = Accumulator()
    for part in np.array_split(values, 40):
        accumulator.extend(float(part.min()), float(part.max()))
        lower, upper = (
            (None, None)
            if bounds is None
            else (
                Tail(part[part < bounds[0] * 0.5], bounds[0]),
                Tail(part[part > bounds[1] * 0.5], bounds[1]),
            )
        )
        accumulator.add(part[::step].copy(), weight=step, upper=upper, lower=lower)
    return accumulator.counts()


@pytest.mark.parametrize("name", SAMPLES)
def test_values_added_in_parts_are_counted_as_if_they_were_one_array(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    found, expected = accumulated(values, step=1, bounds=None), counts_of(values)
    np.testing.assert_array_equal(found.bins, expected.bins)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)


def test_tails_are_counted_value_by_value_and_the_body_by_its_sample() -> None:
    values = SAMPLES["heavy tail"].astype(np.float32)
    low, high = float(np.quantile(values, 1e-4)), float(np.quantile(values, 1.0 - 1e-4))
    found = accumulated(values, step=9, bounds=(low, high)).histogram()
    exact = counts_of(values).histogram()
    for edges_of, counted in ((exact, exact.counts), (found, found.counts)):
        assert edges_of.edges.size == counted.size + 1
    outer = 1.01  # beyond the bin that the bound falls into
    for sign, bound in ((1.0, high * outer), (-1.0, low * outer)):
        beyond = exact.counts[sign * exact.edges[:-1] > abs(bound)].sum()
        assert beyond > 20
        assert found.counts[sign * found.edges[:-1] > abs(bound)].sum() == beyond
    assert found.total == pytest.approx(values.size, rel=0.01)


def test_counting_goes_on_from_counts() -> None:
    first, second = SAMPLES["normal"].astype(np.float32), SAMPLES["relu"].astype(np.float32)
    accumulator = Accumulator(counts_of(first))
    accumulator.extend(float(second.min()), float(second.max()))
    accumulator.add(second)
    expected = counts_of(np.concatenate([first, second]))
    np.testing.assert_array_equal(accumulator.counts().counts, expected.counts)
    assert accumulator.counts().minimum == expected.minimum


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_noticed_even_within_a_sample(value: float) -> None:
    accumulator = Accumulator()
    accumulator.extend(-1.0, 1.0)
    values = np.array([0.5, value, -0.5], dtype=np.float32)
    tails = (Tail(values[:1], 0.25), Tail(values[2:], -0.25))
    accumulator.add(values, weight=3, upper=tails[0], lower=tails[1])
    accumulator.counts()
    assert not accumulator.finite
