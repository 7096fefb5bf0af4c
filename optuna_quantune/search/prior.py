"""What an estimate of the objective, given before any trial, says in the unit of the objective.

``features=`` may hand over the number ``prior`` for every configuration. It can be on the scale of
the objective, or only rise and fall with it (a signal-to-noise ratio for an accuracy), and it can
be wrong. A line fitted to the trials, shrunk towards "it is right", turns it into the mean
function of the surrogate; the surrogate learns the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


# How far, in spreads of the prior over the space, the trials may lie from their prior on average
# before the prior is taken to be in another unit than the objective.
_SAME_UNIT_DISTANCE = 1.5
# Trials whose priors differ by less than this, in spreads, say little about the unit.
_RESOLUTION = 0.1


@dataclass(frozen=True)
class PriorLine:
    """``offset + slope * prior``, the expected value of a configuration.

    Attributes:
        offset: In the unit of the values.
        slope: Units of the value per unit of the prior, never negative: a prior that turns out to
            point the wrong way is not turned around but no longer believed.
        spread: Standard deviation of the line over the space, in the unit of the values.
    """

    offset: float
    slope: float
    spread: float

    @classmethod
    def fit(
        cls,
        space_prior: NDArray[np.float64],
        trial_prior: NDArray[np.float64],
        values: NDArray[np.float64],
        *,
        may_share_unit: bool = True,
    ) -> PriorLine:
        """Fits the line by least squares, shrunk towards the slope that a right prior has.

        Args:
            space_prior: The prior of the configurations of the space, float64 of shape
                (n_configs,), finite.
            trial_prior: The prior of each trial, float64 of shape (n_trials,), finite.
            values: The trials' values, finite, with the same sign convention as the prior,
                float64 of shape (n_trials,).
            may_share_unit: Whether the prior can be in the unit of the values; if not, the trials
                alone tell what it is worth.

        Returns:
            The fitted line; ``offset=0, slope=1`` without trials.
        """
        spread = float(np.std(space_prior))
        if len(values) == 0 or spread == 0.0:
            return cls(0.0 if len(values) == 0 else float(np.mean(values)), 1.0, spread)
        prior = trial_prior - trial_prior.mean()
        centered = values - values.mean()
        unit = 1.0
        distance = abs(values.mean() - trial_prior.mean())
        if not may_share_unit or distance > _SAME_UNIT_DISTANCE * spread:
            # Another unit: the trials alone can tell how much a unit of prior is worth.
            unit = float(np.std(centered) / np.hypot(np.std(prior), _RESOLUTION * spread))
            # Equal trials tell nothing: any positive slope keeps the order of the prior.
            unit = unit or 1.0 / spread
        # Ridge towards ``unit``, as if one more trial, one spread away, had confirmed it.
        slope = (prior @ centered + spread**2 * unit) / (prior @ prior + spread**2)
        slope = max(float(slope), 0.0)
        return cls(float(values.mean() - slope * trial_prior.mean()), slope, slope * spread)

    def __call__(self, prior: NDArray[np.float64]) -> NDArray[np.float64]:
        """The expected values; float64 of any shape in and out."""
        return self.offset + self.slope * prior
