from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats

from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import kl_threshold
from optuna_quantune.quantization.clipping import quantization_error
from optuna_quantune.quantization.clipping import ranging_scheme
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import Histogram


RNG = np.random.default_rng(0)


def histogram_of(values: NDArray[np.float64]) -> Histogram:
    accumulator = Accumulator()
    accumulator.add(values.astype(np.float32))
    return accumulator.counts().histogram()


def test_max_is_the_exact_range_widened_to_contain_zero() -> None:
    values = RNG.standard_normal(1000) + 10.0
    low, high = choose_range(histogram_of(values), "max", "asymmetric")
    assert low == 0.0
    assert high == values.astype(np.float32).max()


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_kl_clips_a_heavy_tail_and_keeps_the_bulk(scheme: Scheme) -> None:
    values = RNG.standard_t(3, size=200_000)
    low, high = choose_range(histogram_of(values), "kl", scheme)
    assert values.min() < low < np.quantile(values, 0.01)
    assert np.quantile(values, 0.99) < high < values.max()


def test_kl_of_a_symmetric_scheme_has_one_threshold_for_both_sides() -> None:
    values = RNG.standard_t(3, size=200_000)
    low, high = choose_range(histogram_of(values), "kl", "symmetric")
    assert low == -high


def test_kl_follows_each_side_of_a_skewed_tensor() -> None:
    values = np.concatenate([-RNG.random(100_000), np.abs(RNG.standard_t(3, 100_000))])
    low, high = choose_range(histogram_of(values), "kl", "asymmetric")
    assert low == pytest.approx(-1.0, abs=0.1)
    assert np.quantile(values, 0.99) < high < 0.8 * values.max()


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_kl_keeps_a_uniform_tensor_whole(scheme: Scheme) -> None:
    values = RNG.uniform(-1.0, 1.0, 200_000)
    low, high = choose_range(histogram_of(values), "kl", scheme)
    assert low == pytest.approx(-1.0, abs=0.02)
    assert high == pytest.approx(1.0, abs=0.02)


def test_kl_keeps_the_spike_at_the_bound_of_a_relu6() -> None:
    values = np.clip(3.0 * RNG.standard_normal(200_000), 0.0, 6.0)
    _, high = choose_range(histogram_of(values), "kl", "asymmetric")
    assert high == 6.0


def test_kl_does_not_collapse_on_a_tensor_of_mostly_zeros() -> None:
    values = np.where(RNG.random(200_000) < 0.99, 0.0, np.abs(RNG.standard_normal(200_000)))
    _, high = choose_range(histogram_of(values), "kl", "asymmetric")
    assert high > np.quantile(values[values > 0], 0.95)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
@pytest.mark.parametrize("clipping", get_args(Clipping))
def test_constant_tensor_keeps_its_value(value: float, clipping: Clipping) -> None:
    low, high = choose_range(histogram_of(np.full(50, value)), clipping, "asymmetric")
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


SAMPLES = {
    "gaussian": RNG.standard_normal(50_000),
    "laplace": RNG.laplace(size=50_000),
    "half-normal": np.abs(RNG.standard_normal(50_000)),
    "uniform": RNG.uniform(-1.0, 1.0, 50_000),
    "skewed": RNG.gumbel(size=50_000),
    "negative": -RNG.exponential(size=50_000),
    "heavy-tailed": RNG.standard_t(3, 50_000),
    "clipped": np.clip(3.0 * RNG.standard_normal(50_000), 0.0, 6.0),
    "mostly zeros": np.where(RNG.random(50_000) < 0.9, 0.0, RNG.standard_normal(50_000)),
    "nearly constant": RNG.uniform(9.9, 10.0, 50_000),
}
SAMPLES = {name: values.astype(np.float32).astype(np.float64) for name, values in SAMPLES.items()}


def error_of(values: NDArray[np.float64], low: float, high: float, scheme: Scheme) -> float:
    """Mean squared error of the values themselves."""
    parameters = choose_parameters(low, high, scheme)
    single = values.astype(np.float32)
    restored = parameters.dequantize(parameters.quantize(single)).astype(np.float64)
    return float(np.mean(np.square(restored - single)))


def assert_quantile(found: float, values: NDArray[np.float64], share: float) -> None:
    # Between two values any threshold leaves the same share inside; a bin is 0.8 % wide.
    below, above = (np.quantile(values, share, method=method) for method in ("lower", "higher"))
    assert 0.992 * below <= found <= 1.008 * above


@pytest.mark.parametrize("name", SAMPLES)
def test_percentiles_are_the_exact_quantiles_of_each_side(name: str) -> None:
    values, histogram = SAMPLES[name], histogram_of(SAMPLES[name])
    for clipping in (c for c in get_args(Clipping) if c.startswith("percentile")):
        share = float(clipping.removeprefix("percentile_")) / 100.0
        low, high = choose_range(histogram, clipping, "asymmetric")
        for found, side in [(high, values[values > 0]), (-low, -values[values < 0])]:
            if side.size:
                assert_quantile(found, side, share)
            else:
                assert found == 0.0


@pytest.mark.parametrize("name", SAMPLES)
def test_a_symmetric_percentile_is_the_exact_quantile_of_the_magnitudes(name: str) -> None:
    values = SAMPLES[name]
    low, high = choose_range(histogram_of(values), "percentile_99.9", "symmetric")
    assert_quantile(max(-low, high), np.abs(values[values != 0]), 0.999)


def density_histogram(distribution: stats.rv_continuous) -> Histogram:
    """The histogram of infinitely many values."""
    low, high = distribution.ppf(1e-13), distribution.isf(1e-13)
    edges = np.unique(np.concatenate([np.linspace(low, high, 20_001), [0.0]]))
    counts = 1e12 * np.diff(distribution.cdf(edges))
    return Histogram(edges, counts, 0.0, float(low), float(high))


def integrated_error(distribution: stats.rv_continuous, threshold: float, levels: int) -> float:
    """Gauss-Legendre quadrature over the half cells of a quantizer of `levels` positive steps."""
    step = threshold / levels
    centers = step * np.arange(-levels - 1, levels + 1)
    ends = np.sort(np.concatenate([centers, centers[:-1] + step / 2.0, [-40.0, 40.0]]))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half = np.diff(ends)[:, None] / 2.0
    x = ends[:-1, None] + half * (nodes + 1.0)
    rounded = np.clip(np.rint(x / step), -levels - 1, levels) * step
    return float(np.sum(half * weights * np.square(x - rounded) * distribution.pdf(x)))


# The optimal thresholds of Banner et al. (arXiv 1810.05723), which neglect the one step by which
# the negative side of an integer range is longer.
@pytest.mark.parametrize(
    ("distribution", "bits", "published"),
    [
        (stats.norm, 8, 3.92),
        (stats.laplace, 8, 9.89),
        (stats.norm, 4, 2.55),
        (stats.laplace, 4, 5.03),
    ],
)
def test_mse_finds_the_optimal_thresholds_of_known_distributions(
    distribution: stats.rv_continuous, bits: int, published: float
) -> None:
    histogram = density_histogram(distribution)
    low, high = choose_range(histogram, "mse", "symmetric", bits=bits)
    levels = (1 << (bits - 1)) - 1
    optimum = optimize.minimize_scalar(
        lambda threshold: integrated_error(distribution, threshold, levels),
        bracket=(0.8 * published, published, 1.25 * published),
        tol=1e-3,
    )
    assert high == pytest.approx(optimum.x, rel=0.01)
    assert high == pytest.approx(published, rel=0.04 if bits == 8 else 0.1)
    predicted = float(quantization_error(histogram, choose_parameters(low, high, "symmetric")))
    if bits == 8:
        assert predicted == pytest.approx(optimum.fun, rel=0.01)


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_loses_no_more_than_any_other_clipping(name: str, scheme: Scheme) -> None:
    values = SAMPLES[name]
    histogram = histogram_of(values)
    errors = {
        clipping: error_of(values, *choose_range(histogram, clipping, scheme), scheme)
        for clipping in get_args(Clipping)
    }
    # Nearly constant values lie on three of the integers: which ones is not in the histogram.
    tolerance = 1.2 if name == "nearly constant" else 1.02
    assert errors["mse"] <= tolerance * min(errors.values())


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("name", ["skewed", "half-normal", "laplace", "clipped"])
def test_mse_is_the_minimum_of_a_brute_force_search(name: str, scheme: Scheme) -> None:
    values = SAMPLES[name][:20_000]
    found = error_of(values, *choose_range(histogram_of(values), "mse", scheme), scheme)
    shares = np.linspace(0.3, 1.0, 15)
    best = min(
        error_of(values, below * min(values.min(), 0.0), above * max(values.max(), 0.0), scheme)
        for below in shares
        for above in shares
    )
    assert found <= 1.01 * best


def test_the_error_of_a_histogram_is_that_of_its_values() -> None:
    for name, values in SAMPLES.items():
        if name == "nearly constant":
            continue
        parameters = QuantizationParameters(
            np.array([0.01, 0.02, 0.05], dtype=np.float32), np.array([-100, 0, 30], np.int32)
        )
        found = quantization_error(histogram_of(values), parameters)
        single = values.astype(np.float32)
        for index in range(3):
            one = QuantizationParameters(parameters.scale[index], parameters.zero_point[index])
            restored = one.dequantize(one.quantize(single))
            exact = np.mean(np.square(restored - single, dtype=np.float64))
            assert found[index] == pytest.approx(exact, rel=0.05), name


@pytest.mark.parametrize("clipping", [c for c in get_args(Clipping) if c != "max"])
@pytest.mark.parametrize("name", SAMPLES)
def test_no_clipping_collapses(name: str, clipping: Clipping) -> None:
    values = SAMPLES[name]
    for scheme in get_args(Scheme):
        low, high = choose_range(histogram_of(values), clipping, scheme)
        assert min(values.min(), 0.0) <= low <= 0.0 <= high <= max(values.max(), 0.0)
        # 8 bits over the whole range leave 24 dB of the heavy-tailed sample, more of the others.
        noise = error_of(values, low, high, scheme) / np.mean(np.square(values))
        assert -10.0 * np.log10(noise) > 13.0


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("clipping", get_args(Clipping))
@pytest.mark.parametrize("name", SAMPLES)
def test_schemes_that_range_alike_have_the_same_range(
    name: str, clipping: Clipping, scheme: Scheme
) -> None:
    histogram = histogram_of(SAMPLES[name])
    alike = ranging_scheme(histogram, clipping, scheme)
    assert choose_range(histogram, clipping, alike) == choose_range(histogram, clipping, scheme)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_kl_sees_many_equal_values_at_the_minimum(scheme: Scheme) -> None:
    low, high = choose_range(histogram_of(np.full(1000, -1.0)), "kl", scheme)
    assert (low, high) == (-1.0, 0.0)
    clipped = np.maximum(RNG.standard_normal(200_000), -1.0)
    low, high = choose_range(histogram_of(clipped), "kl", "asymmetric")
    assert low == pytest.approx(-1.0, abs=0.02)


def test_fewer_bits_clip_more() -> None:
    histogram = histogram_of(SAMPLES["laplace"])
    ends = [choose_range(histogram, "mse", "symmetric", bits=bits)[1] for bits in (4, 8, 16)]
    assert ends[0] < ends[1] < ends[2]
