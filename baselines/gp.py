"""Gaussian process with Optuna's defaults: the strongest sampler in Optuna on small tables.

Its kernel compares categorical knobs by equality, one length scale each, and its acquisition
function is maximised over all their choices, so it needs no change for them. It needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import GPSampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """GPSampler; it needs no search space."""
    return GPSampler(seed=seed)
