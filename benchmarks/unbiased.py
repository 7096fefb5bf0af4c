"""Whether the reported accuracy of a winner is unbiased, beside what is usually reported.

    python -m benchmarks.unbiased [--seeds N]

Replayed from the recorded tables. For each seed the inputs of a table are split at random: one
half is what a user has for evaluation, the other half stands for everything else, the truth. All
96 configurations (or 20 drawn at random) are "measured" on the evaluation inputs, a winner is
chosen, and what is reported of it is compared with its accuracy on the truth:

- `naive`: the highest accuracy on all evaluation inputs, and that accuracy;
- `no hold-out`: the choice of `optuna_quantune.selection` on all evaluation inputs, reported on
  the same ones;
- `tune`: the same choice on one half of the evaluation inputs, reported on the other half.

Latency, which decides first between configurations that cannot be told apart, is that of the
table.

Results go to `benchmarks/results/unbiased/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks import tables
from benchmarks.splits import mean_interval
from benchmarks.splits import replay_all
from benchmarks.splits import study_of
from optuna_quantune.selection import select


RESULTS = Path(__file__).parent / "results" / "unbiased"
WAYS = ("naive", "no hold-out", "tune")
BUDGETS = (96, 20)
# What the docstring says between the command and the place of the results.
EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])

Indices = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    seeds = parser.parse_args().seeds
    frame = replay_all(replay, seeds, RESULTS)
    bias = (
        frame.groupby(["configurations", "way", "model"], sort=False)
        .apply(summary, include_groups=False)
        .reset_index()
    )
    columns = ["bias", "bias of difference", "true difference"]
    # The models of one seed share their split, so that their mean is one observation.
    of_seed = frame.groupby(["configurations", "way", "seed"], sort=False)[columns].mean()
    every = (
        of_seed.groupby(["configurations", "way"], sort=False)
        .apply(summary, include_groups=False)
        .reset_index()
        .assign(model="mean of all")
    )
    bias = pd.concat([bias, every], ignore_index=True)
    bias.to_csv(RESULTS / "bias.csv", index=False, float_format="%.3f")
    plot(bias)
    write(bias, seeds)


def replay(table: tables.Table, seeds: int) -> Iterator[dict[str, object]]:
    """One row for each seed, number of configurations and way of reporting, in points."""
    n = int(table.float_model["inputs"])
    correct = table.all_correct
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        evaluation, truth = np.split(rng.permutation(n), [n // 2])
        searched, held_out = np.split(evaluation, [len(evaluation) // 2])
        for budget in BUDGETS:
            rows = np.sort(rng.permutation(len(table.rows))[:budget])
            naive = int(rows[correct[np.ix_(rows, evaluation)].mean(axis=1).argmax()])
            winners = (
                (naive, evaluation),
                (chosen(table, rows, evaluation), evaluation),
                (chosen(table, rows, searched), held_out),
            )
            for way, (row, reported_on) in zip(WAYS, winners, strict=True):
                gain = correct[row].astype(float) - table.float_correct
                yield {
                    "model": table.name,
                    "seed": seed,
                    "configurations": budget,
                    "way": way,
                    "row": row,
                    "bias": 100 * (correct[row, reported_on].mean() - correct[row, truth].mean()),
                    "bias of difference": 100 * (gain[reported_on].mean() - gain[truth].mean()),
                    "true difference": 100 * gain[truth].mean(),
                }


def chosen(table: tables.Table, rows: Indices, inputs: Indices) -> int:
    """The row that `select` chooses of those that were measured on some inputs."""
    return int(select(study_of(table, rows, inputs))[0].user_attrs["row"])


def summary(rows: pd.DataFrame) -> pd.Series:
    """Means over the splits with 95 % intervals (Student's t), in points."""
    numbers: dict[str, float] = {"splits": len(rows)}
    for column in ("bias", "bias of difference", "true difference"):
        mean = mean_interval(rows[column])
        numbers |= {column: mean.estimate, f"{column} low": mean.low, f"{column} high": mean.high}
    return pd.Series(numbers)


def plot(bias: pd.DataFrame) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    names = list(dict.fromkeys(bias["model"]))
    for axes, budget in zip(panels, BUDGETS, strict=True):
        for offset, way in enumerate(WAYS):
            of_way = bias[(bias["configurations"] == budget) & (bias["way"] == way)]
            of_way = of_way.set_index("model").loc[names]
            axes.errorbar(
                of_way["bias of difference"],
                np.arange(len(names)) + 0.2 * (1 - offset),
                xerr=of_way["bias of difference high"] - of_way["bias of difference"],
                fmt="o",
                markersize=4,
                label=way,
            )
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(np.arange(len(names)), names)
        axes.set_xlabel("reported minus true difference to float, points")
        axes.set_title(f"best of {budget} configurations")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(RESULTS / "bias.png", dpi=120)
    plt.close(figure)


def write(bias: pd.DataFrame, seeds: int) -> None:
    command = "python -m benchmarks.unbiased" + ("" if seeds == 50 else f" --seeds {seeds}")
    lines = [
        "# Is the reported accuracy unbiased?",
        "",
        f"`{command}`; {machine.as_markdown(machine.describe())}.",
        "",
        *EXPLANATION.splitlines(),
        "",
        f"Means over {seeds} random splits of each table with 95 % intervals, in points.",
        "`reported - true`: of the accuracy. `difference`: the same of the difference to float,",
        "which is measured on the same inputs and therefore far more exact. `worth`: the",
        "true difference to float of what was chosen. An interval says how sure the mean over",
        "splits of these recorded inputs is, not how other inputs would turn out. The first",
        "column holds the luck of the splits, too: the float model, for which nothing was chosen,",
        "has the same gaps between halves, and all ImageNet models share their splits.",
        "`difference` takes that luck off and is the column to read.",
    ]
    for budget in BUDGETS:
        lines += [
            "",
            f"## Best of {budget} configurations",
            "",
            "| model | way | reported - true | difference: reported - true | worth |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in bias[bias["configurations"] == budget].to_dict("records"):
            cells = [
                f"{row[c]:+.2f} [{row[f'{c} low']:+.2f}, {row[f'{c} high']:+.2f}]"
                for c in ("bias", "bias of difference", "true difference")
            ]
            lines.append(f"| {row['model']} | {row['way']} | " + " | ".join(cells) + " |")
    lines += ["", "![bias of three ways to report](bias.png)"]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
