"""What each choice in the surrogate, the acquisition and the startup design is worth.

Runs the search loop of the sampler's core (no study) on synthetic tables, one choice changed at a
time, and writes the mean normalised regret of the best configuration so far. Run from a checkout:

    OMP_NUM_THREADS=1 python -m benchmarks.ablation_surrogate --seeds 20 --trials 25
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import xgboost
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution

from benchmarks.synthetic_tables import FAMILIES
from benchmarks.synthetic_tables import Table
from optuna_quantune.search.acquisition import log_expected_improvement
from optuna_quantune.search.candidates import emptiness
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.surrogate import MIXTURES
from optuna_quantune.search.surrogate import ModelInputs
from optuna_quantune.search.surrogate import Surrogate
from optuna_quantune.search.targets import TargetTransform


BUDGETS = (5, 10, 15, 25)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """One way to search.

    Attributes:
        model: ``gp`` (the surrogate), ``xgboost`` (boosted trees alone, greedy, one proposal in
            ten at random), ``residual`` (trees fitted to what the kernel part leaves), or
            ``none`` (random without replacement).
        mixtures: Kernel weights that the surrogate may choose from.
        acquisition: ``ei``, ``lcb`` (one standard deviation), ``thompson`` or ``mean``.
        compress: Whether far tails of the targets are compressed.
        n_startup: Trials of the startup design.
        design: ``maximin`` or ``random``.
        repeats: Whether a configuration may be measured twice.
    """

    model: str = "gp"
    mixtures: NDArray[np.float64] | None = None
    acquisition: str = "ei"
    compress: bool = True
    n_startup: int = 4
    design: str = "maximin"
    repeats: bool = False


BASE = Variant()
VARIANTS = {
    "as shipped": BASE,
    "kernels: main effects only": replace(BASE, mixtures=MIXTURES[:1]),
    "kernels: main + pairwise": replace(BASE, mixtures=MIXTURES[:2]),
    "kernels: no trees": replace(BASE, mixtures=MIXTURES[MIXTURES[:, 3] == 0.0]),
    "kernels: trees only": replace(BASE, mixtures=np.array([[0.0, 0.0, 0.0, 1.0]])),
    "trees on the residual instead": replace(
        BASE, model="residual", mixtures=MIXTURES[MIXTURES[:, 3] == 0.0]
    ),
    "XGBoost alone, greedy": replace(BASE, model="xgboost"),
    "acquisition: LCB": replace(BASE, acquisition="lcb"),
    "acquisition: Thompson": replace(BASE, acquisition="thompson"),
    "acquisition: mean (greedy)": replace(BASE, acquisition="mean"),
    "targets: standardised only": replace(BASE, compress=False),
    "startup: 1": replace(BASE, n_startup=1),
    "startup: 2": replace(BASE, n_startup=2),
    "startup: 6": replace(BASE, n_startup=6),
    "startup: 10": replace(BASE, n_startup=10),
    "startup: random design": replace(BASE, design="random"),
    "repeats allowed": replace(BASE, repeats=True),
    "random, no repeats": replace(BASE, model="none"),
}


def search(table: Table, variant: Variant, n_trials: int, seed: int) -> Array:
    """Searches one table.

    Returns:
        The least regret after each trial, float64 of shape (n_trials,).
    """
    rng = np.random.RandomState(seed)
    encoding = SpaceEncoding(_search_space(table.shape))
    codes = table.codes.astype(np.float64)
    inputs = ModelInputs(
        encoding.kernel_features(codes),
        encoding.tree_features(codes),
        np.empty((len(codes), 0), dtype=np.float32),
    )
    seen: list[int] = []
    while len(seen) < n_trials:
        order = rng.permutation(len(codes))
        if variant.model == "none" or (
            len(seen) < variant.n_startup and variant.design == "random"
        ):
            scores = np.zeros(len(codes))
        elif len(seen) < variant.n_startup:
            scores = emptiness(inputs.kernel, inputs.kernel[seen])
        else:
            scores = _scores(inputs, np.array(seen), table.regret[seen], variant, encoding, rng)
        if not variant.repeats:
            scores[seen] = -np.inf
        seen.append(int(order[np.argmax(scores[order])]))
    return np.minimum.accumulate(table.regret[seen])


def _search_space(shape: Sequence[int]) -> dict[str, BaseDistribution]:
    return {f"knob{i:02d}": CategoricalDistribution(range(n)) for i, n in enumerate(shape)}


def _scores(
    inputs: ModelInputs,
    seen: NDArray[np.int64],
    values: Array,
    variant: Variant,
    encoding: SpaceEncoding,
    rng: np.random.RandomState,
) -> Array:
    if variant.compress:
        targets = TargetTransform.fit(values)(values)
    else:
        targets = (values - values.mean()) / (values.std() or 1.0)
    if variant.model == "xgboost":
        if rng.uniform() < 0.1:
            return rng.uniform(size=len(inputs))
        return -_boosted(inputs, seen, targets)
    mixtures = MIXTURES if variant.mixtures is None else variant.mixtures
    surrogate = Surrogate(inputs[seen], targets, encoding.n_params, mixtures=mixtures)
    mean, std = surrogate.predict(inputs)
    if variant.model == "residual":
        mean = mean + _boosted(inputs, seen, targets - mean[seen])
    if variant.acquisition == "ei":
        return log_expected_improvement(mean, std, float(targets.min()))
    if variant.acquisition == "lcb":
        return std - mean
    if variant.acquisition == "thompson":
        return -rng.normal(mean, std)
    return -mean


def _boosted(inputs: ModelInputs, seen: NDArray[np.int64], targets: Array) -> Array:
    data = xgboost.DMatrix(inputs.trees[seen], targets, nthread=1)
    params = {"max_depth": 2, "eta": 0.15, "nthread": 1, "tree_method": "exact", "base_score": 0.0}
    booster = xgboost.train(params, data, 60)
    return np.asarray(booster.inplace_predict(inputs.trees), dtype=np.float64)


def main() -> None:
    """Runs all variants and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="tables of each family")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--variant", action="append", help="only these (default: all)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    budgets = [b for b in BUDGETS if b <= arguments.trials]

    rows = []
    for name in arguments.variant or VARIANTS:
        started = time.process_time()
        by_family = {}
        for family, make in FAMILIES.items():
            by_family[family] = np.array(
                [
                    search(make(seed), VARIANTS[name], arguments.trials, seed)
                    for seed in range(arguments.seeds)
                ]
            )
            for budget in budgets:
                regrets = by_family[family][:, budget - 1]
                error = regrets.std(ddof=1) / np.sqrt(len(regrets))
                rows.append((name, family, budget, regrets.mean(), error))
        print(
            f"{name:32}",
            *(f"{np.mean([r[:, b - 1].mean() for r in by_family.values()]):.4f}" for b in budgets),
            f"{time.process_time() - started:.0f} s",
            flush=True,
        )
    _write(arguments.output, rows, budgets, arguments)


def _write(
    folder: Path,
    rows: list[tuple[str, str, int, float, float]],
    budgets: list[int],
    arguments: argparse.Namespace,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ablation_surrogate.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("variant", "family", "trials", "mean_regret", "standard_error"))
        writer.writerows((*row[:3], f"{row[3]:.5f}", f"{row[4]:.5f}") for row in rows)
    cells = {(variant, family, budget): mean for variant, family, budget, mean, _ in rows}
    variants = list(dict.fromkeys(row[0] for row in rows))
    heads = [f"all @{b}" for b in budgets] + [f"{f} @{budgets[-2]}" for f in FAMILIES]
    lines = [
        "# Ablation of the surrogate, the acquisition and the startup design",
        "",
        f"Mean normalised regret (0 the best configuration, 1 the worst) over {arguments.seeds} "
        f"tables of each of {len(FAMILIES)} synthetic families, one choice changed at a time. "
        "Made by",
        "",
        f"    OMP_NUM_THREADS=1 python -m benchmarks.ablation_surrogate --seeds {arguments.seeds} "
        f"--trials {arguments.trials}",
        "",
        f"with Python {platform.python_version()}, numpy {np.__version__}, xgboost "
        f"{xgboost.__version__}, optuna {optuna.__version__}. Standard errors are in "
        "`ablation_surrogate.csv`.",
        "",
        "| variant | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for variant in variants:
        overall = [np.mean([cells[variant, f, b] for f in FAMILIES]) for b in budgets]
        single = [cells[variant, f, budgets[-2]] for f in FAMILIES]
        lines.append(
            f"| {variant} | " + " | ".join(f"{x:.4f}" for x in [*overall, *single]) + " |"
        )
    (folder / "ablation_surrogate.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
