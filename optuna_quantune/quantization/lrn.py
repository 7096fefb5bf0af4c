"""LRN without powers.

ONNX Runtime raises every value to a power, one after the other: 100 of GoogLeNet's 150 ms. With
the exponent 0.75, which LRN has in all published networks, two square roots do the same.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import helper

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.rewriting import Rewriting


_EXPONENT: Final = 0.75


def without_powers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float model that computes the same, but for the rounding of float32.

    It is the model itself where there is no LRN; one with another exponent stays.
    """
    if all(node.op_type != "LRN" for node in proto.graph.node):
        return proto
    copy = copy_of(proto)
    shapes = {n: s for n, s in tensor_shapes(proto.graph).items() if 0 not in s[1:2]}
    graph = Rewriting(copy.graph, shapes)
    for node in graph.left():
        if node.op_type == "LRN":
            take_square_roots(graph, node)
    graph.write()
    return copy


def needs_no_power(lrn: onnx.NodeProto) -> bool:
    """Whether two square roots do what an LRN's power does."""
    return bool(abs(attribute_of(lrn, "beta", _EXPONENT) - _EXPONENT) <= 1e-6)


def take_square_roots(graph: Rewriting, lrn: onnx.NodeProto) -> None:
    """Writes ``x / (bias + alpha / size * sum(x ** 2)) ** 0.75`` without the power.

    The sum goes over neighbouring channels: a 1 x 1 convolution with a banded weight.
    """
    shape = graph.shape_before(lrn)
    if shape is None or not needs_no_power(lrn):
        return
    size = attribute_of(lrn, "size")
    alpha, bias = attribute_of(lrn, "alpha", 1e-4), attribute_of(lrn, "bias", 1.0)
    channels = np.arange(shape[1])
    distance = channels[None, :] - channels[:, None]
    band = (distance >= -((size - 1) // 2)) & (distance <= size // 2)
    weight = (alpha / size * band).astype(np.float32).reshape(*band.shape, *[1] * (len(shape) - 2))
    source, result = lrn.input[0], lrn.output[0]
    squares, sums, root, fourth_root, power = (
        f"{result}__{part}" for part in ("squares", "sums", "root", "fourth_root", "power")
    )
    operands = [
        graph.add_constant(f"{result}__band", weight),
        graph.add_constant(f"{result}__bias", np.full(shape[1], bias, np.float32)),
    ]
    graph.replace(
        lrn,
        [
            helper.make_node("Mul", [source, source], [squares]),
            helper.make_node("Conv", [squares, *operands], [sums]),
            helper.make_node("Sqrt", [sums], [root]),
            helper.make_node("Sqrt", [root], [fourth_root]),
            helper.make_node("Mul", [root, fourth_root], [power]),
            helper.make_node("Div", [source, power], [result]),
        ],
    )
