"""Arithmetic between float nodes: integers there save nothing, and round twice.

``quantize_static`` gives pairs to every operator that it knows. A layer normalization that is
written out has two or three of them among others that it does not know (Sub, Pow, Sqrt, Div), and
so have Swish, softmax and logarithms: a sum that is rounded to 8 bits before its square root is
taken has lost most of what it was for. In float such a node takes less time than its conversions.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Final

import onnx

from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.placement import MOVING_OPS
from optuna_quantune.quantization.placement import stays_float


_ARITHMETIC: Final = frozenset({"Add", "Mul", "ReduceMean"})
# What reads float values had better stay float, too, and write them to the next layer.
_FUNCTIONS: Final = frozenset({"GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax", "Where"})
_PASSING_ON: Final = (*ACTIVATION_OPS, *MOVING_OPS)


def between_float_nodes(graph: onnx.GraphProto, float_nodes: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes all of whose operands come from float nodes, or all of whose readers are.

    Args:
        graph: The float model.
        float_nodes: Names of nodes that are kept in float; those that ``quantize_static`` does not
            know are in any case.
    """
    islands = _Islands(graph, float_nodes)
    while islands.grow():
        pass
    found = islands.found.difference(float_nodes)
    return tuple(node.name for node in graph.node if node.name in found)


class _Islands:
    """The nodes found so far, those that were named at first included."""

    def __init__(self, graph: onnx.GraphProto, float_nodes: Sequence[str]) -> None:
        self.found = set(float_nodes)
        self._view = GraphView(graph)
        self._candidates = [
            node for node in graph.node if node.op_type in _ARITHMETIC | _FUNCTIONS
        ]

    def grow(self) -> bool:
        """Whether there are more, now that those are known."""
        before = len(self.found)
        for node in self._candidates:
            if all(map(self._in_float, self._writers(node))) or (
                node.op_type in _ARITHMETIC and self._is_read_in_float(node.output[0])
            ):
                self.found.add(node.name)
        return len(self.found) > before

    def _in_float(self, node: onnx.NodeProto | None) -> bool:
        """Whether a node computes in float; None stands for an input of the model."""
        return node is None or stays_float(node, self.found)

    def _writers(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto | None]:
        for name in node.input:
            if name and name not in self._view.constants:
                writer = self._view.writers.get(name)
                while writer is not None and writer.op_type in _PASSING_ON:
                    writer = self._view.writers.get(writer.input[0])
                yield writer

    def _is_read_in_float(self, tensor: str) -> bool:
        readers = self._view.readers.get(tensor, [])
        return (
            bool(readers)
            and tensor not in self._view.outputs
            and all(
                self._is_read_in_float(reader.output[0])
                if reader.op_type in _PASSING_ON
                else self._in_float(reader)
                for reader in readers
            )
        )
