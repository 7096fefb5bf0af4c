from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.lrn import without_powers
from optuna_quantune.quantization.model import load_float_model


INPUTS = 3 * np.random.default_rng(0).standard_normal((6, 12, 8, 8)).astype(np.float32)


def network(*, beta: float = 0.75, size: int = 5) -> onnx.ModelProto:
    weight = np.random.default_rng(1).standard_normal((12, 12, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["conv"], name="conv"),
        helper.make_node(
            "LRN", ["conv"], ["normal"], name="lrn", size=size, alpha=0.9, beta=beta, bias=1.3
        ),
        helper.make_node("Relu", ["normal"], ["out"], name="relu"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "model",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 12, 8, 8])],
        [value("out", onnx.TensorProto.FLOAT, ["batch", 12, 8, 8])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, outputs: Sequence[str]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    results: list[NDArray[np.float32]] = session.run(list(outputs), {"input": INPUTS})
    return results


@pytest.mark.parametrize("size", [1, 3, 5, 25])
def test_lrn_without_powers_is_lrn(size: int) -> None:
    model = network(size=size)
    rewritten = without_powers(model)
    assert "LRN" in {node.op_type for node in model.graph.node}
    assert "LRN" not in {node.op_type for node in rewritten.graph.node}
    # ONNX Runtime's own sum takes away what it has added before, and rounds each time.
    np.testing.assert_allclose(run(rewritten, ["out"])[0], run(model, ["out"])[0], rtol=1e-4)


def test_other_exponents_unknown_channels_and_other_models_stay() -> None:
    unknown = network()
    del unknown.graph.value_info[:]
    for model in (network(beta=0.5), unknown):
        assert "LRN" in {node.op_type for node in without_powers(model).graph.node}
    none = network()
    none.graph.node[1].CopyFrom(helper.make_node("Identity", ["conv"], ["normal"]))
    assert without_powers(none) is none


def test_calibration_has_the_statistics_of_the_model_with_powers(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "lrn.onnx")
    model = load_float_model(tmp_path / "lrn.onnx")
    source = ArrayInputs({"input": INPUTS})
    tensors = ["conv", "normal", "out"]
    statistics = calibrate(model, source, tensors, sizes=["all"])
    with_outputs = network()
    with_outputs.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors[:2]
    )
    for tensor, values in zip(tensors, run(with_outputs, tensors), strict=True):
        histogram = statistics.histogram(tensor, statistics.resolve("all"))
        assert histogram.total == values.size
        assert histogram.minimum == pytest.approx(values.min(), rel=1e-4)
        assert histogram.maximum == pytest.approx(values.max(), rel=1e-4)
