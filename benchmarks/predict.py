"""Predicted against measured: what the noise model says of a configuration before it is run.

    python -m benchmarks.predict

From the recorded tables: rank correlation (Spearman) of the predicted with the measured output
signal-to-noise ratio over the 96 configurations of each model, of the expected with the measured
agreement, and what the configuration with the best prediction is worth. Results go to
`benchmarks/results/predict/`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import spearmanr

from benchmarks import machine
from benchmarks import tables


RESULTS = Path(__file__).parent / "results" / "predict"


def main() -> None:
    names = tables.complete()
    rows = []
    figure, panels = plt.subplots(
        1, len(names), figsize=(2.6 * len(names), 2.9), constrained_layout=True, squeeze=False
    )
    for name, axes in zip(names, panels[0], strict=True):
        table = tables.load(name).rows
        rows.append(summary(name, table))
        axes.scatter(table["predicted_sqnr_db"], table["sqnr_db"], s=9)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], linewidth=0.8, color="gray")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("predicted, dB")
    panels[0][0].set_ylabel("measured output SQNR, dB")
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "sqnr.png", dpi=120)
    plt.close(figure)
    frame = pd.DataFrame(rows)
    frame.to_csv(RESULTS / "summary.csv", index=False, float_format="%.4f")
    head = "| " + " | ".join(frame.columns) + " |"
    lines = [
        "# Predicted against measured",
        "",
        f"`python -m benchmarks.predict`; {machine.as_markdown(machine.describe())}.",
        "",
        "`rank SQNR`, `rank agreement`: Spearman's correlation over the 96 configurations.",
        "`first choice`: agreement of the configuration with the best prediction; `best`: of the",
        "best of all 96. Nothing was run for a prediction but one probe of the float model.",
        "",
        head,
        "|" + " --- |" * len(frame.columns),
        *("| " + " | ".join(cell(value) for value in row) + " |" for row in frame.to_numpy()),
        "",
        "![predicted and measured output SQNR](sqnr.png)",
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def summary(name: str, table: pd.DataFrame) -> dict[str, object]:
    """The numbers of one model."""
    first = table["predicted_sqnr_db"].idxmax()
    return {
        "model": name,
        "rank SQNR": spearmanr(table["predicted_sqnr_db"], table["sqnr_db"]).statistic,
        "rank agreement": spearmanr(table["expected_agreement"], table["agreement"]).statistic,
        "first choice": table["agreement"][first],
        "best": table["agreement"].max(),
    }


def cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
