"""Predicted against measured: what the noise model says of a configuration before it is run.

    python -m benchmarks.predict

From the recorded tables: rank correlation (Spearman) of the predicted with the measured output
signal-to-noise ratio over the 96 configurations of each model, of the expected with the measured
agreement, and what the configuration with the best prediction is worth. Results go to
`benchmarks/results/predict/`. Predictions of sets of float layers, and what a prediction costs,
are measured by `benchmarks.predict_layers`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import machine
from benchmarks import tables
from optuna_quantune.selection import unpack


RESULTS = Path(__file__).parent / "results" / "predict"
# Random halves of the inputs that the reliability of the measured agreement is averaged over.
SPLITS = 100


def main() -> None:
    names = tables.complete()
    rows = []
    figure, panels = plt.subplots(
        2, len(names), figsize=(2.6 * len(names), 5.2), constrained_layout=True, squeeze=False
    )
    for name, sqnr, agreement in zip(names, panels[0], panels[1], strict=True):
        table = tables.load(name)
        rows.append(summary(table))
        draw(sqnr, table.rows["predicted_sqnr_db"], table.rows["sqnr_db"])
        sqnr.set_title(name, fontsize=9)
        sqnr.set_xlabel("predicted, dB")
        draw(agreement, table.rows["expected_agreement"], table.rows["agreement"])
        agreement.set_xlabel("expected")
    panels[0][0].set_ylabel("measured output SQNR, dB")
    panels[1][0].set_ylabel("measured agreement")
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "sqnr.png", dpi=120)
    plt.close(figure)
    frame = pd.DataFrame(rows)
    frame.to_csv(RESULTS / "summary.csv", index=False, float_format="%.4f")
    lines = [
        "# Predicted against measured",
        "",
        f"`python -m benchmarks.predict`; {machine.as_markdown(machine.describe())}.",
        "",
        "`rank SQNR`, `rank agreement`: Spearman's correlation over the 96 configurations.",
        "`attainable`: the correlation of the measured agreement with that over infinitely many",
        "inputs, which no prediction can be expected to exceed (square root of the split-half",
        f"reliability after Spearman and Brown, {SPLITS} random halves of the inputs).",
        "`error`: mean absolute difference of expected and measured agreement.",
        "`first choice`: agreement of the configuration with the best prediction; `best`: of the",
        "best of all 96. Nothing was run for a prediction but one probe of the float model. The",
        "noise model has no number fitted to these tables, but its form was chosen by looking at",
        "them; those of efficientnet_lite0 and the larger part of squeezenet1_1 came afterwards.",
        "",
        *markdown(frame),
        "",
        "![predicted and measured output SQNR and agreement](sqnr.png)",
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def summary(table: tables.Table) -> dict[str, object]:
    """The numbers of one model."""
    rows = table.rows
    first = rows["expected_agreement"].idxmax()
    return {
        "model": table.name,
        "rank SQNR": spearmanr(rows["predicted_sqnr_db"], rows["sqnr_db"]).statistic,
        "rank agreement": spearmanr(rows["expected_agreement"], rows["agreement"]).statistic,
        "attainable": attainable(agreeing(table)),
        "error": float((rows["expected_agreement"] - rows["agreement"]).abs().mean()),
        "first choice": rows["agreement"][first],
        "best": rows["agreement"].max(),
    }


def agreeing(table: tables.Table) -> NDArray[np.bool_]:
    """Which inputs each configuration predicts as the float model does, (rows, inputs)."""
    inputs = table.float_model["inputs"]
    return np.stack([unpack(bits, inputs) for bits in table.rows["agrees"]])


def attainable(agrees: NDArray[np.bool_]) -> float:
    """The rank correlation with measured shares that a perfect prediction would have."""
    rng = np.random.default_rng(0)
    halves = []
    for _ in range(SPLITS):
        order = rng.permutation(agrees.shape[1])
        first, second = np.array_split(order, 2)
        shares = agrees[:, first].mean(axis=1), agrees[:, second].mean(axis=1)
        halves.append(spearmanr(*shares).statistic)
    half = float(np.mean(halves))
    return float(np.sqrt(2.0 * half / (1.0 + half)))


def draw(axes: Axes, predicted: pd.Series[float], measured: pd.Series[float]) -> None:
    """Points of all configurations, and the line on which a prediction is right."""
    axes.scatter(predicted, measured, s=9)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], linewidth=0.8, color="gray")


def markdown(frame: pd.DataFrame) -> list[str]:
    """A frame as the lines of a Markdown table."""
    return [
        "| " + " | ".join(frame.columns) + " |",
        "|" + " --- |" * len(frame.columns),
        *("| " + " | ".join(cell(value) for value in row) + " |" for row in frame.to_numpy()),
    ]


def cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
