from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.helper import make_graph
from onnx.helper import make_model
from onnx.helper import make_node
from onnx.helper import make_opsetid
from onnx.helper import make_tensor_value_info

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.bias_correction import CORRECTION_INPUTS
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.quantizer import Quantizer


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]
MakeQuantizer = Callable[[FloatModel, NDArray[np.float32]], Quantizer]


def activation(
    model: onnx.ModelProto, inputs: NDArray[np.float32], name: str
) -> NDArray[np.float32]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    if name not in [value.name for value in proto.graph.output]:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values: NDArray[np.float32] = session.run([name], {"input": inputs})[0]
    return values


def convolve(x: NDArray[np.float32], weight: NDArray[np.float32], groups: int) -> NDArray[Any]:
    """A convolution with stride 1 that keeps the size, in numpy."""
    pad = weight.shape[-1] // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    outputs = []
    for x_group, w_group in zip(
        np.split(windows, groups, axis=1), np.split(weight, groups), strict=True
    ):
        outputs.append(np.einsum("ncyxij,ocij->noyx", x_group, w_group))
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize("opset", [17, 21])
def test_shifts_are_the_mean_outputs_of_layers_with_the_error_as_weight(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path, opset: int
) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(onnx.version_converter.convert_version(onnx.load(toy_model), opset), path)
    model = load_float_model(path)
    rng = np.random.default_rng(0)
    errors = {
        layer.name: rng.standard_normal(model.weights[layer.weight].shape).astype(np.float32)
        for layer in model.layers
    }
    shifts = BiasCorrection(model, ArrayInputs({"input": toy_inputs})).shifts(errors)
    assert set(shifts) == {"stem", "depthwise", "project", "head"}
    used = toy_inputs[:CORRECTION_INPUTS]
    assert len(used) < len(toy_inputs)
    for layer in model.layers:
        x = used if layer.input == "input" else activation(model.proto, used, layer.input)
        if layer.op_type == "Gemm":
            expected = (x @ errors[layer.name].T).mean(axis=0)
        else:
            expected = convolve(x, errors[layer.name], layer.groups).mean(axis=(0, 2, 3))
        np.testing.assert_allclose(shifts[layer.name], expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_batch_size_one_has_the_same_shifts(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    proto = onnx.load(toy_model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    path = tmp_path / "one.onnx"
    onnx.save(proto, path)
    shifts = []
    for model in (load_float_model(toy_model), load_float_model(path)):
        error = {"project": np.ones_like(model.weights["project.weight"])}
        shifts.append(
            BiasCorrection(model, ArrayInputs({"input": toy_inputs})).shifts(error)["project"]
        )
    np.testing.assert_allclose(shifts[0], shifts[1], rtol=1e-5)


def test_the_knob_takes_the_shift_off_the_biases_and_changes_nothing_else(
    quantizer: Quantizer, float_model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    def initializers(*, corrected: bool) -> dict[str, NDArray[Any]]:
        config = QuantizationConfig(mixed_precision="first_last", bias_correction=corrected)
        proto = quantizer.quantize(config).proto
        return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}

    plain, corrected = initializers(corrected=False), initializers(corrected=True)
    changed = {n for n in plain if not np.array_equal(plain[n], corrected[n])}
    assert set(plain) == set(corrected)
    assert changed == {"depthwise.bias_quantized", "project.bias_quantized"}
    for layer in float_model.layers[1:3]:
        integers = plain[f"{layer.weight}_quantized"].astype(np.float64)
        scale = plain[f"{layer.weight}_scale"].reshape(-1, 1, 1, 1)
        error = integers * scale - float_model.weights[layer.weight]
        x = activation(float_model.proto, toy_inputs[:CORRECTION_INPUTS], layer.input)
        shift = convolve(x, error, layer.groups).mean(axis=(0, 2, 3))
        step = plain[f"{layer.bias}_quantized_scale"]
        expected = (float_model.weights[str(layer.bias)] - shift) / step
        np.testing.assert_allclose(corrected[f"{layer.bias}_quantized"], expected, atol=1.0)


@pytest.fixture(scope="module")
def skewed_model(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    """Conv, Relu, Conv whose weights all lie 0.4 of a step above an integer."""
    rng = np.random.default_rng(0)
    tensors = []
    for name, inputs in (("first", 3), ("second", 8)):
        integers = rng.integers(-100, 100, (8, inputs, 3, 3)) + 0.4
        integers[:, 0, 0, 0] = 127.0  # so that the step is 0.01
        tensors.append(
            numpy_helper.from_array((0.01 * integers).astype(np.float32), f"{name}.weight")
        )
        bias = rng.standard_normal(8).astype(np.float32)
        tensors.append(numpy_helper.from_array(bias, f"{name}.bias"))
    graph = make_graph(
        [
            make_node("Conv", ["input", "first.weight", "first.bias"], ["a"], name="first"),
            make_node("Relu", ["a"], ["b"], name="relu"),
            make_node("Conv", ["b", "second.weight", "second.bias"], ["c"], name="second"),
        ],
        "skewed",
        [make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 3, 12, 12])],
        [make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["n", 8, 8, 8])],
        tensors,
    )
    path = tmp_path_factory.mktemp("models") / "skewed.onnx"
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)], ir_version=10), path)
    return load_float_model(path)


def test_the_mean_error_of_every_channel_shrinks_on_inputs_that_were_not_used(
    skewed_model: FloatModel, make_quantizer: MakeQuantizer, run: Run
) -> None:
    rng = np.random.default_rng(1)
    calibration, others = rng.uniform(0.5, 1.5, (2, 64, 3, 12, 12)).astype(np.float32)
    quantizer = make_quantizer(skewed_model, calibration)
    reference = run(skewed_model.proto, others)

    def error(*, corrected: bool) -> NDArray[Any]:
        config = QuantizationConfig(bias_correction=corrected)
        outputs = run(quantizer.quantize(config).proto, others)
        return (outputs - reference).astype(np.float64)

    before, after = error(corrected=False), error(corrected=True)
    channels = (0, 2, 3)
    assert np.all(np.abs(after.mean(channels)) < 0.2 * np.abs(before.mean(channels)))
    assert np.mean(np.square(after)) < 0.2 * np.mean(np.square(before))


def test_a_layer_without_a_bias_is_left_as_it_is(
    skewed_model: FloatModel, make_quantizer: MakeQuantizer, tmp_path: Path, run: Run
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(skewed_model.proto)
    del proto.graph.node[0].input[2]
    onnx.save(proto, tmp_path / "no_bias.onnx")
    model = load_float_model(tmp_path / "no_bias.onnx")
    inputs = np.random.default_rng(1).uniform(0.5, 1.5, (8, 3, 12, 12)).astype(np.float32)
    quantizer = make_quantizer(model, inputs)
    built = quantizer.quantize(QuantizationConfig(bias_correction=True)).proto
    assert "first.bias_quantized" not in [tensor.name for tensor in built.graph.initializer]
    assert np.all(np.isfinite(run(built, inputs)))


def test_a_quantizer_without_inputs_says_so(
    float_model: FloatModel, toy_statistics: CalibrationStatistics
) -> None:
    bare = Quantizer(float_model, toy_statistics)
    with pytest.raises(InputError, match="knob 'bias_correction': this quantizer was given no"):
        bare.quantize(QuantizationConfig(bias_correction=True))
