"""Where Q/DQ pairs stand: ONNX Runtime's decision, asked for once for each model.

`quantize_static` is run once with placeholder ranges. What it decides (which tensors carry Q/DQ
pairs, which of them share parameters, which constants are stored as integers) does not depend on
the ranges, so every configuration fills its own numbers into the same graph. Nor does it depend on
the weights, whose channels `quantize_static` goes through one by one: it is given two channels of
each. So it takes 0.3 s for MobileNetV2 instead of 1.4, and filling a few hundredths.

A Resize that interpolates is kept in float between its pairs: `quantize_static` would give its
result the range of its input, which cubic interpolation leaves (14 dB of a small net), and ONNX
Runtime's integer kernel rounds down and is slower than the float one. So is an AveragePool with
``ceil_mode`` and ``count_include_pad``, where the integer kernel divides by other numbers (25 dB),
and one with dilations, which it does not know.

Nodes that stay in float lose their pairs afterwards (`keep_float`), as with the option
``nodes_to_exclude``, but for four things in which that loses accuracy or time: a float node reads
what a float node before it wrote, not the rounded copy that an integer neighbour of it needs;
nodes that only move values behind a float node are computed in float too, because ONNX Runtime's
integer MaxPool without a quantized convolution around it is some 30 times slower; the product of
the last layer need not be rounded to 8 bits before it leaves the model; and what is looked up in a
table of integers keeps its pair, without which all of the table is dequantized in each run, some
100 times slower with 30,000 words.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Container
from collections.abc import Sequence
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import save_tensors_data
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.registry import QDQRegistry
from onnxruntime.quantization.registry import QLinearOpsRegistry

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import groups_of
from optuna_quantune.quantization.graph import PAIR_OPS
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.graph import sort_nodes
from optuna_quantune.quantization.model import check_node_names
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import LOOKUP_OPS
from optuna_quantune.quantization.model import NORMALIZATION_OPS
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.observation import is_finite


_SCALE_SUFFIX: Final = "_scale"
# What ONNX Runtime appends to the name of an output of the model that it rounds.
_OUTPUT_SUFFIX: Final = "_QuantizeLinear_Input"
# What ONNX Runtime quantizes with the parameters of the input (`QDQDirect8BitOp`, `QDQMaxPool`).
MOVING_OPS: Final = frozenset(
    {"AveragePool", "Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
# What ``quantize_static`` quantizes at all.
_QUANTIZED_OPS: Final = frozenset({*QDQRegistry, *QLinearOpsRegistry})
# Layers whose integer kernels can give float results (``QGemm``, ``MatMulIntegerToFloat``).
FLOAT_RESULT_OPS: Final = ("Gemm", "MatMul")
ACTIVATION_OPS: Final = ("Clip", "Relu")
# Types that ``quantize_static`` quantizes, too, though a float32 model has them for a reason.
_HALVES: Final = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class ActivationSite:
    """One scale and zero point in the graph, shared by one or more activation tensors.

    Attributes:
        tensor: The activation whose range decides, or the constant, where values are looked up in
            a table (Gather).
        statistics: The activation whose statistics are that range: `tensor` itself, or the one
            that has the same range (`statistics_sources`), or what was looked up.
        scale: Name of the scale initializer.
        zero_point: Name of the zero-point initializer.
    """

    tensor: str
    statistics: str
    scale: str
    zero_point: str


@dataclass(frozen=True)
class ConstantSite:
    """One constant that is stored as integers.

    Attributes:
        kind: ``weight`` (of a layer), ``bias`` (int32) or ``other`` (an operand of Add, Mul, ...).
        tensor: Name of the float initializer.
        quantized: Name of the integer initializer.
        scale: Name of the scale initializer.
        zero_point: Name of the zero-point initializer.
        axis: Channel axis where per-channel scales are possible, otherwise None.
        input_scale: For a bias, the scale initializer of its layer's input.
        weight: For a bias, the weight of its layer.
    """

    kind: Literal["weight", "bias", "other"]
    tensor: str
    quantized: str
    scale: str
    zero_point: str
    axis: int | None
    input_scale: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class Placement:
    """The quantized graph without its numbers.

    Attributes:
        template: The Q/DQ model; the initializers named by the sites are left out.
        activations: All activation parameters in graph order.
        constants: All constants in graph order; weights stand before the biases that need them.
        always_float: Names of the nodes that ONNX Runtime would get wrong with integers.
    """

    template: onnx.ModelProto
    activations: tuple[ActivationSite, ...]
    constants: tuple[ConstantSite, ...]
    always_float: frozenset[str]


def place(model: FloatModel, *, float_nodes: Sequence[str] = ()) -> Placement:
    """Asks ONNX Runtime where the Q/DQ pairs of `model` go.

    The options are per-channel weights (the axis is dropped later for per-tensor ones) and
    ``QDQKeepRemovableActivations``: with our own parameters ONNX Runtime cannot know whether the
    range of a tensor makes its Relu or Clip superfluous, and would remove it all the same.

    Args:
        model: The prepared float model.
        float_nodes: What stays in float (`keep_float`).

    Raises:
        InputError: If no node or output has one of these names, or ONNX Runtime cannot quantize
            the model.
    """
    always_float = _always_float(model.proto.graph)
    quantized = _run_quantize_static(model, always_float)
    graph = quantized.graph
    view = GraphView(graph)
    sources = statistics_sources(model.proto.graph)
    activations: dict[str, ActivationSite] = {}
    constants: list[ConstantSite] = []
    of_constants = {tensor.name for tensor in model.proto.graph.initializer}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero_point = node.input[1], node.input[2]
            tensor = scale.removesuffix(_SCALE_SUFFIX)
            statistics = sources.get(tensor, tensor)
            if tensor in of_constants:  # what is looked up in a table
                statistics = node.input[0].removesuffix(_OUTPUT_SUFFIX)
            activations[scale] = ActivationSite(tensor, statistics, scale, zero_point)
        elif node.op_type == "DequantizeLinear" and node.input[0] in view.constants:
            constants.append(_constant_site(node, view, model))
    constants.sort(key=lambda site: site.kind == "bias")
    filled_in = {name for site in activations.values() for name in (site.scale, site.zero_point)}
    for constant in constants:
        filled_in |= {constant.quantized, constant.scale, constant.zero_point}
    refill(graph.initializer, (t for t in graph.initializer if t.name not in filled_in))
    whole = Placement(quantized, tuple(activations.values()), tuple(constants), always_float)
    placement = keep_float(whole, model, float_nodes)
    if not placement.activations and not float_nodes:
        raise InputError(
            f"model {model.path}: ONNX Runtime has integer kernels for none of its layers as they "
            "are (a grouped ConvTranspose with a bias, say); nothing can be quantized"
        )
    return placement


def keep_float(placement: Placement, model: FloatModel, float_nodes: Sequence[str]) -> Placement:
    """Takes Q/DQ pairs away so that some nodes are computed in float.

    A pair stays where a node that computes with integers writes or reads the tensor.

    Args:
        placement: Where the pairs of `model` stand.
        model: The prepared float model.
        float_nodes: Names of nodes that stay in float, and of outputs of the model that are not
            rounded to 8 bits (where a Gemm or MatMul writes them; elsewhere without effect).

    Raises:
        InputError: If no node or output has one of these names.
    """
    outputs = {output.name for output in model.outputs}
    check_node_names(model, [name for name in float_nodes if name not in outputs])
    template = copy_of(placement.template)
    graph = template.graph
    computed_in_float = _with_moving_nodes(model.proto.graph, float_nodes)
    computed_in_float |= placement.always_float
    pairs = _Pairs(graph, computed_in_float, set(float_nodes))
    # The dequantized bias has the name of the float one.
    unused = {id(node) for name, node in pairs.constants.items() if pairs.all_readers_float(name)}
    instead: dict[str, str] = {}
    for dequantized, pair in pairs.nodes.items():
        if not pairs.stay(dequantized):
            unused.update(map(id, pair))
            if dequantized in outputs:  # the node before it writes the output itself
                instead[pair[0].input[0]] = dequantized
    float_constants = {site.quantized: site.tensor for site in placement.constants}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in pairs.nodes and pairs.read_in_float(name, node):
                source = pairs.nodes[name][0].input[0]
                node.input[position] = instead.get(source, source)
            elif name in pairs.constants and node.name in pairs.float_nodes:
                node.input[position] = float_constants[pairs.constants[name].input[0]]
            elif name in instead:  # what is never quantized reads it already
                node.input[position] = instead[name]
        for position, name in enumerate(node.output):
            node.output[position] = instead.get(name, name)
    kept = [node for node in graph.node if id(node) not in unused]
    return _without_unused(placement, template, _shielded(kept, pairs.float_nodes), model)


def stays_float(node: onnx.NodeProto, float_nodes: Set[str]) -> bool:
    """Whether a node is one that is kept in float, or that ``quantize_static`` does not know."""
    return node.name in float_nodes or node.op_type not in _QUANTIZED_OPS


def looks_up(node: onnx.NodeProto, constants: Container[str]) -> bool:
    """Whether a node gives values of a table that is among `constants`."""
    return node.op_type in LOOKUP_OPS and node.input[0] in constants


def nodes_around(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """The node that writes a tensor and those that read it, also where it is only moved."""
    view = GraphView(graph)
    while (writer := view.writers.get(tensor)) is not None and writer.op_type in MOVING_OPS:
        tensor = writer.input[0]
    nodes = [] if writer is None else [writer]
    waiting = [tensor]
    while waiting:
        readers = view.readers.get(waiting.pop(), [])
        nodes += readers
        waiting += [node.output[0] for node in readers if node.op_type in MOVING_OPS]
    return nodes


def keep_normalizations(placement: Placement, model: FloatModel) -> Placement:
    """Gives normalizations their factors and offsets as floats.

    ``quantize_static`` rounds them as the weights of a layer, the factors with one scale for all,
    which is a loss for nothing where normalizations are computed in float.

    Args:
        placement: Where the pairs of `model` stand.
        model: The prepared float model.
    """
    template = copy_of(placement.template)
    view = GraphView(template.graph)
    restored = {}
    for site in placement.constants:
        (dequantize,) = view.readers[site.quantized]
        readers = view.readers.get(dequantize.output[0], [])
        if readers and all(reader.op_type in NORMALIZATION_OPS for reader in readers):
            restored[dequantize.output[0]] = site.tensor
    if not restored:
        return placement
    for node in template.graph.node:
        if node.op_type in NORMALIZATION_OPS:
            refill(node.input, [restored.get(name, name) for name in node.input])
    nodes = [node for node in template.graph.node if not restored.keys() & set(node.output)]
    return _without_unused(placement, template, nodes, model)


class _Pairs:
    """The Q/DQ pairs of a graph by the tensor that they give, and which of them are needed.

    Attributes:
        nodes: QuantizeLinear and DequantizeLinear of each activation, by dequantized tensor.
        constants: DequantizeLinear of each constant, by dequantized tensor.
        float_nodes: Names of the nodes kept in float.
    """

    def __init__(
        self, graph: onnx.GraphProto, float_nodes: Set[str], float_outputs: Set[str]
    ) -> None:
        self.float_nodes = float_nodes
        self._view = GraphView(graph)
        self._float_outputs = float_outputs
        self._stay: dict[str, bool] = {}
        self.nodes: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
        self.constants: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                before = self._view.writers.get(node.input[0])
                if before is None:
                    self.constants[node.output[0]] = node
                else:
                    self.nodes[node.output[0]] = before, node

    def stay(self, tensor: str) -> bool:
        """Whether the pair that gives `tensor` is needed."""
        if tensor not in self._stay:
            self._stay[tensor] = self._is_needed(tensor)
        return self._stay[tensor]

    def _is_needed(self, tensor: str) -> bool:
        writer = self._view.writers.get(self.nodes[tensor][0].input[0])
        if writer is not None and self._computes_with_integers(writer):
            return tensor not in self._float_outputs or writer.op_type not in FLOAT_RESULT_OPS
        # A Relu or Clip is computed as what is before it.
        return any(
            reader.op_type not in ACTIVATION_OPS and self._computes_with_integers(reader)
            for reader in self._view.readers.get(tensor, [])
        )

    def read_in_float(self, tensor: str, reader: onnx.NodeProto) -> bool:
        """Whether `reader` takes what stands before the pair that gives `tensor`."""
        if not self.stay(tensor):
            return True
        writer = self._view.writers.get(self.nodes[tensor][0].input[0])
        rounded_by_need = writer is not None and self._computes_with_integers(writer)
        return not rounded_by_need and not self._computes_with_integers(reader)

    def all_readers_float(self, constant: str) -> bool:
        """Whether only nodes kept in float read a dequantized constant."""
        return all(node.name in self.float_nodes for node in self._view.readers[constant])

    def _computes_with_integers(self, node: onnx.NodeProto) -> bool:
        if stays_float(node, self.float_nodes):
            return False
        activations = [name for name in node.input if name in self.nodes]
        if node.op_type in ACTIVATION_OPS:
            return any(self.stay(name) for name in activations)
        return bool(activations) or looks_up(node, self.constants)


def _with_moving_nodes(graph: onnx.GraphProto, float_nodes: Sequence[str]) -> set[str]:
    """Float nodes, and the moving nodes that stand behind one or have no other readers."""
    found = set(float_nodes)
    view = GraphView(graph)
    for node in graph.node:
        if node.op_type in MOVING_OPS:
            before = view.writers.get(node.input[0])
            while before is not None and before.op_type in ACTIVATION_OPS:
                before = view.writers.get(before.input[0])
            if before is not None and stays_float(before, found):
                found.add(node.name)
    for node in reversed(graph.node):
        behind = view.readers.get(node.output[0], []) if node.op_type in MOVING_OPS else []
        if behind and all(stays_float(reader, found) for reader in behind):
            found.add(node.name)
    return found


def _always_float(graph: onnx.GraphProto) -> frozenset[str]:
    """Names of the nodes that integers, or ONNX Runtime's way to them, would get wrong."""
    view = GraphView(graph)
    constants = view.constants.keys()
    of_shapes = _of_shapes(graph, constants)
    infinite = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and not is_finite(numpy_helper.to_array(tensor))
    }
    halves = {t.name for t in graph.initializer if t.data_type in _HALVES}
    halves |= {
        value.name
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type in _HALVES
    }
    return frozenset(
        node.name
        for node in graph.node
        if node.name in of_shapes
        or _interpolates(node)
        or _has_no_integer_average(node)
        or _has_odd_bias(node, constants)
        or joins_outputs(node, view)
        or infinite.intersection(node.input)
        or halves.intersection((*node.input, *node.output))
    )


def _of_shapes(graph: onnx.GraphProto, constants: Set[str]) -> set[str]:
    """Names of the nodes that compute with nothing but shapes, as how far an image is padded.

    Exporters do so in real numbers, too, and one that is rounded is another shape. Not of layers
    and tables that words are looked up in, whose constants are worth storing as integers.
    """
    found: set[str] = set()
    known: set[str] = set()
    for node in graph.node:
        computed = {name for name in reads(node) if name not in constants}
        large = node.op_type in WEIGHTED_OPS or looks_up(node, constants)
        if node.op_type in ("Shape", "Size") or (computed and computed <= known and not large):
            found.add(node.name)
            known.update(node.output)
    return found


def _interpolates(node: onnx.NodeProto) -> bool:
    return node.op_type == "Resize" and attribute_of(node, "mode", b"nearest") != b"nearest"


def _has_odd_bias(node: onnx.NodeProto, constants: Set[str]) -> bool:
    """Whether the scale of a layer's bias is not that of its input times that of a constant."""
    if node.op_type not in WEIGHTED_OPS or len(node.input) < 3 or node.input[2] not in constants:
        return False
    grouped = node.op_type == "ConvTranspose" and groups_of(node) > 1
    return grouped or node.input[1] not in constants


def _has_no_integer_average(node: onnx.NodeProto) -> bool:
    """Whether windows of an AveragePool are dilated, or can stand out from what is counted."""
    if node.op_type != "AveragePool":
        return False
    beyond = attribute_of(node, "ceil_mode", 0) and attribute_of(node, "count_include_pad", 0)
    return bool(beyond or attribute_of(node, "dilations"))


def _shielded(nodes: Sequence[onnx.NodeProto], float_nodes: Set[str]) -> list[onnx.NodeProto]:
    """The nodes, with a Clip that clips nothing before each float layer that reads 8-bit values.

    And before an average that has to be computed in float. ONNX Runtime quantizes the float weight
    of a layer behind a DequantizeLinear when it loads a model (``WeightBiasQuantization``, from
    the basic level of optimization on), with one scale for all of it: the layer would be no float
    layer at all, and a worse one than a quantized one. The Clip keeps the two apart, and nothing
    removes it.
    """
    dequantized = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
    shielded: list[onnx.NodeProto] = []
    for node in nodes:
        if (
            node.name in float_nodes
            and (
                node.op_type in ("Conv", "ConvTranspose", "Gemm") or _has_no_integer_average(node)
            )
            and node.input[0] in dequantized
        ):
            name = f"{node.name}_float_input"
            shielded.append(onnx.helper.make_node("Clip", [node.input[0]], [name], name))
            node.input[0] = name
        shielded.append(node)
    return shielded


def _without_unused(
    placement: Placement,
    template: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    model: FloatModel,
) -> Placement:
    """A placement without the pairs that nothing reads; float constants are put back."""
    graph = template.graph
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if used.intersection(node.output) or node.op_type not in PAIR_OPS:
            kept.append(node)
            used.update(reads(node))
    refill(graph.node, reversed(kept))
    there = {tensor.name for tensor in graph.initializer}
    there.update(name for node in kept for name in node.output)
    graph.initializer.extend(
        tensor
        for tensor in model.proto.graph.initializer
        if tensor.name in used and tensor.name not in there
    )
    return Placement(
        template,
        tuple(site for site in placement.activations if site.scale in used),
        tuple(site for site in placement.constants if site.quantized in used),
        placement.always_float,
    )


def _run_quantize_static(model: FloatModel, always_float: Set[str]) -> onnx.ModelProto:
    """The Q/DQ model with placeholder ranges; its weights stand for nothing.

    Raises:
        InputError: If ONNX Runtime cannot quantize the model.
    """
    try:
        quantized = _quantize_static(model, _with_two_channels(model), always_float)
    except Exception:  # perhaps shape inference stumbled over the missing channels
        try:
            quantized = _quantize_static(model, copy_of(model.proto), always_float)
        except Exception as error:  # ONNX Runtime raises whatever happens
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"model {model.path}: ONNX Runtime cannot quantize it ({reason})"
            ) from error
    refill(quantized.graph.value_info, model.proto.graph.value_info)
    refill(quantized.graph.output, model.proto.graph.output)
    whole = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    refill(
        quantized.graph.initializer, [whole.get(t.name, t) for t in quantized.graph.initializer]
    )
    sort_nodes(quantized.graph)  # ONNX Runtime does not look into the branches of an If
    return quantized


def _with_two_channels(model: FloatModel) -> onnx.ModelProto:
    """The float model with the first two channels only of all weights and biases of its layers.

    Two, because one would be a scale for the whole weight. What anything else reads stays whole.
    """
    proto = copy_of(model.proto)
    cut: dict[str, tuple[int, int]] = {}
    read_by_layers: Counter[str] = Counter()
    for layer in model.layers:
        channels = model.weights[layer.weight].shape[layer.channel_axis]
        for name, axis in ((layer.weight, layer.channel_axis), (layer.bias, -1)):
            if name is not None:
                read_by_layers[name] += 1
                cut[name] = axis, channels
    read = Counter(name for node in proto.graph.node for name in reads(node))
    for tensor in proto.graph.initializer:
        axis, channels = cut.get(tensor.name, (0, 0))
        if channels > 2 and read[tensor.name] == read_by_layers[tensor.name]:
            values = model.weights[tensor.name]
            if values.ndim and values.shape[axis] == channels:
                few = np.ascontiguousarray(values.take([0, 1], axis))
                tensor.CopyFrom(numpy_helper.from_array(few, tensor.name))
    # Some exporters say the shapes of constants, too.
    values_info = (value for value in proto.graph.value_info if value.name not in cut)
    refill(proto.graph.value_info, values_info)
    return proto


def _quantize_static(
    model: FloatModel, proto: onnx.ModelProto, always_float: Set[str]
) -> onnx.ModelProto:
    graph = model.proto.graph
    tensors = [name for node in graph.node for name in node.output if name]
    tensors += [spec.name for spec in model.inputs]
    placeholder = TensorData(lowest=np.float32(0), highest=np.float32(1))
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(tensors, placeholder))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "ranges.json"
        output = Path(folder) / "quantized.onnx"
        save_tensors_data(ranges, str(cache))
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it advises a pre-processing that was done already
        try:
            quantize_static(
                proto,
                str(output),
                None,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=str(cache),
                nodes_to_exclude=sorted(always_float),
                extra_options={"QDQKeepRemovableActivations": True},
            )
        finally:
            logging.root.setLevel(level)
        return onnx.load(output)


def statistics_sources(
    graph: onnx.GraphProto, *, before_activations: bool = True
) -> dict[str, str]:
    """Maps tensors whose range is that of another tensor to that tensor.

    - What a Relu or Clip without a sibling cuts off never matters, so the tensor before it takes
      the range behind it (ONNX Runtime does the same in ``adjust_tensor_ranges``).
    - What nothing but a Concat reads takes the range of its result: it would be rounded to those
      steps anyway, so that steps of its own are only another rounding, and an integer Concat of
      equal steps copies (a third of the time). Not where some parts end with a Relu or Clip and
      others do not, because the range of the result does not imply the Relu; nor where the Concat
      stays in float (`joins_outputs`).
    - Nodes that only move or pool values keep their input's parameters where the input is
      quantized. Where it is not, because the layer before stays in float, their output gets
      parameters of its own; its values still lie in the input's range.

    Args:
        graph: The float model.
        before_activations: Whether the first two rules hold; without them what is before a Relu,
            Clip or Concat has a range of its own.
    """
    view = GraphView(graph)
    sources: dict[str, str] = {}
    writers = {name: node.op_type for node in graph.node for name in node.output}
    for node in reversed(graph.node) if before_activations else ():
        if node.op_type == "Concat" and not joins_outputs(node, view):
            parts = [name for name in node.input if writers.get(name) not in MOVING_OPS]
            alone = all(view.sole_reader(name) is not None for name in parts)
            if alone and len({writers.get(name) in ACTIVATION_OPS for name in parts}) == 1:
                source = sources.get(node.output[0], node.output[0])
                sources.update(dict.fromkeys(parts, source))
        elif node.op_type in ACTIVATION_OPS and view.sole_reader(node.input[0]) is not None:
            sources[node.input[0]] = sources.get(node.output[0], node.output[0])
    for node in graph.node:
        if node.op_type in MOVING_OPS:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
    return sources


def joins_outputs(node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether a node is a Concat of what leaves the model, as the boxes and scores of a detector.

    They have nothing in common: in the steps of boxes of hundreds of pixels a score is 0. It stays
    in float, and each part keeps the steps of its own.
    """

    def leaves(tensor: str) -> bool:
        readers = view.readers.get(tensor, [])
        return bool(readers or tensor in view.outputs) and all(
            reader.op_type in (*MOVING_OPS, "Concat") and leaves(reader.output[0])
            for reader in readers
        )

    return node.op_type == "Concat" and leaves(node.output[0])


def _constant_site(node: onnx.NodeProto, view: GraphView, model: FloatModel) -> ConstantSite:
    quantized, scale, zero_point = node.input
    tensor = quantized.removesuffix("_quantized")
    if view.constants[quantized].data_type == onnx.TensorProto.INT32:
        layer = view.readers[node.output[0]][0]
        data, weight = view.writers[layer.input[0]], view.writers[layer.input[1]]
        return ConstantSite(
            "bias",
            tensor,
            quantized,
            scale,
            zero_point,
            axis=None,
            input_scale=data.input[1],
            weight=weight.input[0].removesuffix("_quantized"),
        )
    axis = attribute_of(node, "axis")
    kind: Literal["weight", "other"] = (
        "weight" if any(layer.weight == tensor for layer in model.layers) else "other"
    )
    return ConstantSite(kind, tensor, quantized, scale, zero_point, axis)
