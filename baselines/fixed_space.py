"""What the samplers here share that are told their search space when they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial


class FixedSpaceSampler(BaseSampler):
    """Samples a given search space in ``sample_relative``, and any other parameter at random.

    Args:
        search_space: The knobs that the subclass samples together.
        seed: Seed of the other parameters.
    """

    def __init__(
        self, search_space: Mapping[str, BaseDistribution], *, seed: int | None = None
    ) -> None:
        self._search_space = dict(search_space)
        self._independent_sampler = RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Takes another seed for the other parameters."""
        self._independent_sampler.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The search space that was given."""
        return dict(self._search_space)

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


def stop(study: Study) -> None:
    """Ends the study's loop, if there is one: with ask and tell there is none."""
    with contextlib.suppress(RuntimeError):
        study.stop()
