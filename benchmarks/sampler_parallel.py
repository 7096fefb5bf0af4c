"""Four workers on one study against one: what not knowing the running trials' values costs.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_parallel [--seeds 10]

Synthetic tables (`benchmarks.synthetic_tables`), where the sampler knows nothing beforehand, and
the recorded ones on random halves of their inputs, where it knows what is predicted, without and
with what was recorded of models of other families, which `tune` knows, too. Four trials are
always running: whenever the oldest ends, the next is asked for, as four equal workers would.
Regret is counted after as many finished trials as the search with one worker has. The n-th trial
to finish was chosen when at most n - 4 values were known, where one worker knows n - 1: beside the
ratio of the regrets stands the one that is lost by that alone, of one worker three trials earlier,
and how many trials of one worker are worth as much. Normalised regrets count most on the tables
whose configurations are much alike, as nothing collapses there; in points of accuracy all count by
what is lost. Runs are kept, and only missing ones are made;
delete `runs.csv` after a change of the sampler or of the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial

from benchmarks import machine
from benchmarks import synthetic_tables
from benchmarks import tables
from benchmarks.replay import halves
from benchmarks.replay import make
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "sampler_parallel"
BUDGETS = (10, 15, 25)
COLD = "synthetic, cold"


@dataclass(frozen=True)
class Problem:
    """A table to search.

    Attributes:
        space: Its knobs.
        sampler: The sampler.
        value: What a configuration is worth, to be maximized.
        best: The value of the best one.
        worst: The value of the worst one.
    """

    space: Mapping[str, BaseDistribution]
    sampler: BaseSampler
    value: Callable[[Mapping[str, Any]], float]
    best: float
    worst: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, default=10, help="tables of a family, runs of a table"
    )
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = RESULTS / "runs.csv"
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame = pd.read_csv(file) if file.exists() else pd.DataFrame()
    done = set() if frame.empty else set(zip(frame.tables, frame.name, frame.seed, strict=True))
    kinds: dict[str, tuple[Callable[[str, int], Problem], list[str]]] = {
        COLD: (synthetic, list(synthetic_tables.FAMILIES))
    }
    for sampler in ("quantune+features", "quantune+transfer"):
        kinds[f"recorded, {sampler}"] = (partial(recorded, sampler), tables.complete())
    for kind, (make_problem, names) in kinds.items():
        for name in names:
            seeds = [n for n in range(arguments.seeds) if (kind, name, n) not in done]
            rows = [
                {"tables": kind, "name": name, "seed": seed, **row}
                for seed in seeds
                for row in one_and_four_workers(partial(make_problem, name, seed))
            ]
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            frame.to_csv(file, index=False)
            print(f"{kind}: {name}", flush=True)
    write(frame)


def one_and_four_workers(make_problem: Callable[[], Problem]) -> Iterator[dict[str, Any]]:
    """Both searches; ``regret`` has the least regret after each trial, with blanks between."""
    for n_workers in (1, 4):
        regret, n_repeated = search(make_problem(), n_workers)
        curve = " ".join(f"{value:.5g}" for value in regret)
        yield {"workers": n_workers, "repeated": n_repeated, "regret": curve}


def synthetic(family: str, seed: int) -> Problem:
    """A made-up table, of which the sampler knows nothing."""
    table = synthetic_tables.FAMILIES[family](seed)
    space = {f"k{i}": CategoricalDistribution(range(n)) for i, n in enumerate(table.shape)}

    def value(params: Mapping[str, Any]) -> float:
        index = np.ravel_multi_index(tuple(params[name] for name in space), table.shape)
        return -float(table.regret[index])

    sampler = QuantuneSampler(space, seed=seed)
    return Problem(space, sampler, value, 0.0, -1.0)


def recorded(sampler: str, name: str, seed: int) -> Problem:
    """A recorded table on a random half of its inputs, with the predicted noise as features.

    On all inputs every seed would search one and the same table in nearly the same way.
    """
    table = tables.load(name)
    values, _ = halves(table, seed)
    space = SearchSpace.preset("quantune")

    def value(params: Mapping[str, Any]) -> float:
        return float(values[table.key(dict(params))])

    best, worst = float(values.max()), float(values.min())
    return Problem(space, make(sampler, space, table, seed), value, best, worst)


def search(problem: Problem, n_workers: int) -> tuple[NDArray[np.float64], int]:
    """The least regret after each finished trial, and how many trials repeated another."""
    study = optuna.create_study(direction="maximize", sampler=problem.sampler)
    running: deque[Trial] = deque()
    found: list[float] = []
    while len(found) < max(BUDGETS):
        while len(running) < n_workers:
            running.append(study.ask(dict(problem.space)))
        trial = running.popleft()
        found.append(problem.value(trial.params))
        study.tell(trial, found[-1])
    asked = [tuple(trial.params.values()) for trial in study.trials]
    best_so_far = np.maximum.accumulate(found)
    regret = (problem.best - best_so_far) / (problem.best - problem.worst)
    return regret, len(asked) - len(set(asked))


def write(frame: pd.DataFrame) -> None:
    """Mean regret by number of workers as Markdown."""
    lines = [
        "# Four workers against one",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_parallel {' '.join(sys.argv[1:])}`. "
        f"Configurations asked for twice: {frame.repeated.sum()}.",
        "Mean normalised regret after as many finished trials, with its standard error.",
        "",
    ]
    frame = frame.assign(regret=frame.regret.str.split()).explode("regret")
    frame["regret"] = frame.regret.astype(float)
    frame["trials"] = 1 + frame.groupby(["tables", "name", "seed", "workers"]).cumcount()
    spans = {
        (name, seed): 100.0 * float(np.ptp(halves(tables.load(name), seed)[0]))
        for name, seed in frame.loc[frame.tables != COLD, ["name", "seed"]]
        .drop_duplicates()
        .itertuples(index=False)
    }
    keys = zip(frame.name, frame.seed, strict=True)
    frame["points"] = frame.regret * [spans.get(key, np.nan) for key in keys]
    for kind, group in frame.groupby("tables", sort=False):
        lines += section(str(kind), group)
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def section(kind: str, frame: pd.DataFrame) -> list[str]:
    """One and four workers on tables of one kind."""
    groups = frame.groupby(["workers", "trials"])["regret"]
    mean, error = groups.mean().unstack(), groups.sem().unstack()
    lines = [
        f"## Tables: {kind}",
        "",
        f"{frame['name'].nunique()} of them, {frame.seed.nunique()} seeds each.",
        "",
        "| workers | " + " | ".join(f"{b} trials" for b in BUDGETS) + " |",
        "| ---: |" + " ---: |" * len(BUDGETS),
    ]
    for n_workers in mean.index:
        cells = [f"{mean.loc[n_workers, b]:.4f} ± {error.loc[n_workers, b]:.4f}" for b in BUDGETS]
        lines.append(f"| {n_workers} | " + " | ".join(cells) + " |")
    paired = frame.pivot(index=["name", "seed"], columns=["trials", "workers"], values="regret")
    more = {b: paired[b][4] - paired[b][1] for b in BUDGETS}
    cells = [f"{more[b].mean():+.4f} ± {more[b].sem():.4f}" for b in BUDGETS]
    lines.append("| difference, paired | " + " | ".join(cells) + " |")
    lines += _ratios(mean)
    if frame.points.notna().all():
        points = frame.groupby(["workers", "trials"])["points"].mean().unstack()
        for n_workers in points.index:
            cells = [f"{points.loc[n_workers, b]:.3f}" for b in BUDGETS]
            lines.append(f"| {n_workers}, in points of accuracy | " + " | ".join(cells) + " |")
        lines += _ratios(points)
    cells = [f"{_equal_trials(mean.loc[1], mean.loc[4, b]):.1f}" for b in BUDGETS]
    lines.append("| as much as one worker after | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ratios(mean: pd.DataFrame) -> list[str]:
    """Of four workers' mean to one's, and of one's three trials earlier; by workers and trials."""
    others = {
        "ratio": [mean.loc[4, b] for b in BUDGETS],
        "of one worker three trials earlier": [mean.loc[1, b - 3] for b in BUDGETS],
    }
    lines = []
    for name, regrets in others.items():
        pairs = zip(regrets, (mean.loc[1, b] for b in BUDGETS), strict=True)
        cells = [f"{regret / one:.2f}" if one > 0.0 else "-" for regret, one in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _equal_trials(curve: pd.Series[float], regret: float) -> float:
    """After how many trials a falling curve of regret by trials has come to a regret."""
    return float(np.interp(-regret, -curve.to_numpy(), curve.index.to_numpy()))


if __name__ == "__main__":
    main()
