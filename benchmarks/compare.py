"""Compares samplers on the recorded tables.

    python -m benchmarks.compare [--samplers NAME ...] [--tables NAME ...] [--seeds 20] [--quick]

A run asks a sampler for configurations and answers from the table. Values are what a search sees:
the top-1 accuracy on a random half of the inputs; regret is counted on the other half, against the
configuration that is best there on average over all inputs, so that luck does not count as skill.
Results go to `benchmarks/results/compare/`: regret curves as CSV, Markdown and PNG.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.samplers import BaseSampler

from benchmarks import machine
from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "compare"
BUDGETS = (1, 3, 5, 10, 15, 25)
SAMPLERS = ("quantune+features", "quantune", "tpe", "genetic", "cma", "grid", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--tables", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="three seeds")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = arguments.tables or tables.complete()
    loaded = {name: tables.load(name) for name in names}
    rows = []
    for name, table in loaded.items():
        for sampler in arguments.samplers:
            for seed in range(3 if arguments.quick else arguments.seeds):
                rows += replay(table, sampler, seed)
            print(f"{name} {sampler}", flush=True)
    write(pd.DataFrame(rows), names)


def replay(table: Table, name: str, seed: int) -> list[dict[str, Any]]:
    """One run: regret of the incumbent in points after each of the budgets."""
    seen, hidden = halves(table, seed)
    best = hidden.max()
    space = SearchSpace.preset("quantune")
    sampler = make(name, space, table, seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    incumbent, value = 0, -np.inf
    rows = []
    start = time.perf_counter()
    for number in range(1, max(BUDGETS) + 1):
        trial = study.ask(dict(space))
        row = table.key(trial.params)
        study.tell(trial, float(seen[row]))
        if seen[row] > value:
            incumbent, value = row, seen[row]
        if number in BUDGETS:
            rows.append(
                {
                    "table": table.name,
                    "sampler": name,
                    "seed": seed,
                    "trials": number,
                    "regret_points": 100 * (best - hidden[incumbent]),
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def halves(table: Table, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy of every configuration on a random half of the inputs, and on the other half."""
    correct = np.stack([table.correct(row) for row in range(len(table.rows))])
    order = np.random.default_rng(seed).permutation(correct.shape[1])
    middle = len(order) // 2
    return correct[:, order[:middle]].mean(axis=1), correct[:, order[middle:]].mean(axis=1)


def make(name: str, space: SearchSpace, table: Table, seed: int) -> BaseSampler:
    """A sampler by name: ours, or a module of `baselines`."""
    if name == "quantune":
        return QuantuneSampler(space, seed=seed)
    if name == "quantune+features":
        return QuantuneSampler(space, features=table.features, seed=seed)
    create: Callable[..., BaseSampler] = importlib.import_module(f"baselines.{name}").create
    return create(space, seed=seed)


def write(frame: pd.DataFrame, names: list[str]) -> None:
    """The runs as CSV, the means with intervals as Markdown and PNG."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame.to_csv(RESULTS / "runs.csv", index=False, float_format="%.4f")
    groups = frame.groupby(["sampler", "trials"], sort=False)["regret_points"]
    mean = groups.mean().unstack()
    error = groups.sem().unstack()
    order = list(frame["sampler"].unique())
    lines = [
        "# Samplers on the recorded tables",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.compare {' '.join(sys.argv[1:])}`, "
        f"{frame['seed'].nunique()} seeds, tables: "
        f"{', '.join(names)}.",
        "",
        "Mean regret in points of top-1 accuracy on the half of the inputs that the search did",
        "not see, with its standard error. It is counted from the best on that half itself, so no",
        "sampler can reach 0: what cannot be told apart on the seen half costs everyone alike.",
        "",
        "| sampler | " + " | ".join(f"{n} trials" for n in BUDGETS) + " |",
        "| --- |" + " --- |" * len(BUDGETS),
    ]
    for sampler in order:
        cells = [f"{mean.loc[sampler, n]:.2f} ± {error.loc[sampler, n]:.2f}" for n in BUDGETS]
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    lines += ["", "By table, after 3 trials:", "", "| sampler | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    third = frame[frame["trials"] == 3].groupby(["sampler", "table"])["regret_points"].mean()
    for sampler in order:
        cells = [f"{third[sampler, name]:.2f}" for name in names]
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)
    for sampler in order:
        y, spread = mean.loc[sampler], error.loc[sampler]
        axes.plot(BUDGETS, y, marker="o", label=sampler)
        axes.fill_between(BUDGETS, y - 1.96 * spread, y + 1.96 * spread, alpha=0.15)
    axes.set_yscale("log")
    axes.set_xlabel("trials")
    axes.set_ylabel("regret on unseen inputs, points of top-1")
    axes.legend()
    figure.savefig(RESULTS / "regret.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
