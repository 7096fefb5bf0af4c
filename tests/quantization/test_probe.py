from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.probe import probe


def two_layers(
    folder: Path, first: NDArray[np.float32], second: NDArray[np.float32]
) -> FloatModel:
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "second"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", len(first)])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", second.shape[1]])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "linear.onnx")
    return load_float_model(folder / "linear.onnx")


def whole(*tensors: str) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(tensors, (-1e9, 1e9))


def test_gains_of_a_linear_model_are_those_of_its_matrices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((400, 300)).astype(np.float32) / 20
    second = rng.standard_normal((300, 500)).astype(np.float32)
    model = two_layers(tmp_path, first, second)
    inputs = [{"x": rng.standard_normal((1, 400)).astype(np.float32)} for _ in range(8)]
    found = probe(model, inputs, whole("x", "h", "y"))
    expected = {"x": first @ second, "h": second, "y": np.eye(500)}
    for tensor, matrix in expected.items():
        # White noise of power 1 in every input gives each output the squared norm of its column.
        gain = np.mean(np.square(matrix).sum(axis=0))
        assert found.noise_gain[tensor] == pytest.approx(gain, rel=0.1)
    assert found.noise_gain["y"] == pytest.approx(1.0, rel=1e-3)
    outputs = np.concatenate([feed["x"] for feed in inputs]) @ first @ second
    assert found.output_power == pytest.approx(np.mean(np.square(outputs)), rel=1e-3)


def test_moments_are_those_of_the_inputs_of_each_layer(
    toy_probe: Probe, toy_inputs: NDArray[np.float32]
) -> None:
    first = toy_inputs[:8].astype(np.float64)
    np.testing.assert_allclose(
        toy_probe.channel_mean["stem"], first.mean(axis=(0, 2, 3)), atol=1e-6
    )
    np.testing.assert_allclose(
        toy_probe.channel_power["stem"], np.square(first).mean(axis=(0, 2, 3)), rtol=1e-6
    )
    assert toy_probe.channel_mean["head"].shape == (16,)


def test_the_same_seed_gives_the_same_gains(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
) -> None:
    feeds = [{"input": toy_inputs[i : i + 1]} for i in range(3)]
    ranges = whole(*toy_statistics.segments)
    runs = [probe(float_model, feeds, ranges, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].noise_gain == pytest.approx(runs[1].noise_gain, rel=1e-6)
    assert runs[0].noise_gain != pytest.approx(runs[2].noise_gain, rel=1e-6)


def test_a_tensor_that_is_always_zero_gains_nothing(tmp_path: Path) -> None:
    model = two_layers(tmp_path, np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32))
    found = probe(model, [{"x": np.ones((1, 4), dtype=np.float32)}], whole("x", "h", "y"))
    assert found.noise_gain["h"] == 0.0


def test_a_channel_that_is_never_active_bears_no_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 200)).astype(np.float32)
    second = rng.standard_normal((200, 400)).astype(np.float32)
    first[:, :100] = 0.0  # these channels of h are always 0,
    second[:100] *= 1e4  # and what follows would amplify noise in them
    model = two_layers(tmp_path, first, second)
    inputs = [{"x": rng.standard_normal((1, 300)).astype(np.float32)} for _ in range(4)]
    found = probe(model, inputs, whole("x", "h", "y"))
    # Per unit of mean power over all values the active half bears twice the power.
    expected = 2 * np.mean(np.square(second[100:]).sum(axis=0))
    assert found.noise_gain["h"] == pytest.approx(expected, rel=0.15)


def test_clipping_is_probed_with_the_range_that_is_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    second = np.ones((64, 8), dtype=np.float32)  # a sum: errors of one sign add up
    model = two_layers(tmp_path, np.eye(64, dtype=np.float32), second)
    inputs = [{"x": np.abs(rng.standard_normal((1, 64))).astype(np.float32)}]
    found = probe(model, inputs, {"x": (0.0, 0.5), "h": (0.0, 0.5), "y": (-1e9, 1e9)})
    error = np.minimum(inputs[0]["x"], 0.5) - inputs[0]["x"]
    expected = np.square(error.sum()) / np.mean(np.square(error))
    assert found.clipping_gain["h"] == pytest.approx(expected, rel=1e-3)
    assert found.clipping_gain["h"] > 10 * found.noise_gain["h"]
