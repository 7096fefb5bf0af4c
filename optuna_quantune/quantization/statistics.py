"""What calibration keeps of an activation: exact extremes, and a histogram that never grows.

The histogram's bins are the bfloat16 numbers: a value falls into the bin of the upper 16 bits of
its float32 representation. That makes binning a reinterpretation of memory, covers the whole range
of float32 on both sides of zero, gives every bin a width of 2^-7 (0.8 %) of its value, and lets
histograms of different inputs be added without ever being rebinned. The step of an 8-bit scale is
0.4 % of the range, so a threshold is known to about two steps; within a bin values are taken as
evenly spread.

Counting all values would take as long as computing them. Of a large activation the body is counted
by an even sample, and the tails, which decide where a range is clipped, value by value (`Tail`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray


BINS: Final = 1 << 16
_SIGN: Final = 1 << 15
_INFINITY: Final = 0x7F80
# Values this far (2^-20) below the largest magnitude are counted as zero: an 8-bit step is 2^-8 of
# the range, a 16-bit step 2^-16.
_NEGLIGIBLE_OCTAVES: Final = 20
# Counted in pieces whose bin numbers stay in the processor's cache.
_PIECE: Final = 1 << 18
# Values that are collected before they are counted: adding up all bins costs as much as counting
# about this many values.
_PENDING: Final = 1 << 16


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, with the exact zeros (and what is next to nothing) apart.

    Attributes:
        edges: Lower edges and the last upper edge in ascending order, float64, shape (n + 1,).
        counts: Number of values in each bin, float64, shape (n,).
        zeros: Number of values that are 0 or negligible beside the largest magnitude.
        minimum: The smallest value, exact.
        maximum: The largest value, exact.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.float64]
    zeros: float
    minimum: float
    maximum: float

    @property
    def total(self) -> float:
        """Number of values, zeros included."""
        return float(self.counts.sum()) + self.zeros

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of each bin, shape (n,)."""
        return 0.5 * (self.edges[:-1] + self.edges[1:])

    @property
    def mean_square(self) -> float:
        """Mean of the squared values."""
        if self.total == 0:
            return 0.0
        low, high = self.edges[:-1], self.edges[1:]
        square = (low * low + low * high + high * high) / 3.0  # of an even spread within the bin
        return float(self.counts @ square) / self.total


@dataclass(frozen=True)
class Counts:
    """A histogram in the form in which it is stored and added: occupied bfloat16 bins only.

    Attributes:
        bins: uint16 bin numbers in ascending order, shape (n,).
        counts: int64, shape (n,).
        minimum: The smallest value, exact.
        maximum: The largest value, exact.
    """

    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    minimum: float
    maximum: float

    def __add__(self, other: Counts) -> Counts:
        dense = np.zeros(BINS, dtype=np.int64)
        dense[self.bins] = self.counts
        dense[other.bins] += other.counts
        return from_dense(
            dense, min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        )

    def histogram(self) -> Histogram:
        """The counts over edges in ascending order, clipped to the exact minimum and maximum."""
        magnitude = (self.bins & (_SIGN - 1)).astype(np.uint32)
        negative = self.bins >= _SIGN
        inner = (magnitude << 16).view(np.float32).astype(np.float64)
        outer = (
            (np.minimum(magnitude + 1, _INFINITY - 1) << 16).view(np.float32).astype(np.float64)
        )
        largest = max(abs(self.minimum), abs(self.maximum))
        kept = inner > largest * 2.0**-_NEGLIGIBLE_OCTAVES
        low = np.where(negative, -outer, inner)[kept]
        high = np.where(negative, -inner, outer)[kept]
        order = np.argsort(low, kind="stable")
        low, high, counts = low[order], high[order], self.counts[kept][order].astype(np.float64)
        # Bins without values leave gaps; a bin of count 0 in each gap makes the edges one array.
        gaps = np.flatnonzero(low[1:] > high[:-1])
        edges = np.concatenate([low, high[-1:], high[gaps]])
        filled = np.concatenate([counts, np.zeros(gaps.size)])
        starts = np.concatenate([low, high[gaps]])
        order = np.argsort(starts, kind="stable")
        edges = np.append(starts[order], high[-1:])
        return Histogram(
            edges=np.clip(edges, self.minimum, self.maximum),
            counts=filled[order],
            zeros=float(self.counts[~kept].sum()),
            minimum=self.minimum,
            maximum=self.maximum,
        )


def from_dense(dense: NDArray[np.int64], minimum: float, maximum: float) -> Counts:
    """Drops the empty bins of an array of `BINS` counts."""
    bins = np.flatnonzero(dense)
    return Counts(bins.astype(np.uint16), dense[bins], minimum, maximum)


def count_into(dense: NDArray[np.int64], values: NDArray[np.float32], *, weight: int = 1) -> None:
    """Adds `values` to `dense` in place.

    Args:
        dense: Counts of all bins, shape (BINS,).
        values: C-contiguous, of any shape.
        weight: How many values each of them stands for.
    """
    bins = _bins(values)
    for start in range(0, bins.size, _PIECE):
        counts = np.bincount(bins[start : start + _PIECE], minlength=BINS)
        dense += counts if weight == 1 else weight * counts


@dataclass(frozen=True)
class Tail:
    """The values of an activation that lie furthest from zero on one side, all of them.

    Attributes:
        values: float32, C-contiguous, of any shape; may hold other values too.
        bound: Every value of the activation beyond it is among `values`.
        weight: How many values each of them stands for.
    """

    values: NDArray[np.float32]
    bound: float
    weight: int = 1


class Accumulator:
    """Counts the values of one activation, in constant memory.

    Args:
        counts: Where to go on from.
    """

    def __init__(self, counts: Counts | None = None) -> None:
        self._dense = np.zeros(BINS, dtype=np.int64)
        self._pending: dict[int, list[NDArray[np.float32]]] = {}
        self._minimum, self._maximum = float("inf"), -float("inf")
        if counts is not None:
            self._dense[counts.bins] = counts.counts
            self._minimum, self._maximum = counts.minimum, counts.maximum

    def extend(self, minimum: float, maximum: float) -> None:
        """Widens the exact extremes; what is not a number stays."""
        self._minimum = float(np.minimum(self._minimum, minimum))
        self._maximum = float(np.maximum(self._maximum, maximum))

    def add(
        self,
        values: NDArray[np.float32],
        *,
        weight: int = 1,
        upper: Tail | None = None,
        lower: Tail | None = None,
    ) -> None:
        """Counts values, or a sample of them together with the tails.

        Args:
            values: C-contiguous, of any shape.
            weight: How many values each of them stands for.
            upper: The largest values; what the sample holds of them is not counted again.
            lower: The smallest values, likewise.
        """
        values = values.reshape(-1)
        for tail, sign in ((upper, 0), (lower, _SIGN)):
            if tail is not None:
                magnitude = max(-tail.bound if sign else tail.bound, 0.0)
                bound = int(_bins(np.array([magnitude], dtype=np.float32))[0]) | sign
                values = values[~_beyond(values, bound)]
                furthest = tail.values.reshape(-1)
                self._append(furthest[_beyond(furthest, bound)], tail.weight)
        self._append(values, weight)

    def counts(self) -> Counts:
        """Everything counted so far; empty bins are left out."""
        for weight in self._pending:
            self._count(weight)
        return from_dense(self._dense, self._minimum, self._maximum)

    @property
    def finite(self) -> bool:
        """Whether no infinity and nothing that is not a number was met so far."""
        return bool(
            np.isfinite(self._minimum)
            and np.isfinite(self._maximum)
            and not self._dense[_INFINITY:_SIGN].any()
            and not self._dense[_SIGN + _INFINITY :].any()
        )

    def _append(self, values: NDArray[np.float32], weight: int) -> None:
        pending = self._pending.setdefault(weight, [])
        pending.append(values)
        if sum(part.size for part in pending) >= _PENDING:
            self._count(weight)

    def _count(self, weight: int) -> None:
        pending = self._pending[weight]
        if pending:
            count_into(self._dense, np.concatenate(pending), weight=weight)
            pending.clear()


def _bins(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bin number of each value; a view."""
    halves = values.reshape(-1).view(np.uint16).reshape(-1, 2)
    return halves[:, 1 if np.little_endian else 0]


def _beyond(values: NDArray[np.float32], bound: int) -> NDArray[np.bool_]:
    """Which finite values fall into a bin beyond `bound`, on the same side of zero."""
    # Unsigned differences wrap around, so that one comparison tests both ends.
    count = max((bound & _SIGN) + _INFINITY - (bound + 1), 0)
    result: NDArray[np.bool_] = _bins(values) - np.uint16(bound + 1) < np.uint16(count)
    return result
