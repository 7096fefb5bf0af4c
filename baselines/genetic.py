"""Genetic algorithm: NSGA-II with a population of 10.

Optuna's default population of 50 is drawn at random, so that below 50 trials the genetic algorithm
has not begun and its curve is that of random search. With 10 there are selection, crossover and
mutation from the eleventh trial on, in the range of 5 to 50 trials that matters here.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import NSGAIISampler


POPULATION_SIZE = 10


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """NSGA-II; it needs no search space, and handles categorical knobs by uniform crossover."""
    return NSGAIISampler(population_size=POPULATION_SIZE, seed=seed)
