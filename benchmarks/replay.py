"""One sampler on one recorded table: what it asks for, and how long it takes to ask.

A run is a list of rows of the table; everything that `benchmarks.compare` reports follows from it
and the table. There are two notions of a configuration's value, and runs of both:

- ``exact``: the accuracy on all inputs is the truth, and the sampler sees it. A run ends with the
  best of all configurations, but not before `HORIZON` trials.
- ``half``: the sampler sees the accuracy on a random half of the inputs, and is judged by the
  other half, as a search is in use. A run has `HORIZON` trials.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from typing import get_args
from typing import Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from baselines import quantune_published
from baselines.quantune_published import ModelRecord
from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


Notion = Literal["exact", "half"]
NOTIONS: tuple[Notion, ...] = get_args(Notion)
HORIZON = 25
# Takes most of a second for a trial; its runs end after `HORIZON` trials in any case.
SLOW = ("smac",)
# Accuracies are shares of some thousand inputs: far apart, but sums of floats.
_SAME = 1e-9


@dataclass(frozen=True)
class Run:
    """What one sampler asked for.

    Attributes:
        table: Name of the table.
        digest: `digest` of the table.
        sampler: Name of the sampler, see `make`.
        notion: Which value it saw.
        seed: Seed of the sampler, and of the split into halves.
        rows: Rows of the table in the order of the trials.
        milliseconds: What the sampler took for each trial, storage in memory included.
    """

    table: str
    digest: str
    sampler: str
    notion: Notion
    seed: int
    rows: tuple[int, ...]
    milliseconds: tuple[float, ...]


def replay(table: Table, name: str, seed: int, notion: Notion = "exact") -> Run:
    """Runs a sampler on a table.

    Args:
        table: The recorded table; its answers are looked up.
        name: Name of the sampler, see `make`.
        seed: Seed of the sampler and of the split into halves.
        notion: Which value the sampler sees.

    Raises:
        ImportError: If the sampler needs a package that is missing.
    """
    values = exact_values(table) if notion == "exact" else halves(table, seed)[0]
    best = values.max() if notion == "exact" else np.inf
    limit = len(table.rows) if notion == "exact" and name not in SLOW else HORIZON
    space = SearchSpace.preset("quantune")
    with warnings.catch_warnings():
        # Samplers say that they are experimental, or that they take to random numbers at first.
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize", sampler=make(name, space, table, seed))
        rows: list[int] = []
        milliseconds: list[float] = []
        before = time.perf_counter()

        def objective(trial: optuna.Trial) -> float:
            space.suggest(trial)
            row = table.key(trial.params)
            rows.append(row)
            milliseconds.append(1e3 * (time.perf_counter() - before))
            return float(values[row])

        def stop_at_the_best(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            nonlocal before
            if len(rows) >= HORIZON and study.best_value >= best - _SAME:
                study.stop()
            before = time.perf_counter()

        study.optimize(objective, n_trials=limit, callbacks=[stop_at_the_best])
    return Run(
        table.name, digest(table, name), name, notion, seed, tuple(rows), tuple(milliseconds)
    )


def exact_values(table: Table) -> NDArray[np.float64]:
    """Top-1 accuracy of every configuration on all inputs, shape (configurations,)."""
    values: NDArray[np.float64] = table.rows["top1"].to_numpy(np.float64)
    return values


def halves(table: Table, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy of every configuration on a random half of the inputs, and on the other half."""
    seen, hidden = inputs_of_halves(table, seed)
    return table.all_correct[:, seen].mean(axis=1), table.all_correct[:, hidden].mean(axis=1)


def inputs_of_halves(table: Table, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the inputs in a random half, and in the other half."""
    order = np.random.default_rng(seed).permutation(table.all_correct.shape[1])
    middle = len(order) // 2
    return order[:middle], order[middle:]


def make(name: str, space: SearchSpace, table: Table, seed: int) -> BaseSampler:
    """A sampler by name.

    Args:
        name: ``quantune`` (this project's sampler), ``quantune+features`` (with the predicted
            noise), ``quantune+transfer`` (with that and the tables of the other families),
            ``quantune_published+transfer``, or a module of `baselines`.
        space: The search space.
        table: The model that will be searched; no sampler sees its measured columns.
        seed: Seed of the sampler.

    Raises:
        ImportError: If the sampler needs a package that is missing.
        ValueError: If there is no such sampler.
    """

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        return recorded_features(table.name)[table.key(dict(params))]

    if name == "quantune":
        return QuantuneSampler(space, seed=seed)
    if name == "quantune+features":
        return QuantuneSampler(space, features=features, seed=seed)
    if name == "quantune+transfer":
        sources = [as_study(source) for source in source_names(table)]
        return QuantuneSampler(space, features=features, seed=seed, source_studies=sources)
    if name == "quantune_published+transfer":
        return quantune_published.create_with_transfer(
            space,
            seed=seed,
            model=ModelRecord(architecture(table), table.float_model["top1"]),
            sources=[as_record(source) for source in source_names(table)],
        )
    if importlib.util.find_spec(f"baselines.{name}") is None:
        raise ValueError(f"sampler {name!r}: neither one of ours nor a module of baselines")
    module = importlib.import_module(f"baselines.{name}")
    if not hasattr(module, "create"):
        raise ValueError(f"sampler {name!r}: baselines.{name} makes no sampler")
    create: Callable[..., BaseSampler] = module.create
    return create(space, seed=seed)


def source_names(table: Table) -> list[str]:
    """The tables that a search on this one may learn from: all but those of its family."""
    return [name for name in tables.complete() if tables.family(name) != table.family]


@cache
def recorded_features(name: str) -> dict[int, dict[str, float]]:
    """The features of every configuration of a table, by its row."""
    return _features(tables.load(name))


@cache
def as_study(name: str) -> optuna.Study:
    """A table as the finished study of an exhaustive search, with what was predicted."""
    table = tables.load(name)
    space = SearchSpace.preset("quantune")
    study = optuna.create_study(direction="maximize", study_name=name)
    study.set_user_attr("metric", "top1")
    study.set_user_attr("float_value", table.float_model["top1"])
    values = exact_values(table)
    trials = [
        optuna.trial.create_trial(
            params=params,
            distributions=dict(space),
            value=float(values[table.key(params)]),
            user_attrs=recorded_features(name)[table.key(params)],
        )
        for params in space.grid()
    ]
    study.add_trials(trials)
    return study


@cache
def as_record(name: str) -> ModelRecord:
    """A table as a source of the published algorithm."""
    table = tables.load(name)
    grid = list(SearchSpace.preset("quantune").grid())
    values = exact_values(table)
    return ModelRecord(
        architecture=architecture(table),
        float_value=table.float_model["top1"],
        params=grid,
        values=[float(values[table.key(params)]) for params in grid],
    )


def architecture(table: Table) -> dict[str, float]:
    """What the tables know of a model's architecture."""
    shared = table.float_model
    return {
        "layers": float(shared["layers"]),
        "log10_parameters": float(np.log10(shared["parameters"])),
    }


def digest(table: Table, name: str) -> str:
    """Short hash of what a sampler's runs on a table depend on, other than the sampler's code.

    Accuracies and correct inputs for all; recorded features for samplers that see them; the other
    tables for those that learn from them.
    """
    parts: list[Any] = [exact_values(table).tolist(), table.rows["correct"].tolist()]
    if name in ("quantune+features", "quantune+transfer"):
        parts.append(_features(table))
    if name.endswith("+transfer"):
        without = name.removesuffix("+transfer")
        seen = "quantune+features" if without == "quantune" else without
        parts.append([digest(tables.load(source), seen) for source in source_names(table)])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _features(table: Table) -> dict[int, dict[str, float]]:
    """`Table.features` of all rows; one by one they take longer than a search."""
    names = list(table.features(next(iter(SearchSpace.preset("quantune").grid()))))
    rows = table.rows[names].to_numpy(np.float64).tolist()
    return {row: dict(zip(names, values, strict=True)) for row, values in enumerate(rows)}
