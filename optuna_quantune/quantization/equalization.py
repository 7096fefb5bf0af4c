"""Channel equalization: another float model with the same function, better suited to one scale.

An activation has one scale for all its channels, which its widest channel decides; a narrow one is
left with a few integers. Multiplying a channel by a positive factor in the layer that writes it
and dividing by it in the layers that read it changes no output (cross-layer equalization, Nagel et
al., arXiv 1906.04721, section 4.1), and ReLU, pooling and shuffling pass the factor on.

Which factors there are is found by following every channel through the graph: channels that an
addition joins share a factor, and a channel that reaches anything that does not pass factors on
keeps the factor 1. A Clip is such a thing (ReLU6 cuts at 6 whatever the factor, and putting a ReLU
in its place leaves the float MobileNetV2 with 3 dB), and so is an output of the model.

How large they are is the compromise of SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4):
the square root of what the channel's weights are in the layers that read it, over what its
activations reach. The paper's own equalization of weight ranges against each other leaves
ShuffleNet with 2 dB more noise where weights have a scale for each output channel.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.quantization.calibration import CalibrationInputs
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.graph import with_outputs
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.session import make_session


# Inputs that the reach of the channels is taken from.
EQUALIZATION_INPUTS: Final = 32
# Inputs that are run at a time.
_BATCH: Final = 4
# Factors lie between one over this and this. What a channel reaches on a few inputs says little
# when it is next to nothing.
_LARGEST_FACTOR: Final = 1000.0
# Nodes with f(a x) = a f(x) for a > 0, channel by channel.
_HOMOGENEOUS_OPS: Final = frozenset(
    {
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "PRelu",
        "Relu",
    }
)
# The number of all channels that keep the factor 1.
_FIXED: Final = 0

# Numbers of channels, int64, in the shape of the activation for one input or broadcast to it.
Channels = NDArray[np.int64]


@dataclass(frozen=True)
class Equalized:
    """A model with equalized channels.

    Attributes:
        model: A float model with the same nodes; the weights and biases of its layers are
            rescaled, and its activations have other ranges than those of the model before.
        read: What each input channel of a layer is multiplied by, shape (channels,), by the name
            of the weight; 1 for weights that are not here.
    """

    model: FloatModel
    read: Mapping[str, NDArray[np.float64]]


def equalize(model: FloatModel, inputs: CalibrationInputs) -> Equalized:
    """The model with equalized channels.

    The outputs are those of `model` up to the rounding of float32. (Factors rounded to powers of
    two would keep every bit, and cost ShuffleNet 1.5 dB.)

    Args:
        model: The prepared float model.
        inputs: The calibration inputs, bound to the model's input names; the first
            `EQUALIZATION_INPUTS` are used.
    """
    links = link_channels(model)
    factors = _factors(model, links, _reach(model, links, inputs))
    scaled: dict[str, NDArray[np.float32]] = {}
    read_by: dict[str, NDArray[np.float64]] = {}
    for layer in model.layers:
        if layer.name not in links.written:
            continue
        written, read = factors[links.written[layer.name]], factors[links.read[layer.name]]
        weight = model.weights[layer.weight]
        groups = layer.groups
        parts = layer.by_group(weight) * written.reshape(groups, -1, 1, 1)
        parts = parts.astype(np.float32) / read.reshape(groups, 1, -1, 1)
        scaled[layer.weight] = layer.from_groups(parts.astype(np.float32), weight.shape)
        read_by[layer.weight] = read
        if layer.bias is not None:
            bias = model.weights[layer.bias]
            scaled[layer.bias] = (bias * written.reshape(bias.shape)).astype(np.float32)
    proto = copy_of(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in scaled:
            tensor.CopyFrom(numpy_helper.from_array(scaled[tensor.name], tensor.name))
    rescaled = dataclasses.replace(
        model,
        proto=proto,
        fingerprint=hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest(),
        weights={**model.weights, **scaled},
    )
    return Equalized(rescaled, read_by)


@dataclass(frozen=True)
class ChannelLinks:
    """Which channels of which layers share a factor.

    Attributes:
        count: Number of factors; factor 0 is 1.
        written: The number of the factor of each output channel, by layer name.
        read: The number of the factor of each input channel, by layer name.
    """

    count: int
    written: Mapping[str, Channels]
    read: Mapping[str, Channels]


def link_channels(model: FloatModel) -> ChannelLinks:
    """Follows every channel from the layer that writes it to the layers that read it."""
    graph = model.proto.graph
    shapes = tensor_shapes(graph)
    constants = {tensor.name for tensor in graph.initializer}
    layers = {layer.name: layer for layer in _rescalable(model)}
    joined = _Joined()
    channels: dict[str, Channels] = {}
    written: dict[str, Channels] = {}
    read: dict[str, Channels] = {}
    for node in graph.node:
        operands = [
            channels.get(name, _fixed(shapes.get(name)))
            for name in node.input
            if name and name not in constants
        ]
        if node.name in layers:
            layer = layers[node.name]
            outputs, inputs = _widths(layer, model.weights[layer.weight].shape)
            if operands[0].size != inputs:  # one number for each channel is what a layer divides
                joined.join(operands[0], np.array(_FIXED))
                operands[0] = np.full(inputs, _FIXED)
            read[node.name] = operands[0].reshape(-1)
            written[node.name] = joined.new(outputs)
            rank = model.weights[layer.weight].ndim
            result = written[node.name].reshape(1, -1, *[1] * (rank - 2))
        else:
            result = _passed_on(node, operands, shapes, joined)
        channels |= {name: _fixed(shapes.get(name)) for name in node.output[1:]}
        channels[node.output[0]] = result
    for output in graph.output:
        joined.join(channels.get(output.name, np.array(_FIXED)), np.array(_FIXED))
    return ChannelLinks(
        joined.count,
        {name: joined.roots(numbers) for name, numbers in written.items()},
        {name: joined.roots(numbers) for name, numbers in read.items()},
    )


class _Joined:
    """Numbers that can be declared equal: the union-find algorithm, the smaller number leading."""

    def __init__(self) -> None:
        self._leader = [_FIXED]

    @property
    def count(self) -> int:
        return len(self._leader)

    def new(self, count: int) -> Channels:
        numbers = np.arange(self.count, self.count + count)
        self._leader.extend(numbers.tolist())
        return numbers

    def join(self, first: Channels, second: Channels) -> None:
        pairs = np.stack([side.reshape(-1) for side in np.broadcast_arrays(first, second)])
        for a, b in np.unique(pairs, axis=1).T:
            one, other = self._root(int(a)), self._root(int(b))
            self._leader[max(one, other)] = min(one, other)

    def roots(self, numbers: Channels) -> Channels:
        return np.array([self._root(int(number)) for number in numbers], dtype=np.int64)

    def _root(self, number: int) -> int:
        while self._leader[number] != number:
            self._leader[number] = self._leader[self._leader[number]]
            number = self._leader[number]
        return number


def _passed_on(
    node: onnx.NodeProto,
    operands: list[Channels],
    shapes: Mapping[str, tuple[int, ...]],
    joined: _Joined,
) -> Channels:
    """The channels of a node's output. Operands that it does not pass on keep the factor 1."""
    # What a pool brings together must have one factor.
    if node.op_type in _HOMOGENEOUS_OPS and (
        "Pool" not in node.op_type or _per_channel(operands[0])
    ):
        for slope in operands[1:]:  # of a PRelu, where it is computed
            joined.join(slope, np.array(_FIXED))
        return operands[0]
    if node.op_type == "Add" and len(operands) == 2 and operands[0].shape == operands[1].shape:
        joined.join(*operands)
        return operands[0]
    if (
        node.op_type == "Concat"
        and attribute_of(node, "axis") == 1
        and len(operands) == len(node.input)
        and all(_per_channel(operand) for operand in operands)
    ):
        return np.concatenate(operands, axis=1)
    if node.op_type in ("Flatten", "Reshape", "Transpose"):
        moved = _moved(node, operands[0], shapes)
        if moved is not None:
            return moved
    for operand in operands:
        joined.join(operand, np.array(_FIXED))
    return _fixed(shapes.get(node.output[0]))


def _moved(
    node: onnx.NodeProto, channels: Channels, shapes: Mapping[str, tuple[int, ...]]
) -> Channels | None:
    """What the same movement makes of the channels; None where it cannot be known."""
    before, after = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
    sizes, moved_sizes = (1, *before[1:]), (1, *after[1:])
    if not before or not after or 0 in sizes or np.prod(sizes) != np.prod(moved_sizes):
        return None
    whole = np.broadcast_to(channels, sizes)
    if node.op_type == "Transpose":
        permutation = attribute_of(node, "perm")
        if not isinstance(permutation, list) or permutation[0] != 0:
            return None
        whole = whole.transpose(permutation)
    whole = whole.reshape(moved_sizes)
    for axis in range(2, whole.ndim):  # back to one number for each channel, where that is all
        first = whole.take([0], axis=axis)
        if np.array_equal(np.broadcast_to(first, whole.shape), whole):
            whole = first
    return whole


def _reach(
    model: FloatModel, links: ChannelLinks, inputs: CalibrationInputs
) -> NDArray[np.float64]:
    """The largest magnitude that each factor's channels have where a layer reads them."""
    layers = [layer for layer in model.layers if np.any(links.read.get(layer.name, _FIXED))]
    reach = np.zeros(links.count)
    if not layers:
        return reach
    session = make_session(_with_channel_maxima(model, layers))
    names = [_maximum(layer) for layer in layers]
    first = np.arange(min(EQUALIZATION_INPUTS, len(inputs)))
    for feed in inputs.batches(_BATCH if model.batches_any else 1, first):
        for layer, maxima in zip(layers, session.run(names, feed), strict=True):
            of_batch = maxima.reshape(len(maxima), -1).max(axis=0)
            np.maximum.at(reach, links.read[layer.name], of_batch)
    return reach


def _factors(
    model: FloatModel, links: ChannelLinks, reach: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The factors by number, normalized so that linked channels reach as far as before."""
    weights = np.zeros(links.count)
    for layer in model.layers:
        if layer.name in links.read:
            parts = np.abs(layer.by_group(model.weights[layer.weight])).max(axis=3)
            rows = np.maximum(parts.max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
            columns = (parts / rows).max(axis=1).reshape(-1)
            np.maximum.at(weights, links.read[layer.name], columns)
    free = (reach > 0.0) & (weights > 0.0)
    free[_FIXED] = False
    factors = np.ones(links.count)
    factors[free] = np.sqrt(weights[free] / reach[free])
    together = _Joined()
    together.new(links.count - 1)
    for numbers in (*links.written.values(), *links.read.values()):
        chosen = numbers[free[numbers]]
        if chosen.size:
            together.join(chosen, chosen[:1])
    family = together.roots(np.arange(links.count))
    before, after = np.zeros(links.count), np.zeros(links.count)
    np.maximum.at(before, family[free], reach[free])
    np.maximum.at(after, family[free], (reach * factors)[free])
    factors[free] *= (before / np.where(after > 0.0, after, 1.0))[family[free]]
    return np.clip(factors, 1.0 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _rescalable(model: FloatModel) -> list[Layer]:
    """Convolutions and Gemms whose weight and bias are their own."""
    nodes = {node.name: node for node in model.proto.graph.node}
    if any(a.type == onnx.AttributeProto.GRAPH for n in nodes.values() for a in n.attribute):
        return []  # the graphs of If and Loop read tensors that are not among the node's inputs
    view = GraphView(model.proto.graph)
    found = []
    for layer in model.layers:
        node = nodes[layer.name]
        own = [name for name in node.input[1:] if name]
        outputs, _ = _widths(layer, model.weights[layer.weight].shape)
        if (
            layer.op_type in ("Conv", "Gemm")
            and not attribute_of(node, "transA")
            and own == [name for name in (layer.weight, layer.bias) if name]
            and all(view.sole_reader(name) is not None for name in own)
            and (layer.bias is None or model.weights[layer.bias].size == outputs)
        ):
            found.append(layer)
    return found


def _widths(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of output and of input channels of a layer."""
    if layer.op_type == "Conv":
        return shape[0], shape[1] * layer.groups
    return shape[layer.channel_axis], shape[1 - layer.channel_axis]


def _fixed(shape: tuple[int, ...] | None) -> Channels:
    """Channels that keep the factor 1, one number for each where the shape is known."""
    if shape is None or len(shape) < 2 or shape[1] == 0:
        return np.array(_FIXED)
    return np.full((1, shape[1], *[1] * (len(shape) - 2)), _FIXED)


def _per_channel(channels: Channels) -> bool:
    return channels.ndim >= 2 and channels.size == channels.shape[1]


def _maximum(layer: Layer) -> str:
    return f"{layer.name}__channel_maxima"


def _with_channel_maxima(model: FloatModel, layers: list[Layer]) -> onnx.ModelProto:
    """The model with the largest magnitude of each channel of each layer's input as outputs."""
    proto = with_outputs(model.proto, map(_maximum, layers))
    for layer in layers:
        magnitude = f"{layer.name}__magnitude"
        pool = "Identity" if layer.op_type == "Gemm" else "GlobalMaxPool"
        proto.graph.node.append(onnx.helper.make_node("Abs", [layer.input], [magnitude]))
        proto.graph.node.append(onnx.helper.make_node(pool, [magnitude], [_maximum(layer)]))
    return proto
