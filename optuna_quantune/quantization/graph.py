"""A view of an ONNX graph: who writes and who reads each tensor, shapes, constants, copies.

An ONNX graph is a flat list of nodes that name the tensors they read and write. Who writes and who
reads a tensor has to be collected first (`GraphView`); shapes, attributes and constants lie in
messages several levels deep. Nothing here knows of quantization.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import MutableSequence
from collections.abc import Sequence
from typing import Any
from typing import Final
from typing import TypeVar

import numpy as np
import onnx
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import AttributeProto
from onnx import helper
from onnx import numpy_helper


# Of ONNX Runtime's own operators.
OWN_DOMAIN: Final = "com.microsoft"
PAIR_OPS: Final = ("DequantizeLinear", "QuantizeLinear")
_GRAPHS: Final = (AttributeProto.GRAPH, AttributeProto.GRAPHS)

AnyMessage = TypeVar("AnyMessage", bound=Message)


class GraphView:
    """Who writes and who reads each tensor of a graph.

    It is taken once: what changes in the graph later is not seen.

    Args:
        graph: The graph; the view holds its own messages, not copies.

    Attributes:
        constants: Initializers by name.
        outputs: Names of the graph's outputs.
        writers: The node that writes each tensor.
        readers: The nodes that read each tensor, in graph order; one that reads it twice stands
            there twice, and a tensor that no node reads is left out.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {output.name for output in graph.output}
        self.writers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            self.writers.update({name: node for name in node.output if name})
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)

    def sole_reader(self, tensor: str) -> onnx.NodeProto | None:
        """The node that reads a tensor if nothing else does; an output of the graph is read."""
        behind = self.readers.get(tensor, [])
        return behind[0] if len(behind) == 1 and tensor not in self.outputs else None


def reads(node: onnx.NodeProto) -> list[str]:
    """Names of the tensors that a node, or a graph within it (of If, Loop, Scan), needs."""
    names = [name for name in node.input if name]  # without those that are left out
    for graph in inner_graphs(node):
        own = {name for inner in graph.node for name in inner.output}
        own |= {value.name for value in (*graph.input, *graph.initializer)}
        names += [n for inner in graph.node for n in reads(inner) if n not in own]
        names += [output.name for output in graph.output if output.name not in own]
    return names


def inner_graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs within a node (of If, Loop, Scan)."""
    attributes = [attribute for attribute in node.attribute if attribute.type in _GRAPHS]
    return [graph for a in attributes for graph in ([a.g] if a.HasField("g") else a.graphs)]


def is_sorted(graph: onnx.GraphProto) -> bool:
    """Whether each node stands behind those that write what it, or a graph within it, reads."""
    unwritten = {name for node in graph.node for name in node.output}
    for node in graph.node:
        if not unwritten.isdisjoint(reads(node)):
            return False
        unwritten.difference_update(node.output)
    return True


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts each node behind those that write what it, or a graph within it, reads.

    Nodes that stand right keep their order.
    """
    unwritten = {name for node in graph.node for name in node.output}
    ordered: list[onnx.NodeProto] = []
    waiting = list(graph.node)
    while waiting:
        late = []
        for node in waiting:
            if unwritten.isdisjoint(reads(node)):
                ordered.append(node)
                unwritten.difference_update(node.output)
            else:
                late.append(node)
        if len(late) == len(waiting):
            raise ValueError("the graph has a cycle")
        waiting = late
    refill(graph.node, ordered)


def attribute_of(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute: a number, bytes, a list; `default` where it is not set."""
    found = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(found, default)


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model uses; the newest if it uses none."""
    versions = (int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return max(versions, default=onnx.defs.onnx_opset_version())


def import_own_domain(proto: onnx.ModelProto) -> None:
    """Declares ONNX Runtime's own operators, if a model uses some and does not say so yet."""
    used = {node.domain for node in proto.graph.node}
    if OWN_DOMAIN in used - {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(OWN_DOMAIN, 1))


def groups_of(conv: onnx.NodeProto) -> int:
    """The groups of a convolution's channels."""
    return int(attribute_of(conv, "group", 1))


def is_depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether a convolution has one input and one output channel in each of several groups.

    ONNX Runtime's integer kernel for these adds products one by one, so that none saturate.
    """
    return tuple(weight_shape[:2]) == (groups, 1) and groups > 1


def constant_values(graph: onnx.GraphProto) -> dict[str, NDArray[Any]]:
    """The values of all initializers, and of Constant nodes that hold a tensor, by name."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return values


def tensor_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """The shapes of inputs, outputs and inner tensors as far as the graph says; 0 where free."""
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def copy_of(message: AnyMessage) -> AnyMessage:
    """A message of its own with the same content."""
    copy: AnyMessage = type(message)()
    copy.CopyFrom(message)
    return copy


def refill(field: MutableSequence[AnyMessage], messages: Iterable[AnyMessage]) -> None:
    """Lets a repeated field hold copies of these messages, some of which may be its own now."""
    kept = list(messages)
    del field[:]
    field.extend(kept)


def rename_tensors(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Gives tensors other names, in the graphs within its nodes, too.

    Args:
        graph: The graph; its inputs and outputs keep their names.
        names: The new names by the old ones.
    """
    for node in graph.node:
        for field in (node.input, node.output):
            for position, name in enumerate(field):
                field[position] = names.get(name, name)
        for inner in inner_graphs(node):
            rename_tensors(inner, names)
    for message in (*graph.initializer, *graph.value_info):
        message.name = names.get(message.name, message.name)


def with_outputs(proto: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of a model that has these tensors, and no others, as outputs."""
    copy = copy_of(proto)
    refill(copy.graph.output, (onnx.ValueInfoProto(name=name) for name in names))
    return copy


def activation_bounds(
    node: onnx.NodeProto, constants: Mapping[str, NDArray[Any]]
) -> tuple[float, float] | None:
    """What a Relu or Clip cuts off at, infinite where it does not; None where that is computed.

    Args:
        node: The Relu or Clip.
        constants: Values of the bounds that are constants, by name.
    """
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = []
    for name, unbounded in zip((*node.input[1:3], "", ""), (-np.inf, np.inf), strict=False):
        if name and name not in constants:
            return None
        ends.append(float(constants[name]) if name else unbounded)
    return ends[0], ends[1]
