"""What nodes are expected to take: how the estimates compare, not how long anything takes here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.node_time import conversion_time
from optuna_quantune.quantization.node_time import fastest_groups
from optuna_quantune.quantization.node_time import Kind
from optuna_quantune.quantization.node_time import node_time
from optuna_quantune.quantization.node_time import sizes_of


SIZES = {
    "x": (64, 28, 28),
    "few": (3, 28, 28),
    "less": (62, 28, 28),
    "row": (512,),
    "rows": (64, 512),
}
WEIGHTS = {
    "pointwise": (64, 64, 1, 1),
    "dense": (64, 64, 3, 3),
    "depthwise": (64, 1, 3, 3),
    "odd": (62, 1, 3, 3),
    "grouped": (64, 16, 3, 3),
    "stem": (64, 3, 3, 3),
    "linear": (512, 512),
}
INPUTS = {"stem": "few", "odd": "less", "linear": "row"}
GROUPS = {"depthwise": 64, "odd": 62, "grouped": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    """Every kind of layer beside the others."""
    value = helper.make_tensor_value_info
    nodes = []
    for name in WEIGHTS:
        source, output = INPUTS.get(name, "x"), f"{name}.out"
        if name == "linear":
            nodes.append(helper.make_node("MatMul", [source, name], [output], name))
            continue
        pads = [WEIGHTS[name][-1] // 2] * 4
        attributes = {"pads": pads, "group": GROUPS.get(name, 1)}
        nodes.append(helper.make_node("Conv", [source, name], [output], name, **attributes))
    nodes.append(helper.make_node("Add", ["x", "dense.out"], ["add.out"], "add"))
    for name, beta in (("lrn", 0.75), ("other_lrn", 0.5)):
        nodes.append(helper.make_node("LRN", ["x"], [f"{name}.out"], name, size=5, beta=beta))
    graph = helper.make_graph(
        nodes,
        "layers",
        [value(n, TensorProto.FLOAT, ["n", *SIZES[n]]) for n in ("x", "few", "less", "row")],
        [value(f"{n.name}.out", TensorProto.FLOAT, None) for n in nodes],
        [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in WEIGHTS.items()],
    )
    path = tmp_path_factory.mktemp("layers") / "layers.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return load_float_model(path)


def time(
    model: FloatModel, name: str, kind: Kind, read: str | None = None, *, in_pairs: bool = False
) -> float:
    (node,) = (n for n in model.proto.graph.node if n.name == name)
    source = read or INPUTS.get(name, "x")
    written = (64, 28, 28) if name != "linear" else SIZES[source]
    sizes = {node.input[0]: SIZES[source], node.output[0]: written}
    return node_time(node, model, sizes, kind, in_pairs=in_pairs)


@pytest.mark.parametrize("name", ["pointwise", "dense", "linear", "add"])
def test_integers_take_less_time_where_there_is_much_to_multiply_or_to_read(
    model: FloatModel, name: str
) -> None:
    assert time(model, name, "int8") < 0.8 * time(model, name, "float")


@pytest.mark.parametrize("name", ["pointwise", "dense", "grouped"])
def test_products_that_are_added_in_pairs_take_longer(model: FloatModel, name: str) -> None:
    assert time(model, name, "int8", in_pairs=True) > 1.3 * time(model, name, "int8")
    assert time(model, name, "float", in_pairs=True) == time(model, name, "float")


@pytest.mark.parametrize("name", ["depthwise", "add"])
def test_what_adds_no_pairs_takes_as_long_with_and_without_them(
    model: FloatModel, name: str
) -> None:
    assert time(model, name, "int8", in_pairs=True) == time(model, name, "int8")


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_multiplies_more_takes_longer(model: FloatModel, kind: Kind) -> None:
    assert time(model, "depthwise", kind) < 0.5 * time(model, "dense", kind)
    assert time(model, "pointwise", kind) < 0.5 * time(model, "dense", kind)
    assert time(model, "linear", kind) < 0.5 * time(model, "linear", kind, read="rows")


def test_the_integer_layer_with_few_channels_copies_them_tap_by_tap(model: FloatModel) -> None:
    assert time(model, "stem", "int8") > 0.9 * time(model, "stem", "float")


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_groups_save_time_and_cost_some(model: FloatModel, kind: Kind) -> None:
    assert time(model, "dense", kind) / 4.0 < time(model, "grouped", kind)
    assert time(model, "grouped", kind) < time(model, "dense", kind)


def test_a_power_takes_longer_than_the_square_roots_of_a_quantized_model(
    model: FloatModel,
) -> None:
    assert time(model, "lrn", "float") > 5.0 * time(model, "lrn", "int8")
    assert time(model, "other_lrn", "int8") > 0.9 * time(model, "other_lrn", "float")


def test_odd_channels_of_a_float_depthwise_convolution_take_long(model: FloatModel) -> None:
    assert time(model, "odd", "float") > 5.0 * time(model, "depthwise", "float")


@pytest.mark.parametrize(
    ("shape", "groups", "fastest"),
    [
        ((128, 4, 3, 3), 32, 4),  # ResNeXt-50, whose groups leave the processor idle
        ((1024, 32, 3, 3), 32, 32),
        ((440, 8, 3, 3), 55, 11),  # RegNetY-400MF
        ((256, 48, 5, 5), 2, 2),  # AlexNet, whose groups do not
        ((60, 20, 1, 1), 3, 1),
        ((64, 64, 1, 1), 1, 1),
    ],
)
def test_narrow_groups_are_fastest_together(
    shape: tuple[int, ...], groups: int, fastest: int
) -> None:
    assert fastest_groups(shape, groups) == fastest


def test_a_conversion_takes_a_pass_over_the_values() -> None:
    assert conversion_time(2e5) == pytest.approx(2.0 * conversion_time(1e5), rel=0.1)
    assert conversion_time(1e6) > 5.5 * conversion_time(2e5)  # they leave the cache


def test_tokens_in_place_of_a_fixed_batch_are_counted() -> None:
    """As where ONNX Runtime's tools make a Gemm of a MatMul in a model with a batch of 1."""
    shapes = {"tokens": [196, 192], "one": [1, 196, 192], "free": ["n", 196, 192], "scalar": []}
    graph = helper.make_graph(
        [],
        "shapes",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()],
        [],
    )
    assert sizes_of(graph) == {
        "tokens": (196, 192),
        "one": (196, 192),
        "free": (196, 192),
        "scalar": (),
    }


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_products_of_attention_and_of_recurrent_nodes_are_counted(
    model: FloatModel, kind: Kind
) -> None:
    sizes = {"q": (12, 196, 64), "k": (12, 64, 196), "scores": (12, 196, 196)}
    product = helper.make_node("MatMul", ["q", "k"], ["scores"])
    addition = helper.make_node("Add", ["scores", "scores"], ["scores"])
    assert node_time(product, model, sizes, kind) > 2.0 * node_time(addition, model, sizes, kind)

    def recurrent(**attributes: object) -> float:
        node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=64, **attributes)
        return node_time(node, model, {"x": (50, 1, 32), "y": (50, 1, 1, 64)}, kind)

    products = 50 * 4 * 64 * (32 + 64)
    assert recurrent() > 0.01 * products  # nanoseconds
    assert recurrent(direction="bidirectional") > 1.8 * recurrent()
