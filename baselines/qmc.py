"""Quasi-random search: a scrambled Sobol' sequence.

Optuna's QMCSampler maps categorical knobs into the unit cube and so spreads its trials over the
space, which plain random search does not. It needs no change for them. Scrambled, because an
unscrambled sequence is the same for every seed.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import QMCSampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """QMCSampler; it needs no search space, and draws its first trial at random."""
    return QMCSampler(
        scramble=True, seed=seed, warn_asynchronous_seeding=False, warn_independent_sampling=False
    )
