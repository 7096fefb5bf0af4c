"""What of a Q/DQ model an integer-only device cannot compute with integers and shifts.

A Q/DQ model describes integer work with float operators between DequantizeLinear and
QuantizeLinear. It is integer work where every scale is a power of two and every zero point is 0:
sums of products of integers, of the scale input times weight; a bias of that scale added to them;
and a shift that brings them to the next scale. What else is there stays float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.model import WEIGHTED_OPS


# Operators that add, multiply, compare or move their operands. Scales that are powers of two are
# brought together by shifts.
_ARITHMETIC: Final = frozenset({"Add", "Max", "Min", "Mul", "Relu", "Sub"})
_MOVING: Final = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Flatten",
        "Gather",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# Of these only the first operand is data; the others are shapes, indices or bounds.
_ONE_OPERAND: Final = _MOVING - {"Concat"} | {"Clip"}
# A mean is a sum and a shift if the number of values is a power of two.
_AVERAGES: Final = frozenset({"AveragePool", "GlobalAveragePool"})


@dataclass(frozen=True)
class FloatNode:
    """A node that stays float, or a Q/DQ node that no shift can stand for.

    Attributes:
        name: Name of the node.
        op_type: Its operator.
        reason: Why, in a few words.
        enclosed: Whether integers go in and come out again. A node before the first
            QuantizeLinear or behind the last DequantizeLinear is not part of the integer work.
    """

    name: str
    op_type: str
    reason: str
    enclosed: bool


def float_nodes(proto: onnx.ModelProto) -> tuple[FloatNode, ...]:
    """Lists what stays float in a Q/DQ model, in graph order.

    The model is integer-only between the first QuantizeLinear and the last DequantizeLinear if no
    node of the list is `enclosed`.
    """
    graph = _Graph(proto)
    found = []
    for node in proto.graph.node:
        reason = graph.reason(node)
        if reason:
            name = node.name or node.output[0]
            enclosed = node.output[0] in graph.enclosed
            found.append(FloatNode(name, node.op_type, reason, enclosed))
    return tuple(found)


class _Graph:
    """Follows the integers through a graph; nodes must be asked for in graph order."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._constants = constant_values(proto.graph)
        self._shapes = tensor_shapes(onnx.shape_inference.infer_shapes(proto).graph)
        # The scale of each tensor of integers or of int32 sums.
        self._scales: dict[str, NDArray[Any]] = {}
        self._next_scales: dict[str, list[NDArray[Any]]] = {}
        for node in proto.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[1] in self._constants:
                scales = self._next_scales.setdefault(node.input[0], [])
                scales.append(self._constants[node.input[1]])
        self.enclosed = _enclosed(proto.graph)

    def reason(self, node: onnx.NodeProto) -> str | None:
        """Why a node stays float; None for one that does not."""
        if node.op_type == "Constant":
            return None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return self._pair_reason(node)
        reason = self._operator_reason(node)
        if reason is None:
            scale = self._result_scale(node)
            self._scales |= dict.fromkeys(node.output, scale)
        return reason

    def _pair_reason(self, node: onnx.NodeProto) -> str | None:
        scale = self._constants.get(node.input[1])
        if scale is None:
            return "its scale is computed"
        if node.op_type == "DequantizeLinear":
            self._scales[node.output[0]] = scale
        zero_point = self._constants.get(node.input[2]) if len(node.input) > 2 else None
        if not np.all(np.frexp(scale)[0] == 0.5):
            return "its scale is not a power of two"
        if zero_point is not None and np.any(zero_point != _middle(zero_point.dtype)):
            return "its zero point is not 0"
        return None

    def _operator_reason(self, node: onnx.NodeProto) -> str | None:
        known = (*WEIGHTED_OPS, *_ARITHMETIC, *_MOVING, *_AVERAGES, "Clip")
        if node.op_type not in known:
            return "not integer arithmetic"
        operands = [name for name in node.input if name]
        if node.op_type in _ONE_OPERAND:
            operands = operands[:1]
        if any(name not in self._scales for name in operands):
            return "an operand is not quantized"
        if node.op_type in WEIGHTED_OPS and len(operands) > 2:
            data, weight, bias = (self._scales[name] for name in operands[:3])
            if bias.shape != weight.shape or np.any(bias != data * weight):
                return "the bias has another scale than input times weight"
        if node.op_type == "Clip" and not self._has_integer_bounds(node):
            return "a bound is not an integer"
        if node.op_type in _AVERAGES:
            number = self._averaged(node)
            if number is None or number & (number - 1):
                return f"divides by {number or 'a number that is not known'}"
        return None

    def _result_scale(self, node: onnx.NodeProto) -> NDArray[Any]:
        scales = [self._scales[name] for name in node.input if name in self._scales]
        if node.op_type in (*WEIGHTED_OPS, "Mul"):
            return np.asarray(scales[0] * scales[1])
        return np.asarray(min(scales, key=np.min))  # the finer grid of an Add holds both

    def _has_integer_bounds(self, node: onnx.NodeProto) -> bool:
        """Whether the bounds lie on the grid of what is clipped, or on that of the result."""
        bounds = [self._constants.get(name) for name in node.input[1:3] if name]
        grids = [self._scales[node.input[0]], *self._next_scales.get(node.output[0], ())]
        return any(
            all(b is not None and np.all(b / grid == np.rint(b / grid)) for b in bounds)
            for grid in grids
        )

    def _averaged(self, node: onnx.NodeProto) -> int | None:
        """How many values a mean is taken of; None if that is not known, or changes."""
        padded = any(attribute_of(node, "pads", ())) and not attribute_of(
            node, "count_include_pad"
        )
        same = attribute_of(node, "auto_pad", b"NOTSET").startswith(b"SAME")
        if padded or same or attribute_of(node, "ceil_mode"):
            return None
        shape = self._shapes.get(node.input[0])
        window = attribute_of(node, "kernel_shape", None if shape is None else shape[2:])
        return None if window is None else int(np.prod(window)) or None


def _middle(dtype: np.dtype[Any]) -> int:
    """The integer that stands for zero point 0: 128 for uint8."""
    limits = np.iinfo(dtype)
    return (int(limits.max) + int(limits.min) + 1) // 2


def _enclosed(graph: onnx.GraphProto) -> set[str]:
    """Outputs of the nodes that have a QuantizeLinear both before and behind them."""
    behind: set[str] = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" or behind & set(node.input):
            behind.update(node.output)
    before: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == "QuantizeLinear" or before & set(node.output):
            before.update(node.input)
    return behind & before
