"""QuantuneSampler as a package of OptunaHub."""

from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sampler import SearchSpaceExhausted


__all__ = ["QuantuneSampler", "SearchSpaceExhausted"]
