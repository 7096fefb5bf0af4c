"""The float model cut into a few graphs, so that an error in a tensor costs what lies behind it.

An error changes nothing before its tensor. Each graph here begins at one of a few cuts, with what
is computed before the cut as its inputs, and reaches to the outputs; behind the tensors between
its cut and the next stands an addition whose second operand is an input, a single zero unless
that tensor is disturbed. Weights stay constants, so that ONNX Runtime packs and fuses them as it
does in the model itself. The error that a changed weight makes is known from the layer alone:
graphs of nothing but layers compute them again with the changed weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx import TensorProto

from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.session import make_session


# Values of an input by name.
Values: TypeAlias = Mapping[str, NDArray[Any]]
# Makes the nodes between a tensor's names before and behind them.
Insertion: TypeAlias = Callable[[str, str], list[onnx.NodeProto]]

# Graphs that the model is cut into: with more of them each tensor is closer behind a cut, but they
# all have to be prepared.
_CUTS: Final = 6
# Nodes that a layer's error is carried through, to a tensor that is disturbed anyway: an addition
# before them would keep ONNX Runtime from fusing them with the layer.
_CARRYING: Final = ("Relu", "Clip", "Concat")


@dataclass(frozen=True)
class Disturbance:
    """Where an error is added, and what is added.

    Attributes:
        tensor: One of the tensors of a `DisturbableModel`.
        error: Of the tensor's shape.
    """

    tensor: str
    error: NDArray[np.float32]


class DisturbableModel:
    """Runs the float model, and what lies behind a tensor again with an error in it.

    Each run has one thread: runs are many, and independent, and side by side they use the cores
    better than one after another in several threads each.

    Args:
        model: The float model.
        tensors: Activations that errors are added to.
        weights: Other values of the layers' weights, by name.

    Attributes:
        names: Names of the outputs of real numbers.
        kept: Names of the values that `run` needs.
        of_each_input: Names of the values that are looked at input by input.
    """

    def __init__(
        self,
        model: FloatModel,
        tensors: Iterable[str],
        weights: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.names = [spec.name for spec in model.outputs if spec.dtype.kind == "f"]
        changes = _changes(model, set(tensors))
        disturbed = {*tensors, *(change.tensor for change in changes)}
        parts = [_Part.of(model, first, names) for first, names in _cuts(model, disturbed)]
        self._part_of = {tensor: part for part in parts for tensor in part.tensors}
        self._inputs = [spec.name for spec in model.inputs]
        begins = (name for part in parts for name in part.inputs)
        self._layers = _ChangedLayers(model, changes, weights)
        self._model = model
        self._changes = {change.nodes[0].name: change for change in changes}
        self._alone: dict[str, _ChangedLayers] = {}
        needed = dict.fromkeys([*self.names, *disturbed, *begins, *self._layers.inputs])
        self._disturbed = disturbed
        self._needed = [name for name in needed if name not in self._inputs]
        self._whole = _with_outputs(model, self._needed)
        self.of_each_input = frozenset([*self.names, *disturbed, *self._layers.inputs])
        self.kept = frozenset([*self.names, *(name for part in parts for name in part.inputs)])

    def start(self, feed: Values) -> Values:
        """All tensors, inputs of layers and outputs by name, undisturbed.

        Args:
            feed: The input.
        """
        results = self._whole.run(self._needed, dict(feed))
        return dict(feed) | dict(zip(self._needed, results, strict=True))

    def size(self, values: Values) -> int:
        """How many values all disturbed tensors of an undisturbed input have."""
        return sum(values[tensor].size for tensor in self._disturbed)

    def changes(self, weights: Iterable[str], values: Values) -> dict[str, list[Disturbance]]:
        """What other values of weights change in each layer that has them, by weight.

        Args:
            weights: Names of weights.
            values: Of the undisturbed input.
        """
        return self._layers.errors(tuple(weights), values)

    def changes_of_layer(
        self, layer: str, disturbance: Disturbance, values: Values
    ) -> Disturbance:
        """What an error in the input of a layer changes that no other reader of that input sees.

        Args:
            layer: Name of one of the `side_readers` of the tensor.
            disturbance: The error in its input.
            values: Of the undisturbed input of the model.
        """
        change, tensor = self._changes[layer], disturbance.tensor
        if layer not in self._alone:
            weights = {change.weight: self._model.weights[change.weight]}
            self._alone[layer] = _ChangedLayers(self._model, [change], weights)
        disturbed = {**values, tensor: values[tensor] + disturbance.error}
        (found,) = self._alone[layer].errors((change.weight,), disturbed)[change.weight]
        return found

    def side_readers(self, tensors: Container[str]) -> dict[str, list[str]]:
        """Names of the layers that read each of some tensors, once, beside other nodes."""
        view = GraphView(self._model.proto.graph)
        found: dict[str, list[str]] = {}
        for name, change in self._changes.items():
            tensor = change.nodes[0].input[0]
            times = sum(list(node.input).count(tensor) for node in change.nodes)
            if tensor in tensors and view.sole_reader(tensor) is None and times == 1:
                found.setdefault(tensor, []).append(name)
        return found

    def run(self, disturbance: Disturbance, values: Values) -> list[NDArray[np.float32]]:
        """The outputs `names` when there is an error in one tensor.

        Args:
            disturbance: The error.
            values: Of the undisturbed input; those that are `kept` suffice.
        """
        return self._part_of[disturbance.tensor].run(self.names, values, disturbance)


@dataclass(frozen=True)
class _Change:
    """A layer computed again with another weight, as far as a tensor that is disturbed.

    Attributes:
        weight: Name of the weight.
        tensor: Where the change is added.
        nodes: The layer and the nodes that carry the error to `tensor`.
    """

    weight: str
    tensor: str
    nodes: tuple[onnx.NodeProto, ...]


def _changes(model: FloatModel, tensors: set[str]) -> list[_Change]:
    view = GraphView(model.proto.graph)
    changes = []
    for layer in model.layers:
        tensor, nodes = layer.output, [view.writers[layer.output]]
        while tensor not in tensors and (reader := view.sole_reader(tensor)) is not None:
            if reader.op_type not in _CARRYING:
                break
            tensor = reader.output[0]
            nodes.append(reader)
        if tensor not in tensors:
            tensor, nodes = layer.output, nodes[:1]
        changes.append(_Change(layer.weight, tensor, tuple(nodes)))
    return changes


def _with_outputs(model: FloatModel, outputs: Iterable[str]) -> onnxruntime.InferenceSession:
    """The whole model with more outputs."""
    proto, _ = behind(model, 0, {}, [], declared=True)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs if n not in known)
    return _load(proto, model.weights)


class _ChangedLayers:
    """Computes layers again with other weights, and nothing else of the model.

    Weights that are asked for together share a graph: ONNX Runtime runs all of a graph, whatever
    is asked of it.

    Args:
        model: The float model.
        changes: All its layers.
        weights: The other weights, by name.

    Attributes:
        inputs: The activations that the layers read.
    """

    def __init__(
        self,
        model: FloatModel,
        changes: Sequence[_Change],
        weights: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self._model = model
        self._changes = {w: [change for change in changes if change.weight == w] for w in weights}
        self._weights = weights
        graph = model.proto.graph
        self._constants = {tensor.name for tensor in graph.initializer}
        self._types = {
            value.name: value
            for value in _with_free_space([*graph.input, *graph.value_info], graph)
        }
        self.inputs = self._read(changes)
        self._sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}

    def errors(self, weights: tuple[str, ...], values: Values) -> dict[str, list[Disturbance]]:
        """What the other values of `weights` change in each layer that has them."""
        changes = [change for weight in weights for change in self._changes[weight]]
        errors: dict[str, list[Disturbance]] = {change.weight: [] for change in changes}
        if not changes:
            return errors
        if weights not in self._sessions:
            self._sessions[weights] = self._session(changes)
        results = self._sessions[weights].run(
            [_changed(change.tensor, change.weight) for change in changes],
            {i.name: values[i.name] for i in self._sessions[weights].get_inputs()},
        )
        for change, after in zip(changes, results, strict=True):
            errors[change.weight].append(Disturbance(change.tensor, after - values[change.tensor]))
        return errors

    def _read(self, changes: Iterable[_Change]) -> list[str]:
        """The activations that are read from outside."""
        read: dict[str, None] = {}
        for change in changes:
            written = {name for node in change.nodes for name in node.output}
            names = (name for node in change.nodes for name in node.input)
            outside = {*written, *self._constants, ""}
            read |= {name: None for name in names if name not in outside}
        return list(read)

    def _session(self, changes: Sequence[_Change]) -> onnxruntime.InferenceSession:
        nodes: list[onnx.NodeProto] = []
        for change in changes:
            written = {n: _changed(n, change.weight) for node in change.nodes for n in node.output}
            nodes += [_renamed(node, written, written) for node in change.nodes]
        values = self._model.weights | {c.weight: self._weights[c.weight] for c in changes}
        proto = _assemble(
            self._model,
            nodes,
            [self._types.get(name) or _of_any_shape(name) for name in self._read(changes)],
            [onnx.ValueInfoProto(name=_changed(c.tensor, c.weight)) for c in changes],
            values,
        )
        return _load(proto, values)


def _of_any_shape(tensor: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)


def _changed(tensor: str, weight: str) -> str:
    return f"{tensor}__with_changed__{weight}"


@dataclass(frozen=True)
class _Part:
    """All nodes behind a cut.

    Attributes:
        session: The graph.
        inputs: The values that it begins with.
        tensors: The tensors that can be disturbed in it.
        added: Those of them with an addition; the others are among `inputs`.
        written: The outputs that it computes.
    """

    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    tensors: tuple[str, ...]
    added: tuple[str, ...]
    written: tuple[str, ...]

    @classmethod
    def of(cls, model: FloatModel, first: int, tensors: Sequence[str]) -> _Part:
        """The nodes from number `first` on, with additions behind `tensors`."""

        def addition(tensor: str) -> Insertion:
            def make(before: str, after: str) -> list[onnx.NodeProto]:
                return [helper.make_node("Add", [before, _error(tensor)], [after])]

            return make

        written = {name for node in model.proto.graph.node[first:] for name in node.output}
        added = tuple(tensor for tensor in tensors if tensor in written)
        proto, begins = behind(
            model,
            first,
            {tensor: addition(tensor) for tensor in added},
            [helper.make_tensor_value_info(_error(t), TensorProto.FLOAT, None) for t in added],
            declared=True,
        )
        session = _load(proto, model.weights)
        written_outputs = tuple(output.name for output in session.get_outputs())
        return cls(session, begins, tuple(tensors), added, written_outputs)

    def run(
        self, names: Sequence[str], values: Values, disturbance: Disturbance
    ) -> list[NDArray[np.float32]]:
        tensor, error = disturbance.tensor, disturbance.error
        feed = {name: values[name] for name in self.inputs}
        feed |= {_error(name): np.zeros(1, dtype=np.float32) for name in self.added}
        feed |= (
            {_error(tensor): error}
            if tensor in self.added
            else {tensor: np.asarray(feed[tensor] + error)}
        )
        results = dict(zip(self.written, self.session.run(self.written, feed), strict=True))
        # An output that is written before the cut changes only if it is what is disturbed.
        return [results.get(name, feed.get(name, values[name])) for name in names]


def _cuts(model: FloatModel, tensors: set[str]) -> list[tuple[int, tuple[str, ...]]]:
    """The first node of each part, and the tensors that are disturbed in it.

    Whatever is disturbed in a part, all its additions are run, and they cost more the larger their
    tensors are: the number of tensors times their values is shared out when their roots are.
    """
    graph = model.proto.graph
    sizes = {n: math.prod(d or 1 for d in shape) for n, shape in tensor_shapes(graph).items()}
    written = [
        *((0, spec.name) for spec in model.inputs if spec.name in tensors),
        *(
            (number, name)
            for number, node in enumerate(graph.node)
            for name in node.output
            if name in tensors
        ),
    ]
    root = np.sqrt([sizes.get(name, 1) for _, name in written])
    number_of_part = (np.cumsum(root) - root / 2.0) * _CUTS // root.sum()
    read = {name: number for number, node in enumerate(graph.node) for name in reads(node)}
    outputs = {value.name for value in graph.output}
    parts = []
    for part in np.unique(number_of_part):
        chunk = [written[i] for i in np.flatnonzero(number_of_part == part)]
        first, name = chunk[0]
        behind_it = part > 0 and name not in outputs and read.get(name, -1) > first
        parts.append((first + behind_it, tuple(name for _, name in chunk)))
    return parts


def behind(
    model: FloatModel,
    first: int,
    insertions: Mapping[str, Insertion],
    inputs: Sequence[onnx.ValueInfoProto],
    *,
    declared: bool = False,
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A part of the model with nodes inserted behind tensors.

    Args:
        model: The float model.
        first: Number of the first node of the part, which reaches to the outputs.
        insertions: For each tensor what makes the nodes behind it, from the names of the tensor
            before and behind them.
        inputs: What the inserted nodes read.
        declared: Whether the weights and biases of layers are only declared.

    Returns:
        The part, and the names of the values that it begins with.
    """
    source = model.proto
    graph, nodes_behind = source.graph, source.graph.node[first:]
    written = {name for node in nodes_behind for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    types = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    read = dict.fromkeys(name for node in nodes_behind for name in reads(node))
    if first == 0:  # a whole model takes all its inputs, read or not
        read = dict.fromkeys(spec.name for spec in model.inputs) | read
    begins = tuple(n for n in read if n in types and n not in written | constants)
    # An output of the model keeps its name for what is read from outside.
    before = {t: f"{t}__before" if t in outputs else t for t in insertions}
    after = {t: t if t in outputs else f"{t}__after" for t in insertions}
    nodes = [n for t in begins if t in insertions for n in insertions[t](before[t], after[t])]
    for node in nodes_behind:
        nodes.append(_renamed(node, after, before))
        for name in node.output:
            if name in insertions:
                nodes.extend(insertions[name](before[name], after[name]))
    proto = _assemble(
        model,
        nodes,
        [*_with_free_space([types[name] for name in begins], graph), *inputs],
        [value for value in graph.output if value.name in written],
        model.weights if declared else {},
    )
    return proto, begins


def _with_free_space(
    values: list[onnx.ValueInfoProto], graph: onnx.GraphProto
) -> list[onnx.ValueInfoProto]:
    """Types of tensors without the sizes of images where they may be wrong.

    Shape inference counts windows of a pool with ``ceil_mode`` that begin beyond the image, too;
    ONNX Runtime's kernels leave those out.
    """
    if not any(attribute_of(node, "ceil_mode") for node in graph.node):
        return values
    free = [copy_of(value) for value in values]
    for value in free:
        for dimension in value.type.tensor_type.shape.dim[2:]:
            dimension.Clear()
    return free


def _assemble(
    model: FloatModel,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    declared: Mapping[str, NDArray[np.float32]],
) -> onnx.ModelProto:
    """A model of these nodes with the constants that they read, some of them only declared."""
    used = {name for node in nodes for name in reads(node)}
    used.update(output.name for output in outputs)  # which may be constant
    constants = [
        _declare(t.name, declared[t.name]) if t.name in declared else t
        for t in model.proto.graph.initializer
        if t.name in used
    ]
    return helper.make_model(
        helper.make_graph(nodes, model.proto.graph.name, inputs, outputs, constants),
        opset_imports=model.proto.opset_import,
        ir_version=model.proto.ir_version,
    )


def _load(
    proto: onnx.ModelProto, values: Mapping[str, NDArray[np.float32]]
) -> onnxruntime.InferenceSession:
    """A session of what `_assemble` gave, with the values of what it only declared."""
    declared = {t.name: values[t.name] for t in proto.graph.initializer if t.name in values}
    return make_session(proto, threads=1, weights=declared)


def _declare(name: str, value: NDArray[np.float32]) -> TensorProto:
    """An initializer without its values."""
    tensor = TensorProto(
        name=name,
        dims=value.shape,
        data_type=TensorProto.FLOAT,
        data_location=TensorProto.EXTERNAL,
    )
    # ONNX Runtime wants the name of a file, and never opens it.
    tensor.external_data.add(key="location", value="memory")
    return tensor


def _renamed(
    node: onnx.NodeProto, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> onnx.NodeProto:
    copy = copy_of(node)
    copy.name = ""
    for position, name in enumerate(copy.input):
        copy.input[position] = inputs.get(name, name)
    for position, name in enumerate(copy.output):
        copy.output[position] = outputs.get(name, name)
    return copy


def _error(tensor: str) -> str:
    return f"{tensor}__error"
