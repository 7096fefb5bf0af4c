"""Puts the recorded tables into the OptunaHub benchmark package `benchmarks/quantune_tables`.

    python -m benchmarks.build_package [--registry FOLDER]

Writes the two CSV files of the package, which are small: no bits and margins of single inputs.
Run it whenever a table was recorded anew. With `--registry`, a clone of optuna/optunahub-registry,
the package is then copied there as ``package/benchmarks/quantune_tables``, ready to be committed.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd

from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.space import SearchSpace


PACKAGE = Path(__file__).parent / "quantune_tables"
COLUMNS = (
    "top1",
    "top5",
    "agreement",
    "sqnr_db",
    "latency_ratio",
    "size_bytes",
    "predicted_sqnr_db",
    "expected_agreement",
    "prior",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, help="clone of the registry to copy it to")
    arguments = parser.parse_args()
    complete = [tables.load(name) for name in tables.complete()]
    configurations(complete).to_csv(PACKAGE / "tables.csv", index=False)
    models(complete).to_csv(PACKAGE / "models.csv", index=False)
    if arguments.registry is not None:
        print(copy(arguments.registry))


def configurations(complete: list[Table]) -> pd.DataFrame:
    """One row a model and configuration."""
    knobs = list(SearchSpace.preset("quantune"))
    frames = []
    for table in complete:
        frame = table.rows[[*knobs, *COLUMNS]].copy()
        seconds = table.rows["build_seconds"] + table.rows["evaluate_seconds"]
        frame["seconds"] = seconds.round(3)
        frame.insert(0, "model", table.name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def models(complete: list[Table]) -> pd.DataFrame:
    """One row a model."""
    names = ("inputs", "layers", "parameters", "top1", "top5")
    return pd.DataFrame(
        {
            "model": table.name,
            "family": table.family,
            **{name: table.float_model[name] for name in names},
        }
        for table in complete
    )


def copy(registry: Path) -> Path:
    """Copies the package into a registry, in place of an earlier version of it."""
    target = registry / "package" / "benchmarks" / PACKAGE.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return target


if __name__ == "__main__":
    main()
