"""What earlier studies are worth to QuantuneSampler on recorded tables, and what bad ones cost.

    OMP_NUM_THREADS=1 python -m benchmarks.sampler_transfer [--seeds 10] [--ways NAME ...]

Every table is searched by its exact accuracies, in these ways: cold; with the predicted noise
(features); with that and the tables of the other families as earlier studies (transfer); with
these studies alone (knobs); and with the same studies upside down, their best values the worst
(hostile), with and without features. Runs are kept in
`benchmarks/results/sampler_transfer/runs.csv`, and only missing ones are made; delete the file
after a change of the sampler or of the tables.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks import replay
from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "sampler_transfer"
BUDGETS = (1, 3, 5, 10, 15, 25)
# Name, whether there are features, and the factor on the values of the earlier studies.
WAYS = {
    "cold": (False, 0),
    "knobs": (False, 1),
    "knobs, hostile": (False, -1),
    "features": (True, 0),
    "transfer": (True, 1),
    "transfer, hostile": (True, -1),
}
SPACE = SearchSpace.preset("quantune")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "runs.csv"
    frame = pd.read_csv(file) if file.exists() else pd.DataFrame()
    done = set() if frame.empty else set(zip(frame.table, frame.way, frame.seed, strict=True))
    for seed, name, way in itertools.product(
        range(arguments.seeds), tables.complete(), arguments.ways
    ):
        if (name, way, seed) not in done:
            regret = search(tables.load(name), way, seed)
            rows = [
                {"table": name, "way": way, "seed": seed, "trials": b, "points": regret[b - 1]}
                for b in BUDGETS
            ]
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            frame.to_csv(file, index=False, float_format="%.6g")
            print(name, way, seed, *(f"{row['points']:.2f}" for row in rows), flush=True)
    write(frame)


def search(table: Table, way: str, seed: int) -> NDArray[np.float64]:
    """Regret, in points of top-1, of the best configuration after each trial."""
    has_features, factor = WAYS[way]

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        return replay.recorded_features(table.name)[table.key(dict(params))]

    sampler = QuantuneSampler(
        SPACE,
        features=features if has_features else None,
        source_studies=sources(table, factor) if factor else (),
        seed=seed,
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    values = replay.exact_values(table)
    found = []
    for _ in range(max(BUDGETS)):
        trial = study.ask(dict(SPACE))
        found.append(float(values[table.key(trial.params)]))
        study.tell(trial, found[-1])
    return np.asarray(100 * (values.max() - np.maximum.accumulate(found)))


def sources(table: Table, factor: int) -> Sequence[SourceStudy]:
    """The tables of the other families, as they are or upside down."""
    return [
        replace(source, values=tuple(factor * value for value in source.values))
        for source in map(SourceStudy.from_study, map(replay.as_study, replay.source_names(table)))
    ]


def write(frame: pd.DataFrame) -> None:
    """Mean regret by way as Markdown."""
    groups = frame.groupby(["way", "trials"])["points"]
    mean, error = groups.mean().unstack(), groups.sem().unstack()
    lines = [
        "# What earlier studies are worth",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"`python -m benchmarks.sampler_transfer {' '.join(sys.argv[1:])}`, "
        f"{frame.seed.nunique()} seeds, tables: {', '.join(sorted(frame.table.unique()))}.",
        "",
        "Mean regret of the best configuration so far in points of top-1, with its standard error",
        "over tables and seeds. The ways are explained in `benchmarks/sampler_transfer.py`.",
        "",
        "| way | " + " | ".join(f"{b} trials" for b in BUDGETS) + " |",
        "| --- |" + " ---: |" * len(BUDGETS),
    ]
    for way in [way for way in WAYS if way in mean.index]:
        cells = [f"{mean.loc[way, b]:.2f} ± {error.loc[way, b]:.2f}" for b in BUDGETS]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
