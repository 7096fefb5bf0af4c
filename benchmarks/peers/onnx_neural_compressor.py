"""onnx-neural-compressor: `autotune` over a list of static configurations, one after another.

It has no search over its options of its own; the list here is every combination of what its users
choose between. Its goal is set out of reach, so that it tries them all.

    pip install -r benchmarks/peers/requirements/onnx_neural_compressor.txt
    python -m benchmarks.peers.onnx_neural_compressor TASK OUTPUT
"""

from __future__ import annotations

import itertools
from typing import Any

from onnx_neural_compressor.data_reader import CalibrationDataReader
from onnx_neural_compressor.quantization import CalibrationMethod
from onnx_neural_compressor.quantization import config
from onnx_neural_compressor.quantization import QuantType
from onnx_neural_compressor.quantization import tuning

from benchmarks.peers.peer_run import main
from benchmarks.peers.peer_run import PeerRun
from benchmarks.peers.task import Task


CALIBRATION_INPUTS = 128


class Reader(CalibrationDataReader):  # type: ignore[misc]  # has no types
    """The task's calibration inputs, as its own class wants them."""

    def __init__(self, task: Task) -> None:
        self._reader = task.reader(CALIBRATION_INPUTS)

    def get_next(self) -> Any:
        """The next input, or None."""
        return self._reader.get_next()

    def rewind(self) -> None:
        """Begins again."""
        self._reader.rewind()


def search(run: PeerRun) -> None:
    """Tries all configurations of the list."""
    methods = (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
    types = (QuantType.QUInt8, QuantType.QInt8)
    configurations = [
        config.StaticQuantConfig(
            Reader(run.task),
            calibrate_method=method,
            per_channel=per_channel,
            activation_type=activations,
            weight_type=QuantType.QInt8,
        )
        for method, per_channel, activations in itertools.product(methods, (True, False), types)
    ]

    def evaluate(model: Any) -> float:
        is_proto = hasattr(model, "SerializeToString")
        return run.measure(model.SerializeToString() if is_proto else model)

    tuning.autotune(
        model_input=str(run.task.model),
        tune_config=tuning.TuningConfig(
            config_set=configurations, tolerable_loss=-1.0, max_trials=len(configurations)
        ),
        eval_fn=evaluate,
        calibration_data_reader=Reader(run.task),
    )


if __name__ == "__main__":
    main("onnx_neural_compressor", ("onnx-neural-compressor", "onnxruntime"), search)
