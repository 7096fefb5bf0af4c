from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import kl_threshold
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import from_dense
from optuna_quantune.quantization.statistics import Histogram


RNG = np.random.default_rng(0)


def histogram_of(values: NDArray[np.float64]) -> Histogram:
    values = values.astype(np.float32)
    dense = np.zeros(BINS, dtype=np.int64)
    count_into(dense, values)
    return from_dense(dense, float(values.min()), float(values.max())).histogram()


def test_max_is_the_exact_range_widened_to_contain_zero() -> None:
    values = RNG.standard_normal(1000) + 10.0
    low, high = choose_range(histogram_of(values), "max", symmetric=False)
    assert low == 0.0
    assert high == values.astype(np.float32).max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_kl_clips_a_heavy_tail_and_keeps_the_bulk(symmetric: bool) -> None:
    values = RNG.standard_t(3, size=200_000)
    low, high = choose_range(histogram_of(values), "kl", symmetric=symmetric)
    assert values.min() < low < np.quantile(values, 0.01)
    assert np.quantile(values, 0.99) < high < values.max()


def test_kl_of_a_symmetric_scheme_has_one_threshold_for_both_sides() -> None:
    values = RNG.standard_t(3, size=200_000)
    low, high = choose_range(histogram_of(values), "kl", symmetric=True)
    assert low == -high


def test_kl_follows_each_side_of_a_skewed_tensor() -> None:
    values = np.concatenate([-RNG.random(100_000), np.abs(RNG.standard_t(3, 100_000))])
    low, high = choose_range(histogram_of(values), "kl", symmetric=False)
    assert low == pytest.approx(-1.0, abs=0.1)
    assert np.quantile(values, 0.99) < high < 0.8 * values.max()


@pytest.mark.parametrize("symmetric", [False, True])
def test_kl_keeps_a_uniform_tensor_whole(symmetric: bool) -> None:
    values = RNG.uniform(-1.0, 1.0, 200_000)
    low, high = choose_range(histogram_of(values), "kl", symmetric=symmetric)
    assert low == pytest.approx(-1.0, abs=0.02)
    assert high == pytest.approx(1.0, abs=0.02)


def test_kl_keeps_the_spike_at_the_bound_of_a_relu6() -> None:
    values = np.clip(3.0 * RNG.standard_normal(200_000), 0.0, 6.0)
    _, high = choose_range(histogram_of(values), "kl", symmetric=False)
    assert high == 6.0


def test_kl_does_not_collapse_on_a_tensor_of_mostly_zeros() -> None:
    values = np.where(RNG.random(200_000) < 0.99, 0.0, np.abs(RNG.standard_normal(200_000)))
    _, high = choose_range(histogram_of(values), "kl", symmetric=False)
    assert high > np.quantile(values[values > 0], 0.95)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constant_tensor_keeps_its_value(value: float) -> None:
    low, high = choose_range(histogram_of(np.full(50, value)), "kl", symmetric=False)
    assert (low, high) == (min(value, 0.0), max(value, 0.0))


def brute_force_divergence(counts: NDArray[np.float64], stop: int, levels: int) -> float:
    """The textbook loop: saturate the tail, merge into levels, spread over occupied bins."""
    p = counts[:stop].copy()
    p[-1] += counts[stop:].sum()
    q = np.zeros(stop)
    for level in range(levels):
        bins = [b for b in range(stop) if b * levels // stop == level]
        occupied = [b for b in bins if counts[b] > 0]
        for b in occupied:
            q[b] = sum(counts[c] for c in bins) / len(occupied)
    if np.any((q == 0) & (p > 0)):
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(sum(pi * np.log(pi / qi) for pi, qi in zip(p, q, strict=True) if pi > 0))


def test_threshold_is_the_minimum_of_a_brute_force_divergence() -> None:
    rng = np.random.default_rng(4)
    counts = np.histogram(np.abs(rng.standard_t(2, 5000)), bins=128, range=(0.0, 12.0))[0] * 1.0
    edges = np.linspace(0.0, 12.0, 129)
    levels = 16
    found = kl_threshold(edges, counts, levels=levels)
    divergences = {stop: brute_force_divergence(counts, stop, levels) for stop in range(16, 129)}
    assert found == edges[min(divergences, key=divergences.__getitem__)]
