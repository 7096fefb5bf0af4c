"""What building one configuration costs, and where the time goes.

    taskset -c 1 python -m benchmarks.building DATA [--models NAME ...]

DATA is a folder as `benchmarks.catalogue` says. Statistics come from 32 calibration inputs.
Building is timed for several configurations beside ONNX Runtime's `quantize_static` with cached
ranges, in turn, in one process; medians of processor seconds are reported, so that other work on
the machine counts little. A model that is measured already is left out (delete its row to measure
it again). Results: `benchmarks/results/building/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import save_tensors_data
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.calibrate import TensorsData

from benchmarks import catalogue
from benchmarks import machine
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.digest import canonical_digest
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations


RESULTS = Path(__file__).parent / "results" / "building"
CONFIGURATIONS = (
    QuantizationConfig(),
    QuantizationConfig(granularity="tensor"),
    QuantizationConfig(scheme="symmetric"),
    QuantizationConfig(scheme="symmetric_uint8", clipping="kl"),
    QuantizationConfig(scheme="symmetric_power2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "seconds.csv"
    rows = pd.read_csv(path).to_dict("records") if path.is_file() else []
    for name in catalogue.names(arguments.data, arguments.models, demo=True):
        if name in {row["model"] for row in rows}:
            continue
        rows.append(measure(name, arguments.data))
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False, float_format="%.4f")
        report(frame)
        print(json.dumps(rows[-1]), flush=True)


def measure(name: str, data: Path) -> dict[str, Any]:
    """Median seconds of each step for one model."""
    path, calibration, _ = catalogue.sources(name, data)
    model = load_float_model(path)
    inputs = calibration.bind([InputSpec(i.name, i.shape, i.dtype) for i in model.inputs])
    placement, placing = timed(lambda: place(model))
    counted = calibrate(
        model, inputs.subset(np.arange(32)), required_activations(placement), sizes=("all",)
    )
    quantizer = Quantizer(model, counted, placement=placement)
    steps: dict[str, list[float]] = {}

    def step(kind: str, work: Callable[[], Any]) -> Any:
        result, seconds = timed(work)
        steps.setdefault(kind, []).append(seconds)
        return result

    with tempfile.TemporaryDirectory() as folder:
        cache = write_ranges(model, Path(folder))
        for config in CONFIGURATIONS:
            # Ranges of a clipping that is new are computed here, and are at hand from then on.
            step("new ranges and plan", partial(quantizer.plan, config))
            step("plan", partial(quantizer.plan, config))
            built = step("build", partial(quantizer.quantize, config))
            step("digest", partial(canonical_digest, built.proto))
            step("serialize", built.proto.SerializeToString)
            step("quantize_static", partial(theirs, model, cache, Path(folder)))
    medians = {kind: statistics.median(values) for kind, values in steps.items()}
    return {
        "model": name,
        "layers": len(model.layers),
        "placement, once": placing,
        "new ranges": max(steps["new ranges and plan"]) - medians["plan"],
        "plan": medians["plan"],
        "fill": medians["build"] - medians["plan"] - medians["digest"],
        "digest": medians["digest"],
        "serialize": medians["serialize"],
        "one configuration": medians["build"] + medians["serialize"],
        "quantize_static": medians["quantize_static"],
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and the processor seconds that it took."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def write_ranges(model: FloatModel, folder: Path) -> Path:
    """A calibration cache of ONNX Runtime; what the ranges are makes no difference to the time."""
    names = [name for node in model.proto.graph.node for name in node.output]
    names += [spec.name for spec in model.inputs]
    ranges = TensorData(lowest=np.float32(-1), highest=np.float32(1))
    path = folder / "ranges.json"
    save_tensors_data(
        TensorsData(CalibrationMethod.MinMax, dict.fromkeys(names, ranges)), str(path)
    )
    return path


def theirs(model: FloatModel, cache: Path, folder: Path) -> None:
    """ONNX Runtime's `quantize_static` with cached ranges."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    quantize_static(
        copy,
        str(folder / "theirs.onnx"),
        None,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        calibration_cache_path=str(cache),
    )


def report(frame: pd.DataFrame) -> None:
    """Writes README.md."""
    lines = [
        "# Building one configuration",
        "",
        f"`taskset -c 1 python -m benchmarks.building DATA`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"Processor seconds, medians over {len(CONFIGURATIONS)} configurations, beside ONNX",
        "Runtime's `quantize_static` with cached ranges in turn with ours. `one configuration` =",
        "plan (scales and zero points) + fill (the template is copied, weights and biases become",
        "integers, implied activations are taken out) + digest (the hash by which duplicates are",
        "found) + serialize. `placement` is asked for once for each set of float layers, `new",
        "ranges` are computed once for each clipping (KL here), scheme and set size.",
        "",
        "| " + " | ".join(frame.columns) + " |",
        "|" + " --- |" * len(frame.columns),
        *(
            "| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |"
            for row in frame.itertuples(index=False)
        ),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
