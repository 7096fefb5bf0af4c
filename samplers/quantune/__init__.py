"""QuantuneSampler as a package of OptunaHub."""

from optuna_quantune.search.knapsack import knapsack_front
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sampler import SearchSpaceExhausted
from optuna_quantune.search.sources import SourceStudy


__all__ = ["QuantuneSampler", "SearchSpaceExhausted", "SourceStudy", "knapsack_front"]
