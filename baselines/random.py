"""Random search: independent uniform trials, repeats included.

The fair version is the plain one. It is the floor of every comparison; ``baselines.grid`` is the
floor without repeats.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """A random sampler; it needs no search space."""
    return RandomSampler(seed=seed)
