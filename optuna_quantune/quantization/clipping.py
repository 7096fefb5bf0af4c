"""From a histogram to a range: what is represented, and what is cut off.

Exact zeros take no part: zero is represented exactly whatever the range is, and the many zeros
behind a ReLU would otherwise hide everything else. With a symmetric scheme both sides of zero
share one threshold, so their magnitudes are folded together; otherwise each side has its own.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.statistics import Histogram


# Fine bins between which a KL threshold is looked for, as TensorRT's calibrator has.
_KL_BINS: Final = 2048
_ROUNDS: Final = 2
# The range of least squared error is looked for between the whole range and this many halvings of
# either end, first in quarter octaves, then around the best candidate in steps four times as fine.
_OCTAVES: Final = 10
_COARSE_STEP: Final = 0.25
_REFINEMENTS: Final = 3


def choose_range(
    histogram: Histogram, clipping: Clipping, scheme: Scheme, *, bits: int = 8
) -> tuple[float, float]:
    """The range that a tensor is quantized over.

    Args:
        histogram: The tensor's values.
        clipping: ``max`` for the minimum and maximum as they are, ``kl`` for the thresholds of
            least Kullback-Leibler divergence (`kl_threshold`), ``percentile_P`` for thresholds
            with P percent of the values between them and zero on either side, ``mse`` for the
            range of least squared error (`quantization_error`).
        scheme: What the range becomes a scale and a zero point by.
        bits: Width of the integers.

    Returns:
        Lower and upper end, within the histogram's minimum and maximum and containing 0.
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if clipping == "max" or not histogram.counts.any():
        return low, high
    symmetric = _is_symmetric(histogram, scheme)
    if clipping == "mse":
        return _least_error_range(histogram, scheme, bits, symmetric=symmetric)
    if clipping == "kl":
        return _kl_range(histogram, bits, symmetric=symmetric)
    return _percentile_range(
        histogram, float(clipping.removeprefix("percentile_")) / 100.0, symmetric=symmetric
    )


def ranging_scheme(histogram: Histogram, clipping: Clipping, scheme: Scheme) -> Scheme:
    """The first of the schemes that `choose_range` gives the same range with.

    Args:
        histogram: The tensor's values.
        clipping: As in `choose_range`.
        scheme: As in `choose_range`.
    """
    if clipping == "max":
        return "asymmetric"
    if clipping == "mse" and scheme == "symmetric_power2":
        return scheme
    return "symmetric" if _is_symmetric(histogram, scheme) else "asymmetric"


def _is_symmetric(histogram: Histogram, scheme: Scheme) -> bool:
    if scheme == "symmetric_uint8":
        return histogram.minimum < 0.0
    return scheme != "asymmetric"


def _percentile_range(
    histogram: Histogram, share: float, *, symmetric: bool
) -> tuple[float, float]:
    """Thresholds with `share` of the non-zero values of either side between them and zero.

    What is cut off is 1 - `share` of all non-zero values, whether they lie on one side or on both.
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    edges = histogram.edges
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    if symmetric:
        magnitudes = np.unique(np.abs(edges))
        inside = np.interp(magnitudes, edges, below) - np.interp(-magnitudes, edges, below)
        threshold = float(np.interp(share * below[-1], inside, magnitudes))
        return max(low, -threshold), min(high, threshold)
    negative = float(np.interp(0.0, edges, below))
    ends = ((1.0 - share) * negative, negative + share * (below[-1] - negative))
    return tuple(np.clip(np.interp(ends, below, edges), (low, 0.0), (0.0, high)).tolist())


def _least_error_range(
    histogram: Histogram, scheme: Scheme, bits: int, *, symmetric: bool
) -> tuple[float, float]:
    """The range whose parameters make the least squared error, by search over both ends."""
    moments = _Moments(histogram)
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    reach = max(-low, high)

    def ends(below: NDArray[np.float64], above: NDArray[np.float64]) -> NDArray[np.float64]:
        if symmetric:
            threshold = reach * np.exp2(-above)
            return np.array([np.maximum(low, -threshold), np.minimum(high, threshold)])
        return np.array([low * np.exp2(-below), high * np.exp2(-above)])

    free = (not symmetric and low < 0.0, symmetric or high > 0.0)
    best = np.zeros(2)  # octaves that each end is drawn in by
    step = _COARSE_STEP
    offsets = np.arange(0.0, _OCTAVES + step, step)
    for _ in range(1 + _REFINEMENTS):
        sides = [
            np.unique(np.clip(octaves + offsets, 0.0, _OCTAVES)) if moves else np.zeros(1)
            for octaves, moves in zip(best, free, strict=True)
        ]
        below, above = (grid.ravel() for grid in np.meshgrid(*sides, indexing="ij"))
        starts, stops = ends(below, above)
        errors = moments.error(choose_parameters(starts, stops, scheme, bits=bits))
        index = int(np.argmin(errors))
        best = np.array([below[index], above[index]])
        offsets = np.linspace(-step, step, 9)
        step /= 4.0
    chosen = ends(*best)
    return float(chosen[0]), float(chosen[1])


def quantization_error(
    histogram: Histogram, parameters: QuantizationParameters
) -> NDArray[np.float64]:
    """Mean squared error of a tensor's values under quantization, rounding and clipping together.

    Values are taken as evenly spread within each bin. A value beyond the smallest or largest
    integer, or nearest to it, loses its distance to it; a value nearest to zero loses itself;
    every other one loses ``scale**2 / 12`` on average (B. Widrow). So a spike of values at the end
    of the range, as a ReLU6 makes it, costs nothing when the range ends there.

    Args:
        histogram: The values.
        parameters: Scales and zero points of any number of candidates, shape () or (n,).

    Returns:
        The error for each candidate, of the shape of the scales.
    """
    return _Moments(histogram).error(parameters) / max(histogram.total, 1.0)


class _Moments:
    """Number, sum and sum of squares of a histogram's non-zero values up to any threshold."""

    def __init__(self, histogram: Histogram) -> None:
        self._edges, self._counts = histogram.edges, histogram.counts
        powers = [self._edges ** (k + 1) / (k + 1) for k in range(3)]
        widths = np.diff(self._edges)
        # Bins of width 0 (all values at the minimum or maximum) are never cut through.
        self._density = np.divide(
            self._counts, widths, out=np.zeros_like(widths), where=widths > 0.0
        )
        in_bins = [
            np.where(widths > 0.0, self._density * np.diff(power), self._counts * spike)
            for k, power in enumerate(powers)
            for spike in [self._edges[:-1] ** k]
        ]
        self._below = [np.concatenate([[0.0], np.cumsum(part)]) for part in in_bins]

    def error(self, parameters: QuantizationParameters) -> NDArray[np.float64]:
        """Sum of squared errors of all values, for each candidate of `parameters`."""
        scale = parameters.scale.astype(np.float64)
        low = scale * (parameters.lowest - parameters.zero_point)
        high = scale * (parameters.highest - parameters.zero_point)
        rounding, half = scale * scale / 12.0, scale / 2.0
        # Nearest to the lowest integer, to another negative one, to zero, ... to the highest one.
        first, last = low + half, high - half
        bounds = (first, np.maximum(first, -half), np.minimum(half, last), last)
        count, total, square = zip(*(self._up_to(bound) for bound in bounds), strict=True)
        all_counts, all_totals, all_squares = (sums[-1] for sums in self._below)
        result: NDArray[np.float64] = (
            square[0]
            - 2.0 * low * total[0]
            + low * low * count[0]
            + rounding * (count[1] - count[0] + count[3] - count[2])
            + (square[2] - square[1])
            + (all_squares - square[3])
            - 2.0 * high * (all_totals - total[3])
            + high * high * (all_counts - count[3])
        )
        return result

    def _up_to(self, threshold: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        index = np.searchsorted(self._edges, threshold, side="right") - 1
        inside = (index >= 0) & (index < self._counts.size)
        at = np.clip(index, 0, self._counts.size - 1)
        start, density = self._edges[at], np.where(inside, self._density[at], 0.0)
        whole = np.clip(index, 0, self._counts.size)
        return [
            sums[whole] + density * (threshold ** (k + 1) - start ** (k + 1)) / (k + 1)
            for k, sums in enumerate(self._below)
        ]


def _kl_range(histogram: Histogram, bits: int, *, symmetric: bool) -> tuple[float, float]:
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if symmetric:
        grid = np.linspace(0.0, max(-low, high), _KL_BINS + 1)
        folded = _rebin(histogram, grid) + _rebin(histogram, -grid[::-1])[::-1]
        threshold = kl_threshold(grid, folded, levels=1 << (bits - 1))
        return max(low, -threshold), min(high, threshold)
    # Each side has the integer levels that fall to its share of the range; clipping one side
    # leaves more of them to the other. (Glow's numQuantizedBins: 255 of 8 bits.)
    levels = (1 << bits) - 1
    below, above = -low, high
    previous = math.nan
    for _ in range(_ROUNDS):
        share = below / (below + above)
        if share == previous:  # as of values on one side, which has all levels
            break
        previous = share
        below, above = (
            _side_threshold(histogram, -low, levels * share, negative=True),
            _side_threshold(histogram, high, levels * (1.0 - share), negative=False),
        )
    return -below, above


def _side_threshold(histogram: Histogram, end: float, levels: float, *, negative: bool) -> float:
    grid = np.linspace(0.0, end, _KL_BINS + 1)
    counts = _rebin(histogram, -grid[::-1])[::-1] if negative else _rebin(histogram, grid)
    if not counts.any():
        return end
    return kl_threshold(grid, counts, levels=max(2, round(levels)))


def kl_threshold(edges: NDArray[np.float64], counts: NDArray[np.float64], *, levels: int) -> float:
    """The threshold whose quantized distribution diverges least from the true one.

    For every candidate threshold the reference P is the histogram up to it with everything beyond
    added to its last bin (saturation); Q is the histogram up to it with the counts of each integer
    level spread evenly over the level's occupied bins. The threshold with the least
    Kullback-Leibler divergence D(P || Q) wins (S. Migacz, *8-bit Inference with TensorRT*, GTC
    2017; Glow ``optimizeKL``). ONNX Runtime's Entropy calibrator has as many bins as levels, which
    leaves a single candidate, the maximum; here there are many more bins than levels.

    Args:
        edges: Edges of evenly spaced bins of magnitudes, starting at 0, shape (n + 1,).
        counts: Counts in those bins, shape (n,), not all 0.
        levels: Number of integer levels between 0 and the threshold, at least 2.

    Returns:
        The threshold, larger than 0 and at most the last edge.
    """
    last = int(np.flatnonzero(counts)[-1]) + 1
    if last <= levels:  # every bin has a level of its own: clipping could only lose
        return float(edges[last])
    stops = np.unique(np.linspace(levels, last, 1 + _KL_BINS // 16).astype(np.int64))
    best = stops[int(np.argmin(_divergences(counts, stops, levels)))]
    return float(edges[best])


def _divergences(
    counts: NDArray[np.float64], stops: NDArray[np.int64], levels: int
) -> NDArray[np.float64]:
    """D(P || Q) for each candidate `stops`, the number of bins inside the threshold.

    Within a level Q is constant over the occupied bins, so sums over bins are differences of
    cumulative sums at the bounds of the levels, for all candidates at once.
    """
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    occupied = np.concatenate([[0.0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(xlogy(counts, counts))])
    bounds = -(-np.arange(levels + 1)[None, :] * stops[:, None] // levels)
    mass = np.diff(cumulative[bounds], axis=1)
    spread = mass / np.maximum(np.diff(occupied[bounds], axis=1), 1.0)
    total, inside, last_bin = cumulative[-1], cumulative[stops], counts[stops - 1]
    tail = total - inside
    own = entropy[stops] - xlogy(last_bin, last_bin) + xlogy(last_bin + tail, last_bin + tail)
    cross = xlogy(mass, spread).sum(axis=1) + xlogy(tail, spread[:, -1])
    with np.errstate(divide="ignore", invalid="ignore"):
        divergences = (own - cross) / total - np.log(total) + np.log(inside)
    # A tail that falls into an empty last bin has nothing to be represented by.
    impossible = (inside == 0) | ((last_bin == 0) & (tail > 0))
    result: NDArray[np.float64] = np.where(impossible, np.inf, divergences)
    return result


def _rebin(histogram: Histogram, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts of a histogram over other bins, taking values as evenly spread within each bin."""
    cumulative = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    up_to = np.interp(grid, histogram.edges, cumulative)
    if grid[0] <= histogram.edges[0]:
        up_to[0] = 0.0  # many equal values at the minimum are a bin without a width
    return np.diff(up_to)
