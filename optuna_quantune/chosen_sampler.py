"""The sampler of a search, by name: the one of this package, Optuna's, or a factory's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any
from typing import Final
from typing import TypeAlias

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler

from optuna_quantune import records
from optuna_quantune.errors import InputError
from optuna_quantune.importing import import_function
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.space import SearchSpace


# In place of an earlier study: those of the reference models, which the package ships.
RECORDS: Final = "records"
# What `source_studies` may hold.
Source: TypeAlias = optuna.Study | SourceStudy | str


def make_sampler(
    sampler: BaseSampler | str,
    objective: QuantizationObjective,
    *,
    seed: int,
    source_studies: Sequence[Source] = (RECORDS,),
) -> BaseSampler:
    """A sampler for an objective's search space.

    Args:
        sampler: ``quantune``, the name of a class in `optuna.samplers`, or ``module:factory`` with
            the signature ``factory(search_space, *, seed)``. A module is looked for in the
            current folder, too. A sampler is taken as it is.
        objective: What the sampler will be used with.
        seed: Seed of the sampler.
        source_studies: Earlier studies that ``quantune`` learns from; ``records`` stands for those
            of the reference models that the package ships, which say something where the first
            objective is a metric that they have.

    Raises:
        InputError: If there is no such sampler, it cannot be made, or it learns from no studies
            and there are more than the records.
    """
    space = objective.space
    if sampler == "quantune":
        return QuantuneSampler(
            space,
            features=objective.features,
            source_studies=_studies(source_studies, objective),
            seed=seed,
            progress=lambda done, total: objective.progress("predictions", done, total),
        )
    if any(source != RECORDS for source in source_studies):
        name = sampler if isinstance(sampler, str) else type(sampler).__name__
        raise InputError(f"source_studies: the sampler 'quantune' learns from them, not {name!r}")
    if isinstance(sampler, BaseSampler):
        return sampler
    if ":" in sampler:
        return _sampler_of_factory(sampler, space, seed)
    if sampler == "CmaEsSampler" and len(objective.goals.objectives) > 1:
        raise InputError(f"sampler {sampler!r}: takes a single objective; use another sampler")
    return _sampler_of_optuna(sampler, space, seed)


# Packages that samplers of Optuna import only after their first trials, in the midst of a search.
_NEEDS: Final = {"GPSampler": "torch", "CmaEsSampler": "cmaes"}


def _sampler_of_optuna(name: str, space: SearchSpace, seed: int) -> BaseSampler:
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
    package = _NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        raise InputError(f"sampler {name!r}: needs the package {package!r}; pip install {package}")
    constructor = getattr(optuna.samplers, name)
    accepted = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"seed": seed} if "seed" in accepted else {}
    if name == "GridSampler":
        arguments["search_space"] = _choices(space)
    sampler = constructor(**arguments)
    assert isinstance(sampler, BaseSampler)
    return sampler


def _studies(
    sources: Sequence[Source], objective: QuantizationObjective
) -> list[optuna.Study | SourceStudy]:
    found: list[optuna.Study | SourceStudy] = []
    for source in sources:
        if not isinstance(source, str):
            found.append(source)
        elif source != RECORDS:
            raise InputError(f"source_studies: {source!r} is neither a study nor {RECORDS!r}")
        elif objective.goals.objectives[0] == "accuracy":
            found.extend(records.source_studies(objective.metric))
    return found


def _choices(space: SearchSpace) -> dict[str, list[Any]]:
    """The grid of a space whose knobs have steps.

    Raises:
        InputError: If a knob has none.
    """
    grid: dict[str, list[Any]] = {}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            grid[name] = list(distribution.choices)
        elif isinstance(distribution, (IntDistribution, FloatDistribution)) and distribution.step:
            n = round((distribution.high - distribution.low) / distribution.step)
            grid[name] = [distribution.low + i * distribution.step for i in range(n + 1)]
        else:
            raise InputError(f"sampler 'GridSampler': knob {name!r} has no steps; give it some")
    return grid


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
