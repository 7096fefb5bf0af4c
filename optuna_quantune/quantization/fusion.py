"""Which Q/DQ pairs a device needs that keeps the int32 sums of a layer for what follows it.

A compiler for integer hardware (VTA) or TensorRT computes a layer, the Relu or Clip behind it and
the Add of a residual connection in one go and brings the result back to 8 bits once: `fuse`. One
that does not fuse brings every node's output back to 8 bits, each with a range of its own:
`separate`. ONNX Runtime's kernels stand between the two: a Relu or Clip shares the range of the
layer before it, so that saturation does its work, and an Add wants 8-bit operands.
"""

from __future__ import annotations

import dataclasses

import onnx

from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.placement import Placement
from optuna_quantune.quantization.placement import statistics_sources


def fuse(placement: Placement) -> Placement:
    """Removes the pairs between a layer and the Relu, Clip and Add that directly follow it.

    A tensor loses its pair where it is nothing but the int32 sums of a layer (or what Relu, Clip
    and Add made of them) and its only reader is another Relu, Clip or Add. One operand of an Add
    stays as it is: there is one accumulator, and that of the later layer is it.
    """
    template = copy_of(placement.template)
    graph = template.graph
    view = GraphView(graph)
    # Each tensor of int32 sums, and the position in the graph of the layer that they come from.
    sums: dict[str, int] = {}
    pairs: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
    dropped: set[int] = set()
    for position, node in enumerate(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] in sums:
            dequantize = view.sole_reader(node.output[0])
            if dequantize is not None and view.sole_reader(node.input[0]) is not None:
                pairs[dequantize.output[0]] = node, dequantize
            continue
        if node.op_type in WEIGHTED_OPS:
            sums[node.output[0]] = position
            continue
        if node.op_type not in ("Relu", "Clip", "Add"):
            continue
        fusible = [name for name in node.input if name in pairs and view.sole_reader(name) is node]
        fusible += [name for name in node.input if name in sums]  # never had a pair
        if not fusible:
            continue
        chosen = max(fusible, key=lambda name: sums[_source(name, pairs)])
        source = _source(chosen, pairs)
        if chosen in pairs:
            dropped |= {id(item) for item in pairs[chosen]}
            node.input[list(node.input).index(chosen)] = source
        sums[node.output[0]] = sums[source]
    kept = [node for node in graph.node if id(node) not in dropped]
    used = {name for node in kept for name in node.input}
    refill(graph.node, kept)
    sites = tuple(site for site in placement.activations if site.scale in used)
    return dataclasses.replace(placement, template=template, activations=sites)


def separate(placement: Placement, graph: onnx.GraphProto) -> Placement:
    """Gives every tensor with a pair the range of its own values.

    Args:
        placement: Where the pairs stand.
        graph: The float model.
    """
    sources = statistics_sources(graph, before_activations=False)
    constants = {tensor.name for tensor in graph.initializer}
    sites = tuple(
        site
        if site.tensor in constants
        else dataclasses.replace(site, statistics=sources.get(site.tensor, site.tensor))
        for site in placement.activations
    )
    return dataclasses.replace(placement, activations=sites)


def _source(name: str, pairs: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]]) -> str:
    """The tensor of int32 sums that a fusible operand comes from."""
    return pairs[name][0].input[0] if name in pairs else name
