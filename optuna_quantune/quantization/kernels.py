"""A Q/DQ model written so that ONNX Runtime's processor kernels are fast at it.

Nothing here changes what a model computes, but for the rounding of float32. Each rewriting answers
something that was seen in profiles of ONNX Runtime 1.32 on x86-64. Those of the channels and
groups of convolutions stand in `kernel_channels.py`, all others here:

- A MaxPool between float nodes is turned into an integer one, because Q/DQ pairs are moved across
  it ("QDQ propagation"), and that one is some 30 times slower unless integer convolutions surround
  it: 28 ms instead of 1 in GoogLeNet. A Max with the smallest float stops the pair.
- Integer convolutions compute with channels last, and everything that follows one with integers
  does, too. What comes quantized from a float node does not: where an Add or Concat joins the two,
  as at the head of a residual network, each further convolution is wrapped in two transposes. A
  depthwise convolution that multiplies by 1, right behind the pair, changes no integer and turns
  all at once.
- An integer AveragePool takes four times as long as a float one. A depthwise convolution with the
  same weight everywhere computes the same integers in a tenth of that.
- A Relu or Clip that a symmetric range does not imply is computed in float between pairs, each a
  pass over memory. Where both pairs have the same steps it cuts off integers: MobileNetV2 takes
  two thirds of the time with the schemes `symmetric` and `symmetric_power2`.
- A HardSigmoid between pairs, and so every HardSwish, is computed in float, and each of the pairs
  takes another pass over memory. It is a sum that saturates, which an integer Add does by itself
  where the ends of its steps are 0 and 1: a block of MobileNetV3 takes three quarters of the time.
- A BatchNormalization that no convolution takes in, as behind the joined tensors of a DenseNet, is
  computed in float between pairs that turn the layout. It is a depthwise convolution of one tap.
- A GELU that is written out reads its input twice. ONNX Runtime gives each reader a
  DequantizeLinear of its own, does not know the function again then, and computes it node by node.
- LRN takes powers (`lrn.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from optuna_quantune.quantization.gelu import find_gelu
from optuna_quantune.quantization.graph import activation_bounds
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import import_own_domain
from optuna_quantune.quantization.graph import OWN_DOMAIN
from optuna_quantune.quantization.kernel_channels import absorb_shuffle
from optuna_quantune.quantization.kernel_channels import fill_up_channels
from optuna_quantune.quantization.kernel_channels import make_few_dense
from optuna_quantune.quantization.kernel_channels import merge_groups
from optuna_quantune.quantization.lrn import take_square_roots
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.placement import MOVING_OPS
from optuna_quantune.quantization.rewriting import Rewriting


_LARGEST_WEIGHT: Final = 127
_LEAST_SCALE: Final = 1e-20
_IMAGE_RANK: Final = 4
_JOINING_OPS: Final = ("Add", "Concat")


def adapt(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Rewrites a Q/DQ model in place.

    Args:
        proto: The model with all its initializers, nodes in topological order.
        shapes: Shapes of float tensors for one input (the batch axis counts 1), as far as known.
    """
    graph = Rewriting(proto.graph, shapes)
    for node in graph.left():
        if node.op_type == "Conv":
            merge_groups(graph, node)
        elif node.op_type == "MaxPool":
            _hold_pairs(graph, node)
        elif node.op_type == "AveragePool":
            _convolve(graph, node)
        elif node.op_type == "HardSigmoid":
            _add_and_saturate(graph, node)
        elif node.op_type == "BatchNormalization":
            _scale_channels(graph, node)
        elif node.op_type == "LRN":
            take_square_roots(graph, node)
        elif node.op_type == "Erf":
            _collapse_gelu(graph, node)
    for node in graph.left():
        if node.op_type == "Reshape":
            absorb_shuffle(graph, node)
        elif node.op_type == "DequantizeLinear":
            _put_channels_last(graph, node)
    for node in graph.left():
        if node.op_type == "Conv":
            fill_up_channels(graph, node)
            make_few_dense(graph, node)
        elif node.op_type in ACTIVATION_OPS:
            _cut_off_integers(graph, node)
    graph.write()
    import_own_domain(proto)


def _channels_of_images(graph: Rewriting, node: onnx.NodeProto) -> int | None:
    """The number of channels of what a node reads, if that is images."""
    shape = graph.shape_before(node)
    return shape[1] if shape is not None and len(shape) == _IMAGE_RANK else None


def _pair_around(
    graph: Rewriting, node: onnx.NodeProto, result: str
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """What dequantizes the input of a node, and alone reads and quantizes a result."""
    before, behind = graph.writers.get(node.input[0]), graph.sole_reader(result)
    if before is None or before.op_type != "DequantizeLinear":
        return None
    return None if behind is None or behind.op_type != "QuantizeLinear" else (before, behind)


def _hold_pairs(graph: Rewriting, pool: onnx.NodeProto) -> None:
    """Keeps ONNX Runtime from moving a pair across a MaxPool that is computed in float."""
    writer = graph.writers.get(pool.input[0])
    readers = graph.readers.get(pool.output[0], [])
    dequantized = writer is not None and writer.op_type == "DequantizeLinear"
    quantized = any(reader.op_type == "QuantizeLinear" for reader in readers)
    if dequantized == quantized:
        return
    lowest = graph.add_constant("maxpool__lowest", np.array(np.finfo(np.float32).min))
    held = f"{pool.output[0]}__held"
    if quantized:
        graph.reroute(pool.output[0], held)
        graph.replace(pool, [pool, helper.make_node("Max", [pool.output[0], lowest], [held])])
    else:
        maximum = helper.make_node("Max", [pool.input[0], lowest], [held])
        again = copy_of(pool)
        again.input[0] = held
        graph.replace(pool, [maximum, again])


def _convolve(graph: Rewriting, pool: onnx.NodeProto) -> None:
    """Averages with an integer depthwise convolution whose weights are all 1 / taps.

    Not where the number of taps changes at the border.
    """
    tensor, channels = pool.output[0], _channels_of_images(graph, pool)
    same_taps = not any(attribute_of(pool, "pads", ())) or attribute_of(pool, "count_include_pad")
    if (
        channels is None
        or _pair_around(graph, pool, tensor) is None
        or attribute_of(pool, "ceil_mode")
        or attribute_of(pool, "auto_pad", b"NOTSET") not in (b"NOTSET", b"")
        or not same_taps
    ):
        return
    kernel = attribute_of(pool, "kernel_shape")
    share = np.float32(1.0 / np.prod(kernel))
    weight = _depthwise_weight(graph, tensor, (channels, 1, *kernel), share)
    kept = ("kernel_shape", "strides", "pads", "dilations")
    convolution = helper.make_node("Conv", [pool.input[0], weight[-1]], [tensor], group=channels)
    convolution.attribute.extend(a for name in kept for a in pool.attribute if a.name == name)
    dequantize = helper.make_node("DequantizeLinear", weight[:-1], weight[-1:], axis=0)
    graph.replace(pool, [dequantize, convolution])


def _scale_channels(graph: Rewriting, norm: onnx.NodeProto) -> None:
    """Writes a BatchNormalization between pairs as an integer depthwise convolution of one tap.

    A channel's factor is 127 steps of the channel's own scale, so that nothing is rounded but the
    offset, to a 127th of a step of the input and less.
    """
    tensor, channels = norm.output[0], _channels_of_images(graph, norm)
    reader = graph.sole_reader(tensor)
    activated = reader is not None and reader.op_type in ACTIVATION_OPS
    pair = _pair_around(graph, norm, reader.output[0] if reader and activated else tensor)
    if (
        channels is None
        or pair is None
        or any(name not in graph.constants for name in norm.input[1:])
    ):
        return
    gamma, beta, mean, variance = (graph.values(n).astype(np.float64) for n in norm.input[1:])
    factor = gamma / np.sqrt(variance + attribute_of(norm, "epsilon", 1e-5))
    step = float(graph.values(pair[0].input[1]))
    operands, nodes = [], []
    for kind, integers, scale in _in_steps(factor, beta - mean * factor, step):
        zeros = np.zeros(len(scale), integers.dtype)
        names = [f"{tensor}__{kind}_{part}" for part in ("integers", "scale", "zero_point")]
        for name, values in zip(names, (integers, scale, zeros), strict=True):
            graph.add_constant(name, values)
        operands.append(f"{tensor}__{kind}")
        nodes.append(helper.make_node("DequantizeLinear", names, operands[-1:], axis=0))
    inputs = [norm.input[0], *operands]
    convolution = helper.make_node(
        "Conv", inputs, [tensor], norm.name, group=channels, kernel_shape=[1, 1]
    )
    graph.replace(norm, [*nodes, convolution])


def _in_steps(
    factor: NDArray[np.float64], offset: NDArray[np.float64], step: float
) -> list[tuple[str, NDArray[Any], NDArray[np.float32]]]:
    """Integers and scales of a weight and a bias for each channel of an input with this step."""
    # The offset has to fit into 32 bits, and a factor of 0 needs a scale, too.
    scale = np.maximum(np.abs(factor) / _LARGEST_WEIGHT, np.abs(offset) / step / 2.0**30)
    scale = np.maximum(scale, _LEAST_SCALE).astype(np.float32)
    steps = scale * np.float32(step)
    weight = np.rint(factor / scale).astype(np.int8).reshape(-1, 1, 1, 1)
    return [("weight", weight, scale), ("bias", np.rint(offset / steps).astype(np.int32), steps)]


def _add_and_saturate(graph: Rewriting, gate: onnx.NodeProto) -> None:
    """Writes ``min(max(alpha x + beta, 0), 1)`` as a sum of integers whose ends are 0 and 1.

    The integers of x with a scale alpha times as large are those of alpha x. Not where the steps
    of the result reach below 0 or above 1.
    """
    pair = _pair_around(graph, gate, gate.output[0])
    slope, offset = attribute_of(gate, "alpha", 0.2), attribute_of(gate, "beta", 0.5)
    if pair is None or min(slope, offset) <= 0.0:
        return
    source, quantize = pair
    scale, zero_point = (graph.values(name) for name in source.input[1:])
    step, nothing = (graph.values(name) for name in quantize.input[1:])
    limits = np.iinfo(nothing.dtype)
    low, high = (float(step) * (limit - int(nothing)) for limit in (limits.min, limits.max))
    if nothing.itemsize > 1 or zero_point.dtype != nothing.dtype or low < 0.0 or high > 1.0 + 1e-6:
        return
    name = gate.output[0]
    product, constant = f"{name}__product", f"{name}__constant"
    wider = graph.add_constant(f"{name}__scale", np.float32(slope) * scale)
    operands = [
        graph.add_constant(f"{name}__offset", np.array(limits.max, nothing.dtype)),
        graph.add_constant(f"{name}__offset_scale", np.array(offset / limits.max, np.float32)),
        graph.add_constant(f"{name}__offset_zero_point", np.array(0, nothing.dtype)),
    ]
    inputs = [source.input[0], wider, source.input[2]]
    added = [
        helper.make_node("DequantizeLinear", inputs, [product]),
        helper.make_node("DequantizeLinear", operands, [constant]),
        helper.make_node("Add", [product, constant], [name], name=gate.name),
    ]
    alone = graph.sole_reader(source.output[0]) is gate
    graph.replace(gate, added, without=[source] if alone else ())


def _cut_off_integers(graph: Rewriting, activation: onnx.NodeProto) -> None:
    """Writes a Relu or Clip between pairs of the same steps as a Clip of the integers."""
    pair = _pair_around(graph, activation, activation.output[0])
    given = {n: graph.values(n) for n in activation.input[1:] if n in graph.constants}
    bounds = activation_bounds(activation, given)
    if pair is None or bounds is None:
        return
    source, quantize = pair
    before, behind = ([graph.values(name) for name in node.input[1:]] for node in pair)
    scale, zero_point = before
    same = all(np.array_equal(a, b) for a, b in zip(before, behind, strict=True))
    if not same or zero_point.dtype != behind[1].dtype or zero_point.itemsize > 1:
        return
    limits = np.iinfo(zero_point.dtype)
    integers = np.clip(np.rint(np.array(bounds) / scale) + zero_point, limits.min, limits.max)
    ends = [
        graph.add_constant(f"{activation.output[0]}__{end}", np.array(integer, zero_point.dtype))
        for end, integer in zip(("lowest", "highest"), integers, strict=True)
    ]
    inputs, outputs = [source.input[0], *ends], [quantize.output[0]]
    alone = graph.sole_reader(source.output[0]) is activation
    clip = helper.make_node("Clip", inputs, outputs, name=activation.name)
    graph.replace(activation, [clip], without=[quantize, source] if alone else [quantize])


def _depthwise_weight(
    graph: Rewriting, name: str, shape: tuple[int, ...], value: np.float32
) -> list[str]:
    """Names of integers, scale, zero point and result of a weight that has one value."""
    return [
        graph.add_constant(f"{name}__ones", np.ones(shape, np.int8)),
        graph.add_constant(f"{name}__ones_scale", np.full(shape[0], value, np.float32)),
        graph.add_constant(f"{name}__ones_zero_point", np.zeros(shape[0], np.int8)),
        f"{name}__weight",
    ]


def _put_channels_last(graph: Rewriting, dequantize: onnx.NodeProto) -> None:
    """Multiplies a float node's result by 1 with integers before it is joined with others."""
    tensor = dequantize.output[0]
    quantize = graph.writers.get(dequantize.input[0])
    channels = _channels_of_images(graph, dequantize) if quantize is not None else None
    if quantize is None or channels is None:
        return
    readers = graph.readers.get(tensor, [])
    writer = graph.writers.get(quantize.input[0])
    if (
        writer is None
        or graph.sole_reader(quantize.output[0]) is None
        or not any(reader.op_type in _JOINING_OPS for reader in readers)
        or _computes_with_integers(graph, writer)
    ):
        return
    weight = _depthwise_weight(graph, tensor, (channels, 1, 1, 1), np.float32(1.0))
    parameters = quantize.input[1:]
    first, same, quantized = (f"{tensor}__{part}" for part in ("first", "same", "quantized"))
    dequantize.output[0] = first
    again = [
        helper.make_node("DequantizeLinear", weight[:-1], weight[-1:], axis=0),
        helper.make_node("Conv", [first, weight[-1]], [same], group=channels, kernel_shape=[1, 1]),
        helper.make_node("QuantizeLinear", [same, *parameters], [quantized]),
        helper.make_node("DequantizeLinear", [quantized, *parameters], [tensor]),
    ]
    graph.replace(dequantize, [dequantize, *again])


def _computes_with_integers(graph: Rewriting, node: onnx.NodeProto) -> bool:
    """Whether a node's operands (of a layer the weight) are dequantized ones."""
    if node.op_type in WEIGHTED_OPS:
        operands = [node.input[1]]
    else:
        operands = [name for name in node.input if name not in graph.constants]
    return all(_is_integer(graph, name) for name in operands)


def _is_integer(graph: Rewriting, tensor: str) -> bool:
    """Whether a tensor comes from a pair, possibly through nodes that only move its values."""
    writer = graph.writers.get(tensor)
    if writer is None or writer.op_type == "DequantizeLinear":
        return writer is not None
    moving = (*ACTIVATION_OPS, *MOVING_OPS)
    return writer.op_type in moving and _is_integer(graph, writer.input[0])


def _collapse_gelu(graph: Rewriting, erf: onnx.NodeProto) -> None:
    """Writes ONNX Runtime's operator for a GELU that is written out in float."""
    gelu = find_gelu(graph, erf)
    if gelu is None:
        return
    last = gelu.nodes[-1]
    whole = helper.make_node(
        "Gelu", [gelu.source], [gelu.output], name=last.name, domain=OWN_DOMAIN
    )
    graph.replace(last, [whole], without=[node for node in gelu.nodes if node is not last])
