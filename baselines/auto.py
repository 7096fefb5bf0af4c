"""OptunaHub's AutoSampler: Optuna's own choice of a sampler for the search space.

With categorical knobs it chooses TPE after a random first trial, so it is ``baselines.tpe`` with
other random numbers; it stands here because Optuna recommends it to whoever does not know which
sampler to take. The committed results are of the registry's commit 257a04b. It needs optunahub,
cmaes, scipy and torch, and the network once: OptunaHub keeps what it has downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler


PACKAGE = "samplers/auto_sampler"


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """AutoSampler; it needs no search space.

    Raises:
        ImportError: If optunahub or what AutoSampler needs is missing, or it cannot be downloaded.
    """
    try:
        import optunahub

        module = optunahub.load_module(PACKAGE)
    except Exception as error:
        # Without network OptunaHub fails in as many ways as git and the HTTP client do.
        raise ImportError(
            f"{PACKAGE} of OptunaHub cannot be loaded ({error}); "
            "pip install optunahub cmaes scipy torch, and run it once with network"
        ) from error
    sampler: BaseSampler = module.AutoSampler(seed=seed)
    return sampler
