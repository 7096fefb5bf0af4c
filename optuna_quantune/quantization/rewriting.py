"""A graph that is being rewritten for ONNX Runtime's kernels (`kernels.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import PAIR_OPS
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill


class Rewriting(GraphView):
    """A view that follows the changes made through it; the graph itself changes when written.

    Args:
        proto: The graph of a Q/DQ model.
        shapes: Shapes of float tensors for one input (the batch axis counts 1), as far as known.

    Attributes:
        reshaped: Tensors whose shape the graph's ``value_info`` no longer tells.
    """

    def __init__(self, proto: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(proto)
        self._proto = proto
        self._nodes = list(proto.node)
        self._shapes = shapes
        self.reshaped: set[str] = set()

    def left(self) -> list[onnx.NodeProto]:
        """The nodes that were there at first and still are."""
        there = {id(node) for node in self._nodes}
        return [node for node in self._proto.node if id(node) in there]

    def values(self, name: str) -> NDArray[Any]:
        """The values of a constant."""
        return numpy_helper.to_array(self.constants[name])

    def add_constant(self, name: str, values: NDArray[Any]) -> str:
        """Adds a constant, or gives one other values; returns its name."""
        self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def replace(
        self,
        node: onnx.NodeProto,
        nodes: list[onnx.NodeProto],
        *,
        without: Sequence[onnx.NodeProto] = (),
    ) -> None:
        """Puts nodes in the place of one, and takes others away."""
        position = next(i for i, other in enumerate(self._nodes) if other is node)
        self._nodes[position : position + 1] = nodes
        self._forget(node)
        for new in nodes:
            self.writers.update(dict.fromkeys(new.output, new))
            for name in reads(new):
                self.readers.setdefault(name, []).append(new)
        self.remove(without)

    def remove(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Takes nodes away; what read their outputs is left to the caller."""
        gone = {id(node) for node in nodes}
        for node in nodes:
            self._forget(node)
        self._nodes = [node for node in self._nodes if id(node) not in gone]

    def reroute(self, tensor: str, source: str) -> None:
        """Lets all that read `tensor` read `source`."""
        readers = self.readers.pop(tensor, [])
        for reader in readers:
            for position, name in enumerate(reader.input):
                if name == tensor:
                    reader.input[position] = source
        self.readers.setdefault(source, []).extend(readers)

    def shape_before(self, node: onnx.NodeProto) -> tuple[int, ...] | None:
        """The shape of what a node reads, which a pair (or what holds it) does not change.

        None if it is not known, or has no axis behind the channels.
        """
        tensor = node.input[0]
        while tensor not in self._shapes:
            writer = self.writers.get(tensor)
            if writer is None or writer.op_type not in (*PAIR_OPS, "Max"):
                return None
            tensor = writer.input[0]
        return self._shapes[tensor] if len(self._shapes[tensor]) > 2 else None

    def write(self) -> None:
        """Brings the changes into the graph, without constants that nothing reads any more."""
        used = {name for node in self._nodes for name in reads(node)} | self.outputs
        refill(self._proto.node, self._nodes)
        refill(self._proto.initializer, (t for n, t in self.constants.items() if n in used))
        known = (value for value in self._proto.value_info if value.name not in self.reshaped)
        refill(self._proto.value_info, known)

    def _forget(self, node: onnx.NodeProto) -> None:
        for name in set(reads(node)):
            left = [reader for reader in self.readers[name] if reader is not node]
            self.readers[name] = left
            if not left:
                del self.readers[name]
        for name in node.output:
            if self.writers.get(name) is node:
                del self.writers[name]
