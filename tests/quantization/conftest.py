"""The toy model with its calibration statistics, ready for every configuration."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.weight_rounding import WeightRounding


Run = Callable[..., NDArray[np.float32]]
MakeQuantizer = Callable[[FloatModel, NDArray[np.float32]], Quantizer]


def statistics_of(model: FloatModel, inputs: NDArray[np.float32]) -> CalibrationStatistics:
    tensors = required_activations(place(model))
    return calibrate(model, ArrayInputs({"input": inputs}), tensors, sizes=(1, 32, "all"))


def _run(
    proto: onnx.ModelProto,
    inputs: NDArray[np.float32],
    *,
    without_optimizers: Sequence[str] = (),
) -> NDArray[np.float32]:
    def make_session(*, exact: bool) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), options, disabled_optimizers=list(without_optimizers)
        )

    try:
        session = make_session(exact=True)  # what the pairs say, on processors without VNNI, too
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:  # where layers share a weight
        session = make_session(exact=False)
    outputs: NDArray[np.float32] = session.run(None, {"input": inputs})[0]
    return outputs


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a model on inputs and gives its first output."""
    return _run


@pytest.fixture(scope="session")
def float_model(toy_model: Path) -> FloatModel:
    return load_float_model(toy_model)


@pytest.fixture(scope="session")
def toy_statistics(
    float_model: FloatModel, toy_inputs: NDArray[np.float32]
) -> CalibrationStatistics:
    return statistics_of(float_model, toy_inputs)


@pytest.fixture(scope="session")
def toy_probe(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
) -> Probe:
    feeds = [{"input": toy_inputs[i : i + 1]} for i in range(8)]
    quantizer = Quantizer(float_model, toy_statistics)
    return probe(quantizer, feeds)


def _make_quantizer(model: FloatModel, inputs: NDArray[np.float32]) -> Quantizer:
    source = ArrayInputs({"input": inputs})
    return Quantizer(
        model,
        statistics_of(model, inputs),
        bias_correction=BiasCorrection(model, source),
        weight_rounding=WeightRounding(lambda: input_moments(model, source)),
    )


@pytest.fixture(scope="session")
def make_quantizer() -> MakeQuantizer:
    """Calibrates a model on inputs; the quantizer knows every knob."""
    return _make_quantizer


@pytest.fixture(scope="session")
def quantizer(float_model: FloatModel, toy_inputs: NDArray[np.float32]) -> Quantizer:
    return _make_quantizer(float_model, toy_inputs)
