"""What an estimate of the objective, given before any trial, says in the unit of the objective.

``features=`` may hand over the number ``prior`` for every configuration. It can be on the scale of
the objective, or only rise and fall with it (a signal-to-noise ratio for an accuracy), and it can
be wrong. A line fitted to the trials, shrunk towards "it is right", turns it into the mean
function of the surrogate; the surrogate learns the rest. Estimates of constraints are treated
alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.acquisition import log_probability_below


# Standard deviation of a constraint around its estimate before any trial, in spreads of the
# estimate over the half of the space that keeps it best.
_LIMIT_ERROR = 0.25
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


@dataclass(frozen=True)
class LimitLine:
    """The expected value of a constraint, as a line in its estimate.

    Attributes:
        line: The line.
        error: Standard deviation of the constraint around it, positive.
    """

    line: PriorLine
    error: float

    @classmethod
    def fit(
        cls,
        space_guess: NDArray[np.float64],
        trial_guess: NDArray[np.float64],
        values: NDArray[np.float64],
    ) -> LimitLine:
        """Fits the line as `PriorLine.fit` does, and says how far trials lie from it."""
        line = PriorLine.fit(space_guess, trial_guess, values)
        expected = _limit_errors(space_guess[:, None])[0]
        variance = (expected**2 + np.square(values - line(trial_guess)).sum()) / (1 + len(values))
        # The squares of tiny numbers are zero.
        return cls(line, float(np.sqrt(variance)) or float(expected))

    def log_probability(self, guess: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithm of the probability that the constraint is kept; same shape as `guess`."""
        return log_probability_below(self.line(guess), np.full(guess.shape, self.error), 0.0)


def first_look(
    values: NDArray[np.float64], limits: NDArray[np.float64], reference: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How good configurations look before any trial; less is better.

    Args:
        values: Estimates of the objective, to be minimised, in spreads over the space, float64 of
            shape (n_configs,).
        limits: Estimates of constraints, feasible when at most 0, float64 of shape
            (n_configs, n_limits).
        reference: The same for the configurations of the space, float64 of shape
            (n_space, n_limits).
    """
    kept = log_probability_below(limits, _limit_errors(reference), 0.0)
    return np.asarray(values - kept.sum(axis=1))


def _limit_errors(reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far constraints may lie from their estimates before trials tell; one for each column."""
    # The worse half may be worse by orders of magnitude.
    better = np.where(reference <= np.median(reference, axis=0), reference, np.nan)
    spread = _LIMIT_ERROR * np.nanstd(better, axis=0)
    size = np.abs(reference).max(axis=0, initial=0.0)
    return np.where(spread > 1e-9 * size, spread, np.where(size > 0.0, size, 1.0))
