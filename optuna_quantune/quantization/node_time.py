"""About how long a node takes with integers and in float, without running it.

For ONNX Runtime's processor kernels, one input and one thread: nanoseconds by themselves, and of
every multiplication, weight and value. `benchmarks/node_times.py` compares them with nodes that
are measured in the middle of networks. They say which of two nodes is the dearer one, also on
another machine, and not how long a model takes: that is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Final
from typing import Literal

import numpy as np
import onnx

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import groups_of
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.lrn import needs_no_power
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import RECURRENT_OPS
from optuna_quantune.quantization.model import WEIGHTED_OPS


Kind = Literal["float", "int8"]

_NODE: Final = {"float": 1.5e3, "int8": 1.8e3}
_MULTIPLICATION: Final = {"float": 0.014, "int8": 0.0034}
# Without VNNI: the products of integers take three instructions instead of one.
_MULTIPLICATION_IN_PAIRS: Final = 0.009
_DEPTHWISE: Final = {"float": 0.012, "int8": 0.028}
# Channels that the depthwise kernels take at once. The float one is not used for other numbers of
# them, and integer ones are filled up (`kernel_channels.py`).
CHANNELS_AT_ONCE: Final = {"float": 4, "int8": 16}
_ODD_DEPTHWISE: Final = 0.2
_WEIGHT: Final = {"float": 0.35, "int8": 0.1}
_VALUE: Final = {"float": 0.25, "int8": 0.15}
# A Clip is a pass of its own over float values; integers are cut off where they are rounded.
_CLIPPED_VALUE: Final = {"float": 0.2, "int8": 0.0}
# Each value of a float tensor that leaves the processor's cache is written and read slowly.
_FAR: Final = 1 << 19
_FAR_VALUE: Final = {"float": 0.15, "int8": 0.0}
# The integer convolution first copies its input together, tap by tap for every place, unless that
# is the input as it is; where there are few channels a tap takes as long as many would. (The float
# one has a kernel for those.)
_COPIED_TAP: Final = {"few": 4.0, "many": 1.25, "depthwise": 1.2}
_COPIED_CHANNEL: Final = 0.014
_FEW_CHANNELS: Final = 4
# Groups are gone through one by one; with integers each makes up a whole number of the channels
# that are multiplied at once. (How many groups are fastest was measured, and these numbers give
# it; several take longer than they say.) The float convolution has a kernel for groups in sixteens
# and copies the input of others.
_GROUP: Final = {"group": 4.0, "tap": 2.6, "multiplication": 0.0027}
_SEVERAL_GROUPS: Final = 1.4
_AT_ONCE: Final = {"outputs": 16, "inputs": 4}
_BLOCK: Final = 16
_COPIED_VALUE: Final = 0.5
# LRN raises every value to a power; written with square roots it is a dense 1 x 1 convolution and
# some passes (`lrn.py`).
_POWER: Final = 25.0
_PASSES: Final = 5
# Matrices of a recurrent node, each for its input and for what it remembers.
_GATES: Final = {"GRU": 3, "LSTM": 4, "RNN": 1}
# Quantizing or dequantizing changes the layout, too.
_CONVERSION: Final = 5e3
_CONVERTED_VALUE: Final = 0.6
_FAR_CONVERSION: Final = 1 << 18


def sizes_of(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of activations for one input, without the batch axis; unknown sizes count as 1.

    A first axis that is neither free nor 1 is no batch axis: ONNX Runtime's tools make one of the
    tokens of a model with a fixed batch of 1.
    """
    return {
        name: tuple(size or 1 for size in (shape if shape[:1] > (1,) else shape[1:]))
        for name, shape in tensor_shapes(graph).items()
    }


def node_time(
    node: onnx.NodeProto,
    model: FloatModel,
    sizes: Mapping[str, Sequence[int]],
    kind: Kind,
    *,
    clipped: bool = False,
    in_pairs: bool = False,
) -> float:
    """Nanoseconds that a node takes for one input.

    Args:
        node: One of the model's.
        model: The prepared float model.
        sizes: As from `sizes_of`.
        kind: Whether it computes with integers or in float; of LRN, which never has integers,
            whether it is written as in a quantized model or as in the float model.
        clipped: Whether a Clip follows, which is counted in.
        in_pairs: Whether products of integers are added in pairs, as without VNNI.
    """
    multiplication = _MULTIPLICATION[kind]
    if in_pairs and kind == "int8":
        multiplication = _MULTIPLICATION_IN_PAIRS
    read = sizes.get(node.input[0], ()) if node.input else ()
    written = sizes.get(node.output[0], ())
    values = _count(written)
    time = _NODE[kind] + (_CLIPPED_VALUE[kind] * values if clipped else 0.0)
    time += _FAR_VALUE[kind] * sum(n for n in (values, _count(read)) if n > _FAR)
    if node.op_type == "LRN":
        if kind == "float" or not needs_no_power(node):
            return time + _POWER * values
        multiplications = _MULTIPLICATION["float"] * _count(written[:1])
        return time + (multiplications + _PASSES * _VALUE["float"]) * values
    if node.op_type in RECURRENT_OPS:
        return time + _MULTIPLICATION["float"] * _recurrent_products(node, read)
    if node.op_type not in WEIGHTED_OPS or node.input[1] not in model.weights:
        if node.op_type == "MatMul" and read:  # of two activations
            time += multiplication * values * read[-1]
        return time + _VALUE[kind] * max(values, _count(read))
    weight = model.weights[node.input[1]]
    time += _WEIGHT[kind] * weight.size + _VALUE[kind] * values
    if node.op_type == "ConvTranspose":  # has no integer kernel
        return time + _MULTIPLICATION["float"] * weight.size * _count(read[1:])
    if node.op_type != "Conv":
        return time + multiplication * weight.size * _count(written[:-1])
    places, taps, groups = _count(written[1:]), _count(weight.shape[2:]), groups_of(node)
    if weight.shape[1] == 1 < groups:
        several = len(weight) != groups or len(weight) % CHANNELS_AT_ONCE[kind]
        odd = kind == "float" and bool(several)
        time += (_ODD_DEPTHWISE if odd else _DEPTHWISE[kind]) * weight.size * places
        return time + (_COPIED_TAP["depthwise"] * taps * places if kind == "int8" else 0.0)
    if kind == "int8" and groups > 1:
        left = fastest_groups(weight.shape, groups)
        slower = _SEVERAL_GROUPS if left > 1 else 1.0
        products = multiplication / _MULTIPLICATION["int8"]
        grouped = _groups_time(weight.shape, groups, left, products=products)
        return time + slower * grouped * places
    time += multiplication * weight.size * places
    if kind == "int8":
        is_whole = taps == 1 and all(n == 1 for n in attribute_of(node, "strides", [1]))
        return time if is_whole else time + _copied_tap(weight.shape[1]) * taps * places
    if (
        groups > 1
        and taps > 1
        and any(n % _BLOCK for n in (len(weight) // groups, weight.shape[1]))
    ):
        time += _COPIED_VALUE * taps * weight.shape[1] * groups * places
    return time


def _recurrent_products(node: onnx.NodeProto, read: Sequence[int]) -> float:
    """How many products the gates of a recurrent node take, for all steps and directions."""
    hidden = attribute_of(node, "hidden_size", 1)
    directions = 2 if attribute_of(node, "direction", b"forward") == b"bidirectional" else 1
    steps, inputs = _count(read[:-1]), _count(read[-1:])
    return float(directions * _GATES[node.op_type] * hidden * (hidden + inputs) * steps)


def fastest_groups(shape: Sequence[int], groups: int) -> int:
    """The number of groups with which an integer convolution takes the least time.

    Zeros between some groups make them one: wider ones are multiplied in fewer steps, but more is
    multiplied.

    Args:
        shape: Of the weight: output channels, input channels of a group, taps.
        groups: How many there are; one of its divisors is returned.
    """
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    return min(divisors, key=lambda left: _groups_time(shape, groups, left))


def _groups_time(shape: Sequence[int], groups: int, left: int, *, products: float = 1.0) -> float:
    """Nanoseconds at each place that an integer convolution takes with `left` of its groups.

    Products take `products` times as long as with VNNI.
    """
    taps = _count(shape[2:])
    outputs = -(-shape[0] // left // _AT_ONCE["outputs"]) * _AT_ONCE["outputs"]
    inputs = -(-shape[1] * groups // left // _AT_ONCE["inputs"]) * _AT_ONCE["inputs"]
    multiplications = products * _GROUP["multiplication"] * outputs * inputs
    return left * (_GROUP["group"] + (_GROUP["tap"] + multiplications) * taps)


def _copied_tap(channels: int) -> float:
    """Nanoseconds that it takes to copy one tap of so many channels."""
    if channels <= _FEW_CHANNELS:
        return _COPIED_TAP["few"]
    return _COPIED_TAP["many"] + _COPIED_CHANNEL * channels


def conversion_time(values: float) -> float:
    """Nanoseconds that it takes to make integers of so many floats, or floats of integers."""
    slow = 2.0 if values > _FAR_CONVERSION else 1.0
    return _CONVERSION + slow * _CONVERTED_VALUE * values


def _count(shape: Sequence[int]) -> float:
    return float(np.prod(shape))
