"""A quantized model's nodes and tensors, as far as leaving some of them in float matters.

How much noise is left and about how long the model takes then: both follow from what each node and
each tensor contributes by itself, without building anything. A tensor is rounded as long as one
node with integers writes it, or one reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set
from dataclasses import dataclass
from dataclasses import field

import numpy as np

from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.node_time import conversion_time
from optuna_quantune.quantization.node_time import node_time
from optuna_quantune.quantization.node_time import sizes_of
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.placement import FLOAT_RESULT_OPS
from optuna_quantune.quantization.placement import looks_up
from optuna_quantune.quantization.placement import MOVING_OPS
from optuna_quantune.quantization.placement import Placement


@dataclass
class PlacedTensor:
    """An activation with Q/DQ pairs, together with those that share its parameters.

    Attributes:
        values: Number of values for one input.
        noise: What rounding and clipping it contributes to the output's noise.
        writers: Names of the nodes that compute it.
        readers: Names of the nodes that compute with it.
        output: Its name if it is an output of the model that need not be rounded.
    """

    values: float
    noise: float
    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    output: str | None = None


@dataclass(frozen=True)
class PlacedNode:
    """A node that can be computed with integers or in float.

    Attributes:
        noise: What its quantized weight contributes to the output's noise.
        int8_time: Nanoseconds with integers.
        float_time: Nanoseconds in float.
        tensors: The keys of the tensors that it reads and writes.
    """

    noise: float
    int8_time: float
    float_time: float
    tensors: frozenset[str]


@dataclass(frozen=True)
class PlacedGraph:
    """Nodes and tensors as far as leaving some of them in float matters.

    Attributes:
        nodes: Those that can be computed with integers or in float, and outputs that need not be
            rounded, by name.
        layers: Which of the nodes have a weight.
        tensors: The activations with Q/DQ pairs, by the name of their statistics.
        always_float: Names of the nodes beside those that read or write such activations.
        rest: Nanoseconds of the nodes that are always computed in float.
        rest_in_float: What these take in the float model.
    """

    nodes: Mapping[str, PlacedNode]
    layers: frozenset[str]
    tensors: Mapping[str, PlacedTensor]
    always_float: frozenset[str]
    rest: float
    rest_in_float: float

    @classmethod
    def of(
        cls,
        model: FloatModel,
        placement: Placement,
        noise: NoisePrediction,
        *,
        in_pairs: bool = False,
    ) -> PlacedGraph:
        """The graph of a model.

        Args:
            model: The prepared float model.
            placement: Where the Q/DQ pairs of `model` stand when all of it is quantized.
            noise: What each tensor and weight contributes to the output's noise then.
            in_pairs: Whether products of integers are added in pairs, which takes longer.
        """
        proto = model.proto.graph
        sizes = sizes_of(proto)
        view = GraphView(proto)
        # What is looked up in a table counts, not the table.
        of_site = {
            site.statistics if site.tensor in view.constants else site.tensor: site.statistics
            for site in placement.activations
        }
        template = placement.template.graph
        dequantized = {n.output[0] for n in template.node if n.op_type == "DequantizeLinear"}
        integer = {n.name for n in template.node if dequantized.intersection(n.input)}
        contribution = {
            name: noise.rounding.get(name, 0.0) + noise.clipping.get(name, 0.0)
            for name in of_site.values()
        }
        tensors = {
            name: PlacedTensor(float(np.prod(sizes.get(name, ()))), contribution[name])
            for name in contribution
        }
        weights = {layer.name: layer.weight for layer in model.layers}
        nodes: dict[str, PlacedNode] = {}
        passed_on: dict[str, str] = {}  # through nodes that only move or cut values
        rest = rest_in_float = 0.0
        for node in proto.node:
            keys = []
            for name in node.input:
                key = of_site.get(name, passed_on.get(name))
                if key is not None:
                    keys.append(key)
            written = of_site.get(node.output[0])
            if node.op_type in ACTIVATION_OPS or node.op_type in MOVING_OPS:
                if written is None and keys:
                    passed_on[node.output[0]] = keys[0]
                continue
            for key in keys:
                tensors[key].readers.add(node.name)
            if written is not None:
                tensors[written].writers.add(node.name)
            reader = view.sole_reader(node.output[0])
            clipped = reader is not None and reader.op_type == "Clip"
            float_time = node_time(node, model, sizes, "float", clipped=clipped)
            reads_integers = bool(keys) or looks_up(node, view.constants)
            if node.name not in integer or written is None or not reads_integers:
                rest_in_float += float_time
                rest += (
                    node_time(node, model, sizes, "int8") if node.op_type == "LRN" else float_time
                )
                continue
            nodes[node.name] = PlacedNode(
                noise.weights.get(weights.get(node.name, ""), 0.0),
                node_time(node, model, sizes, "int8", clipped=clipped, in_pairs=in_pairs),
                float_time,
                frozenset([*keys, written]),
            )
        for output in proto.output:
            writer = view.writers.get(output.name)
            if (
                writer is not None
                and writer.name in nodes
                and writer.op_type in FLOAT_RESULT_OPS
                and output.name in tensors
            ):
                tensors[output.name].output = output.name
                nodes[output.name] = PlacedNode(0.0, 0.0, 0.0, frozenset([output.name]))
        seen = {name for t in tensors.values() for name in (*t.writers, *t.readers)}
        layers = frozenset(name for name in nodes if name in weights)
        return cls(nodes, layers, tensors, frozenset(seen - set(nodes)), rest, rest_in_float)

    def latency_ratio(self, chosen: Set[str], *, activation_bits: int = 8) -> float:
        """About how long the model takes beside the float model.

        Args:
            chosen: Names of nodes and outputs that are left in float.
            activation_bits: 8, or 16, for which there are no integer kernels: every node computes
                in float between conversions.
        """
        in_float = sum(node.float_time for node in self.nodes.values())
        if activation_bits == 8:
            time = self.time(chosen)
        else:
            rounded = [
                t for t in self.tensors.values() if self._split(t.writers | t.readers, chosen)[0]
            ]
            time = in_float + sum(2.0 * conversion_time(tensor.values) for tensor in rounded)
        return (self.rest + time) / max(self.rest_in_float + in_float, 1.0)

    def noise(self, chosen: Set[str]) -> float:
        """The noise that is left when `chosen` is left in float."""
        weights = sum(node.noise for name, node in self.nodes.items() if name not in chosen)
        return weights + sum(self._rounded(t, chosen) for t in self.tensors.values())

    def time(self, chosen: Set[str]) -> float:
        """Nanoseconds of the nodes that can be computed with integers, and of conversions."""
        nodes = sum(self._node_time(name, chosen) for name in self.nodes)
        return nodes + sum(self._conversions(t, chosen) for t in self.tensors.values())

    def change(self, chosen: Set[str], added: Set[str]) -> tuple[float, float]:
        """Noise taken away and nanoseconds added by leaving `added` in float beside `chosen`."""
        after = chosen | added
        quieter = sum(self.nodes[name].noise for name in added)
        slower = sum(
            self._node_time(name, after) - self._node_time(name, chosen) for name in added
        )
        for key in {key for name in added for key in self.nodes[name].tensors}:
            tensor = self.tensors[key]
            quieter += self._rounded(tensor, chosen) - self._rounded(tensor, after)
            slower += self._conversions(tensor, after) - self._conversions(tensor, chosen)
        return quieter, slower

    def _node_time(self, name: str, chosen: Set[str]) -> float:
        node = self.nodes[name]
        return node.float_time if name in chosen else node.int8_time

    def _split(self, names: Set[str], chosen: Set[str]) -> tuple[int, int]:
        """How many nodes compute with integers, and how many in float."""
        in_float = sum(name in chosen or name in self.always_float for name in names)
        return len(names) - in_float, in_float

    def _rounded(self, tensor: PlacedTensor, chosen: Set[str]) -> float:
        """The noise that is left. A float reader of what a float node wrote sees none of it."""
        if tensor.output in chosen:
            return 0.0
        integer_writers, _ = self._split(tensor.writers, chosen)
        integer_readers, float_readers = self._split(tensor.readers, chosen)
        if integer_writers or not float_readers:
            return tensor.noise if integer_writers or integer_readers else 0.0
        return tensor.noise * integer_readers / (integer_readers + float_readers)

    def _conversions(self, tensor: PlacedTensor, chosen: Set[str]) -> float:
        integer_writers, float_writers = self._split(tensor.writers, chosen)
        integer_readers, float_readers = self._split(tensor.readers, chosen)
        quantized = integer_readers and (float_writers or not tensor.writers)
        dequantized = integer_writers and float_readers
        return conversion_time(tensor.values) * (bool(quantized) + bool(dequantized))
