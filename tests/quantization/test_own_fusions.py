from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.session import make_session


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("Relu", []),
        ("Clip", [-0.5, 1.5]),
        ("LeakyRelu", [0.2]),
        ("HardSigmoid", [0.3, 0.4]),
        ("Tanh", []),
    ],
)
@pytest.mark.parametrize("residual", ["x", ""])
def test_convolutions_and_their_activations_are_taken_apart(
    tmp_path: Path, activation: str, parameters: list[float], residual: str
) -> None:
    extra = {"activation_params": parameters} if parameters else {}
    inputs = ["x", "w", "" if residual else "b", residual]
    nodes = [
        own("FusedConv", inputs, ["a"], activation=activation, **extra),
        own("FusedConv", ["a", "w2", "b2"], ["y"], activation="Relu"),
    ]
    model = check(tmp_path, nodes, [1, 3, 8, 8], w=(3, 3, 1, 1), b=(3,), w2=(4, 3, 1, 1), b2=(4,))
    after = ["Add", activation] if residual else [activation]
    assert operators(model) == ["Conv", *after, "Conv", "Relu"]


@pytest.mark.parametrize("residual", ["x", ""])
def test_a_fused_convolution_without_an_activation_is_linear(
    tmp_path: Path, residual: str
) -> None:
    node = own("FusedConv", ["x", "w", "b", residual], ["y"])
    model = check(tmp_path, [node], [1, 3, 8, 8], w=(3, 3, 1, 1), b=(3,))
    assert operators(model) == (["Conv", "Add"] if residual else ["Conv"])


def test_matrix_products_and_their_activations_are_taken_apart(tmp_path: Path) -> None:
    nodes = [
        own("FusedGemm", ["x", "w", "b"], ["a"], activation="LeakyRelu", activation_alpha=0.2),
        own("FusedGemm", ["a", "w2"], ["y"], activation="Relu", transB=1),
    ]
    model = check(tmp_path, nodes, [1, 6], w=(6, 5), b=(5,), w2=(4, 5))
    assert operators(model) == ["Gemm", "LeakyRelu", "Gemm", "Relu"]


def test_a_model_for_one_processor_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", domain="com.microsoft.nchwc")
    path = save([node], tmp_path, [1, 8, 8, 8], w=(8, 8, 1, 1))
    with pytest.raises(InputError, match=r"one processor \(node 'conv' is a com.microsoft.nchwc"):
        load_float_model(path)


def own(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    node = helper.make_node(operator, inputs, outputs, **attributes)
    node.domain = "com.microsoft"
    return node


def check(
    folder: Path, nodes: list[onnx.NodeProto], shape: list[int], **shapes: tuple[int, ...]
) -> onnx.ModelProto:
    """The prepared model, which computes what these nodes do."""
    path = save(nodes, folder, shape, **shapes)
    prepared = load_float_model(path).proto
    feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    expected, found = (make_session(m).run(None, feed)[0] for m in (onnx.load(path), prepared))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return prepared


def save(
    nodes: list[onnx.NodeProto], folder: Path, shape: list[int], **shapes: tuple[int, ...]
) -> Path:
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name)
            for name, size in shapes.items()
        ],
    )
    domains = {"", *(node.domain for node in nodes)}
    opsets = [helper.make_opsetid(domain, 1 if domain else 17) for domain in sorted(domains)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
