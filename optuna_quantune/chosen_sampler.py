"""The sampler of a search, by name: the one of this package, Optuna's, or a factory's."""

from __future__ import annotations

import inspect
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler

from optuna_quantune import records
from optuna_quantune.errors import InputError
from optuna_quantune.importing import import_function
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


def make_sampler(name: str, objective: QuantizationObjective, *, seed: int) -> BaseSampler:
    """A sampler for an objective's search space.

    Args:
        name: ``quantune``, the name of a class in `optuna.samplers`, or ``module:factory`` with
            the signature ``factory(search_space, *, seed)``. A module is looked for in the
            current folder, too.
        objective: What the sampler will be used with.
        seed: Seed of the sampler.

    Raises:
        InputError: If there is no such sampler, or it cannot be made.
    """
    space = objective.space
    if name == "quantune":
        is_accuracy = objective.goals.objectives[0] == "accuracy"
        return QuantuneSampler(
            space,
            features=objective.features,
            source_studies=records.source_studies(objective.metric) if is_accuracy else (),
            seed=seed,
        )
    if ":" in name:
        return _sampler_of_factory(name, space, seed)
    known = [
        item
        for item in optuna.samplers.__all__
        if item.endswith("Sampler") and not item.startswith(("Base", "PartialFixed"))
    ]
    if name not in known:
        raise InputError(
            f"sampler {name!r}: unknown; use 'quantune', 'module:factory' or one of "
            f"{', '.join(known)}"
        )
    constructor = getattr(optuna.samplers, name)
    accepted = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"seed": seed} if "seed" in accepted else {}
    if name == "GridSampler":
        arguments["search_space"] = _choices(space)
    sampler = constructor(**arguments)
    assert isinstance(sampler, BaseSampler)
    return sampler


def _choices(space: SearchSpace) -> dict[str, list[Any]]:
    """The grid of a space of categorical knobs."""
    return {
        name: list(distribution.choices)
        for name, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution)
    }


def _sampler_of_factory(name: str, space: SearchSpace, seed: int) -> BaseSampler:
    factory = import_function(name, "sampler")
    try:
        sampler = factory(space, seed=seed)
    except Exception as error:  # whatever a user's function raises
        raise InputError(
            f"sampler {name!r}: fails when it is called with the search space and seed={seed}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(sampler, BaseSampler):
        raise InputError(f"sampler {name!r}: gave a {type(sampler).__name__}, not a sampler")
    return sampler
