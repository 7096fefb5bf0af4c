"""Grid search in the order of its nested loops, the last knob changing fastest.

The naive reading of "grid search". Its result depends on how the knobs happen to be listed: for
the first third of its trials on the `quantune` preset, every model is calibrated on one image.
``baselines.grid`` is the shuffled one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from baselines.fixed_space import FixedSpaceSampler
from baselines.fixed_space import stop
from baselines.grid import grid_values


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """The grid in order; the seed changes nothing.

    Raises:
        ValueError: If a float parameter has no step.
    """
    return LexicographicGridSampler(search_space)


class LexicographicGridSampler(FixedSpaceSampler):
    """Takes the configuration with the number of the trial, and stops the study after the last.

    Args:
        search_space: The knobs; the first one changes most slowly.
    """

    def __init__(self, search_space: Mapping[str, BaseDistribution]) -> None:
        super().__init__(search_space)
        values = [grid_values(name, knob) for name, knob in search_space.items()]
        self._grid = list(itertools.product(*values))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The configuration that is due; from the first again after the last."""
        values = self._grid[trial.number % len(self._grid)]
        return dict(zip(self._search_space, values, strict=True))

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stops the study with the last configuration."""
        if trial.number == len(self._grid) - 1:
            stop(study)
