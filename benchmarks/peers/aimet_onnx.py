"""AIMET-ONNX: quantization simulation with and without cross-layer equalization.

It has no search for ONNX models any more (AutoQuant left it in 2.13), so its two usual recipes are
tried. Its files keep float weights behind Q/DQ pairs.

    pip install torch==2.13.0  # a build for the processor alone is enough
    pip install -r benchmarks/peers/requirements/aimet_onnx.txt
    python -m benchmarks.peers.aimet_onnx TASK OUTPUT
"""

from __future__ import annotations

import onnx
from aimet_onnx.cross_layer_equalization import equalize_model
from aimet_onnx.quantsim import QuantizationSimModel

from benchmarks.peers.peer_run import main
from benchmarks.peers.peer_run import PeerRun


CALIBRATION_INPUTS = 128


def search(run: PeerRun) -> None:
    """Builds and measures both recipes."""
    task = run.task
    feeds = [
        {task.input_name: task.calibration[n : n + 1]}
        for n in range(min(CALIBRATION_INPUTS, len(task.calibration)))
    ]
    for is_equalized in (False, True):
        model = onnx.load(task.model)
        if is_equalized:
            equalize_model(model)
        simulation = QuantizationSimModel(
            model,
            param_type="int8",
            activation_type="int8",
            providers=["CPUExecutionProvider"],
        )
        simulation.compute_encodings(feeds)
        run.measure(simulation.to_onnx_qdq().SerializeToString())


if __name__ == "__main__":
    main("aimet_onnx", ("aimet-onnx", "onnxruntime", "torch"), search)
