"""From a histogram to a range: what is represented, and what is cut off.

Exact zeros take no part: zero is represented exactly whatever the range is, and the many zeros
behind a ReLU would otherwise hide everything else. With a symmetric scheme both sides of zero
share one threshold, so their magnitudes are folded together; otherwise each side has its own.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.statistics import Histogram


# Fine bins between which a threshold is looked for, as TensorRT's calibrator has.
_KL_BINS: Final = 2048
# Integer levels of a tensor (Glow's numQuantizedBins), and of one side of a symmetric one.
_LEVELS: Final = 255
_SYMMETRIC_LEVELS: Final = 128
_ROUNDS: Final = 2


def choose_range(
    histogram: Histogram, clipping: Clipping, *, symmetric: bool
) -> tuple[float, float]:
    """The range that a tensor is quantized over.

    Args:
        histogram: The activation's values.
        clipping: ``max`` for the minimum and maximum as they are, ``kl`` for the thresholds of
            least Kullback-Leibler divergence (`kl_threshold`).
        symmetric: Whether the tensor's integers will be symmetric about zero.

    Returns:
        Lower and upper end, within the histogram's minimum and maximum and containing 0.
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if clipping == "max" or not histogram.counts.any():
        return low, high
    if symmetric:
        grid = np.linspace(0.0, max(-low, high), _KL_BINS + 1)
        folded = _rebin(histogram, grid) + _rebin(histogram, -grid[::-1])[::-1]
        threshold = kl_threshold(grid, folded, levels=_SYMMETRIC_LEVELS)
        return max(low, -threshold), min(high, threshold)
    # Each side has the integer levels that fall to its share of the range; clipping one side
    # leaves more of them to the other.
    below, above = -low, high
    for _ in range(_ROUNDS):
        share = below / (below + above)
        below, above = (
            _side_threshold(histogram, -low, share, negative=True),
            _side_threshold(histogram, high, 1.0 - share, negative=False),
        )
    return -below, above


def _side_threshold(histogram: Histogram, end: float, share: float, *, negative: bool) -> float:
    grid = np.linspace(0.0, end, _KL_BINS + 1)
    counts = _rebin(histogram, -grid[::-1])[::-1] if negative else _rebin(histogram, grid)
    if not counts.any():
        return end
    return kl_threshold(grid, counts, levels=max(2, round(_LEVELS * share)))


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
    return np.diff(np.interp(grid, histogram.edges, cumulative))
