"""Graphs are written out by hand; what is said of them is compared with what stands there."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.graph import sort_nodes
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.graph import with_outputs


@pytest.fixture
def model() -> onnx.ModelProto:
    """``a = input + one; b = a * a; c = relu(b)``, with the outputs b and c."""
    nodes = [
        helper.make_node("Add", ["input", "one"], ["a"], name="add"),
        helper.make_node("Mul", ["a", "a"], ["b"], name="square"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "bc"
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        values,
        [numpy_helper.from_array(np.ones(3, np.float32), "one")],
        value_info=[helper.make_tensor_value_info("a", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def conditional() -> onnx.NodeProto:
    """An If of which one branch reads the tensors `outer` and, in a node of its own, `inner`."""
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [3])
    branch = helper.make_graph(
        [
            helper.make_node("Neg", ["outer"], ["inner"]),
            helper.make_node("Neg", ["inner"], ["result"]),
        ],
        "then",
        [],
        [result],
    )
    constant = numpy_helper.from_array(np.zeros(3, np.float32))
    other = helper.make_graph(
        [helper.make_node("Constant", [], ["result"], value=constant)], "else", [], [result]
    )
    return helper.make_node(
        "If", ["condition"], ["chosen"], name="if", then_branch=branch, else_branch=other
    )


def test_a_view_knows_who_writes_and_who_reads_each_tensor(model: onnx.ModelProto) -> None:
    view = GraphView(model.graph)
    assert {name: node.name for name, node in view.writers.items()} == {
        "a": "add",
        "b": "square",
        "c": "relu",
    }
    assert {name: [node.name for node in nodes] for name, nodes in view.readers.items()} == {
        "input": ["add"],
        "one": ["add"],
        "a": ["square", "square"],
        "b": ["relu"],
    }
    assert view.outputs == {"b", "c"}
    assert list(view.constants) == ["one"]


def test_a_change_to_a_node_of_a_view_is_one_to_the_graph(model: onnx.ModelProto) -> None:
    GraphView(model.graph).writers["c"].op_type = "Sigmoid"
    assert model.graph.node[2].op_type == "Sigmoid"


def test_a_sole_reader_shares_the_tensor_with_no_node_and_no_output(
    model: onnx.ModelProto,
) -> None:
    view = GraphView(model.graph)
    sole = view.sole_reader("input")
    assert sole is not None
    assert sole.name == "add"
    assert view.sole_reader("a") is None  # read twice
    assert view.sole_reader("b") is None  # an output, too
    assert view.sole_reader("c") is None  # read by none


def test_a_node_reads_what_a_graph_within_it_needs_from_outside(model: onnx.ModelProto) -> None:
    assert reads(conditional()) == ["condition", "outer"]
    refill(model.graph.node, [conditional()])
    assert [node.name for node in GraphView(model.graph).readers["outer"]] == ["if"]


def test_attributes_are_numbers_bytes_or_lists() -> None:
    pool = helper.make_node(
        "AveragePool", ["x"], ["y"], kernel_shape=[3, 2], ceil_mode=1, auto_pad="VALID"
    )
    assert attribute_of(pool, "kernel_shape") == [3, 2]
    assert attribute_of(pool, "ceil_mode", 0) == 1
    assert attribute_of(pool, "auto_pad") == b"VALID"
    assert attribute_of(pool, "pads") is None
    assert attribute_of(pool, "count_include_pad", 0) == 0


def test_constants_are_initializers_and_constant_nodes(model: onnx.ModelProto) -> None:
    two = numpy_helper.from_array(np.full(2, 2, np.int64))
    model.graph.node.append(helper.make_node("Constant", [], ["two"], value=two))
    values = constant_values(model.graph)
    assert sorted(values) == ["one", "two"]
    np.testing.assert_array_equal(values["one"], np.ones(3, np.float32))
    np.testing.assert_array_equal(values["two"], [2, 2])


def test_free_dimensions_are_0_and_unknown_shapes_are_left_out(model: onnx.ModelProto) -> None:
    model.graph.value_info.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, []))
    assert tensor_shapes(model.graph) == {"input": (0, 3), "d": (), "b": (0, 3), "c": (0, 3)}


def test_a_copy_leaves_the_original_alone(model: onnx.ModelProto) -> None:
    node = model.graph.node[0]
    copy = copy_of(node)
    assert copy == node
    copy.input[0] = "other"
    assert node.input[0] == "input"


def test_a_field_is_refilled_with_messages_of_its_own(model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    refill(nodes, (node for node in nodes if node.name != "square"))
    assert [node.name for node in nodes] == ["add", "relu"]
    first, last = nodes
    last.name = "changed"
    refill(nodes, [last, helper.make_node("Neg", ["c"], ["d"]), first])
    assert [node.name for node in nodes] == ["changed", "", "add"]
    assert list(nodes[2].input) == ["input", "one"]
    first.name = "no longer part of the graph"
    assert nodes[2].name == "add"


def test_other_outputs_replace_those_of_a_model(model: onnx.ModelProto) -> None:
    before = copy_of(model)
    inner = with_outputs(model, ["a"])
    session = onnxruntime.InferenceSession(inner.SerializeToString())
    (values,) = session.run(None, {"input": np.zeros((1, 3), np.float32)})
    np.testing.assert_array_equal(values, np.ones((1, 3)))
    assert model == before


def test_what_a_loop_brings_along_is_not_read_from_outside() -> None:
    """Its counter, condition and state are inputs of its body; weights may lie in the body."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Mul", ["state", "factor"], ["next"])],
        "body",
        [
            value("count", TensorProto.INT64, []),
            value("go_on", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, [3]),
        ],
        # The condition is handed on as it is; `outer` is an output that the body does not compute.
        [
            value("go_on", TensorProto.BOOL, []),
            value("next", TensorProto.FLOAT, [3]),
            value("outer", TensorProto.FLOAT, [3]),
        ],
        [numpy_helper.from_array(np.ones(3, np.float32), "factor")],
    )
    loop = helper.make_node("Loop", ["n", "", "start"], ["end", "all"], name="loop", body=body)
    assert reads(loop) == ["n", "start", "outer"]


def test_nodes_are_sorted_by_what_they_and_their_branches_read(model: onnx.ModelProto) -> None:
    graph = model.graph
    graph.node.insert(0, helper.make_node("Neg", ["b"], ["outer"], name="negative"))
    graph.node.insert(0, conditional())
    sort_nodes(graph)
    assert [node.name for node in graph.node] == ["add", "square", "relu", "negative", "if"]
    sort_nodes(graph)
    assert [node.name for node in graph.node] == ["add", "square", "relu", "negative", "if"]
