"""What calibration keeps of an activation: exact extremes, and a histogram that never grows.

The histogram's bins are floating-point numbers with 9 bits of mantissa: a value falls into the bin
of the upper 18 bits of its float32 representation. That makes binning a shift, covers the whole
range of float32 on both sides of zero, gives every bin a width of 0.1 to 0.2 % of its value (half
a step of an 8-bit scale or less), and lets histograms of different inputs be added without ever
being rebinned. Within a bin values are taken as evenly spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray


# Bits of float32 below a bin's number.
_SHIFT: Final = 14
BINS: Final = 1 << (32 - _SHIFT)
_SIGN: Final = BINS >> 1
_INFINITY: Final = 0x7F800000 >> _SHIFT
# Values this far (2^-20) below the largest magnitude are counted as zero: an 8-bit step is 2^-8 of
# the range, a 16-bit step 2^-16. So there are that many bins on either side of zero.
_WIDTH: Final = 20 * (1 << (23 - _SHIFT))
# Values that are counted at a time (their places stay in the processor's cache), and that are
# collected before they are counted: adding up all bins costs as much as counting so many.
_PIECE: Final = 1 << 17
_PENDING: Final = 1 << 16


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, with the exact zeros (and what is next to nothing) apart.

    Sums over bins are no matrix products: for vectors of this length BLAS wakes its threads, which
    then spin, and that takes longer.

    Attributes:
        edges: Lower edges and the last upper edge in ascending order, float64, shape (n + 1,).
        counts: Number of values in each bin, float64, shape (n,).
        zeros: Number of values that are 0 or negligible beside the largest magnitude (2^-20).
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
        return float(np.sum(self.counts * square)) / self.total

    def cut_off(self, low: float, high: float) -> tuple[float, float]:
        """Sums of the squared distances to a range, of all values below and of all above it."""
        x = self.centers
        first, last = np.searchsorted(x, low), np.searchsorted(x, high, side="right")
        below = self.counts[:first] * np.square(x[:first] - low)
        above = self.counts[last:] * np.square(x[last:] - high)
        return float(below.sum()), float(above.sum())


@dataclass(frozen=True)
class Counts:
    """A histogram in the form in which it is stored and added: occupied bins only.

    Attributes:
        bins: uint32 bin numbers in ascending order, shape (n,).
        counts: int64, shape (n,).
        minimum: The smallest value, exact.
        maximum: The largest value, exact.
    """

    bins: NDArray[np.uint32]
    counts: NDArray[np.int64]
    minimum: float
    maximum: float

    def __add__(self, other: Counts) -> Counts:
        both = Accumulator(self)
        both.add_counts(other)
        return both.counts()

    def histogram(self) -> Histogram:
        """The counts over edges in ascending order, clipped to the exact minimum and maximum."""
        magnitude = self.bins & np.uint32(_SIGN - 1)
        negative = self.bins >= _SIGN
        inner = _edges(magnitude)
        outer = _edges(np.minimum(magnitude + np.uint32(1), np.uint32(_INFINITY - 1)))
        kept = magnitude > 0
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


def _edges(magnitude: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The magnitude at which each bin begins."""
    return (magnitude << _SHIFT).view(np.float32).astype(np.float64)


class Accumulator:
    """Counts the values of one activation, in constant memory.

    The counts do not depend on the parts in which values are added.

    Args:
        counts: Where to go on from.
    """

    def __init__(self, counts: Counts | None = None) -> None:
        # The bins above `_zero`, the last bin that counts as zero, first of positive values.
        self._zero = 0
        self._bins = np.zeros((2, _WIDTH), dtype=np.int64)
        self._zeros = 0
        # By weight, with their number.
        self._pending: dict[int, tuple[list[NDArray[np.float32]], int]] = {}
        self._minimum, self._maximum = float("inf"), -float("inf")
        if counts is not None:
            self.add_counts(counts)

    def add(self, values: NDArray[np.float32], *, weight: int = 1) -> None:
        """Counts values.

        Args:
            values: C-contiguous, of any shape.
            weight: How many values each of them stands for.
        """
        if values.size == 0:
            return
        parts, size = self._pending.get(weight, ([], 0))
        parts.append(values.reshape(-1))
        self._pending[weight] = parts, size + values.size
        if size + values.size >= _PENDING:
            self._count(weight)

    def add_counts(self, counts: Counts) -> None:
        """Adds what was counted elsewhere."""
        self._extend(counts.minimum, counts.maximum)
        magnitude = (counts.bins & (_SIGN - 1)).astype(np.int64)
        zero = magnitude <= self._zero
        self._zeros += int(counts.counts[zero].sum())
        side = (counts.bins >= _SIGN).astype(np.int64)
        # Bins are not repeated, so that this adds to each once.
        self._bins[side[~zero], magnitude[~zero] - self._zero - 1] += counts.counts[~zero]

    def counts(self) -> Counts:
        """Everything counted so far; empty bins are left out."""
        for weight in list(self._pending):
            self._count(weight)
        positive, negative = (np.flatnonzero(side) for side in self._bins)
        zero = np.flatnonzero([self._zeros])
        first = self._zero + 1
        return Counts(
            np.concatenate([zero, first + positive, _SIGN + first + negative]).astype(np.uint32),
            np.concatenate([self._zeros + zero, self._bins[0, positive], self._bins[1, negative]]),
            self._minimum,
            self._maximum,
        )

    def _extend(self, minimum: float, maximum: float) -> None:
        """Widens the extremes; what is not a number stays."""
        if minimum > maximum:  # of no values
            return
        self._minimum = float(np.minimum(self._minimum, minimum))
        self._maximum = float(np.maximum(self._maximum, maximum))
        largest = np.array([max(abs(self._minimum), abs(self._maximum))], dtype=np.float32)
        zero = int(largest.view(np.uint32)[0] >> _SHIFT) - _WIDTH
        shift = min(zero - self._zero, _WIDTH)
        if shift > 0:
            self._zeros += int(self._bins[:, :shift].sum())
            self._bins[:, :-shift] = self._bins[:, shift:]
            self._bins[:, _WIDTH - shift :] = 0
            self._zero = zero

    def _count(self, weight: int) -> None:
        parts, _ = self._pending.pop(weight)
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._extend(values.min(), values.max())
        for start in range(0, values.size, _PIECE):
            bits = values[start : start + _PIECE].view(np.uint32)
            places = (bits >> _SHIFT) & (_SIGN - 1)
            np.maximum(places, self._zero, out=places)
            places -= self._zero
            if self._minimum < 0.0:
                places += (bits >> 31) * (_WIDTH + 1)
            counts = np.bincount(places, minlength=2 * (_WIDTH + 1)).reshape(2, -1)
            self._zeros += weight * int(counts[:, 0].sum())
            self._bins += weight * counts[:, 1:]
