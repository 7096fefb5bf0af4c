"""Predicted against measured: what the noise model says of a configuration before it is run.

    python -m benchmarks.predict DATA [--models NAME ...] [--cache FOLDER] [--report]

For each recorded table: rank correlation (Spearman) of the predicted with the measured output
signal-to-noise ratio over the 96 configurations of the model, of the expected with the measured
agreement, what the configuration with the best prediction is worth, and what the probe costs.
Results go to `benchmarks/results/predict/`: `predictions.csv`, a row a configuration,
`summary.csv`, a plot and a README; with `--report` the last three are written from the first.
Predictions of sets of float layers are measured by `benchmarks.predict_layers`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import catalogue
from benchmarks import machine
from benchmarks import tables
from benchmarks.record import processor_of
from optuna_quantune.evaluation.metrics import class_scores
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.agreement import AgreementModel
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.probe import PROBE_INPUTS


RESULTS = Path(__file__).parent / "results" / "predict"
# Random halves of the inputs that the reliability of the measured agreement is averaged over.
SPLITS = 100


# Runs of the float model that a probe is compared with, before and after it.
FLOAT_RUNS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", choices=tables.complete())
    parser.add_argument("--cache", type=Path, help="folder of calibration statistics")
    parser.add_argument("--report", action="store_true", help="only summarize again")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "predictions.csv"
    frame = pd.read_csv(path) if path.is_file() else pd.DataFrame({"model": []})
    for name in () if arguments.report else arguments.models or tables.complete():
        rows = predict(name, arguments.data, arguments.cache)
        frame = pd.concat([frame[frame["model"] != name], rows], ignore_index=True)
        frame.sort_values("model", kind="stable").to_csv(path, index=False, float_format="%.5f")
    report(pd.read_csv(path))


def predict(name: str, data: Path, cache: Path | None) -> pd.DataFrame:
    """Predicts every configuration of a model, with one thread; times are processor time."""
    path, calibration, evaluation = catalogue.sources(name, data)
    objective = QuantizationObjective(
        path,
        calibration=calibration,
        evaluation=evaluation,
        target=processor_of(name),
        cache=cache,
    )
    quantizer = objective.quantizer
    quantizer.clipping_ranges()  # kept from here on: they and the placement are not the probe's
    quantizer.placement(())
    last = np.arange(len(objective.calibration))[::-1][:PROBE_INPUTS]
    feeds = list(objective.calibration.batches(1, last))
    session = make_session(path, threads=1)

    def float_runs() -> float:
        start = time.process_time()
        for feed in feeds[:FLOAT_RUNS]:
            session.run(None, feed)
        return (time.process_time() - start) / len(feeds[:FLOAT_RUNS])

    float_runs()
    before = float_runs()
    start = time.process_time()
    gains = probe(quantizer, feeds, threads=1)
    probed = time.process_time() - start
    one_run = (before + float_runs()) / 2.0
    agreement = AgreementModel(class_scores(objective.float_evaluation.outputs))
    configs = [objective.space.config(params) for params in objective.space.grid()]

    def timed(noise: NoiseModel) -> tuple[list[NoisePrediction], float]:
        start = time.process_time()
        return [noise.predict(config) for config in configs], time.process_time() - start

    predictions, seconds = timed(NoiseModel(quantizer, gains))
    closely, seconds_closely = timed(NoiseModel(quantizer, gains, closely=True))
    return pd.DataFrame(
        {
            "model": name,
            "configuration": number,
            "predicted_sqnr_db": prediction.features()["predicted_sqnr_db"],
            "expected_agreement": agreement.expected(
                prediction.confusion, prediction.highest_output
            ),
            "closely_sqnr_db": close.features()["predicted_sqnr_db"],
            "closely_agreement": agreement.expected(close.confusion, close.highest_output),
            "probe_float_runs": probed / one_run,
            "prediction_seconds": seconds,
            "closely_seconds": seconds_closely,
        }
        for number, (prediction, close) in enumerate(zip(predictions, closely, strict=True))
    )


def report(frame: pd.DataFrame) -> None:
    """Writes the summary, the plot and the README."""
    names = [name for name in tables.complete() if name in set(frame["model"])]
    rows = []
    figure, panels = plt.subplots(
        2, len(names), figsize=(2.6 * len(names), 5.2), constrained_layout=True, squeeze=False
    )
    for name, sqnr, agreement in zip(names, panels[0], panels[1], strict=True):
        table = tables.load(name)
        predicted = frame[frame["model"] == name].reset_index(drop=True)
        rows.append(summary(table, predicted))
        draw(sqnr, predicted["predicted_sqnr_db"], table.rows["sqnr_db"])
        sqnr.set_title(name, fontsize=9)
        sqnr.set_xlabel("predicted, dB")
        draw(agreement, predicted["expected_agreement"], table.rows["agreement"])
        agreement.set_xlabel("expected")
    panels[0][0].set_ylabel("measured output SQNR, dB")
    panels[1][0].set_ylabel("measured agreement")
    figure.savefig(RESULTS / "sqnr.png", dpi=120)
    plt.close(figure)
    found = pd.DataFrame(rows)
    found.to_csv(RESULTS / "summary.csv", index=False, float_format="%.4f")
    lines = [
        "# Predicted against measured",
        "",
        f"`python -m benchmarks.predict DATA`; {machine.as_markdown(machine.describe())}.",
        "",
        "`rank SQNR`, `rank agreement`: Spearman's correlation over the 96 configurations.",
        "`attainable`: the correlation of the measured agreement with that over infinitely many",
        "inputs, which no prediction can be expected to exceed (square root of the split-half",
        f"reliability after Spearman and Brown, {SPLITS} random halves of the inputs).",
        "`of measured SQNR`: the correlation of the measured agreement with the measured SQNR,",
        "which a configuration has to be run for.",
        "`error`: mean absolute difference of expected and measured agreement.",
        "`first choice`: agreement of the configuration with the best prediction; `best`: of the",
        "best of all 96. `probe`: processor time of the probe over that of one float inference of",
        "batch size 1, both with one thread. `s`: processor time of all 96 predictions, with the",
        "ranges that they need and the simulations of configurations whose errors are not small",
        "beside the signal (none where no such configuration is). A search simulates one for each",
        "scheme and granularity, and those of which clipping makes most of the noise; `closely`",
        "(`NoiseModel(closely=True)`) simulates all, and orders those better whose signal is",
        "lost.",
        "",
        "The noise model has no number fitted to these tables, but all of them have been in view",
        "while its form was chosen: those of demo, mobilenetv2_1.0, squeezenet1_1 and",
        "cifar10_resnet8 for most of it, and cifar10_resnet20, googlenet and shufflenetv1_0.5_g3",
        "for counting what is cut off by input (rank agreement of cifar10_resnet20 before:",
        "0.89, of googlenet 0.83; no other changed by more than 0.006). Clipping is simulated",
        "where it makes most of the noise because of vision transformers that are not among these",
        "(rank SQNR of one before: 0.86, then 0.98; of shufflenetv1_0.5_g3 0.95 and 0.97).",
        "What is cut off below a range and above it is probed apart because of a MobileNetV3 that",
        "is not among these either, as HardSwish makes nothing of the one (rank SQNR there: 0.53",
        "before, 0.72 then; rank agreement of cifar10_resnet20 0.94 and 0.97, of the others as",
        "before). Small models are probed with the step of each scheme because of demo, whose",
        "images have a background (rank agreement 0.94 before, 0.96 now; of cifar10_resnet8 0.96",
        "and 0.97).",
        "",
        "Predictions are made for the integers of the processor that a table was recorded on.",
        "Where the divergence is flat, ranges of the least one (`kl`) differ a little from one",
        "processor to another, as values are sampled in the order in which it holds them; the",
        "recorded models have those of theirs.",
        "",
        *markdown(found),
        "",
        "![predicted and measured output SQNR and agreement](sqnr.png)",
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def summary(table: tables.Table, predicted: pd.DataFrame) -> dict[str, object]:
    """The numbers of one model."""
    rows, expected = table.rows, predicted["expected_agreement"]

    def rank(column: str, measured: str) -> float:
        return float(spearmanr(predicted[column], rows[measured]).statistic)

    return {
        "model": table.name,
        "rank SQNR": rank("predicted_sqnr_db", "sqnr_db"),
        "rank agreement": rank("expected_agreement", "agreement"),
        "attainable": attainable(table.all_agrees),
        "of measured SQNR": float(spearmanr(rows["sqnr_db"], rows["agreement"]).statistic),
        "error": float((expected - rows["agreement"]).abs().mean()),
        "first choice": float(rows["agreement"][expected.idxmax()]),
        "best": float(rows["agreement"].max()),
        "probe": round(float(predicted["probe_float_runs"].iloc[0])),
        "s": float(predicted["prediction_seconds"].iloc[0]),
        "closely: rank SQNR": rank("closely_sqnr_db", "sqnr_db"),
        "rank agreement ": rank("closely_agreement", "agreement"),
        "s ": float(predicted["closely_seconds"].iloc[0]),
    }


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
