"""NNCF `quantize_with_accuracy_control`: quantizes, then gives operations back to float.

It ends when the accuracy is within MAX_DROP of the float model on the validation inputs, or
nothing is left to give back.

    pip install -r benchmarks/peers/requirements/nncf_accuracy_control.txt
    python -m benchmarks.peers.nncf_accuracy_control TASK OUTPUT
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import onnx

from benchmarks.peers.peer_run import main
from benchmarks.peers.peer_run import PeerRun


CALIBRATION_INPUTS = 300  # NNCF's default
MAX_DROP = 0.001  # a share of inputs


def search(run: PeerRun) -> None:
    """Runs NNCF; whole passes over the validation inputs are measured, its subsets are not."""
    task = run.task

    def validate(model: Any, items: Iterable[int]) -> tuple[float, list[float]]:
        run.check()
        indices = task.selected[list(items)]
        data = model.SerializeToString()
        if len(indices) == len(task.selected):
            run.measure(data)
        predicted = task.outputs(data, indices).argmax(axis=1)
        correct = (predicted == task.labels[indices]).astype(float)
        return float(np.mean(correct)), correct.tolist()

    calibration = [
        {task.input_name: task.calibration[n : n + 1]}
        for n in range(min(CALIBRATION_INPUTS, len(task.calibration)))
    ]
    quantized = nncf.quantize_with_accuracy_control(
        onnx.load(task.model),
        nncf.Dataset(calibration),
        nncf.Dataset(list(range(len(task.selected)))),
        validation_fn=validate,
        max_drop=MAX_DROP,
        subset_size=CALIBRATION_INPUTS,
    )
    # What it returns is its choice, whatever it has tried.
    onnx.save(quantized, run.model)


if __name__ == "__main__":
    main("nncf_accuracy_control", ("nncf", "onnxruntime"), search)
