"""Tree-structured Parzen estimator with the defaults of Optuna 5.

Those are multivariate, so that it can learn that knobs act together, and with the constant liar;
the univariate one of Optuna 4 is behind it on tables of categorical knobs and repeats itself more
often. It needs no change for categorical knobs.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import TPESampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """TPE; it needs no search space."""
    return TPESampler(seed=seed)
