"""A Q/DQ model written so that ONNX Runtime's processor kernels are fast at it.

Nothing here changes what a model computes, but for the rounding of float32. Each rewriting answers
something that was seen in profiles of ONNX Runtime 1.32 on x86-64:

- A MaxPool between float nodes is turned into an integer one, because Q/DQ pairs are moved across
  it ("QDQ propagation"), and that one is some 30 times slower unless integer convolutions surround
  it: 28 ms instead of 1 in GoogLeNet. A Max with the smallest float stops the pair.
- An integer convolution goes through its groups one by one, and narrow ones leave the processor
  idle. With zeros between them it has fewer and wider groups, up to one: of 32 groups of four
  channels, as in ResNeXt, four of 32 take a quarter of the time.
- A shuffle of channels costs nothing where the convolution before it is dense: it is another order
  of the weight's rows. ShuffleNet takes 3.4 ms instead of 3.9.
- The integer depthwise convolution takes channels by sixteens and the rest one by one: with 60 of
  them it takes three times as long as with 64. Channels of zeros, which the convolution before it
  writes and the one behind it does not need, fill them up. (The float one likewise, by fours.)
  Where others read its channels, and there are few, the dense one with zeros is faster.
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
- LRN raises every value to a power, one after the other: 100 of GoogLeNet's 150 ms. With the
  exponent 0.75, which it has in all published networks, two square roots do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.gelu import find_gelu
from optuna_quantune.quantization.graph import activation_bounds
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import groups_of
from optuna_quantune.quantization.graph import import_own_domain
from optuna_quantune.quantization.graph import OWN_DOMAIN
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.node_time import CHANNELS_AT_ONCE
from optuna_quantune.quantization.node_time import fastest_groups
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.placement import MOVING_OPS
from optuna_quantune.quantization.placement import PAIR_OPS


# Up to so many groups become one for the sake of what stands beside the convolution.
_MOST_GROUPS: Final = 8
# Integer depthwise convolutions of up to so many channels, that do not come in eights, are made
# dense.
_FEW_CHANNELS: Final = 20
_EIGHT: Final = 8
_LRN_EXPONENT: Final = 0.75
_LARGEST_WEIGHT: Final = 127
_LEAST_SCALE: Final = 1e-20
_IMAGE_RANK: Final = 4
_JOINING_OPS: Final = ("Add", "Concat")
_SHUFFLING_OPS: Final = ("Reshape", "Transpose")

# For a weight and a bias each the constants that it is made of.
Operands = list[tuple[str, ...]]
Shapes = Mapping[str, tuple[int, ...]]


def adapt(proto: onnx.ModelProto, shapes: Shapes) -> None:
    """Rewrites a Q/DQ model in place.

    Args:
        proto: The model with all its initializers, nodes in topological order.
        shapes: Shapes of float tensors for one input (the batch axis counts 1), as far as known.
    """
    graph = _Graph(proto.graph)
    for node in graph.left():
        if node.op_type == "Conv":
            _merge_groups(graph, node)
        elif node.op_type == "MaxPool":
            _hold_pairs(graph, node)
        elif node.op_type == "AveragePool":
            _convolve(graph, node, shapes)
        elif node.op_type == "HardSigmoid":
            _add_and_saturate(graph, node)
        elif node.op_type == "BatchNormalization":
            _scale_channels(graph, node, shapes)
        elif node.op_type == "LRN":
            _take_square_roots(graph, node, shapes)
        elif node.op_type == "Erf":
            _collapse_gelu(graph, node)
    for node in graph.left():
        if node.op_type == "Reshape":
            _absorb_shuffle(graph, node, shapes)
        elif node.op_type == "DequantizeLinear":
            _put_channels_last(graph, node, shapes)
    for node in graph.left():
        if node.op_type == "Conv":
            _fill_up_channels(graph, node)
            _make_few_dense(graph, node)
        elif node.op_type in ACTIVATION_OPS:
            _cut_off_integers(graph, node)
    graph.write()
    import_own_domain(proto)


class _Graph(GraphView):
    """A view that follows the changes made through it; the graph itself changes when written."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        super().__init__(proto)
        self._proto = proto
        self._nodes = list(proto.node)
        self.reshaped: set[str] = set()

    def left(self) -> list[onnx.NodeProto]:
        """The nodes that were there at first and still are."""
        there = {id(node) for node in self._nodes}
        return [node for node in self._proto.node if id(node) in there]

    def values(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def add_constant(self, name: str, values: NDArray[Any]) -> str:
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

    def write(self) -> None:
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


def _merge_groups(graph: _Graph, conv: onnx.NodeProto) -> None:
    """Writes zeros between groups of a convolution, so that they are fewer, or one.

    An integer one gets as few as are fastest, a float one keeps its own. A few become one where a
    depthwise convolution beside it can only so be filled up with channels. (Depthwise ones have a
    kernel of their own.)
    """
    operands, groups = _operands(graph, conv), groups_of(conv)
    if operands is None or groups == 1:
        return
    shape = graph.values(operands[0][0]).shape
    if shape[1] == 1:
        return
    left = groups if len(operands[0]) == 1 else fastest_groups(shape, groups)
    if left <= _MOST_GROUPS and _is_beside_odd_channels(graph, conv):
        left = 1
    if left < groups:
        _write_zeros_between(graph, conv, operands[0], left)


def _is_beside_odd_channels(graph: _Graph, conv: onnx.NodeProto) -> bool:
    """Whether the next convolution up or down is depthwise with channels that are to be filled up.

    A shuffle of channels may stand between: it goes where the convolution before it is dense.
    """
    for forward in (False, True):
        beside, _ = _next_convolution(graph, conv, forward=forward, passing=_SHUFFLING_OPS)
        if beside is not None and _missing_channels(graph, beside) > 0:
            return True
    return False


def _make_few_dense(graph: _Graph, depthwise: onnx.NodeProto) -> None:
    """Makes an integer depthwise convolution of a few odd channels dense."""
    operands, channels = _operands(graph, depthwise), groups_of(depthwise)
    if operands is None or len(operands[0]) == 1 or channels == 1:
        return
    odd = channels % _EIGHT != 0 and channels <= _FEW_CHANNELS
    if odd and graph.values(operands[0][0]).shape[:2] == (channels, 1):
        _write_zeros_between(graph, depthwise, operands[0])


def _write_zeros_between(
    graph: _Graph, conv: onnx.NodeProto, names: tuple[str, ...], left: int = 1
) -> None:
    """Lets a convolution have `left` groups, a divisor of those that it has."""
    weight, merged = graph.values(names[0]), groups_of(conv) // left
    outputs, inputs = weight.shape[0] // groups_of(conv), weight.shape[1]
    fewer = np.full(
        (len(weight), inputs * merged, *weight.shape[2:]),
        _zero(graph, names),
        weight.dtype,
    )
    for group in range(groups_of(conv)):
        rows = slice(group * outputs, (group + 1) * outputs)
        place = group % merged
        fewer[rows, place * inputs : (place + 1) * inputs] = weight[rows]
    graph.add_constant(names[0], fewer)
    for attribute in conv.attribute:
        if attribute.name == "group":
            attribute.i = left


def _zero(graph: _Graph, names: tuple[str, ...]) -> Any:
    """What stands for 0 in a constant: of weights with a scale for each channel it is 0."""
    return graph.values(names[2]).reshape(-1)[0] if len(names) > 2 else 0


def _operands(graph: _Graph, conv: onnx.NodeProto) -> Operands | None:
    """The names of a convolution's weight and bias; None if they are not all its own constants.

    Each is one constant, or integers with their scale and zero point.
    """
    operands = []
    for tensor in conv.input[1:]:
        names: tuple[str, ...] = (tensor,)
        if tensor not in graph.constants:
            writer = graph.writers.get(tensor)
            if writer is None or writer.op_type != "DequantizeLinear":
                return None
            names = tuple(writer.input)
        if any(n not in graph.constants or graph.sole_reader(n) is None for n in (*names,)) or (
            graph.sole_reader(tensor) is None
        ):
            return None
        operands.append(names)
    return operands


def _absorb_shuffle(graph: _Graph, start: onnx.NodeProto, shapes: Shapes) -> None:
    """Takes away a Reshape, Transpose and Reshape that only reorder channels.

    The convolution before them writes its channels in the new order instead, for which one of
    integers with a few groups is made dense; a depthwise one between passes the order on.
    """
    chain = _chain(graph, start)
    shape = _shape_before(graph, start, shapes)
    if chain is None or shape is None:
        return
    source, tensor = start.input[0], chain[-1].output[0]
    values = np.arange(int(np.prod(shape))).reshape(shape)
    moved = values
    for node in chain:
        if node.op_type not in PAIR_OPS:
            after = _moved(graph, node, moved)
            if after is None:
                return
            moved = after
    channels = shape[1]
    order = moved.reshape(channels, -1)[:, 0] // (values.size // channels)
    if moved.shape != values.shape or not np.array_equal(moved, values[:, order]):
        return
    convolutions = _writers_of_channels(graph, source)
    if not convolutions:
        return
    *_, (first, operands) = convolutions
    if groups_of(first) > 1:
        _write_zeros_between(graph, first, operands[0])
    for names in (names for _, operands in convolutions for names in operands):
        for name in names:
            constant = graph.values(name)
            if constant.ndim:
                graph.add_constant(name, np.ascontiguousarray(constant[order]))
    graph.remove(chain)
    graph.reroute(tensor, source)


def _chain(graph: _Graph, start: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """Reshape, Transpose and Reshape with the pairs between and behind them, if they follow."""
    before = graph.writers.get(start.input[0])
    scale = None
    if before is not None and before.op_type == "DequantizeLinear":
        scale = before.input[1]
    chain = [start]
    for expected in ("Transpose", "Reshape"):
        while (node := graph.sole_reader(chain[-1].output[0])) is not None:
            chain.append(node)
            if node.op_type not in PAIR_OPS:
                break
        if chain[-1].op_type != expected:
            return None
    quantize = graph.sole_reader(chain[-1].output[0])
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        dequantize = graph.sole_reader(quantize.output[0])
        # The pair behind rounds to the steps of the one before: once is enough.
        if dequantize is not None and quantize.input[1] == scale:
            chain += [quantize, dequantize]
    return None if chain[-1].output[0] in graph.outputs else chain


def _writers_of_channels(graph: _Graph, tensor: str) -> list[tuple[onnx.NodeProto, Operands]]:
    """The depthwise convolutions that pass a tensor's channels on, then the one that writes them.

    That one is dense, or can be made so. Empty if anything else stands in between, or reads what
    is between.
    """
    found = []
    while graph.sole_reader(tensor) is not None:
        node = graph.writers.get(tensor)
        if node is None:
            break
        if node.op_type == "Conv":
            operands, groups = _operands(graph, node), groups_of(node)
            if operands is None:
                break
            found.append((node, operands))
            weight, integers = graph.values(operands[0][0]), len(operands[0]) > 1
            if groups == 1 or (integers and weight.shape[1] > 1 and groups <= _MOST_GROUPS):
                return found
            if weight.shape[1] != 1 or weight.shape[0] != groups:
                break
        elif node.op_type not in (*PAIR_OPS, *ACTIVATION_OPS):
            break
        tensor = node.input[0]
    return []


def _fill_up_channels(graph: _Graph, depthwise: onnx.NodeProto) -> None:
    """Gives a depthwise convolution between dense ones as many channels as suit its kernel."""
    operands, missing = _operands(graph, depthwise), _missing_channels(graph, depthwise)
    if operands is None or missing == 0:
        return
    around: list[Operands] = []
    between: set[str] = set()
    for forward in (False, True):
        conv, tensors = _next_convolution(graph, depthwise, forward=forward)
        found = _operands(graph, conv) if conv is not None and groups_of(conv) == 1 else None
        if found is None:
            return
        around.append(found)
        between |= tensors
    graph.reshaped |= between
    before, behind = around
    for names in (*operands, *before):
        _lengthen(graph, names, missing, axis=0)
    _lengthen(graph, behind[0], missing, axis=1)
    for attribute in depthwise.attribute:
        if attribute.name == "group":
            attribute.i += missing


def _missing_channels(graph: _Graph, conv: onnx.NodeProto) -> int:
    """How many channels a depthwise convolution's kernel wants more; of another one none."""
    operands = _operands(graph, conv)
    if operands is None:
        return 0
    channels, inputs = graph.values(operands[0][0]).shape[:2]
    if channels == 1 or inputs != 1 or groups_of(conv) != channels:
        return 0
    at_once = CHANNELS_AT_ONCE["float" if len(operands[0]) == 1 else "int8"]
    return int(-channels % at_once)


def _next_convolution(
    graph: _Graph, conv: onnx.NodeProto, *, forward: bool, passing: tuple[str, ...] = ()
) -> tuple[onnx.NodeProto | None, set[str]]:
    """The next convolution up or down, and the tensors on the way.

    None if anything but pairs, activations and the operators `passing` comes first, or anything
    else reads what is between.
    """
    tensors: set[str] = set()
    tensor = conv.output[0] if forward else conv.input[0]
    while (reader := graph.sole_reader(tensor)) is not None:
        tensors.add(tensor)
        node = reader if forward else graph.writers.get(tensor)
        if node is not None and node.op_type == "Conv":
            return node, tensors
        if node is None or node.op_type not in (*PAIR_OPS, *ACTIVATION_OPS, *passing):
            break
        tensor = node.output[0] if forward else node.input[0]
    return None, tensors


def _lengthen(graph: _Graph, names: tuple[str, ...], missing: int, *, axis: int) -> None:
    """Adds zeros to a constant, or integers that stand for zero.

    Their scale is the last channel's: ONNX Runtime computes with integers only where a bias's
    scale is the product of its input's and its weight's.
    """
    values, *parameters = (graph.values(name) for name in names)
    widths = [(0, missing if i == axis else 0) for i in range(values.ndim)]
    graph.add_constant(names[0], np.pad(values, widths, constant_values=_zero(graph, names)))
    for name, parameter in zip(names[1:], parameters, strict=True):
        if parameter.ndim and axis == 0:  # one for each channel
            graph.add_constant(name, np.pad(parameter, (0, missing), mode="edge"))


def _shape_before(graph: _Graph, node: onnx.NodeProto, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of what a node reads, which a Q/DQ pair (or what holds it) does not change."""
    tensor = node.input[0]
    while tensor not in shapes:
        writer = graph.writers.get(tensor)
        if writer is None or writer.op_type not in (*PAIR_OPS, "Max"):
            return None
        tensor = writer.input[0]
    return shapes[tensor] if len(shapes[tensor]) > 2 else None


def _channels_of_images(graph: _Graph, node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """The number of channels of what a node reads, if that is images."""
    shape = _shape_before(graph, node, shapes)
    return shape[1] if shape is not None and len(shape) == _IMAGE_RANK else None


def _pair_around(
    graph: _Graph, node: onnx.NodeProto, result: str
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """What dequantizes the input of a node, and alone reads and quantizes a result."""
    before, behind = graph.writers.get(node.input[0]), graph.sole_reader(result)
    if before is None or before.op_type != "DequantizeLinear":
        return None
    return None if behind is None or behind.op_type != "QuantizeLinear" else (before, behind)


def _moved(
    graph: _Graph, node: onnx.NodeProto, values: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """What a Reshape or Transpose makes of a tensor for one input; None if it cannot be known."""
    if node.op_type == "Transpose":
        order = attribute_of(node, "perm")
        return None if order is None or order[0] != 0 else values.transpose(order)
    if node.input[1] not in graph.constants:
        return None
    sizes = [int(size) for size in graph.values(node.input[1])]
    if 0 in sizes[1:] or (-1 in sizes[1:] and sizes[0] not in (0, 1)):
        return None  # the batch takes part
    try:
        return values.reshape([1, *sizes[1:]])
    except ValueError:
        return None


def _hold_pairs(graph: _Graph, pool: onnx.NodeProto) -> None:
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


def _convolve(graph: _Graph, pool: onnx.NodeProto, shapes: Shapes) -> None:
    """Averages with an integer depthwise convolution whose weights are all 1 / taps.

    Not where the number of taps changes at the border.
    """
    tensor, channels = pool.output[0], _channels_of_images(graph, pool, shapes)
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


def _scale_channels(graph: _Graph, norm: onnx.NodeProto, shapes: Shapes) -> None:
    """Writes a BatchNormalization between pairs as an integer depthwise convolution of one tap.

    A channel's factor is 127 steps of the channel's own scale, so that nothing is rounded but the
    offset, to a 127th of a step of the input and less.
    """
    tensor, channels = norm.output[0], _channels_of_images(graph, norm, shapes)
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


def _add_and_saturate(graph: _Graph, gate: onnx.NodeProto) -> None:
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


def _cut_off_integers(graph: _Graph, activation: onnx.NodeProto) -> None:
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
    graph: _Graph, name: str, shape: tuple[int, ...], value: np.float32
) -> list[str]:
    """Names of integers, scale, zero point and result of a weight that has one value."""
    return [
        graph.add_constant(f"{name}__ones", np.ones(shape, np.int8)),
        graph.add_constant(f"{name}__ones_scale", np.full(shape[0], value, np.float32)),
        graph.add_constant(f"{name}__ones_zero_point", np.zeros(shape[0], np.int8)),
        f"{name}__weight",
    ]


def _put_channels_last(graph: _Graph, dequantize: onnx.NodeProto, shapes: Shapes) -> None:
    """Multiplies a float node's result by 1 with integers before it is joined with others."""
    tensor = dequantize.output[0]
    quantize = graph.writers.get(dequantize.input[0])
    channels = _channels_of_images(graph, dequantize, shapes) if quantize is not None else None
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


def _computes_with_integers(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Whether a node's operands (of a layer the weight) are dequantized ones."""
    if node.op_type in WEIGHTED_OPS:
        operands = [node.input[1]]
    else:
        operands = [name for name in node.input if name not in graph.constants]
    return all(_is_integer(graph, name) for name in operands)


def _is_integer(graph: _Graph, tensor: str) -> bool:
    """Whether a tensor comes from a pair, possibly through nodes that only move its values."""
    writer = graph.writers.get(tensor)
    if writer is None or writer.op_type == "DequantizeLinear":
        return writer is not None
    moving = (*ACTIVATION_OPS, *MOVING_OPS)
    return writer.op_type in moving and _is_integer(graph, writer.input[0])


def _collapse_gelu(graph: _Graph, erf: onnx.NodeProto) -> None:
    """Writes ONNX Runtime's operator for a GELU that is written out in float."""
    gelu = find_gelu(graph, erf)
    if gelu is None:
        return
    last = gelu.nodes[-1]
    whole = helper.make_node(
        "Gelu", [gelu.source], [gelu.output], name=last.name, domain=OWN_DOMAIN
    )
    graph.replace(last, [whole], without=[node for node in gelu.nodes if node is not last])


def _take_square_roots(graph: _Graph, lrn: onnx.NodeProto, shapes: Shapes) -> None:
    """Writes ``x / (bias + alpha / size * sum(x ** 2)) ** 0.75`` without the power.

    The sum goes over neighbouring channels: a 1 x 1 convolution with a banded weight.
    """
    shape = _shape_before(graph, lrn, shapes)
    exponent = attribute_of(lrn, "beta", _LRN_EXPONENT)
    if shape is None or abs(exponent - _LRN_EXPONENT) > 1e-6:
        return
    size = attribute_of(lrn, "size")
    alpha, bias = attribute_of(lrn, "alpha", 1e-4), attribute_of(lrn, "bias", 1.0)
    channels = np.arange(shape[1])
    distance = channels[None, :] - channels[:, None]
    band = (distance >= -((size - 1) // 2)) & (distance <= size // 2)
    weight = (alpha / size * band).astype(np.float32).reshape(*band.shape, *[1] * (len(shape) - 2))
    source, result = lrn.input[0], lrn.output[0]
    squares, sums, root, fourth_root, power = (
        f"{result}__{part}" for part in ("squares", "sums", "root", "fourth_root", "power")
    )
    operands = [
        graph.add_constant(f"{result}__band", weight),
        graph.add_constant(f"{result}__bias", np.full(shape[1], bias, np.float32)),
    ]
    graph.replace(
        lrn,
        [
            helper.make_node("Mul", [source, source], [squares]),
            helper.make_node("Conv", [squares, *operands], [sums]),
            helper.make_node("Sqrt", [sums], [root]),
            helper.make_node("Sqrt", [root], [fourth_root]),
            helper.make_node("Mul", [root, fourth_root], [power]),
            helper.make_node("Div", [source, power], [result]),
        ],
    )
