"""What should decide between configurations that paired tests cannot tell apart.

    python -m benchmarks.choice [--seeds N]

Replayed from the recorded tables, as of a search that prefers accuracy. For each seed 20 of the
48 configurations with the least predicted noise are drawn, and the inputs of a table are split at
random: one half measures them, the other half is what the choice is worth. Of the configurations
that paired tests on the first half cannot tell from the best one, in accuracy and in agreement
with the float model, the choice falls on

- `value`: the one with the best accuracy, the one that agrees more if there are several;
- `agreement`: the one that agrees most often with the float model;
- `output noise`: the one with the least noise in the outputs;
- `margin noise`: the one with the least noise in the margins by which classes win, which is what
  `optuna_quantune.selection` does.

Results go to `benchmarks/results/choice/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial

from benchmarks import machine
from benchmarks import tables
from benchmarks.splits import mean_interval
from benchmarks.splits import replay_all
from benchmarks.splits import study_of
from optuna_quantune.selection import little_noise
from optuna_quantune.selection import not_worse_than_best
from optuna_quantune.selection import select
from optuna_quantune.selection import sqnr_db


RESULTS = Path(__file__).parent / "results" / "choice"
PROMISING, TRIALS = 48, 20
EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])


def agreement(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["agreement"])


WAYS: dict[str, Callable[[FrozenTrial], tuple[float, ...]]] = {
    "value": lambda trial: (trial.values[0], agreement(trial), sqnr_db(trial)),
    "agreement": lambda trial: (agreement(trial), sqnr_db(trial)),
    "output noise": lambda trial: (sqnr_db(trial),),
    "margin noise": little_noise,
}
COLUMNS = ["difference to float", "agreement"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    seeds = parser.parse_args().seeds
    frame = replay_all(replay, seeds, RESULTS)
    write(frame, seeds)


def replay(table: tables.Table, seeds: int) -> Iterator[dict[str, object]]:
    """One row for each seed and way to choose, in points on the inputs that did not choose."""
    n = int(table.float_model["inputs"])
    promising = np.argsort(-table.rows["predicted_sqnr_db"].to_numpy(), kind="stable")[:PROMISING]
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        measured, unseen = np.split(rng.permutation(n), [n // 2])
        rows = np.sort(rng.permutation(promising)[:TRIALS])
        study = study_of(table, rows, measured)
        rivals = not_worse_than_best(study.get_trials(deepcopy=False), "maximize")
        for way, key in WAYS.items():
            chosen = max(rivals, key=lambda trial: (*key(trial), -trial.number))  # noqa: B023
            if way == "margin noise":
                assert chosen.number == select(study, prefer="accuracy")[0].number
            row = int(chosen.user_attrs["row"])
            gain = table.all_correct[row].astype(float) - table.float_correct
            yield {
                "model": table.name,
                "seed": seed,
                "way": way,
                "row": row,
                "difference to float": 100 * gain[unseen].mean(),
                "agreement": 100 * table.all_agrees[row, unseen].mean(),
            }


def write(frame: pd.DataFrame, seeds: int) -> None:
    command = "python -m benchmarks.choice" + ("" if seeds == 100 else f" --seeds {seeds}")
    lines = [
        "# What decides between configurations that cannot be told apart",
        "",
        f"`{command}`; {machine.as_markdown(machine.describe())}.",
        "",
        *EXPLANATION.splitlines(),
        "",
        f"Means over {seeds} random splits of each table, in points: top-1 against float, and",
        "agreement with it. The last rows are the means over the models, and how much more that",
        "is than by `value`, with the 95 % interval over splits (Student's t): it says how sure",
        "the mean over splits of these recorded inputs is, not how other models would turn out.",
        "",
        "| model | " + " | ".join(WAYS) + " |",
        "| --- |" + " --- |" * len(WAYS),
    ]
    of_model = frame.groupby(["model", "way"], sort=False)[COLUMNS].mean()
    for model in dict.fromkeys(frame["model"]):
        cells = ["{:+.2f}, {:.2f}".format(*of_model.loc[(model, way)]) for way in WAYS]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    every = of_model.groupby("way").mean()
    cells = ["{:+.2f}, {:.2f}".format(*every.loc[way]) for way in WAYS]
    lines.append("| mean of all | " + " | ".join(cells) + " |")
    of_seed = frame.groupby(["seed", "way"])[COLUMNS].mean().unstack("way")
    for column in COLUMNS:
        cells = []
        for way in WAYS:
            more = mean_interval(of_seed[column][way] - of_seed[column]["value"])
            cells.append(f"{more.estimate:+.2f} [{more.low:+.2f}, {more.high:+.2f}]")
        lines.append(f"| {column}, more than by value | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
