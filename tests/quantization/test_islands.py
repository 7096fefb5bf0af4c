"""Arithmetic between float nodes is computed in float, and only that."""

from __future__ import annotations

from onnx import helper
from onnx import TensorProto

from optuna_quantune.quantization.islands import between_float_nodes


def found(*nodes: tuple[str, list[str], str], kept: tuple[str, ...] = ()) -> set[str]:
    """Names are those of the outputs; the input is x, a weight w, the last one the output."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], output) for op, inputs, output in nodes],
        "graph",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value(nodes[-1][2], TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.0] * 16)],
    )
    return set(between_float_nodes(graph, kept))


def test_what_reads_float_values_only_is_computed_in_float() -> None:
    nodes = [("MatMul", ["x", "w"], "a"), ("Sqrt", ["a"], "b"), ("Add", ["b", "w"], "c")]
    more = [("Relu", ["c"], "d"), ("Mul", ["d", "w"], "e"), ("MatMul", ["e", "w"], "f")]
    assert found(*nodes, *more) == {"c", "e"}


def test_what_only_float_nodes_read_is_computed_in_float() -> None:
    nodes = [("MatMul", ["x", "w"], "a"), ("Add", ["a", "w"], "b"), ("Transpose", ["b"], "c")]
    assert found(*nodes, ("Sqrt", ["c"], "d"), ("MatMul", ["d", "w"], "e")) == {"b"}
    # A table is faster than the function in float.
    nodes[1] = ("Sigmoid", ["a"], "b")
    assert found(*nodes, ("Sqrt", ["c"], "d"), ("MatMul", ["d", "w"], "e")) == set()


def test_what_stands_between_layers_stays() -> None:
    nodes = [("MatMul", ["x", "w"], "a"), ("MatMul", ["x", "w"], "b"), ("Add", ["a", "b"], "c")]
    assert found(*nodes, ("MatMul", ["c", "w"], "d")) == set()
    assert found(*nodes, ("Sqrt", ["c"], "d"), ("MatMul", ["c", "w"], "e")) == set()
    assert found(*nodes) == set()  # what the model gives


def test_nodes_that_are_kept_in_float_count_as_such() -> None:
    nodes = [("MatMul", ["x", "w"], "a"), ("Add", ["a", "w"], "b"), ("MatMul", ["b", "w"], "c")]
    assert found(*nodes) == set()
    assert found(*nodes, kept=("a",)) == {"b"}


def test_an_input_is_no_integer_yet() -> None:
    assert found(("Mul", ["x", "w"], "a"), ("MatMul", ["a", "w"], "b")) == {"a"}
