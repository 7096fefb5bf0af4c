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
_DEPTHWISE: Final = {"float": 0.012, "int8": 0.028}
_WEIGHT: Final = {"float": 0.35, "int8": 0.15}
_VALUE: Final = {"float": 0.25, "int8": 0.15}
# A Clip is a pass of its own over float values; integers are cut off where they are rounded.
_CLIPPED_VALUE: Final = {"float": 0.2, "int8": 0.0}
# Each value of a float tensor that leaves the processor's cache is written and read slowly.
_FAR: Final = 1 << 19
_FAR_VALUE: Final = {"float": 0.15, "int8": 0.0}
# The integer convolution first copies its input together, tap by tap for every place; where there
# are few channels a tap takes as long as many would. (The float one has a kernel for those.)
_COPIED_TAP: Final = {"few": 4.0, "many": 2.6, "depthwise": 1.2}
_FEW_CHANNELS: Final = 4
# Quantizing or dequantizing changes the layout, too.
_CONVERSION: Final = 5e3
_CONVERTED_VALUE: Final = 0.6
_FAR_CONVERSION: Final = 1 << 18


def sizes_of(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of activations for one input, without the batch axis; unknown sizes count as 1."""
    shapes = tensor_shapes(graph).items()
    return {name: tuple(size or 1 for size in shape[1:]) for name, shape in shapes}


def node_time(
    node: onnx.NodeProto,
    model: FloatModel,
    sizes: Mapping[str, Sequence[int]],
    kind: Kind,
    *,
    clipped: bool = False,
) -> float:
    """Nanoseconds that a node takes for one input.

    Args:
        node: One of the model's.
        model: The prepared float model.
        sizes: As from `sizes_of`.
        kind: Whether it computes with integers or in float.
        clipped: Whether a Clip follows, which is counted in.
    """
    read, written = sizes.get(node.input[0], ()), sizes.get(node.output[0], ())
    values = _count(written)
    time = _NODE[kind] + (_CLIPPED_VALUE[kind] * values if clipped else 0.0)
    time += _FAR_VALUE[kind] * sum(n for n in (values, _count(read)) if n > _FAR)
    if node.op_type not in WEIGHTED_OPS or node.input[1] not in model.weights:
        return time + _VALUE[kind] * max(values, _count(read))
    weight = model.weights[node.input[1]]
    time += _WEIGHT[kind] * weight.size + _VALUE[kind] * values
    if node.op_type == "ConvTranspose":  # has no integer kernel
        return time + _MULTIPLICATION["float"] * weight.size * _count(read[1:])
    if node.op_type != "Conv":
        return time + _MULTIPLICATION[kind] * weight.size * _count(written[:-1])
    places = _count(written[1:])
    groups = groups_of(node)
    if weight.shape[1] == 1 < groups:
        channels, multiplications = "depthwise", _DEPTHWISE[kind] * weight.size
    else:
        channels = "few" if read and read[0] <= _FEW_CHANNELS else "many"
        times = groups if kind == "int8" and groups <= MOST_GROUPS else 1  # it is made dense
        multiplications = _MULTIPLICATION[kind] * weight.size * times
    copied = _COPIED_TAP[channels] * _count(weight.shape[2:]) if kind == "int8" else 0.0
    return time + (multiplications + copied) * places


def conversion_time(values: float) -> float:
    """Nanoseconds that it takes to make integers of so many floats, or floats of integers."""
    slow = 2.0 if values > _FAR_CONVERSION else 1.0
    return _CONVERSION + slow * _CONVERTED_VALUE * values


def _count(shape: Sequence[int]) -> float:
    return float(np.prod(shape))
