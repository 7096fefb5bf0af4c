"""Random splits of the recorded tables: some inputs measure, the others say what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import pack


Replay = Callable[[Table, int], Iterator[dict[str, object]]]


def replay_all(replay: Replay, seeds: int, folder: Path) -> pd.DataFrame:
    """The rows of every table, which are also kept as `splits.csv`.

    Args:
        replay: Gives the rows of one table, for a number of seeds.
        seeds: The number.
        folder: Where the results stand.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    frame = pd.DataFrame(
        row for name in tables.complete() for row in replay(tables.load(name), seeds)
    )
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "splits.csv", index=False, float_format="%.5f")
    return frame


def study_of(table: Table, rows: NDArray[np.int64], inputs: NDArray[np.int64]) -> optuna.Study:
    """A study of some rows, measured on some inputs; the attribute ``row`` says which is which."""
    float_margins = table.predictions["float_margin"].to_numpy(np.float64)[inputs]
    study = optuna.create_study(direction="maximize")
    for row in rows:
        right, same = table.all_correct[row, inputs], table.all_agrees[row, inputs]
        study.add_trial(
            optuna.trial.create_trial(
                value=float(right.mean()),
                user_attrs={
                    "row": int(row),
                    "n": len(inputs),
                    "agreement": float(same.mean()),
                    "sqnr_db": float(table.rows["sqnr_db"][row]),
                    "margin_sqnr_db": sqnr_db(table.margins(row)[inputs], float_margins),
                    **_latency_of(table, row),
                    CORRECT_KEY: pack(right),
                    AGREES_KEY: pack(same),
                },
            )
        )
    return study


def mean_interval(values: pd.Series) -> Interval:
    """The mean over splits with its 95 % interval (Student's t), of no width for one split."""
    mean, half = float(values.mean()), 0.0
    if len(values) > 1:
        half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def _latency_of(table: Table, row: int) -> dict[str, float]:
    """The recorded latency ratio of a row, if it was measured."""
    ratio = float(table.rows["latency_ratio"][row])
    return {} if np.isnan(ratio) else {"latency_ratio": ratio}
