"""What transformers have and CNNs lack: layer normalization, its biases, products of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.space import SearchSpace


TOKENS, WIDTH = 6, 16


def attention(folder: Path) -> Path:
    """Normalized projections and their product.

    Two normalizations have one bias, and of the third gain and bias are one tensor.
    """
    rng = np.random.default_rng(0)

    def constant(name: str, values: NDArray[np.float64]) -> onnx.TensorProto:
        return numpy_helper.from_array(values.astype(np.float32), name)

    constants = [
        constant("gain", rng.uniform(0.5, 1.5, WIDTH)),
        constant("shared_bias", rng.normal(size=WIDTH)),
        constant("wq", rng.normal(size=(WIDTH, WIDTH))),
        constant("wk", rng.normal(size=(WIDTH, WIDTH))),
        constant("wo", rng.normal(size=(TOKENS, 5))),
    ]
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shared_bias"], ["n1"], name="norm1"),
        helper.make_node("MatMul", ["n1", "wq"], ["q"], name="query"),
        helper.make_node("LayerNormalization", ["q", "gain", "shared_bias"], ["n2"], name="norm2"),
        helper.make_node("MatMul", ["n2", "wk"], ["k"], name="key"),
        helper.make_node("LayerNormalization", ["k", "gain", "gain"], ["n3"], name="norm3"),
        helper.make_node("Transpose", ["n3"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="product"),
        helper.make_node("Softmax", ["scores"], ["shares"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "wo"], ["rows"], name="out"),
        helper.make_node("ReduceMean", ["rows"], ["y"], name="mean", axes=[1], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", TOKENS, WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = folder / "attention.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> QuantizationObjective:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(96, TOKENS, WIDTH)).astype(np.float32)
    return QuantizationObjective(
        attention(tmp_path_factory.mktemp("attention")),
        calibration=ArrayInputs(inputs[:48]),
        evaluation=ArrayInputs(inputs[48:]),
        metric="sqnr_db",
        space=SearchSpace.preset("extended"),
        cache=None,
    )


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"scheme": "symmetric_power2", "granularity": "tensor"},
        {"clipping": "kl", "mixed_precision": "first_last"},
        {"bias_correction": True, "equalization": True, "float_layers": 2},
    ],
)
def test_a_bias_that_several_normalizations_share_is_each_ones_own(
    objective: QuantizationObjective, knobs: dict[str, str | bool | int]
) -> None:
    config = QuantizationConfig.from_dict(dict(knobs))
    quantized = objective.quantize(config)
    onnx.checker.check_model(quantized.proto)
    measured = objective.evaluate(quantized.proto).measurement.sqnr_db
    assert measured is not None
    assert measured > 10.0
    predicted = objective.features(dict(knobs))["predicted_sqnr_db"]
    assert predicted == pytest.approx(measured, abs=6.0)
