from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.layer_inputs import MOMENT_INPUTS
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.weight_rounding import WeightRounding


MakeQuantizer = Callable[[FloatModel, NDArray[np.float32]], Quantizer]
PLAIN = QuantizationConfig()
COMPENSATED = dataclasses.replace(PLAIN, weight_rounding="compensated")


def initializers(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}


def matrix(folder: Path, weight: NDArray[np.float32]) -> FloatModel:
    """A MatMul whose weight has a row for each output."""
    shape = ["n", "rows", weight.shape[1]]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["output"], "layer")],
        "matrix",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)],
        [onnx.ValueInfoProto(name="output")],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, folder / "matrix.onnx")
    return load_float_model(folder / "matrix.onnx")


def rounding(model: FloatModel, inputs: NDArray[np.float32]) -> WeightRounding:
    return WeightRounding(lambda: input_moments(model, ArrayInputs({"input": inputs})))


def rounded(
    model: FloatModel,
    inputs: NDArray[np.float32],
    scale: float | NDArray[np.float64],
    *,
    about_mean: bool = False,
) -> NDArray[np.int32]:
    (layer,) = model.layers
    parameters = choose_parameters(-127 * np.asarray(scale), 127 * np.asarray(scale), "symmetric")
    return (
        rounding(model, inputs)
        .integers(layer, model.weights["w"], parameters, about_mean=about_mean)
        .T
    )


def test_inputs_that_have_nothing_to_do_with_each_other_leave_the_nearest_integers(
    tmp_path: Path,
) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    inputs = np.tile(np.eye(8, dtype=np.float32), (4, 1, 1))
    steps = rounded(matrix(tmp_path, weight), inputs, 0.05)
    np.testing.assert_array_equal(steps, np.rint(weight / np.float32(0.05)))


def test_an_error_is_taken_back_by_an_input_that_is_the_same(tmp_path: Path) -> None:
    weight = np.array([[1.4, 0.4], [200.0, -50.0]], dtype=np.float32)
    inputs = np.repeat(np.random.default_rng(0).normal(size=(32, 500, 1)), 2, axis=2)
    steps = rounded(matrix(tmp_path, weight), inputs.astype(np.float32), 1.0)
    # Nearest integers are 1 and 0; 127 and -50, as there are no larger ones.
    assert steps[0].sum() == 2
    assert steps[1].tolist() == [127, pytest.approx(-50 + 73, abs=3)]


@pytest.mark.parametrize("about_mean", [False, True])
def test_inputs_that_hardly_vary_about_a_large_mean_can_be_compensated_on(
    about_mean: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 300)).astype(np.float32)
    inputs = (1000.0 + 0.01 * rng.normal(size=(40, 3, 300))).astype(np.float32)
    inputs[..., 0] = 0.0
    steps = rounded(matrix(tmp_path, weight), inputs, 0.05, about_mean=about_mean)
    off = np.abs(steps * 0.05 - weight)
    assert off.max() < 1.0
    if not about_mean:  # all errors of a row add up, and make up for each other
        assert np.abs((steps * 0.05 - weight)[:, 1:].sum(axis=1)).max() < 0.1


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("about_mean", [False, True])
def test_other_inputs_meet_no_larger_error_than_was_expected(
    per_channel: bool, about_mean: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(40, 24)).astype(np.float32)
    mixing = rng.normal(size=(6, 24)) + 0.2 * rng.normal(size=(24, 24))[:6]
    values = rng.normal(size=(96, 100, 6)) @ mixing + 0.3 * rng.normal(size=(96, 100, 24)) + 1.0
    inputs = values.astype(np.float32)
    model = matrix(tmp_path, weight)
    (layer,) = model.layers
    extremes = np.abs(weight).max(axis=1) if per_channel else np.abs(weight).max()
    scale = np.asarray(extremes / 31.0)
    steps = rounded(model, inputs, scale, about_mean=about_mean)
    column = scale[:, None] if per_channel else scale
    nearest = np.rint(weight / column) * column

    def power(values: NDArray[Any]) -> float:
        found = inputs[MOMENT_INPUTS:] @ (values - weight).T  # the first ones were learned from
        return float(np.square(found - found.mean(axis=(0, 1)) * about_mean).mean())

    share = power(steps * column) / power(nearest)
    expected = rounding(model, inputs).share_left(layer, about_mean=about_mean)
    # Inputs as clearly correlated as these gain more than what was added to their moments tells.
    assert expected / 4 < share < expected < 0.5


def test_the_knob_changes_integers_of_weights_and_nothing_else(
    quantizer: Quantizer, float_model: FloatModel
) -> None:
    plain = initializers(quantizer.quantize(PLAIN).proto)
    compensated = initializers(quantizer.quantize(COMPENSATED).proto)
    assert set(plain) == set(compensated)
    changed = {n for n in plain if not np.array_equal(plain[n], compensated[n])}
    assert changed <= {f"{layer.weight}_quantized" for layer in float_model.layers}
    assert f"{float_model.layers[0].weight}_quantized" in changed
    for name in changed:
        moved = np.abs(plain[name].astype(int) - compensated[name].astype(int))
        assert 0 < moved.mean() < 3


def test_a_corrected_bias_takes_back_the_mean_of_what_compensation_leaves(
    quantizer: Quantizer, float_model: FloatModel
) -> None:
    config = dataclasses.replace(COMPENSATED, bias_correction=True)
    plain = initializers(quantizer.quantize(COMPENSATED).proto)
    corrected = initializers(quantizer.quantize(config).proto)
    layer = float_model.layers[2]
    name = f"{layer.weight}_quantized"
    # Its mean does not count any more.
    assert not np.array_equal(plain[name], corrected[name])
    step = corrected[f"{layer.bias}_quantized_scale"]
    bias = corrected[f"{layer.bias}_quantized"] * step
    assert layer.bias is not None
    moved = bias - float_model.weights[layer.bias]
    weight = corrected[name] * corrected[f"{layer.weight}_scale"].reshape(-1, 1, 1, 1)
    error = {layer.name: (weight - float_model.weights[layer.weight]).astype(np.float32)}
    assert quantizer._bias_correction is not None
    shift = quantizer._bias_correction.shifts(error)[layer.name]
    np.testing.assert_allclose(moved, -shift, atol=float(np.max(step)))


def test_a_model_of_batch_size_one_is_rounded_alike(
    make_quantizer: MakeQuantizer,
    quantizer: Quantizer,
    toy_model: Path,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    proto = onnx.load(toy_model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, tmp_path / "one.onnx")
    one = make_quantizer(load_float_model(tmp_path / "one.onnx"), toy_inputs)
    single = initializers(one.quantize(COMPENSATED).proto)
    for name, values in initializers(quantizer.quantize(COMPENSATED).proto).items():
        if name.endswith("weight_quantized"):
            differing = np.mean(values != single[name])
            assert differing < 0.02  # sums of other order


def test_predictions_count_what_compensation_leaves(
    quantizer: Quantizer, float_model: FloatModel, toy_probe: Probe
) -> None:
    model = NoiseModel(quantizer, toy_probe)
    plain, compensated = model.predict(PLAIN), model.predict(COMPENSATED)
    assert compensated.rounding == plain.rounding
    for layer in float_model.layers:
        share = quantizer.share_left(layer, COMPENSATED)
        assert compensated.weights[layer.weight] == pytest.approx(
            share * plain.weights[layer.weight]
        )
        assert 0.0 < share <= 1.0
    assert quantizer.share_left(float_model.layers[0], PLAIN) == 1.0


def test_without_inputs_it_is_refused(
    float_model: FloatModel, toy_statistics: CalibrationStatistics
) -> None:
    with pytest.raises(InputError, match="knob 'weight_rounding': .* give it a WeightRounding"):
        Quantizer(float_model, toy_statistics).quantize(COMPENSATED)
