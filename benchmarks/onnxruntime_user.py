"""How a user of ONNX Runtime searches today: `quantize_static` for each configuration.

    python -m benchmarks.onnxruntime_user TASK NUMBER|rule OUTPUT

Builds and measures one of the 96 configurations that ONNX Runtime's own options give, or the rule
of thumb (per channel, uint8 activations, MinMax, 128 inputs), and prints one line of JSON.
`benchmarks.live` runs each in a process of its own, as its memory is measured, too.

The options are the closest there are to the knobs of the `quantune` preset: numbers of
calibration inputs; activations as uint8 or int8, symmetric or not (ONNX Runtime has no scales of
powers of two, so the fourth scheme is asymmetric int8); MinMax or Entropy as they come (Entropy
with its default bins returns the range of MinMax, which its user cannot see); per tensor or per
channel; first and last layer in float or not. On a processor without VNNI weights have 7 bits
(`reduce_range`), as ONNX Runtime's documentation says.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.finished_model import describe
from benchmarks.peers.task import peak_memory_mb
from benchmarks.peers.task import Task
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.selection import pack


@dataclass(frozen=True)
class UserConfig:
    """Options of `quantize_static`.

    Attributes:
        calibration_images: How many inputs are calibrated on; None is all.
        activations: ``uint8`` or ``int8``.
        symmetric: Whether activations have zero point in the middle.
        entropy: Entropy in place of MinMax calibration.
        per_channel: A scale for each channel of a weight.
        float_ends: First and last layer stay float.
    """

    calibration_images: int | None
    activations: str
    symmetric: bool
    entropy: bool
    per_channel: bool
    float_ends: bool


RULE_OF_THUMB = UserConfig(128, "uint8", False, False, True, False)


def grid() -> list[UserConfig]:
    """All 96 configurations."""
    bools = (False, True)
    options = ((1, 32, None), ("uint8", "int8"), bools, bools, bools, bools)
    return [UserConfig(*choice) for choice in itertools.product(*options)]


def kinds_of_cost() -> dict[tuple[int | None, bool], list[int]]:
    """Numbers of the configurations by what decides how long they take."""
    kinds: dict[tuple[int | None, bool], list[int]] = {}
    for number, config in enumerate(grid()):
        kinds.setdefault((config.calibration_images, config.entropy), []).append(number)
    return kinds


def quantize(task: Task, config: UserConfig, output: Path) -> None:
    """Writes the quantized model."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(task.model), str(prepared), skip_symbolic_shape=True)
        layers = [n.name for n in onnx.load(prepared).graph.node if n.op_type in ("Conv", "Gemm")]
        quantize_static(
            str(prepared),
            str(output),
            task.reader(config.calibration_images),
            activation_type=QuantType.QUInt8 if config.activations == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=config.per_channel,
            reduce_range=detect_vnni() is False,
            calibrate_method=CalibrationMethod.Entropy
            if config.entropy
            else CalibrationMethod.MinMax,
            nodes_to_exclude=[layers[0], layers[-1]] if config.float_ends else [],
            extra_options={"ActivationSymmetric": config.symmetric},
        )


def main() -> None:
    folder, which, output = sys.argv[1:]
    task = Task.load(folder)
    # Read before the clock starts: a user has them in memory for all configurations.
    _ = task.calibration, task.evaluation, task.labels
    before_mb = peak_memory_mb()
    config = RULE_OF_THUMB if which == "rule" else grid()[int(which)]
    start = time.perf_counter()
    quantize(task, config, Path(output))
    build_seconds = time.perf_counter() - start
    predicted = task.outputs(output, task.selected).argmax(axis=1)
    correct = predicted == task.labels[task.selected]
    evaluate_seconds = time.perf_counter() - start - build_seconds
    result = {
        "config": asdict(config),
        "build_seconds": round(build_seconds, 3),
        "evaluate_seconds": round(evaluate_seconds, 3),
        "top1_selected": float(correct.mean()),
        "correct_selected": pack(correct),
        "memory_mb": round(peak_memory_mb() - before_mb),
        **describe(task, Path(output)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
