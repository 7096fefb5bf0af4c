"""From the values of trials to what the surrogate learns.

A collapsed configuration (accuracy at chance) says "not here" and no more; on the raw scale a few
of them would dominate every fit. Infinite values are legal in Optuna and cannot be fitted at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


# What larger finite numbers count as: their squares are finite, and float32 holds them.
LARGEST = 1e30
# A smaller spread is none: what is divided by it would not be finite.
_LEAST_SCALE = 1e-300
# Trials of which the first spread is taken.
_FIRST = 8
# Scales from the center beyond which all is alike: its square is finite. Only where values differ
# by next to nothing, and a prior expects others, is anything as far.
_FARTHEST = 1e100


@dataclass(frozen=True)
class TargetTransform:
    """Standardises values to be minimised, and compresses those far worse than the median.

    From one scale above the median on, the straight line goes on as a logarithm of the same slope.
    The map is strictly increasing, so the order of trials never changes.

    Attributes:
        center: The median of the finite values.
        scale: Their spread (positive), in the unit of the values.
        lowest: The least finite value; what a value of -inf counts as.
        highest: The greatest finite value; what a value of +inf counts as.
    """

    center: float
    scale: float
    lowest: float
    highest: float

    @classmethod
    def fit(
        cls, values: NDArray[np.float64], expected_scale: float | None = None
    ) -> TargetTransform:
        """Fits center and scale.

        Args:
            values: Values to be minimised, float64 of shape (n_trials,), infinities allowed.
            expected_scale: What the spread over the whole space is expected to be; it counts as
                much as three trials. The first trials of an informed search lie close together and
                would make the scale far too small.

        Returns:
            The fitted transform.
        """
        finite = values[np.isfinite(values)]
        if len(finite) == 0:
            return cls(center=0.0, scale=1.0, lowest=0.0, highest=0.0)
        center = float(np.median(finite))
        spread = _spread(finite) or float(np.std(finite))
        if expected_scale is not None:
            weight = 3.0 / (3.0 + len(finite))
            spread = float(np.sqrt(weight * expected_scale**2 + (1 - weight) * spread**2))
        scale = spread if spread > _LEAST_SCALE else 1.0
        return cls(center, scale, float(finite.min()), float(finite.max()))

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transforms values; float64 of any shape in and out."""
        standard = self._standardised(values)
        return np.where(standard > 1.0, 1.0 + np.log(np.maximum(standard, 1.0)), standard)

    def slope(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much a target changes with a value, where the values are; shapes as above."""
        return 1.0 / (self.scale * np.maximum(self._standardised(values), 1.0))

    def _standardised(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        finite = np.nan_to_num(values, nan=np.nan, posinf=self.highest, neginf=self.lowest)
        with np.errstate(over="ignore"):
            standard = (finite - self.center) / self.scale
        return np.clip(standard, -_FARTHEST, _FARTHEST)


def widest_spread(values: NDArray[np.float64]) -> float:
    """The largest spread that the first trials had, before a search gathers them in one place.

    Args:
        values: Values in the order of the trials, float64 of shape (n_trials,), infinities
            allowed.
    """
    finite = values[np.isfinite(values)]
    doublings = (len(finite) // _FIRST).bit_length()
    sizes = [len(finite), *(_FIRST << n for n in range(doublings))]
    return max(_spread(finite[:size]) for size in sizes) if len(finite) else 0.0


def _spread(values: NDArray[np.float64]) -> float:
    """The mean absolute deviation of the better half from the median.

    It sees neither collapsed trials nor, as the median absolute deviation would, zero where most
    trials share one value.
    """
    center = np.median(values)
    return float(np.mean(np.abs(values[values <= center] - center)))


def center_and_spread(
    columns: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of columns with gaps.

    Args:
        columns: float64 of shape (n_rows, n_columns), NaN where unknown.

    Returns:
        The means, 0 for a column of gaps, and the deviations, 1 for a constant column; each
        float64 of shape (n_columns,).
    """
    known = ~np.isnan(columns)
    n = np.maximum(known.sum(axis=0), 1)
    center = np.where(known, columns, 0.0).sum(axis=0) / n
    spread = np.sqrt((np.where(known, columns - center, 0.0) ** 2).sum(axis=0) / n)
    return center, np.where(spread > 0.0, spread, 1.0)
