"""What transformers have and CNNs lack: tables of tokens, layer normalization and its biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def looked_up(folder: Path) -> Path:
    """Tokens looked up in a table, and a layer."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(50, WIDTH))
    table[40:] *= 8.0  # tokens that no calibration input has
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["embedded"], name="lookup"),
            helper.make_node("MatMul", ["embedded", "w"], ["rows"], name="project"),
            helper.make_node("ReduceMean", ["rows"], ["y"], name="mean", axes=[1], keepdims=0),
        ],
        "tokens",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", TOKENS])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5])],
        [
            numpy_helper.from_array(table.astype(np.float32), "table"),
            numpy_helper.from_array(rng.normal(size=(WIDTH, 5)).astype(np.float32), "w"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = folder / "tokens.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("target", ["cpu", "vta"])
@pytest.mark.parametrize("clipping", ["max", "kl"])
def test_a_table_keeps_all_its_values_whatever_calibration_looks_up(
    target: str, clipping: str, tmp_path: Path
) -> None:
    path = looked_up(tmp_path)
    ids = np.random.default_rng(3).integers(0, 40, size=(96, TOKENS))
    space = SearchSpace.preset("vta" if target == "vta" else "quantune")
    objective = QuantizationObjective(
        path,
        calibration=ArrayInputs(ids[:48]),
        evaluation=ArrayInputs(ids[48:]),
        metric="sqnr_db",
        space=space,
        target=target,
        cache=None,
    )
    knobs = next(params for params in space.grid() if params["clipping"] == clipping)
    proto = objective.quantize(space.config(knobs)).proto
    onnx.checker.check_model(proto)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert len(constants) == len(proto.graph.initializer)
    steps = constants["table_quantized"].astype(np.int32) - constants["table_zero_point"]
    table = numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    scale = constants["table_scale"]
    assert np.abs(steps * scale - table).max() <= scale * 0.51
    predicted = objective.features(knobs)["predicted_sqnr_db"]
    measured = objective.evaluate(proto).measurement.sqnr_db
    assert measured is not None
    assert predicted == pytest.approx(measured, abs=6.0)


def of_noise(model: Path, inputs: NDArray[Any]) -> QuantizationObjective:
    return QuantizationObjective(
        model,
        calibration=ArrayInputs(inputs),
        evaluation=ArrayInputs(inputs),
        metric="sqnr_db",
        cache=None,
    )


@pytest.mark.parametrize("chosen", [("project",), ("mean", "project"), ("lookup", "project")])
def test_a_table_has_its_noise_also_where_float_nodes_read_it(
    chosen: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(3).integers(0, 50, size=(96, TOKENS))
    objective = of_noise(looked_up(tmp_path), ids)
    monkeypatch.setattr(objective.quantizer, "float_layers", lambda config: chosen)
    knobs = {"calibration_images": "all"}
    proto = objective.quantize(QuantizationConfig.from_dict(dict(knobs))).proto
    measured = objective.evaluate(proto).measurement.sqnr_db
    predicted = objective.features(dict(knobs))["predicted_sqnr_db"]
    integers = {tensor.name for tensor in proto.graph.initializer} & {"table_quantized"}
    assert bool(integers) == ("lookup" not in chosen)
    # Nothing but the table is rounded, and not all of it is dequantized.
    (lookup,) = (node for node in proto.graph.node if node.op_type == "Gather")
    (reader,) = (node for node in proto.graph.node if lookup.output[0] in node.input)
    assert (reader.op_type == "QuantizeLinear") == bool(integers)
    assert measured is not None
    if integers:
        assert predicted == pytest.approx(measured, abs=1.0)
    else:
        assert min(predicted, measured) > 100.0


def test_a_table_is_in_the_order_of_float_layers(tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 50, size=(96, TOKENS))
    objective = of_noise(looked_up(tmp_path), ids)
    graph = objective.placed_graph
    assert {"lookup", "project"} <= graph.nodes.keys()
    whole = graph.noise(frozenset())
    assert graph.noise(frozenset({"lookup", "project"})) < 0.5 * whole
    project = graph.noise(frozenset({"project"}))
    assert project - graph.noise(frozenset({"lookup", "project"})) == pytest.approx(
        graph.tensors["embedded"].noise
    )


def masked_logits(folder: Path) -> Path:
    """Products of queries and keys, with minus infinity for the tokens behind each."""
    rng = np.random.default_rng(4)
    constants = {
        "wq": rng.normal(0.0, 0.25, (WIDTH, WIDTH)),
        "wk": rng.normal(0.0, 0.25, (WIDTH, WIDTH)),
        "mask": np.triu(np.full((TOKENS, TOKENS), -np.inf), 1),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], name="key"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="product"),
        helper.make_node("Add", ["scores", "mask"], ["y"], name="masking"),
    ]
    graph = helper.make_graph(
        nodes,
        "masked",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", TOKENS, WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", TOKENS, TOKENS])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = folder / "masked.onnx"
    onnx.save(model, path)
    return path


def test_infinite_outputs_count_neither_as_signal_nor_as_noise(tmp_path: Path) -> None:
    inputs = np.random.default_rng(5).normal(size=(96, TOKENS, WIDTH)).astype(np.float32)
    objective = of_noise(masked_logits(tmp_path), inputs)
    for granularity in ("tensor", "channel"):
        knobs = {"granularity": granularity, "calibration_images": "all"}
        config = QuantizationConfig.from_dict(dict(knobs))
        measured = objective.evaluate(objective.quantize(config).proto).measurement.sqnr_db
        assert measured is not None
        features = objective.features(dict(knobs))
        assert all(np.isfinite(value) for value in features.values())
        assert features["predicted_sqnr_db"] == pytest.approx(measured, abs=1.0)
