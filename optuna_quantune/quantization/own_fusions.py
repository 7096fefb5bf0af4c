"""Layers that ONNX Runtime has fused with what follows them, taken apart again.

A model that it has optimized and saved has a FusedConv where a Conv and its Relu were. Neither
``quantize_static`` nor an integer kernel knows that operator: half of a network stays in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from typing import Final

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import OWN_DOMAIN
from optuna_quantune.quantization.graph import refill


# Operators in the order of channels of one processor, which nothing can take apart.
BLOCKED_DOMAIN: Final = "com.microsoft.nchwc"
_PLAIN: Final = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
# Attributes of each activation, in the order in which its parameters are given.
_PARAMETERS: Final = {
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
}


def without_own_fusions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A model that computes the same; it is the model itself where nothing is fused."""
    if not any(map(_is_fused, proto.graph.node)):
        return proto
    copy = copy_of(proto)
    graph = copy.graph
    refill(graph.node, [part for node in graph.node for part in _taken_apart(node, graph)])
    return copy


def _is_fused(node: onnx.NodeProto) -> bool:
    known = _activation(node) in ("", "Clip", *_PARAMETERS)
    return node.domain == OWN_DOMAIN and node.op_type in _PLAIN and known


def _activation(node: onnx.NodeProto) -> str:
    """What is computed of the layer's result; nothing where it is not said."""
    return bytes(attribute_of(node, "activation", b"")).decode()


def _taken_apart(node: onnx.NodeProto, graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    if not _is_fused(node):
        yield node
        return
    (result,) = node.output
    name, activation = node.name or result, _activation(node)
    own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes = {key: own[key] for key in own if not key.startswith("activation")}
    inputs = list(node.input[:3])
    while not inputs[-1]:
        inputs.pop()
    added = [other for other in node.input[3:] if other]  # by a residual connection
    total = f"{result}__sum" if activation else result
    product = f"{result}__product" if added else total
    yield helper.make_node(_PLAIN[node.op_type], inputs, [product], node.name, **attributes)
    if added:
        yield helper.make_node("Add", [product, *added], [total], f"{name}__add")
    if not activation:
        return
    name = f"{name}__{activation}"
    parameters = _parameters(own)
    if activation == "Clip":
        bounds = [f"{result}__{bound}" for bound in ("min", "max")]
        for bound, value in zip(bounds, parameters, strict=True):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), bound))
        yield helper.make_node("Clip", [total, *bounds], [result], name)
    else:
        named: dict[str, Any] = dict(zip(_PARAMETERS[activation], parameters, strict=False))
        yield helper.make_node(activation, [total], [result], name, **named)


def _parameters(attributes: dict[str, Any]) -> list[float]:
    """Of the activation: a FusedGemm has an attribute for each."""
    if "activation_params" in attributes:
        return list(attributes["activation_params"])
    each = (f"activation_{letter}" for letter in ("alpha", "beta", "gamma"))
    return [attributes[name] for name in each if name in attributes]
