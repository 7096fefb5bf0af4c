"""Channels and groups of convolutions as ONNX Runtime's processor kernels are fast at them.

Nothing here changes what a model computes; `kernels.py` says when what is done. Seen in profiles
of ONNX Runtime 1.32 on x86-64:

- An integer convolution goes through its groups one by one, and narrow ones leave the processor
  idle. With zeros between them it has fewer and wider groups, up to one: of 32 groups of four
  channels, as in ResNeXt, four of 32 take a quarter of the time.
- A shuffle of channels costs nothing where the convolution before it is dense: it is another order
  of the weight's rows. ShuffleNet takes 3.4 ms instead of 3.9.
- The integer depthwise convolution takes channels by sixteens and the rest one by one: with 60 of
  them it takes three times as long as with 64. Channels of zeros, which the convolution before it
  writes and the one behind it does not need, fill them up. (The float one likewise, by fours.)
  Where others read its channels, and there are few, the dense one with zeros is faster.
"""

from __future__ import annotations

from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import groups_of
from optuna_quantune.quantization.graph import is_depthwise
from optuna_quantune.quantization.graph import PAIR_OPS
from optuna_quantune.quantization.node_time import CHANNELS_AT_ONCE
from optuna_quantune.quantization.node_time import fastest_groups
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.rewriting import Rewriting


# Up to so many groups become one for the sake of what stands beside the convolution.
_MOST_GROUPS: Final = 8
# Integer depthwise convolutions of up to so many channels, that do not come in eights, are made
# dense.
_FEW_CHANNELS: Final = 20
_EIGHT: Final = 8
_SHUFFLING_OPS: Final = ("Reshape", "Transpose")

# For a weight and a bias each the constants that it is made of.
Operands = list[tuple[str, ...]]


def merge_groups(graph: Rewriting, conv: onnx.NodeProto) -> None:
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


def absorb_shuffle(graph: Rewriting, start: onnx.NodeProto) -> None:
    """Takes away a Reshape, Transpose and Reshape that only reorder channels.

    The convolution before them writes its channels in the new order instead, for which one of
    integers with a few groups is made dense; a depthwise one between passes the order on.
    """
    chain = _chain(graph, start)
    shape = graph.shape_before(start)
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


def fill_up_channels(graph: Rewriting, depthwise: onnx.NodeProto) -> None:
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


def make_few_dense(graph: Rewriting, depthwise: onnx.NodeProto) -> None:
    """Makes an integer depthwise convolution of a few odd channels dense."""
    operands, channels = _operands(graph, depthwise), groups_of(depthwise)
    if operands is None or len(operands[0]) == 1:
        return
    shape = graph.values(operands[0][0]).shape
    if is_few_and_odd(channels) and is_depthwise(shape, channels):
        _write_zeros_between(graph, depthwise, operands[0])


def is_few_and_odd(channels: int) -> bool:
    """Whether an integer depthwise convolution of so many channels is made dense."""
    return channels % _EIGHT != 0 and channels <= _FEW_CHANNELS


def _is_beside_odd_channels(graph: Rewriting, conv: onnx.NodeProto) -> bool:
    """Whether the next convolution up or down is depthwise with channels that are to be filled up.

    A shuffle of channels may stand between: it goes where the convolution before it is dense.
    """
    for forward in (False, True):
        beside, _ = _next_convolution(graph, conv, forward=forward, passing=_SHUFFLING_OPS)
        if beside is not None and _missing_channels(graph, beside) > 0:
            return True
    return False


def _write_zeros_between(
    graph: Rewriting, conv: onnx.NodeProto, names: tuple[str, ...], left: int = 1
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


def _zero(graph: Rewriting, names: tuple[str, ...]) -> Any:
    """What stands for 0 in a constant: of weights with a scale for each channel it is 0."""
    return graph.values(names[2]).reshape(-1)[0] if len(names) > 2 else 0


def _operands(graph: Rewriting, conv: onnx.NodeProto) -> Operands | None:
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


def _chain(graph: Rewriting, start: onnx.NodeProto) -> list[onnx.NodeProto] | None:
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


def _moved(
    graph: Rewriting, node: onnx.NodeProto, values: NDArray[np.int64]
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


def _writers_of_channels(graph: Rewriting, tensor: str) -> list[tuple[onnx.NodeProto, Operands]]:
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
            if not is_depthwise(weight.shape, groups):
                break
        elif node.op_type not in (*PAIR_OPS, *ACTIVATION_OPS):
            break
        tensor = node.input[0]
    return []


def _missing_channels(graph: Rewriting, conv: onnx.NodeProto) -> int:
    """How many channels a depthwise convolution's kernel wants more; of another one none."""
    operands = _operands(graph, conv)
    if operands is None:
        return 0
    shape, channels = graph.values(operands[0][0]).shape, groups_of(conv)
    if not is_depthwise(shape, channels):
        return 0
    at_once = CHANNELS_AT_ONCE["float" if len(operands[0]) == 1 else "int8"]
    return int(-channels % at_once)


def _next_convolution(
    graph: Rewriting, conv: onnx.NodeProto, *, forward: bool, passing: tuple[str, ...] = ()
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


def _lengthen(graph: Rewriting, names: tuple[str, ...], missing: int, *, axis: int) -> None:
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
