"""A quantized model, whoever made it, as the rules of `lint.py` look at it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.model import channel_axis
from optuna_quantune.quantization.model import quantized_node
from optuna_quantune.quantization.model import WEIGHTED_OPS


# Operators of the ``QOperator`` format: which input is the bias, and which the output's scale.
_INTEGER_OPS: Final = {"QLinearConv": (8, 6), "QGemm": (6, 7), "QLinearMatMul": (None, 6)}


def load_quantized(path: str | Path) -> onnx.ModelProto | None:
    """Reads a model that has quantized tensors; anything else gives None."""
    try:
        proto = onnx.load(path, format="protobuf")
    except (DecodeError, OSError, ValueError):
        return None
    return None if quantized_node(proto) is None else proto


@dataclass(frozen=True)
class Quantized:
    """Scale and zero point of a tensor, and its integers if it is a constant."""

    name: str
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    integers: NDArray[Any] | None


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer whose weight is stored as integers; `bias_scale` is None where it is implied."""

    name: str
    op_type: str
    channel_axis: int
    groups: int
    input: Quantized | None
    weight: Quantized
    bias: NDArray[Any] | None
    bias_scale: NDArray[Any] | None


class QuantizedGraph:
    """A quantized model as the rules look at it.

    Args:
        proto: The model, in Q/DQ or ``QOperator`` format.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self._constants = constant_values(proto.graph)
        self._dequantizers = {
            node.output[0]: node for node in proto.graph.node if node.op_type == "DequantizeLinear"
        }

    @cached_property
    def layers(self) -> list[QuantizedLayer]:
        """The layers with integer weights in the order of computation."""
        return [layer for node in self.proto.graph.node if (layer := self._layer(node))]

    @cached_property
    def activations(self) -> dict[str, Quantized]:
        """Parameters by the name that the tensor has in a float model."""
        found: dict[str, Quantized | None] = {}
        for node in self.proto.graph.node:
            if node.op_type == "QuantizeLinear":
                found[node.input[0]] = self._quantized("", *node.input[1:3])
            elif node.op_type in _INTEGER_OPS:
                _, at = _INTEGER_OPS[node.op_type]
                tensor = node.output[0].removesuffix("_quantized")
                found[tensor] = self._quantized("", *node.input[at : at + 2])
        return {tensor: parameters for tensor, parameters in found.items() if parameters}

    @cached_property
    def computed_in_float(self) -> list[QuantizedLayer]:
        """Layers for which ONNX Runtime dequantizes the weight instead of using its integers."""
        kept = {
            node.input[0]
            for node in self._optimized.graph.node
            if node.op_type == "DequantizeLinear"
        }
        return [layer for layer in self.layers if layer.weight.name in kept]

    @cached_property
    def quantized_when_loaded(self) -> list[str]:
        """Names of layers of which ONNX Runtime replaces the float weight by integers."""
        floats = {tensor.name for tensor in self.proto.graph.initializer}
        left = {tensor.name for tensor in self._optimized.graph.initializer}
        return [
            node.name or node.output[0]
            for node in self.proto.graph.node
            if node.op_type in WEIGHTED_OPS
            and node.input[0] in self._dequantizers
            and node.input[1] in floats - left
        ]

    @cached_property
    def _optimized(self) -> onnx.ModelProto:
        return _optimized(self.proto)

    def _layer(self, node: onnx.NodeProto) -> QuantizedLayer | None:
        inputs = [*node.input, *[""] * 9]  # those left out at the end are named by nothing
        bias: Quantized | None = None
        integers = None
        if node.op_type in _INTEGER_OPS:
            at, _ = _INTEGER_OPS[node.op_type]
            data, weight = self._quantized(*inputs[:3]), self._quantized(*inputs[3:6])
            integers = None if at is None else self._constants.get(inputs[at])
        elif node.op_type in WEIGHTED_OPS:
            data, weight, bias = (self._dequantized(name) for name in inputs[:3])
            integers = None if bias is None else bias.integers
        else:
            return None
        if weight is None or weight.integers is None:
            return None
        return QuantizedLayer(
            name=node.name or node.output[0],
            op_type=node.op_type,
            channel_axis=channel_axis(node, weight.integers.ndim),
            groups=attribute_of(node, "group", 1),
            input=data,
            weight=weight,
            bias=integers,
            bias_scale=None if bias is None else bias.scale,
        )

    def _dequantized(self, tensor: str) -> Quantized | None:
        node = self._dequantizers.get(tensor)
        return None if node is None else self._quantized(*node.input)

    def _quantized(self, name: str, scale: str, zero_point: str = "") -> Quantized | None:
        if scale not in self._constants:
            return None
        integers = self._constants.get(name)
        default = np.zeros((), np.uint8 if integers is None else integers.dtype)
        return Quantized(
            name, self._constants[scale], self._constants.get(zero_point, default), integers
        )


def _optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model before memory layouts are chosen."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            reason = str(error).splitlines()[0]
            raise InputError(f"ONNX Runtime cannot load the quantized model ({reason})") from error
        return onnx.load(path)
