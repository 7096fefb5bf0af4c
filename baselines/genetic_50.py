"""Genetic algorithm with Optuna's default population of 50: random search for 50 trials.

Below 50 trials nothing has been selected yet. It stands beside ``baselines.genetic``, which has a
population of 10, to show what the default does at the budgets that matter here.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import NSGAIISampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """NSGA-II with its default population; it needs no search space."""
    return NSGAIISampler(seed=seed)
