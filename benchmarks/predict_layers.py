"""Predicted against measured noise of random sets of float layers, and what predicting costs.

    python -m benchmarks.predict_layers DATA [--models NAME ...] [--sets N] [--cache FOLDER]

For each model N random sets of layers stay in float (every share of the layers is equally likely),
everything else is quantized with one scale for each weight; the output's signal-to-noise ratio is
predicted, and measured on calibration inputs that the probe did not see. Results go to
`benchmarks/results/predict/`: `layers.csv`, a row a set, and `layers.md`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks import catalogue
from benchmarks import machine
from benchmarks.predict import markdown
from benchmarks.predict import RESULTS
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.probe import PROBE_INPUTS
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.session import make_session


CONFIG = QuantizationConfig(granularity="tensor")
MEASURED_INPUTS = 64


class LayerwiseQuantizer(Quantizer):
    """Keeps `chosen` in float, whatever the configuration says."""

    chosen: tuple[str, ...] = ()

    def float_layers(self, config: QuantizationConfig) -> tuple[str, ...]:
        """`chosen`."""
        return self.chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--models", nargs="+", default=(catalogue.DEMO, "cifar10_resnet20"), metavar="NAME"
    )
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="folder of calibration statistics")
    arguments = parser.parse_args()
    path = RESULTS / "layers.csv"
    frame = pd.read_csv(path) if path.is_file() else pd.DataFrame({"model": []})
    for name in catalogue.names(arguments.data, arguments.models, demo=True):
        rows = measure(name, arguments.data, arguments.cache, arguments.sets)
        frame = pd.concat([frame[frame["model"] != name], rows], ignore_index=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        frame.to_csv(path, index=False, float_format="%.4f")
    summary = pd.DataFrame(
        {
            "model": name,
            "sets": len(rows),
            "rank SQNR": spearmanr(rows["predicted_sqnr_db"], rows["sqnr_db"]).statistic,
            "median error, dB": float(
                (rows["predicted_sqnr_db"] - rows["sqnr_db"]).abs().median()
            ),
            "probe, s": float(rows["probe_seconds"].iloc[0]),
            "probe, float inferences": round(rows["probe_inferences"].iloc[0]),
            "prediction, ms": float(rows["prediction_ms"].iloc[0]),
        }
        for name, rows in frame.groupby("model")
    )
    lines = [
        "# Sets of float layers, predicted against measured",
        "",
        f"`python -m benchmarks.predict_layers DATA`; {machine.as_markdown(machine.describe())}.",
        "",
        "Random sets of layers in float, the rest with one scale for each weight, measured on",
        f"{MEASURED_INPUTS} inputs that the probe did not see.",
        "`probe, float inferences`: its seconds over those of one float inference. `prediction`:",
        "of the 96 configurations of the `quantune` preset, once their tensors are known.",
        "",
        *markdown(summary),
    ]
    (RESULTS / "layers.md").write_text("\n".join(lines) + "\n")


def measure(name: str, data: Path, cache: Path | None, sets: int) -> pd.DataFrame:
    """Predicts and measures one model."""
    path, calibration, evaluation = catalogue.sources(name, data)
    objective = QuantizationObjective(
        path, calibration=calibration, evaluation=evaluation, cache=cache
    )
    base = objective.quantizer
    quantizer = LayerwiseQuantizer(base.model, base.statistics)
    last = np.arange(len(objective.calibration))[::-1][:PROBE_INPUTS]
    feeds = list(objective.calibration.batches(1, last))
    session = make_session(base.model.proto)
    session.run(None, feeds[0])
    start = time.perf_counter()
    for feed in feeds:
        session.run(None, feed)
    one_inference = (time.perf_counter() - start) / len(feeds)
    quantizer.clipping_ranges()  # kept from here on: they are not the probe's
    start = time.perf_counter()
    gains = probe(quantizer, feeds)
    probed = time.perf_counter() - start
    noise = NoiseModel(quantizer, gains)
    configs = [objective.space.config(params) for params in objective.space.grid()]
    for config in configs:
        noise.predict(config)
    start = time.perf_counter()
    for config in configs:
        noise.predict(config).features()
    prediction = (time.perf_counter() - start) / len(configs)
    reference = outputs(base.model.proto, objective.calibration)
    layers = [layer.name for layer in base.model.layers]
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(sets):
        size = int(rng.integers(0, len(layers)))
        quantizer.chosen = tuple(sorted(rng.choice(layers, size, replace=False)))
        predicted = noise.predict_layers(CONFIG, quantizer.chosen)
        measured = outputs(quantizer.quantize(CONFIG).proto, objective.calibration)
        rows.append(
            {
                "model": name,
                "float_layers": size,
                "predicted_sqnr_db": predicted.features()["predicted_sqnr_db"],
                "sqnr_db": sqnr_db(measured, reference),
                "probe_seconds": probed,
                "probe_inferences": probed / one_inference,
                "prediction_ms": 1e3 * prediction,
            }
        )
    return pd.DataFrame(rows)


def outputs(proto: onnx.ModelProto, inputs: InputSource) -> NDArray[np.float32]:
    """First output of a model for inputs that the probe did not see."""
    session = make_session(proto.SerializeToString())
    wanted = np.arange(MEASURED_INPUTS)
    return np.concatenate([session.run(None, feed)[0] for feed in inputs.batches(1, wanted)])


if __name__ == "__main__":
    main()
