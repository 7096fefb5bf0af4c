"""Where the noise of a model can be measured whose outputs are a selection, as a detector's are.

A non-maximum suppression gives as many boxes as it likes, and an ArgMax gives integers: a little
noise in front of them changes nothing, or the number of values. Noise is measured then on the
real numbers that the selection is made by and made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import onnx

from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import inner_graphs
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import tensor_spec
from optuna_quantune.quantization.model import TensorSpec


# The number of their values depends on the values that they read.
_SELECTING: Final = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})
# What they give depends on no value, but on the shape alone.
_OF_SHAPE: Final = frozenset({"Shape", "Size"})


def with_measurable_outputs(model: FloatModel) -> FloatModel:
    """The model with its `measurable_outputs`; itself if it has these already.

    Its nodes and layers stay: what is computed behind these outputs has no noise.
    """
    outputs = measurable_outputs(model)
    if outputs == model.outputs:
        return model
    declared = {v.name: v for v in (*model.proto.graph.value_info, *model.proto.graph.output)}
    proto = copy_of(model.proto)
    refill(proto.graph.output, (declared[output.name] for output in outputs))
    return replace(model, proto=proto, outputs=outputs)


def measurable_outputs(model: FloatModel) -> tuple[TensorSpec, ...]:
    """The outputs of real numbers that are no selection and depend on the inputs.

    Outputs behind a selection, and those of integers where there are no others, give way to the
    last tensors of real numbers before it. Where there is nothing of the kind, the model's own.
    """
    graph = model.proto.graph
    varying, selected = _varying_and_selected(graph)
    real = {v.name: v for v in (*graph.value_info, *graph.output) if _is_real(v)}
    kept = [o.name for o in graph.output if o.name in (varying & real.keys()) - selected]
    lost = [o.name for o in graph.output if o.name in selected or not kept]
    if not lost and varying.issuperset(o.name for o in graph.output):
        return model.outputs
    found = [*kept, *_before(lost, graph, varying & real.keys() - selected)]
    return tuple(tensor_spec(real[name]) for name in dict.fromkeys(found)) or model.outputs


def outputs_of_inputs(model: FloatModel) -> tuple[TensorSpec, ...]:
    """The outputs that depend on an input; where none does, all.

    A constant among the outputs has no batch axis, and is the same in all models made of this one.
    """
    graph = model.proto.graph
    reached = {value.name for value in graph.input}
    for node in graph.node:
        if not reached.isdisjoint(reads(node)):
            reached.update(node.output)
    return tuple(output for output in model.outputs if output.name in reached) or model.outputs


def _varying_and_selected(graph: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """Tensors that depend on the values of inputs, and those whose shapes may do so."""
    constants = {tensor.name for tensor in graph.initializer}
    varying = {value.name for value in graph.input} - constants
    selected: set[str] = set()
    for node in graph.node:
        read = set(reads(node))
        if not read.isdisjoint(selected if node.op_type in _OF_SHAPE else varying):
            varying.update(node.output)
            if _selects(node) or not read.isdisjoint(selected):
                selected.update(node.output)
    return varying, selected


def _selects(node: onnx.NodeProto) -> bool:
    """Whether a node, or one of the graphs within it, gives as many values as it likes."""
    return node.op_type in _SELECTING or any(
        _selects(inner) for graph in inner_graphs(node) for inner in graph.node
    )


def _before(lost: Iterable[str], graph: onnx.GraphProto, points: set[str]) -> list[str]:
    """Those of `points` that stand nearest before some outputs, the last first."""
    writers = GraphView(graph).writers
    found: dict[str, None] = {}
    seen = set(lost)
    queue = list(lost)
    while queue:
        writer = writers.get(queue.pop())
        for name in () if writer is None else reads(writer):
            if name in points and name in writers:
                found[name] = None
            elif name not in seen:
                seen.add(name)
                queue.append(name)
    return list(found)


def _is_real(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
