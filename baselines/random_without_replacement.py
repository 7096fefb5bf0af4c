"""Random search without repeats: the honest floor for a sampler that never repeats itself.

That is what a shuffled grid is, so ``baselines.grid`` does it. Random search with replacement,
``baselines.random``, loses to it for no other reason than its repeats.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from baselines import grid


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """A shuffled grid over all values of the search space.

    Raises:
        ValueError: If a float parameter has no step.
    """
    return grid.create(search_space, seed=seed)
