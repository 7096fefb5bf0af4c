"""ONNX Runtime sessions for looking at a float model: calibration, probe, corrections."""

from __future__ import annotations

import onnx
import onnxruntime


def make_session(
    proto: onnx.ModelProto, *, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """A session on the processor that prints errors only.

    Args:
        proto: The model.
        threads: Threads that share one run; None is one for each core.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
