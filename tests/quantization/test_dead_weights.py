"""Weights behind channels that are always 0: no use to the function, a burden to its scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.dead_weights import live_weights
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.quantizer import Quantizer


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]
MakeQuantizer = Callable[..., Quantizer]


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel without weights and with a negative bias, and huge weights that read it."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    second = rng.standard_normal((5, 8, 1, 1)).astype(np.float32)
    bias = rng.standard_normal(8).astype(np.float32)
    first[2], bias[2], second[:, 2] = 0.0, -0.1, 300.0
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "first", "bias"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="relu"),
            helper.make_node("Conv", ["b", "second"], ["out"], name="second"),
        ],
        "dead",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [value("out", onnx.TensorProto.FLOAT, ["batch", 5, 14, 14])],
        [
            numpy_helper.from_array(first, "first"),
            numpy_helper.from_array(bias, "bias"),
            numpy_helper.from_array(second, "second"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    path = tmp_path_factory.mktemp("models") / "dead.onnx"
    onnx.save(model, path)
    return path


def test_the_float_function_does_not_depend_on_them(
    dead: Path, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    model = load_float_model(dead)
    zeroed = onnx.ModelProto()
    zeroed.CopyFrom(model.proto)
    live = live_weights(model)["second"]
    assert not live[:, 2].any()
    for tensor in zeroed.graph.initializer:
        if tensor.name == "second":
            tensor.CopyFrom(numpy_helper.from_array(live, "second"))
    np.testing.assert_array_equal(run(zeroed, toy_inputs), run(model.proto, toy_inputs))


def test_zeroed_they_decide_no_scale(
    dead: Path, toy_inputs: NDArray[np.float32], run: Run, make_quantizer: MakeQuantizer
) -> None:
    model = load_float_model(dead)
    quantizer = make_quantizer(model, toy_inputs)
    reference = run(model.proto, toy_inputs)

    def noise(*, zeroed: bool) -> tuple[float, NDArray[np.float32]]:
        config = QuantizationConfig(
            scheme="symmetric", granularity="tensor", zero_dead_weights=zeroed
        )
        proto = quantizer.quantize(config).proto
        constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        outputs = run(proto, toy_inputs)
        weight = constants["second_quantized"] * constants["second_scale"]
        return float(np.mean((outputs - reference) ** 2)), weight

    kept_noise, kept = noise(zeroed=False)
    zeroed_noise, zeroed = noise(zeroed=True)
    assert np.abs(kept).max() == pytest.approx(300.0, rel=1e-2)
    assert not zeroed[:, 2].any()
    alive = np.delete(model.weights["second"], 2, axis=1)
    step = np.abs(alive).max() / 127
    assert np.abs(np.delete(zeroed, 2, axis=1) - alive).max() <= 0.51 * step
    assert zeroed_noise < 0.01 * kept_noise
