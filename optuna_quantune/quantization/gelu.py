"""GELU as models write it out, ``x / 2 * (1 + erf(x / sqrt(2)))``, found as one function.

Up to opset 19 it has no operator of its own. `quantize_static` puts a pair behind each of its
products and sums, which makes noise, and takes more passes over memory than the function itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from optuna_quantune.quantization.graph import GraphView


_NEAR: Final = 1e-3


@dataclass
class Gelu:
    """One GELU.

    Attributes:
        source: Name of its input.
        nodes: The nodes that it is written out as, the last one behind all others; nothing else
            reads what is between them.
    """

    source: str
    nodes: list[onnx.NodeProto]

    @property
    def output(self) -> str:
        """Name of its result."""
        return str(self.nodes[-1].output[0])


def find_gelus(graph: onnx.GraphProto) -> list[Gelu]:
    """Every GELU of a graph, in its order."""
    view = GraphView(graph)
    found = (find_gelu(view, node) for node in graph.node if node.op_type == "Erf")
    return [gelu for gelu in found if gelu is not None]


def find_gelu(view: GraphView, erf: onnx.NodeProto) -> Gelu | None:
    """The GELU around an Erf, or None if there is none."""
    scaled = view.writers.get(erf.input[0])
    if scaled is None or view.sole_reader(erf.input[0]) is None:
        return None
    factors = {name: _factor(view, scaled, name) for name in scaled.input}
    source = next((n for n, by in factors.items() if by and abs(by - np.sqrt(0.5)) < _NEAR), None)
    if source is None:
        return None
    plus = view.sole_reader(erf.output[0])
    if plus is None or plus.op_type != "Add" or _constant(view, plus, erf.output[0]) != 1.0:
        return None
    gelu = Gelu(source, [scaled, erf, plus])
    factor, has_source = 1.0, False
    while not (has_source and abs(factor - 0.5) < _NEAR):
        product = view.sole_reader(gelu.output)
        if product is None or product.op_type not in ("Mul", "Div"):
            return None
        by = _factor(view, product, gelu.output)
        if by is None:
            by, before = _times_source(view, product, gelu)
            if by is None or has_source:
                return None
            gelu.nodes += before
            has_source = True
        factor *= by
        gelu.nodes.append(product)
    return gelu


def _times_source(
    view: GraphView, product: onnx.NodeProto, gelu: Gelu
) -> tuple[float | None, list[onnx.NodeProto]]:
    """By what a product multiplies besides the source, and the node that does it; None if not."""
    if product.op_type != "Mul":
        return None, []
    (other,) = {*product.input} - {gelu.output} or {gelu.output}
    if other == gelu.source:
        return 1.0, []
    half = view.writers.get(other)
    if half is None or view.sole_reader(other) is None or gelu.source not in half.input:
        return None, []
    return _factor(view, half, gelu.source), [half]


def _factor(view: GraphView, node: onnx.NodeProto, tensor: str) -> float | None:
    """What a node multiplies a tensor with; None if that is no constant, or it does not."""
    if node.op_type not in ("Div", "Mul") or (node.op_type == "Div" and node.input[0] != tensor):
        return None
    constant = _constant(view, node, tensor)
    if not constant:
        return None
    return 1.0 / constant if node.op_type == "Div" else constant


def _constant(view: GraphView, node: onnx.NodeProto, tensor: str) -> float | None:
    """The number beside a tensor that a node reads, if it is one."""
    others = [name for name in node.input if name != tensor]
    if len(others) != 1 or others[0] not in view.constants:
        return None
    values = numpy_helper.to_array(view.constants[others[0]])
    # One of more axes could give the result more axes.
    return float(values.reshape(-1)[0]) if values.size == 1 and values.ndim <= 1 else None
