"""Optuna's brute force: every configuration once, the next one drawn from a tree of what is left.

It draws knob by knob among the branches that still hold unseen configurations, weighted by their
number, so it is random search without repeats, as ``baselines.random_without_replacement`` is, and
it handles conditional knobs that a grid refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import BruteForceSampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """BruteForceSampler; it needs no search space."""
    return BruteForceSampler(seed=seed)
