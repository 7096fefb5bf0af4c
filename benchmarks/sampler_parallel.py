"""Four workers on one study against one: what not knowing the running trials' values costs.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_parallel [--seeds 10]

Synthetic tables (`benchmarks.synthetic_tables`). Four trials are always running: whenever the
oldest ends, the next is asked for, as four equal workers would. Regret is counted after as many
finished trials as the search with one worker has. The n-th trial to finish was chosen when at most
n - 4 values were known, where one worker knows n - 1; the last line of the result says how many
trials of one worker are worth as much.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.trial import Trial

from benchmarks import machine
from benchmarks.synthetic_tables import FAMILIES
from benchmarks.synthetic_tables import Table
from optuna_quantune.search.sampler import QuantuneSampler


RESULTS = Path(__file__).parent / "results" / "sampler_parallel"
BUDGETS = (10, 15, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="tables of each family")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for family, make in FAMILIES.items():
        for seed in range(arguments.seeds):
            for n_workers in (1, 4):
                regret, n_repeated = search(make(seed), n_workers, seed)
                rows += [
                    {"family": family, "seed": seed, "workers": n_workers, "trials": 1 + n}
                    | {"regret": regret[n], "repeated": n_repeated}
                    for n in range(max(BUDGETS))
                ]
        print(family, flush=True)
    write(pd.DataFrame(rows))


def search(table: Table, n_workers: int, seed: int) -> tuple[NDArray[np.float64], int]:
    """The least regret after each finished trial, and how many trials repeated another."""
    space: dict[str, BaseDistribution] = {
        f"k{i}": CategoricalDistribution(range(n)) for i, n in enumerate(table.shape)
    }
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=seed))
    running: deque[Trial] = deque()
    found: list[float] = []
    while len(found) < max(BUDGETS):
        while len(running) < n_workers:
            running.append(study.ask(space))
        trial = running.popleft()
        index = np.ravel_multi_index(tuple(trial.params[name] for name in space), table.shape)
        found.append(float(table.regret[index]))
        study.tell(trial, found[-1])
    asked = [tuple(trial.params.values()) for trial in study.trials]
    return np.minimum.accumulate(found), len(asked) - len(set(asked))


def write(frame: pd.DataFrame) -> None:
    """Mean regret by number of workers as CSV and Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame.to_csv(RESULTS / "runs.csv", index=False, float_format="%.6g")
    groups = frame.groupby(["workers", "trials"])["regret"]
    mean, error = groups.mean().unstack(), groups.sem().unstack()
    lines = [
        "# Four workers against one",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_parallel {' '.join(sys.argv[1:])}`: "
        f"{frame.family.nunique()} families of tables, {frame.seed.nunique()} tables each. "
        f"Configurations asked for twice: {frame[frame.trials == 1].repeated.sum()}.",
        "",
        "Mean normalised regret after as many finished trials, with its standard error.",
        "",
        "| workers | " + " | ".join(f"{b} trials" for b in BUDGETS) + " |",
        "| ---: |" + " ---: |" * len(BUDGETS),
    ]
    for n_workers in mean.index:
        cells = [f"{mean.loc[n_workers, b]:.4f} ± {error.loc[n_workers, b]:.4f}" for b in BUDGETS]
        lines.append(f"| {n_workers} | " + " | ".join(cells) + " |")
    paired = frame.pivot(index=["family", "seed"], columns=["trials", "workers"], values="regret")
    more = {b: paired[b][4] - paired[b][1] for b in BUDGETS}
    cells = [f"{more[b].mean():+.4f} ± {more[b].sem():.4f}" for b in BUDGETS]
    lines.append("| difference, paired | " + " | ".join(cells) + " |")
    cells = [f"{mean.loc[4, b] / mean.loc[1, b]:.2f}" for b in BUDGETS]
    lines.append("| ratio | " + " | ".join(cells) + " |")
    cells = [f"{_equal_trials(mean.loc[1], mean.loc[4, b]):.1f}" for b in BUDGETS]
    lines.append("| as much as one worker after | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def _equal_trials(curve: pd.Series[float], regret: float) -> float:
    """After how many trials a falling curve of regret by trials has come to a regret."""
    return float(np.interp(-regret, -curve.to_numpy(), curve.index.to_numpy()))


if __name__ == "__main__":
    main()
