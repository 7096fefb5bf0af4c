"""Models with branches: what an If reads lies in the graph around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.space import SearchSpace


def branching(folder: Path) -> Path:
    """A convolution, one of two on its result with weights that no other node reads, another."""
    rng = np.random.default_rng(0)

    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 6, 6])
        nodes = [helper.make_node("Conv", ["found", f"w_{name}"], [name], f"conv_{name}")]
        return helper.make_graph(nodes, name, [], [output])

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = rng.normal(0.0, 0.3, shape).astype(np.float32)
        return numpy_helper.from_array(values, name)

    chosen = {"then_branch": branch("high"), "else_branch": branch("low")}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["first"], "conv"),
        helper.make_node("Relu", ["first"], ["found"], "relu"),
        helper.make_node("ReduceMean", ["x"], ["mean"], "mean", keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["is_high"], "greater"),
        helper.make_node("If", ["is_high"], ["either"], "if", **chosen),
        helper.make_node("Conv", ["either", "w_last"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "branching",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 4, 4])],
        [
            *(weight("w", 4, 3, 3, 3), weight("b", 4), weight("w_last", 2, 4, 3, 3)),
            *(weight("w_high", 4, 4, 3, 3), weight("w_low", 4, 4, 3, 3)),
            numpy_helper.from_array(np.float32(0.0), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = folder / "branching.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "knobs",
    [
        {"calibration_images": "all"},
        {"clipping": "kl", "granularity": "tensor"},
        {"mixed_precision": "first_last", "equalization": True},
        {"float_layers": 2, "bias_correction": True},
    ],
)
def test_branches_keep_what_only_they_read(
    knobs: dict[str, str | bool | int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(64, 3, 10, 10)).astype(np.float32)
    path = branching(tmp_path)
    objective = QuantizationObjective(
        path,
        calibration=ArrayInputs(inputs[:32]),
        evaluation=ArrayInputs(inputs[32:]),
        metric="sqnr_db",
        space=SearchSpace.preset("extended"),
        cache=None,
    )
    proto = objective.quantize(QuantizationConfig.from_dict(dict(knobs))).proto
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    float_session = onnxruntime.InferenceSession(str(path))
    for sign in (1.0, -1.0):  # one branch, then the other
        x = sign * np.abs(inputs[32:40])
        (expected,), (computed,) = float_session.run(None, {"x": x}), session.run(None, {"x": x})
        assert np.sum((computed - expected) ** 2) < 0.02 * np.sum(expected**2)
