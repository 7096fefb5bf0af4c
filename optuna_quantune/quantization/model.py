"""A float ONNX model, loaded, checked and prepared: what every configuration is built from."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnxruntime.quantization.shape_inference import quant_pre_process

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import inner_graphs
from optuna_quantune.quantization.graph import is_sorted
from optuna_quantune.quantization.graph import opset_of
from optuna_quantune.quantization.graph import OWN_DOMAIN
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.graph import rename_tensors
from optuna_quantune.quantization.graph import sort_nodes
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.own_fusions import BLOCKED_DOMAIN
from optuna_quantune.quantization.own_fusions import without_own_fusions
from optuna_quantune.quantization.session import make_session


WEIGHTED_OPS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Have no integer kernels on processors.
NORMALIZATION_OPS: Final = ("BatchNormalization", "InstanceNormalization", "LayerNormalization")
# Have weights, which ONNX Runtime's quantizer leaves as they are.
RECURRENT_OPS: Final = ("GRU", "LSTM", "RNN")
# Operators whose third input is a bias.
_BIASED_OPS: Final = ("Conv", "ConvTranspose", "Gemm", *NORMALIZATION_OPS)
# Per-channel DequantizeLinear (its `axis` attribute) exists since opset 13.
MINIMUM_OPSET: Final = 13
# The last opset in which a Resize, or Upsample, has no other way to find places.
_OPSET_OF_ASYMMETRIC_RESIZE: Final = 10
# What gives values of a constant as they are, with its one scale.
LOOKUP_OPS: Final = ("Gather", "GatherElements")
# Constants need not be inputs of the graph, too, since this version of the format.
_IR_OF_FIXED_CONSTANTS: Final = 4
# What ONNX Runtime's quantizer appends to the name of a tensor.
_ADDED_SUFFIXES: Final = (
    "_scale",
    "_zero_point",
    "_quantized",
    "_quantized_scale",
    "_quantized_zero_point",
    "_QuantizeLinear_Input",
    "_QuantizeLinear_Output",
    "_DequantizeLinear_Output",
)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (None for a free dimension) and dtype of one input or output of a model."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Layer:
    """One node with a constant weight: what can be quantized or kept in float.

    Attributes:
        name: Name of the node.
        op_type: One of `WEIGHTED_OPS`.
        input: Name of the activation that the node reads.
        output: Name of the activation that the node writes.
        weight: Name of the weight initializer.
        bias: Name of the bias initializer, or None.
        channel_axis: Axis of the weight that counts output channels.
        groups: Number of groups of a convolution, otherwise 1.
    """

    name: str
    op_type: str
    input: str
    output: str
    weight: str
    bias: str | None
    channel_axis: int
    groups: int

    def has_corrected_bias(self, config: QuantizationConfig) -> bool:
        """Whether a configuration takes the mean error of the layer off its bias."""
        return config.bias_correction and self.bias is not None

    def by_group(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight as (groups, output channels and input channels of a group, taps)."""
        if self.op_type == "Conv":
            outputs, inputs = weight.shape[:2]
            return weight.reshape(self.groups, outputs // self.groups, inputs, -1)
        if self.op_type == "ConvTranspose":
            inputs, outputs = weight.shape[:2]
            parts = weight.reshape(self.groups, inputs // self.groups, outputs, -1)
            return parts.swapaxes(1, 2)
        inputs_last = np.moveaxis(weight, self.channel_axis, 0)
        return inputs_last.reshape(1, inputs_last.shape[0], -1, 1)

    def from_groups(self, parts: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """What `by_group` gave, in the shape of the weight again."""
        if self.op_type == "Conv":
            return parts.reshape(shape)
        if self.op_type == "ConvTranspose":
            return parts.swapaxes(1, 2).reshape(shape)
        matrix = np.moveaxis(parts.reshape(parts.shape[1:3]), 0, self.channel_axis)
        return np.ascontiguousarray(matrix)


@dataclass(frozen=True)
class FloatModel:
    """A float model after ONNX Runtime's pre-processing, with what the other modules ask of it.

    Attributes:
        path: The file that the model was read from.
        file_bytes: Size of that file and of those that have its external data.
        proto: The prepared graph: shapes inferred, constants folded, every node named.
        fingerprint: SHA-256 of `proto`, hexadecimal.
        inputs: The model's inputs, initializers excluded.
        outputs: The model's outputs.
        layers: The quantizable layers in the order of computation.
        weights: Every weight and bias of `layers` by initializer name.
    """

    path: Path
    file_bytes: int
    proto: onnx.ModelProto
    fingerprint: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    weights: dict[str, NDArray[np.float32]]

    @property
    def takes_batches(self) -> bool:
        """Whether the first axis of every input is free, so that several can be run at once."""
        return all(spec.shape and spec.shape[0] is None for spec in self.inputs)

    @property
    def batches_any(self) -> bool:
        """Whether any inputs can be run at once: those of a free size may differ in it."""
        return self.takes_batches and all(None not in spec.shape[1:] for spec in self.inputs)

    def one_at_a_time(self) -> FloatModel:
        """The model as one that is run on a single input, whatever its file says of batches."""
        inputs = (replace(spec, shape=(1, *spec.shape[1:])) for spec in self.inputs)
        return replace(self, inputs=tuple(inputs))


def load_float_model(path: str | Path) -> FloatModel:
    """Reads, checks and prepares a float ONNX model.

    Preparation is ONNX Runtime's ``quant_pre_process`` (basic graph optimizations, then shape
    inference), so that ranges and Q/DQ pairs refer to the nodes that will really run.

    Args:
        path: The ``.onnx`` file; external data is looked for beside it.

    Raises:
        InputError: If the file is missing, is not a valid ONNX model, is quantized already, or has
            no layer with a constant float weight.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"model {path}: no such file")
    try:
        source = onnx.load(path, format="protobuf", load_external_data=False)
        file_bytes = path.stat().st_size + _external_bytes(source, path.parent)
        onnx.load_external_data_for_model(source, str(path.parent))
        _refuse_other_types(source, path)
        in_order = is_sorted(source.graph)
        if not in_order:  # which ONNX Runtime takes, the checker does not
            sort_nodes(source.graph)
        if in_order and all(o.type.tensor_type.HasField("shape") for o in source.graph.output):
            onnx.checker.check_model(str(path))
        else:  # nor does it take outputs without type or shape
            source = onnx.shape_inference.infer_shapes(source)
            onnx.checker.check_model(_with_any_shape(source))
    except InputError:
        raise
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "unreadable")
        raise InputError(
            f"model {path}: not a valid ONNX file, or a truncated one ({reason.strip()})"
        ) from error
    _refuse_quantized(source, path)
    _refuse_blocked(source, path)
    proto = _prepare(source, path)
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    layers = tuple(_layers(proto, initializers))
    if not layers:
        raise InputError(
            f"model {path}: no quantizable layer ({', '.join(WEIGHTED_OPS)} with a constant "
            "float32 weight); nothing can be quantized"
            + ("; its weights are float16: give the float32 model" if _has_halves(proto) else "")
        )
    names = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    return FloatModel(
        path=path,
        file_bytes=file_bytes,
        proto=proto,
        fingerprint=hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest(),
        inputs=tuple(tensor_spec(i) for i in proto.graph.input if i.name not in initializers),
        outputs=tuple(tensor_spec(o) for o in proto.graph.output),
        layers=layers,
        weights={name: numpy_helper.to_array(initializers[name]) for name in sorted(names)},
    )


def _with_any_shape(source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the checker: outputs of no known rank, which ONNX Runtime takes, get one."""
    copy = copy_of(source)
    for output in copy.graph.output:
        if not output.type.tensor_type.HasField("shape"):
            output.type.tensor_type.shape.SetInParent()
    return copy


def _refuse_other_types(source: onnx.ModelProto, path: Path) -> None:
    """Refuses inputs and outputs that are no tensors."""
    for value in (*source.graph.input, *source.graph.output):
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            raise InputError(
                f"model {path}: {value.name!r} is a {kind.removesuffix('_type')}, no tensor; "
                "export the model without it (of scikit-learn with the option zipmap=False)"
            )


def _external_bytes(source: onnx.ModelProto, folder: Path) -> int:
    """Size of the files beside a model that have its weights, before these are loaded."""
    files = {
        entry.value
        for tensor in source.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum((folder / name).stat().st_size for name in files)


def shares_left_in_float(model: FloatModel) -> dict[str, float]:
    """Share of the model's real parameters, 0 to 1, that nodes of each operator keep in float.

    Of operators that have no integer form whatever the configuration: recurrent ones, ONNX
    Runtime's own, as Attention, and those with graphs within them (If, Loop, Scan).
    """
    graph = model.proto.graph
    sizes = {t.name: math.prod(t.dims) for t in graph.initializer if _is_real(t)}
    found: Counter[str] = Counter()
    total = sum(sizes.values())
    for node in graph.node:
        within = sum(map(_parameters_within, inner_graphs(node)))
        total += within
        found[node.op_type] += within
        if inner_graphs(node) or node.op_type in RECURRENT_OPS or node.domain == OWN_DOMAIN:
            found[node.op_type] += sum(sizes.pop(name, 0) for name in reads(node))
    return {operator: size / total for operator, size in found.items() if size}


def _parameters_within(graph: onnx.GraphProto) -> int:
    """How many real parameters a graph within a node has."""
    constants = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute)]
    own = sum(math.prod(tensor.dims) for tensor in constants if _is_real(tensor))
    inner = (inner for node in graph.node for inner in inner_graphs(node))
    return int(own + sum(map(_parameters_within, inner)))


def _is_real(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT


def _has_halves(proto: onnx.ModelProto) -> bool:
    return any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)


def check_node_names(model: FloatModel, names: Sequence[str]) -> None:
    """Refuses names that no node has; ``quantize_static(nodes_to_exclude=...)`` ignores them.

    Raises:
        InputError: If a name matches no node.
    """
    known = [node.name for node in model.proto.graph.node]
    for name in names:
        if name not in known:
            alike = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise InputError(f"model {model.path}: no node {name!r}; did you mean {alike[0]!r}?")


def _refuse_quantized(proto: onnx.ModelProto, path: Path) -> None:
    node = quantized_node(proto)
    if node is not None:
        raise InputError(
            f"model {path}: already quantized (node {node.name or node.output[0]!r} is a "
            f"{node.op_type}); give the float model"
        )


def _refuse_blocked(proto: onnx.ModelProto, path: Path) -> None:
    for node in proto.graph.node:
        if node.domain == BLOCKED_DOMAIN:
            raise InputError(
                f"model {path}: ONNX Runtime has optimized it for one processor (node "
                f"{node.name or node.output[0]!r} is a {BLOCKED_DOMAIN}.{node.op_type}); give the "
                "model that it was made of"
            )


def quantized_node(proto: onnx.ModelProto) -> onnx.NodeProto | None:
    """The first node of a model that works on quantized tensors, or None."""
    exact = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QGemm")
    nodes: Iterable[onnx.NodeProto] = proto.graph.node
    for node in nodes:
        if node.op_type in exact or (
            node.op_type.startswith("QLinear") or node.op_type.endswith("Integer")
        ):
            return node
    return None


def _prepare(source: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder, _quiet_root_logger():
        converted, prepared = Path(folder) / "converted.onnx", Path(folder) / "prepared.onnx"
        try:
            whole = without_own_fusions(_with_fixed_constants(_in_newer_opset(source)))
            onnx.save(whole, converted)
            # Symbolic shape inference is for transformers, and would need sympy.
            quant_pre_process(str(converted), str(prepared), skip_symbolic_shape=True)
            proto = onnx.load(prepared)
            _declare_types(proto)
        except Exception as error:  # ONNX Runtime raises its own types here, without a common base
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"model {path}: ONNX Runtime cannot prepare it for quantization ({reason})"
            ) from error
    _remove_dead_nodes(proto.graph)
    _remove_notes(proto.graph)
    _name_nodes(proto.graph)
    _free_names(proto.graph, path)
    _separate_weights(proto.graph)
    _separate_biases(proto.graph)
    _make_gemms_plain(proto.graph)
    _make_matrices_plain(proto.graph)
    _make_pools_plain(proto.graph)
    return proto


def _in_newer_opset(source: onnx.ModelProto) -> onnx.ModelProto:
    """The model in at least `MINIMUM_OPSET`.

    ONNX's converter leaves to each Resize the default way to find places of later versions, and
    until opset 10 there was another one.
    """
    before = opset_of(source)
    if before >= MINIMUM_OPSET:
        return source
    converted = onnx.version_converter.convert_version(source, MINIMUM_OPSET)
    if before <= _OPSET_OF_ASYMMETRIC_RESIZE:
        way = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        for node in _all_nodes(converted.graph):
            if node.op_type == "Resize":
                refill(node.attribute, (a for a in node.attribute if a.name not in way))
                node.attribute.extend(helper.make_attribute(*item) for item in way.items())
    return converted


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from _all_nodes(inner)


def _with_fixed_constants(source: onnx.ModelProto) -> onnx.ModelProto:
    """The model without inputs that have a value of their own: the quantized one stores integers.

    Besides, ONNX Runtime folds nothing into constants that can be given anew.
    """
    constants = {tensor.name for tensor in source.graph.initializer}
    if not any(value.name in constants for value in source.graph.input):
        return source
    fixed = copy_of(source)
    refill(fixed.graph.input, [i for i in source.graph.input if i.name not in constants])
    fixed.ir_version = max(source.ir_version, _IR_OF_FIXED_CONSTANTS)
    return fixed


def _remove_dead_nodes(graph: onnx.GraphProto) -> None:
    """Removes what no output needs: a layer among it would be the last of the model."""
    needed = {output.name for output in graph.output}
    alive = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            alive.append(node)
            needed.update(reads(node))
    refill(graph.node, reversed(alive))


def _remove_notes(graph: onnx.GraphProto) -> None:
    """Removes what an exporter notes of single nodes and tensors, as where in its source they are.

    For nodes that are fused, folded and quantized it is true no longer, and of a small model that
    PyTorch exports it is a seventh of the quantized file. What is noted of the model stays.
    """
    for message in (*graph.node, *graph.value_info, *graph.initializer):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Gives a name of its own to each node that has none, or the one of an output."""
    outputs = {output.name for output in graph.output}
    taken = {node.name for node in graph.node} | outputs
    for index, node in enumerate(graph.node):
        if not node.name or node.name in outputs:
            name = f"{node.name}_{node.op_type}" if node.name else f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def _declare_types(proto: onnx.ModelProto) -> None:
    """Declares the tensors that ONNX cannot, behind ONNX Runtime's own operators, as that does."""
    graph = proto.graph
    known = {value.name for value in (*graph.input, *graph.value_info, *graph.output)}
    unknown = [name for node in graph.node for name in node.output if name and name not in known]
    if not unknown:
        return
    asking = copy_of(proto)
    asking.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown)
    for node in make_session(asking).get_outputs():
        if node.name in unknown and node.type.startswith("tensor("):
            dtype = onnx.TensorProto.DataType.Value(node.type[len("tensor(") : -1].upper())
            shape = node.shape or None  # which it leaves empty where it knows no rank, too
            graph.value_info.append(helper.make_tensor_value_info(node.name, dtype, shape))


def _free_names(graph: onnx.GraphProto, path: Path) -> None:
    """Renames inner tensors whose names ONNX Runtime would make up for what it adds to others.

    Raises:
        InputError: If inputs or outputs have such names.
    """
    ends = {value.name for value in (*graph.input, *graph.output)}
    names = dict.fromkeys([*ends, *(tensor.name for tensor in graph.initializer)])
    names |= dict.fromkeys(name for node in graph.node for name in node.output if name)
    renamed: dict[str, str] = {}
    for name in names:
        for suffix in _ADDED_SUFFIXES:
            base = name.removesuffix(suffix)
            if base == name or base not in names:
                continue
            chosen = next((n for n in (name, base) if n not in ends), None)
            if chosen is None:
                raise InputError(
                    f"model {path}: {base!r} and {name!r} are both inputs or outputs, and the "
                    f"quantized model would need the second name for the first; rename one"
                )
            renamed[chosen] = f"{chosen}__renamed"
    rename_tensors(graph, renamed)


def _separate_weights(graph: onnx.GraphProto) -> None:
    """Gives layers that read the same weight along different axes, or in other groups, one each.

    A matrix and its transpose, say: their output channels are not the same values. And one beside
    the table that words are looked up in, which has one scale for all.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    names: dict[tuple[str, str, int, int], str] = {}
    taken = {node.input[0] for node in graph.node if node.op_type in LOOKUP_OPS}
    for node in graph.node:
        weight = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type not in WEIGHTED_OPS or weight is None:
            continue
        axis, groups = channel_axis(node, len(weight.dims)), attribute_of(node, "group", 1)
        way = weight.name, node.op_type, axis, groups
        if way not in names:
            names[way] = weight.name
            if weight.name in taken:
                copy = graph.initializer.add()
                copy.CopyFrom(weight)
                names[way] = copy.name = f"{weight.name}__of__{node.name}"
            taken.add(weight.name)
        node.input[1] = names[way]


def _separate_biases(graph: onnx.GraphProto) -> None:
    """Gives each node a bias of its own.

    The scale of an integer bias is that of its node's products, so that nodes cannot share one.
    ONNX Runtime would store copies under names that it makes up.
    """
    count = Counter(name for node in graph.node for name in reads(node))
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        bias = node.input[2] if node.op_type in _BIASED_OPS and len(node.input) > 2 else ""
        if bias in constants and count[bias] > 1:
            count[bias] -= 1
            copy = graph.initializer.add()
            copy.CopyFrom(constants[bias])
            copy.name = f"{bias}__of__{node.name}"
            node.input[2] = copy.name


def _make_gemms_plain(graph: onnx.GraphProto) -> None:
    """Puts the factors of each Gemm into its constants, and gives its bias one axis.

    ONNX Runtime does the former for the bias when it quantizes it, and cannot quantize a bias of
    shape (1, n).
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    count = Counter(name for node in graph.node for name in reads(node))
    reshaped: set[str] = set()
    for node in graph.node:
        if node.op_type != "Gemm":
            continue
        for position, factor in ((1, "alpha"), (2, "beta")):
            name = node.input[position] if len(node.input) > position else ""
            scale = np.float32(attribute_of(node, factor, 1.0))
            if name not in constants or scale == 1.0:
                continue
            values = numpy_helper.to_array(constants[name])
            if count[name] > 1:
                count[name] -= 1
                name = node.input[position] = f"{name}__of__{node.name}"
                constants[name] = graph.initializer.add()
            scaled = (scale * values).astype(values.dtype)
            constants[name].CopyFrom(numpy_helper.from_array(scaled, name))
            refill(node.attribute, (a for a in node.attribute if a.name != factor))
        weight, bias = (constants.get(name) for name in (*node.input[1:], "", "")[:2])
        if weight is not None and bias is not None:
            outputs = weight.dims[0 if attribute_of(node, "transB", 0) else 1]
            values = numpy_helper.to_array(bias)
            last = values.shape[-1] if values.ndim else 1
            if values.shape != (outputs,) and values.size == last and last in (1, outputs):
                flat = np.broadcast_to(values.reshape(-1), (outputs,)).copy()
                bias.CopyFrom(numpy_helper.from_array(flat, bias.name))
                reshaped.add(bias.name)
    refill(graph.value_info, (value for value in graph.value_info if value.name not in reshaped))


def _make_matrices_plain(graph: onnx.GraphProto) -> None:
    """Takes axes of 1 off the constants of MatMuls, as of one matrix for all of a batch.

    What is stored as a stack of matrices has no integer kernel with a scale for each channel.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    count = Counter(name for node in graph.node for name in reads(node))
    shapes = tensor_shapes(graph)
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or count[weight.name] > 1 or len(weight.dims) <= 2:
            continue
        if set(weight.dims[:-2]) == {1} and len(shapes.get(node.input[0], ())) >= len(weight.dims):
            values = numpy_helper.to_array(weight)
            matrix = values.reshape(values.shape[-2:])
            weight.CopyFrom(numpy_helper.from_array(matrix, weight.name))
            refill(graph.value_info, (v for v in graph.value_info if v.name != weight.name))


def _make_pools_plain(graph: onnx.GraphProto) -> None:
    """Takes dilations of 1 off each AveragePool, whose integer kernel knows no dilations."""
    for node in graph.node:
        if node.op_type == "AveragePool" and set(attribute_of(node, "dilations", ())) == {1}:
            refill(node.attribute, (a for a in node.attribute if a.name != "dilations"))


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    # ONNX Runtime's quantization tools write hints for their own command line to the root logger,
    # and the traceback of an optimization that failed, which they do without.
    disabled = logging.root.manager.disable
    logging.disable(max(logging.ERROR, disabled))
    try:
        yield
    finally:
        logging.disable(disabled)


def _layers(proto: onnx.ModelProto, initializers: dict[str, onnx.TensorProto]) -> Iterator[Layer]:
    for node in proto.graph.node:
        if node.op_type not in WEIGHTED_OPS or len(node.input) < 2:
            continue
        weight = initializers.get(node.input[1])
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
            continue
        if node.op_type == "MatMul" and len(weight.dims) != 2:
            continue  # a stack of matrices has no one channel axis
        if node.op_type == "Gemm" and attribute_of(node, "transA", 0):
            continue  # its input has the channels where others have the batch
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in initializers else None
        yield Layer(
            name=node.name,
            op_type=node.op_type,
            input=node.input[0],
            output=node.output[0],
            weight=weight.name,
            bias=bias,
            channel_axis=channel_axis(node, len(weight.dims)),
            groups=attribute_of(node, "group", 1),
        )


def channel_axis(node: onnx.NodeProto, rank: int) -> int:
    """Which axis of a layer's weight of this rank counts output channels."""
    if node.op_type in ("Conv", "QLinearConv"):
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type in ("Gemm", "QGemm"):
        transposed = bool(attribute_of(node, "transB", 0))
        return 0 if transposed else 1
    return rank - 1


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """What a graph declares of a tensor."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim)
    return TensorSpec(
        name=value.name,
        shape=shape,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
    )
