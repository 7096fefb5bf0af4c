"""From the values of trials to what the surrogate learns.

A collapsed configuration (accuracy at chance) says "not here" and no more; on the raw scale a few
of them would dominate every fit. Infinite values are legal in Optuna and cannot be fitted at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        # The mean absolute deviation of the better half sees neither collapsed trials nor, as the
        # median absolute deviation would, zero where most trials share one value.
        spread = float(np.mean(np.abs(finite[finite <= center] - center))) or float(np.std(finite))
        if expected_scale is not None:
            weight = 3.0 / (3.0 + len(finite))
            spread = float(np.sqrt(weight * expected_scale**2 + (1 - weight) * spread**2))
        return cls(center, spread or 1.0, float(finite.min()), float(finite.max()))

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transforms values; float64 of any shape in and out."""
        finite = np.nan_to_num(values, nan=np.nan, posinf=self.highest, neginf=self.lowest)
        standard = (finite - self.center) / self.scale
        return np.where(standard > 1.0, 1.0 + np.log(np.maximum(standard, 1.0)), standard)
