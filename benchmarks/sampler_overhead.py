"""What a sampler itself takes for a proposal, at 100 trials.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_overhead [--asks 20]

Studies in memory with 100 trials at random, over the 96 configurations of the `quantune` preset
(duplicates allowed, as there are more trials than configurations) and over 100,000 (five knobs of
ten values); then the median processor time, on one thread, of `Study.ask` over further trials:
other work on the machine hardly changes it. GPSampler needs torch.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler

from baselines import tpe
from benchmarks import machine
from optuna_quantune.search.sampler import QuantuneSampler


RESULTS = Path(__file__).parent / "results" / "sampler_overhead"
SHAPES = {"96": (3, 4, 2, 2, 2), "100,000": (10,) * 5}
N_TRIALS = 100
# The first proposals fill caches.
N_WARM_UP = 2
Space = dict[str, BaseDistribution]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--asks", type=int, default=20)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for size, shape in SHAPES.items():
        space: Space = {f"k{i}": CategoricalDistribution(range(n)) for i, n in enumerate(shape)}
        for name, create in samplers().items():
            seconds = ask_seconds(space, create(space), arguments.asks)
            rows.append((size, name, 1e3 * np.median(seconds), 1e3 * np.max(seconds)))
            print(*rows[-1], flush=True)
    write(pd.DataFrame(rows, columns=["configurations", "sampler", "median_ms", "max_ms"]))


def samplers() -> dict[str, Callable[[Space], BaseSampler]]:
    """Factories by name; those whose packages are missing are left out."""
    known: dict[str, Callable[[Space], BaseSampler]] = {
        "QuantuneSampler": lambda space: QuantuneSampler(space, seed=0, allow_duplicates=True),
        "TPESampler": lambda space: tpe.create(space, seed=0),
    }
    try:
        import torch
    except ImportError:
        return known
    torch.set_num_threads(1)
    return {**known, "GPSampler": lambda space: optuna.samplers.GPSampler(seed=0)}


def ask_seconds(space: Space, sampler: BaseSampler, n_asks: int) -> list[float]:
    """Processor times of proposals."""
    rng = np.random.default_rng(0)
    effects = [rng.normal(size=10) for _ in space]

    def value(params: dict[str, int]) -> float:
        main_effects = sum(e[v] for e, v in zip(effects, params.values(), strict=True))
        return float(main_effects + 0.5 * effects[0][params["k0"]] * effects[1][params["k1"]])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(sampler=sampler)
        for _ in range(N_TRIALS):
            params = {
                name: int(rng.integers(len(d.choices)))
                for name, d in space.items()
                if isinstance(d, CategoricalDistribution)
            }
            trial = optuna.create_trial(params=params, distributions=space, value=value(params))
            study.add_trial(trial)
        seconds = []
        for _ in range(N_WARM_UP + n_asks):
            start = time.process_time()
            asked = study.ask(space)
            seconds.append(time.process_time() - start)
            study.tell(asked, value(asked.params))
    return seconds[N_WARM_UP:]


def write(frame: pd.DataFrame) -> None:
    """The times as CSV and Markdown."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame.to_csv(RESULTS / "times.csv", index=False, float_format="%.2f")
    lines = [
        "# Time of a proposal at 100 trials",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_overhead {' '.join(sys.argv[1:])}`; milliseconds of",
        "processor time on one thread, in-memory storage. Samplers whose packages are missing are",
        "left out.",
        "",
        "| configurations | sampler | median | maximum |",
        "| ---: | --- | ---: | ---: |",
    ]
    lines += [
        f"| {row.configurations} | {row.sampler} | {row.median_ms:.1f} | {row.max_ms:.1f} |"
        for row in frame.itertuples()
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
