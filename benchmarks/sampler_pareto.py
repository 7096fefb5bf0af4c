"""Two objectives: the hypervolume that QuantuneSampler, TPE and NSGA-II reach.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_pareto [--seeds 5]

Recorded tables: top-1 accuracy, to be made large, and the size of the model, to be made small.
The hypervolume is counted from the worst value of either objective and is 1 for the table's whole
Pareto front. NSGA-II has a population of 10, as with Optuna's 50 it would be random search here.
``quantune+features`` is told the accuracy that is expected of each configuration, not its size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from baselines import genetic
from baselines import tpe
from benchmarks import machine
from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.search.configurations import PRIOR_FEATURE
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "sampler_pareto"
BUDGETS = (10, 15, 25, 50)
SPACE = SearchSpace.preset("quantune")
SAMPLERS: dict[str, Callable[[Table, int], BaseSampler]] = {
    "quantune+features": lambda table, seed: QuantuneSampler(
        SPACE, features=lambda params: to_be_minimised(table.features(params)), seed=seed
    ),
    "quantune": lambda table, seed: QuantuneSampler(SPACE, seed=seed),
    "tpe": lambda table, seed: tpe.create(SPACE, seed=seed),
    "nsga2, population 10": lambda table, seed: genetic.create(SPACE, seed=seed),
    "random": lambda table, seed: optuna.samplers.RandomSampler(seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for name in tables.complete():
        table = tables.load(name)
        for sampler, create in SAMPLERS.items():
            for seed in range(arguments.seeds):
                volumes = search(table, create(table, seed))
                rows += [
                    {"table": name, "sampler": sampler, "seed": seed, "trials": b, "volume": v}
                    for b, v in zip(BUDGETS, volumes, strict=True)
                ]
        print(name, flush=True)
    write(pd.DataFrame(rows))


def to_be_minimised(features: dict[str, float]) -> dict[str, float]:
    """Recorded features with the loss of accuracy that is expected in place of the accuracy."""
    return {**features, PRIOR_FEATURE: -features[PRIOR_FEATURE]}


def search(table: Table, sampler: BaseSampler) -> list[float]:
    """The share of the hypervolume of the table that is reached after each of the budgets."""
    losses = table.rows[["top1", "size_bytes"]].to_numpy(np.float64) * (-1.0, 1.0)
    losses = (losses - losses.min(axis=0)) / np.ptp(losses, axis=0)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    rows = []
    for _ in range(max(BUDGETS)):
        trial = study.ask(dict(SPACE))
        rows.append(table.key(trial.params))
        study.tell(trial, losses[rows[-1]].tolist())
    return [hypervolume(losses[rows[:budget]]) / hypervolume(losses) for budget in BUDGETS]


def hypervolume(losses: NDArray[np.float64]) -> float:
    """Area between points, to be minimised, and (1, 1); shape (n_points, 2), each in [0, 1]."""
    area, lowest = 0.0, 1.0
    for first, second in sorted(map(tuple, losses)):
        area += (1.0 - first) * max(lowest - second, 0.0)
        lowest = min(lowest, second)
    return area


def write(frame: pd.DataFrame) -> None:
    """Mean hypervolume by sampler as CSV and Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame.to_csv(RESULTS / "runs.csv", index=False, float_format="%.6g")
    groups = frame.groupby(["sampler", "trials"])["volume"]
    mean, error = groups.mean().unstack(), groups.sem().unstack()
    lines = [
        "# Hypervolume of accuracy and size",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_pareto {' '.join(sys.argv[1:])}`, "
        f"{frame.seed.nunique()} seeds, tables: {', '.join(sorted(frame.table.unique()))}.",
        "",
        "Mean share of the hypervolume of all configurations, with its standard error.",
        "",
        "| sampler | " + " | ".join(f"{b} trials" for b in BUDGETS) + " |",
        "| --- |" + " ---: |" * len(BUDGETS),
    ]
    for name in SAMPLERS:
        cells = [f"{mean.loc[name, b]:.4f} ± {error.loc[name, b]:.4f}" for b in BUDGETS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
