"""ONNX Runtime sessions for looking at a float model: calibration, probe, corrections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from optuna_quantune.quantization.lrn import without_powers


def make_session(
    proto: onnx.ModelProto,
    *,
    threads: int | None = None,
    optimize: bool = True,
    optimized: Path | None = None,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the processor that prints errors only, and takes square roots for LRN.

    Args:
        proto: The model.
        threads: Threads that share one run; None is one for each core.
        optimize: Whether the graph is optimized.
        optimized: File that the optimized model is written to; it is for this machine only.
        weights: Values of initializers that `proto` only declares (external data): copying them
            into it can take longer than what the session is for.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Rounding in a float model is there to be looked at, not to make integer kernels of.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        options.add_external_initializers(list(weights), values)
    return onnxruntime.InferenceSession(
        without_powers(proto).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
