from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization import layer_inputs
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.layer_inputs import MOMENT_INPUTS
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model


RNG = np.random.default_rng(0)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    weights: Mapping[str, NDArray[np.float32]],
) -> Path:
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", *shape])],
        [onnx.ValueInfoProto(name=node.output[0]) for node in nodes],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return path


def outputs_with(
    model: FloatModel, weights: Mapping[str, NDArray[np.float32]], inputs: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found: list[NDArray[np.float32]] = session.run(None, {"input": inputs})
    return found


LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (4, 9, 7), (6, 4, 3, 3), {}),
    "pointwise": ("Conv", (4, 9, 7), (6, 4, 1, 1), {}),
    "strides and pads": (
        "Conv",
        (4, 9, 7),
        (6, 4, 3, 2),
        {"strides": [2, 3], "pads": [1, 0, 2, 1]},
    ),
    "dilations": ("Conv", (4, 9, 7), (6, 4, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 1, 3]}),
    "groups": ("Conv", (4, 9, 7), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", (4, 9, 7), (4, 1, 3, 3), {"group": 4}),
    "same upper": ("Conv", (4, 9, 7), (6, 4, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ("Conv", (4, 9, 7), (6, 4, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ("Conv", (4, 9, 7), (6, 4, 4, 3), {"auto_pad": "VALID"}),
    "one axis": ("Conv", (4, 20), (6, 4, 5), {"strides": [2], "pads": [3, 1]}),
    "three axes": ("Conv", (2, 4, 5, 6), (3, 2, 2, 3, 2), {"pads": [1, 0, 1, 0, 1, 1]}),
    "Gemm": ("Gemm", (5,), (5, 3), {}),
    "Gemm, transposed": ("Gemm", (5,), (3, 5), {"transB": 1}),
    "MatMul": ("MatMul", (7, 5), (5, 3), {}),
}


@pytest.mark.parametrize("which", LAYERS)
def test_moments_say_what_any_error_in_the_weight_does_to_the_output(
    which: str, tmp_path: Path
) -> None:
    op_type, shape, weight_shape, attributes = LAYERS[which]
    weight = RNG.normal(size=weight_shape).astype(np.float32)
    node = helper.make_node(op_type, ["input", "w"], ["output"], "layer", **attributes)
    model = load_float_model(save(tmp_path / "model.onnx", [node], shape, {"w": weight}))
    inputs = RNG.normal(1.0, 1.0, size=(MOMENT_INPUTS + 5, *shape)).astype(np.float32)
    moments = input_moments(model, ArrayInputs({"input": inputs}), windows=10_000)["w"]
    (layer,) = model.layers
    error = RNG.normal(size=weight_shape).astype(np.float32)
    (output,) = outputs_with(model, {"w": error}, inputs[:MOMENT_INPUTS])
    channel = 1 if op_type == "Conv" else output.ndim - 1
    others = tuple(axis for axis in range(output.ndim) if axis != channel)
    rows = layer.by_group(error)
    rows = rows.reshape(*rows.shape[:2], -1)
    power = np.einsum("goi,gij,goj->go", rows, moments.power(), rows).reshape(-1)
    np.testing.assert_allclose(power, np.square(output).mean(axis=others), rtol=1e-4)
    mean = np.einsum("goi,gi->go", rows, moments.mean[0]).reshape(-1)
    np.testing.assert_allclose(mean, output.mean(axis=others), rtol=1e-3, atol=1e-4)
    varying = np.einsum("goi,gij,goj->go", rows, moments.covariance, rows).reshape(-1)
    np.testing.assert_allclose(varying, output.var(axis=others), rtol=1e-3)
    np.testing.assert_array_equal(layer.from_groups(layer.by_group(error), error.shape), error)


def test_layers_with_one_weight_share_its_moments(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], "first"),
        helper.make_node("Conv", ["a", "w"], ["b"], "second", strides=[2, 2]),
    ]
    weight = RNG.normal(size=(4, 4, 3, 3)).astype(np.float32)
    model = load_float_model(save(tmp_path / "model.onnx", nodes, (4, 9, 9), {"w": weight}))
    inputs = RNG.normal(1.0, 1.0, size=(MOMENT_INPUTS, 4, 9, 9)).astype(np.float32)
    moments = input_moments(model, ArrayInputs({"input": inputs}), windows=10_000)["w"]
    a, b = outputs_with(model, {}, inputs)
    rows = weight.reshape(1, 4, -1)
    power = np.einsum("goi,gij,goj->go", rows, moments.power(), rows)[0]
    windows = [np.moveaxis(output, 1, 0).reshape(4, -1) for output in (a, b)]
    expected = np.square(np.concatenate(windows, axis=1)).mean(axis=1)
    np.testing.assert_allclose(power, expected, rtol=1e-4)
    varying = np.einsum("goi,gij,goj->go", rows, moments.covariance, rows)[0]
    both = sum(part.var(axis=1) * part.shape[1] for part in windows) / moments.number
    np.testing.assert_allclose(varying, both, rtol=1e-3)


def test_of_a_large_layer_some_windows_are_taken(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["input", "w"], ["output"], "layer", pads=[1, 1, 1, 1])
    weight = RNG.normal(size=(4, 2, 3, 3)).astype(np.float32)
    model = load_float_model(save(tmp_path / "model.onnx", [node], (2, 30, 30), {"w": weight}))
    inputs = RNG.normal(size=(MOMENT_INPUTS, 2, 30, 30)).astype(np.float32)
    source = ArrayInputs({"input": inputs})
    some = input_moments(model, source, windows=100)["w"]
    every = input_moments(model, source, windows=900)["w"]
    assert (some.number, every.number) == (100 * MOMENT_INPUTS, 900 * MOMENT_INPUTS)
    np.testing.assert_allclose(some.power(), every.power(), atol=0.1)
    assert not np.array_equal(some.power(), every.power())


def test_other_layers_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["input", "t"], ["a"], "up"),
        helper.make_node("Conv", ["a", "long"], ["b"], "long"),
        helper.make_node("Conv", ["a", "short"], ["c"], "short"),
    ]
    weights = {
        "t": RNG.normal(size=(2, 4, 3, 3)).astype(np.float32),
        "long": RNG.normal(size=(4, 4, 3, 3)).astype(np.float32),
        "short": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
    }
    model = load_float_model(save(tmp_path / "model.onnx", nodes, (2, 9, 9), weights))
    monkeypatch.setattr(layer_inputs, "LONGEST_VECTOR", 35)
    inputs = np.ones((3, 2, 9, 9), dtype=np.float32)
    assert set(input_moments(model, ArrayInputs({"input": inputs}))) == {"short"}
    inputs[1] = 1e25
    assert set(input_moments(model, ArrayInputs({"input": inputs}))) == set()
