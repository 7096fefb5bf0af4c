"""QuantuneSampler in spaces that cannot be listed: continuous, mixed and conditional ones.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_endless [--seeds 10] [--samplers NAME ...]

Functions of which the least value is known. Those of the second half ask for some parameters only
if others have certain values: the kind of a model, the number of layers, the optimizer. The
search space is given (``quantune``), or not (``quantune, space not given``), as the other samplers
have it. Runs are kept in `benchmarks/results/sampler_endless/runs.csv`, and only missing ones are
made; delete the file to start anew. GPSampler needs torch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import Trial

from benchmarks import machine
from benchmarks import searches
from optuna_quantune.search.sampler import QuantuneSampler


RESULTS = Path(__file__).parent / "results" / "sampler_endless"
BUDGETS = (20, 40, 60)
Space = dict[str, BaseDistribution]
SAMPLERS: dict[str, Callable[[Space, int], BaseSampler]] = {
    "quantune": lambda space, seed: QuantuneSampler(space, seed=seed),
    "quantune, space not given": lambda space, seed: QuantuneSampler(
        seed=seed, warn_independent_sampling=False
    ),
    "gp": lambda space, seed: optuna.samplers.GPSampler(
        seed=seed, deterministic_objective=True, warn_independent_sampling=False
    ),
    "tpe": lambda space, seed: TPESampler(seed=seed),
    "tpe, multivariate, group": lambda space, seed: TPESampler(
        seed=seed, multivariate=True, group=True
    ),
    "random": lambda space, seed: RandomSampler(seed=seed),
}
_HARTMANN_A = np.array(
    [
        [10.0, 3.0, 17.0, 3.5, 1.7, 8.0],
        [0.05, 10.0, 17.0, 0.1, 8.0, 14.0],
        [3.0, 3.5, 1.7, 10.0, 17.0, 8.0],
        [17.0, 8.0, 0.05, 10.0, 0.1, 14.0],
    ]
)
_HARTMANN_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)


def branin(trial: Trial) -> float:
    x, y = trial.suggest_float("x", -5.0, 10.0), trial.suggest_float("y", 0.0, 15.0)
    valley = y - 5.1 / (4.0 * np.pi**2) * x**2 + 5.0 / np.pi * x - 6.0
    value = valley**2 + 10.0 * (1.0 - 1.0 / (8.0 * np.pi)) * np.cos(x) + 10.0
    return float(value - 0.397887)


def hartmann(trial: Trial) -> float:
    distances = np.sum(_HARTMANN_A * (_point(trial, 6, 0.0, 1.0) - _HARTMANN_P) ** 2, axis=1)
    return float(3.32237 - np.array([1.0, 1.2, 3.0, 3.2]) @ np.exp(-distances))


def ackley(trial: Trial) -> float:
    x = _point(trial, 4, -5.0, 5.0) - 1.3
    hills = np.exp(np.mean(np.cos(2.0 * np.pi * x)))
    return float(20.0 - 20.0 * np.exp(-0.2 * np.sqrt(np.mean(x**2))) - hills + np.e)


def rastrigin(trial: Trial) -> float:
    x = _point(trial, 3, -2.0, 2.5)
    return float(np.sum(x**2 - 5.0 * np.cos(2.0 * np.pi * x) + 5.0))


def mixed(trial: Trial) -> float:
    """Hyperparameters of a network: real, whole, on logarithmic scales, and a choice."""
    rate = np.log10(trial.suggest_float("rate", 1e-6, 1.0, log=True))
    optimizer = trial.suggest_categorical("optimizer", ["adam", "sgd", "rmsprop"])
    loss = 0.3 * (rate + (1.2 if optimizer == "sgd" else 2.7)) ** 2
    loss += {"adam": 0.0, "sgd": 0.15, "rmsprop": 0.1}[optimizer]
    loss += 0.02 * (trial.suggest_int("layers", 1, 10) - 4) ** 2
    loss += 0.02 * np.log2(trial.suggest_int("batch", 8, 1024, log=True) / 64) ** 2
    return float(loss + (trial.suggest_float("dropout", 0.0, 0.9) - 0.2) ** 2)


def kind_of_model(trial: Trial) -> float:
    """The best kind has the most parameters, so that others are ahead at first."""
    loss = (trial.suggest_float("share", 0.0, 1.0) - 0.3) ** 2
    kind = trial.suggest_categorical("kind", ["kernel", "forest", "network"])
    if kind == "kernel":
        penalty = np.log10(trial.suggest_float("penalty", 1e-3, 1e3, log=True))
        width = np.log10(trial.suggest_float("width", 1e-4, 10.0, log=True))
        return float(loss + 0.3 + 0.05 * (penalty - 1.0) ** 2 + 0.05 * (width + 2.0) ** 2)
    if kind == "forest":
        depth, leaf = trial.suggest_int("depth", 2, 32), trial.suggest_int("leaf", 1, 50)
        return float(loss + 0.25 + 0.002 * (depth - 12) ** 2 + 0.001 * (leaf - 4) ** 2)
    layers = trial.suggest_int("layers", 1, 3)
    rate = np.log10(trial.suggest_float("rate", 1e-5, 1e-1, log=True))
    units = [trial.suggest_int(f"units_{layer}", 8, 512, log=True) for layer in range(layers)]
    widths = sum(0.05 * np.log2(n / 96) ** 2 for n in units)
    return float(loss + 0.2 * (layers != 2) + widths + 0.05 * (rate + 3.0) ** 2)


def branches(trial: Trial) -> float:
    """Three bowls of four parameters each, of different depth."""
    branch = trial.suggest_categorical("branch", ["a", "b", "c"])
    x = np.array([trial.suggest_float(f"{branch}{i}", 0.0, 1.0) for i in range(4)])
    centre = 0.2 + 0.15 * np.arange(4)
    return {"a": 0.6, "b": 0.0, "c": 0.3}[branch] + float(np.sum((x - centre) ** 2))


def network(trial: Trial) -> float:
    """As many widths as layers, and parameters of the optimizer."""
    layers = trial.suggest_int("layers", 1, 4)
    loss = 0.05 * (layers - 3) ** 2
    for layer in range(layers):
        units = trial.suggest_int(f"units_{layer}", 8, 512, log=True)
        loss += 0.04 * np.log2(units / (32 * 2 ** (layer / 2))) ** 2 / layers
    if trial.suggest_categorical("optimizer", ["sgd", "adam"]) == "sgd":
        loss += 0.1 + 0.1 * (trial.suggest_float("momentum", 0.0, 1.0) - 0.9) ** 2
    else:
        loss += 30.0 * (trial.suggest_float("decay", 0.9, 0.999) - 0.97) ** 2
    rate = np.log10(trial.suggest_float("rate", 1e-5, 1.0, log=True))
    return float(loss + 0.05 * (rate + 3.0) ** 2)


def _point(trial: Trial, dimensions: int, low: float, high: float) -> NDArray[np.float64]:
    return np.array([trial.suggest_float(f"x{i}", low, high) for i in range(dimensions)])


def _box(dimensions: int, low: float, high: float) -> Space:
    return {f"x{i}": FloatDistribution(low, high) for i in range(dimensions)}


_UNITS = IntDistribution(8, 512, log=True)
FUNCTIONS: dict[str, tuple[Callable[[Trial], float], Space]] = {
    "branin": (branin, {"x": FloatDistribution(-5.0, 10.0), "y": FloatDistribution(0.0, 15.0)}),
    "hartmann": (hartmann, _box(6, 0.0, 1.0)),
    "ackley": (ackley, _box(4, -5.0, 5.0)),
    "rastrigin": (rastrigin, _box(3, -2.0, 2.5)),
    "mixed": (
        mixed,
        {
            "rate": FloatDistribution(1e-6, 1.0, log=True),
            "optimizer": CategoricalDistribution(["adam", "sgd", "rmsprop"]),
            "layers": IntDistribution(1, 10),
            "batch": IntDistribution(8, 1024, log=True),
            "dropout": FloatDistribution(0.0, 0.9),
        },
    ),
    "kind of model": (
        kind_of_model,
        {
            "share": FloatDistribution(0.0, 1.0),
            "kind": CategoricalDistribution(["kernel", "forest", "network"]),
            "penalty": FloatDistribution(1e-3, 1e3, log=True),
            "width": FloatDistribution(1e-4, 10.0, log=True),
            "depth": IntDistribution(2, 32),
            "leaf": IntDistribution(1, 50),
            "layers": IntDistribution(1, 3),
            "rate": FloatDistribution(1e-5, 1e-1, log=True),
            **{f"units_{layer}": _UNITS for layer in range(3)},
        },
    ),
    "branches": (
        branches,
        {
            "branch": CategoricalDistribution(["a", "b", "c"]),
            **{f"{b}{i}": FloatDistribution(0.0, 1.0) for b in "abc" for i in range(4)},
        },
    ),
    "network": (
        network,
        {
            "layers": IntDistribution(1, 4),
            "optimizer": CategoricalDistribution(["sgd", "adam"]),
            "momentum": FloatDistribution(0.0, 1.0),
            "decay": FloatDistribution(0.9, 0.999),
            "rate": FloatDistribution(1e-5, 1.0, log=True),
            **{f"units_{layer}": _UNITS for layer in range(4)},
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    frame = searches.complete(
        RESULTS / "runs.csv",
        "function",
        FUNCTIONS,
        arguments.samplers,
        lambda function, name, seed: search(function, SAMPLERS[name], seed),
        seeds=arguments.seeds,
        budgets=BUDGETS,
        float_format="%.6g",
    )
    write(frame)


def search(
    function: str, create: Callable[[Space, int], BaseSampler], seed: int
) -> NDArray[np.float64]:
    """How far the best so far is above the least value, after each trial."""
    objective, space = FUNCTIONS[function]
    study = optuna.create_study(sampler=create(space, seed))
    study.optimize(objective, n_trials=max(BUDGETS))
    return np.minimum.accumulate([trial.values[0] for trial in study.trials])


def write(frame: pd.DataFrame) -> None:
    """Median regrets by function and sampler as Markdown, and the mean of ranks."""
    last = frame[frame.trials == max(BUDGETS)]
    groups = last.groupby(["sampler", "function"])["regret"]
    median, mean = groups.median().unstack(), groups.mean().unstack()
    ranks = last.assign(rank=last.groupby(["function", "seed"])["regret"].rank())
    rank = ranks.groupby("sampler")["rank"].agg(["mean", "sem"])
    lines = [
        "# Spaces that cannot be listed",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_endless {' '.join(sys.argv[1:])}`, {frame.seed.nunique()} "
        f"seeds, {max(BUDGETS)} trials. How far the best found is above the least value of the "
        "function: the median over the seeds and, in brackets, the mean, which tells of searches "
        "that stay in a wrong branch. The rank is that of a sampler among all with the same "
        "function and seed, with its standard error.",
        "",
        "| sampler | mean rank | " + " | ".join(FUNCTIONS) + " |",
        "| --- | ---: |" + " ---: |" * len(FUNCTIONS),
    ]
    for name in (name for name in SAMPLERS if name in median.index):
        cells = [f"{median.loc[name, f]:.2g} ({mean.loc[name, f]:.2g})" for f in FUNCTIONS]
        place = f"{rank.loc[name, 'mean']:.2f} ± {rank.loc[name, 'sem']:.2f}"
        lines.append(f"| {name} | {place} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
