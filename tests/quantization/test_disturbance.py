from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.disturbance import DisturbableModel
from optuna_quantune.quantization.disturbance import Disturbance
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model


BLOCKS = 8
WIDTH = 12


@pytest.fixture(scope="module")
def weights() -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((WIDTH, WIDTH)) / 3).astype(np.float32) for _ in range(BLOCKS)]


@pytest.fixture(scope="module")
def residual_model(
    tmp_path_factory: pytest.TempPathFactory, weights: list[NDArray[np.float32]]
) -> FloatModel:
    """Blocks of x + relu(x w), so that every cut has values to carry past it."""
    nodes, before = [], "x"
    for number in range(BLOCKS):
        after = f"sum{number}" if number < BLOCKS - 1 else "y"
        nodes += [
            helper.make_node("MatMul", [before, f"w{number}"], [f"h{number}"], name=f"l{number}"),
            helper.make_node("Relu", [f"h{number}"], [f"r{number}"]),
            helper.make_node("Add", [before, f"r{number}"], [after]),
        ]
        before = after
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, WIDTH])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path_factory.mktemp("residual") / "model.onnx"
    onnx.save(model, path)
    return load_float_model(path)


def by_hand(
    x: NDArray[np.float32],
    weights: list[NDArray[np.float32]],
    tensor: str = "",
    error: NDArray[np.float32] | float = 0.0,
) -> NDArray[np.float32]:
    def disturbed(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return value + error if name == tensor else value

    x = disturbed("x", x)
    for number, weight in enumerate(weights):
        r = disturbed(f"r{number}", np.maximum(x @ weight, 0.0))
        x = disturbed(f"sum{number}" if number < BLOCKS - 1 else "y", x + r)
    return x


TENSORS = ["x", *(f"r{i}" for i in range(BLOCKS)), *(f"sum{i}" for i in range(BLOCKS - 1)), "y"]


def test_an_error_reaches_the_output_as_by_hand_from_every_tensor(
    residual_model: FloatModel, weights: list[NDArray[np.float32]]
) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, WIDTH)).astype(np.float32)
    model = DisturbableModel(residual_model, TENSORS, {})
    values = model.start({"x": x})
    np.testing.assert_allclose(values["y"], by_hand(x, weights), rtol=1e-5)
    kept = {name: values[name] for name in model.kept}
    for tensor in TENSORS:
        error = rng.standard_normal((1, WIDTH)).astype(np.float32)
        (output,) = model.run(Disturbance(tensor, error), kept)
        np.testing.assert_allclose(output, by_hand(x, weights, tensor, error), rtol=1e-4)


def test_a_changed_weight_disturbs_as_the_model_with_that_weight_does(
    residual_model: FloatModel, weights: list[NDArray[np.float32]]
) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1, WIDTH)).astype(np.float32)
    changed = {
        f"w{i}": (w + rng.normal(0, 0.1, w.shape)).astype("f4") for i, w in enumerate(weights)
    }
    model = DisturbableModel(residual_model, TENSORS, changed)
    values = model.start({"x": x})
    found = model.changes(["w0", "w5", "w7"], values)
    assert list(found) == ["w0", "w5", "w7"]
    for name, disturbances in found.items():
        # Behind the Relu, where an error is added without keeping it from being fused.
        assert [d.tensor for d in disturbances] == [f"r{name[1:]}"]
        (output,) = model.run(disturbances[0], values)
        others = [changed[name] if f"w{i}" == name else w for i, w in enumerate(weights)]
        np.testing.assert_allclose(output, by_hand(x, others), rtol=1e-4)


def test_a_changed_weight_before_a_concat_disturbs_the_part_that_it_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    left, right = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    after = rng.standard_normal((8, 5)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "left"], ["l"], name="left"),
        helper.make_node("MatMul", ["x", "right"], ["r"], name="right"),
        helper.make_node("Relu", ["l"], ["l_relu"]),
        helper.make_node("Relu", ["r"], ["r_relu"]),
        helper.make_node("Concat", ["l_relu", "r_relu"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "after"], ["y"], name="after"),
    ]
    constants = {"left": left, "right": right, "after": after}
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")
    changed = {"left": left * 1.5, "right": right * 0.5}
    model = DisturbableModel(
        load_float_model(tmp_path / "model.onnx"), ["x", "both", "y"], changed
    )
    x = rng.standard_normal((1, 6)).astype(np.float32)
    # Asked for one by one or together, a weight changes the same.
    values = model.start({"x": x})
    alone = {name: model.changes([name], values)[name] for name in changed}
    together = model.changes(list(changed), values)
    branches = {name: np.maximum(x @ constants[name], 0.0) for name in changed}
    for name, factor in (("left", 1.5), ("right", 0.5)):
        scaled = branches | {name: branches[name] * factor}
        expected = np.concatenate([scaled["left"], scaled["right"]], axis=1) @ after
        for (disturbance,) in (alone[name], together[name]):
            assert disturbance.tensor == "both"
            (output,) = model.run(disturbance, values)
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_an_input_that_nothing_reads_is_taken(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "unread",
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 6])
            for name in ("unread", "x")
        ],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.ones((6, 4), dtype=np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")
    model = DisturbableModel(load_float_model(tmp_path / "model.onnx"), ["x", "y"], {})
    ones = np.ones((1, 6), dtype=np.float32)
    values = model.start({"unread": ones, "x": ones})
    (output,) = model.run(Disturbance("x", ones), values)
    np.testing.assert_array_equal(output, 2.0 * values["y"])


def test_size_counts_axes_that_the_model_leaves_open(tmp_path: Path) -> None:
    weight = np.ones((6, 4), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "sequence",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, "steps", 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "steps", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx")
    model = DisturbableModel(load_float_model(tmp_path / "model.onnx"), ["x", "y"], {})
    values = model.start({"x": np.ones((1, 7, 6), dtype=np.float32)})
    assert model.size(values) == 7 * 6 + 7 * 4
