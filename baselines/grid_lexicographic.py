"""Grid search in the order of its nested loops, the last knob changing fastest.

The naive reading of "grid search". Its result depends on how the knobs happen to be listed: for
the first third of its trials on the `quantune` preset, every model is calibrated on one image.
``baselines.grid`` is the shuffled one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from baselines.grid import grid_values


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """The grid in order; the seed changes nothing.

    Raises:
        ValueError: If a float parameter has no step.
    """
    return LexicographicGridSampler(search_space)


class LexicographicGridSampler(BaseSampler):
    """Takes the configuration with the number of the trial, and stops the study after the last.

    Args:
        search_space: The knobs; the first one changes most slowly.
    """

    def __init__(self, search_space: Mapping[str, BaseDistribution]) -> None:
        self._search_space = dict(search_space)
        values = [grid_values(name, knob) for name, knob in search_space.items()]
        self._grid = list(itertools.product(*values))
        self._independent_sampler = RandomSampler()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The search space that was given."""
        return self._search_space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The configuration that is due; from the first again after the last."""
        values = self._grid[trial.number % len(self._grid)]
        return dict(zip(self._search_space, values, strict=True))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Samples a parameter outside the search space at random."""
        return self._independent_sampler.sample_independent(
            study, trial, param_name, param_distribution
        )

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stops the study with the last configuration."""
        if trial.number == len(self._grid) - 1:
            with contextlib.suppress(RuntimeError):  # with ask and tell there is no loop to end
                study.stop()
