"""About how long a node takes with integers and in float, without running it.

For ONNX Runtime's processor kernels, one input and one thread: nanoseconds by themselves, and of
every multiplication, weight and value. `benchmarks/node_times.py` compares them with profiles of
whole networks. They say which of two nodes is the dearer one, also on another machine, and not how
long a model takes: that is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Final
from typing import Literal

import numpy as np
import onnx

from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.kernels import groups_of
from optuna_quantune.quantization.kernels import MOST_GROUPS
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import WEIGHTED_OPS


Kind = Literal["float", "int8"]

_NODE: Final = {"float": 1.5e3, "int8": 3.5e3}
_MULTIPLICATION: Final = {"float": 0.014, "int8": 0.0027}
_DEPTHWISE: Final = {"float": 0.018, "int8": 0.034}
_WEIGHT: Final = {"float": 0.35, "int8": 0.15}
_VALUE: Final = {"float": 0.25, "int8": 0.15}
# The integer convolution first copies its input together, tap by tap for every place; where there
# are few channels a tap takes as long as many would. (The float one has a kernel for those.)
_COPIED_TAP: Final = 2.6
_FEW_CHANNELS: Final = 4
_COPIED_FEW: Final = 4.0
# Quantizing or dequantizing changes the layout, too. Tensors of more values leave the cache.
_CONVERSION: Final = 5e3
_CONVERTED_VALUE: Final = 0.6
_NEAR: Final = 1 << 18


def sizes_of(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of activations for one input, without the batch axis; unknown sizes count as 1."""
    shapes = tensor_shapes(graph).items()
    return {name: tuple(size or 1 for size in shape[1:]) for name, shape in shapes}


def node_time(
    node: onnx.NodeProto, model: FloatModel, sizes: Mapping[str, Sequence[int]], kind: Kind
) -> float:
    """Nanoseconds that a node takes for one input.

    Args:
        node: One of the model's.
        model: The prepared float model.
        sizes: As from `sizes_of`.
        kind: Whether it computes with integers or in float.
    """
    read, written = sizes.get(node.input[0], ()), sizes.get(node.output[0], ())
    if node.op_type not in WEIGHTED_OPS or node.input[1] not in model.weights:
        return _NODE[kind] + _VALUE[kind] * max(_count(read), _count(written))
    weight = model.weights[node.input[1]]
    time = _NODE[kind] + _WEIGHT[kind] * weight.size + _VALUE[kind] * _count(written)
    if node.op_type == "ConvTranspose":  # has no integer kernel
        return time + _MULTIPLICATION["float"] * weight.size * _count(read[1:])
    if node.op_type != "Conv":
        return time + _MULTIPLICATION[kind] * weight.size * _count(written[:-1])
    places = _count(written[1:])
    groups = groups_of(node)
    if weight.shape[1] == 1 < groups:
        return time + _DEPTHWISE[kind] * weight.size * places
    times = groups if kind == "int8" and groups <= MOST_GROUPS else 1  # it is made dense
    time += _MULTIPLICATION[kind] * weight.size * times * places
    if kind == "int8":
        few = bool(read) and read[0] <= _FEW_CHANNELS
        tap = _COPIED_FEW if few else _COPIED_TAP
        time += tap * _count(weight.shape[2:]) * places
    return time


def conversion_time(values: float) -> float:
    """Nanoseconds that it takes to make integers of so many floats, or floats of integers."""
    slow = 2.0 if values > _NEAR else 1.0
    return _CONVERSION + slow * _CONVERTED_VALUE * values


def _count(shape: Sequence[int]) -> float:
    return float(np.prod(shape))
