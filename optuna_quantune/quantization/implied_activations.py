"""Relu and Clip nodes that do nothing, because the integers around them saturate there already."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import numpy_helper

from optuna_quantune.quantization.graph import activation_bounds
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import reads
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.placement import ACTIVATION_OPS
from optuna_quantune.quantization.scheme import QuantizationParameters


def remove_implied_activations(
    graph: onnx.GraphProto, by_scale: Mapping[str, QuantizationParameters]
) -> None:
    """Removes each Relu or Clip that the saturation of the tensor's integers performs already.

    ``x -> Q -> DQ -> Relu -> Q -> DQ`` becomes ``x -> Q -> DQ`` when both pairs have the same
    parameters and no integer stands for a value that the node would change. ONNX Runtime's own
    quantizer removes the node without looking at the parameters, which loses it for any range with
    negative values (its ``QDQRemovableActivation``).
    """
    view = GraphView(graph)
    removed: set[int] = set()
    for node in graph.node:
        if node.op_type not in ACTIVATION_OPS:
            continue
        before, after = view.writers.get(node.input[0]), view.sole_reader(node.output[0])
        if (
            before is None
            or before.op_type != "DequantizeLinear"
            or after is None
            or after.op_type != "QuantizeLinear"
            or view.sole_reader(before.output[0]) is None
            or view.sole_reader(before.input[0]) is None
            or not _same_parameters(by_scale[before.input[1]], by_scale[after.input[1]])
            or not _implied(node, by_scale[after.input[1]], view.constants)
        ):
            continue
        quantize = view.writers[before.input[0]]
        after.input[0] = quantize.input[0]
        removed |= {id(quantize), id(before), id(node)}
    refill(graph.node, (node for node in graph.node if id(node) not in removed))
    used = {name for node in graph.node for name in reads(node)} | view.outputs
    refill(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in used))


def _same_parameters(first: QuantizationParameters, second: QuantizationParameters) -> bool:
    return bool(first.scale == second.scale and first.zero_point == second.zero_point)


def _implied(
    node: onnx.NodeProto,
    parameters: QuantizationParameters,
    constants: Mapping[str, onnx.TensorProto],
) -> bool:
    scale = float(parameters.scale)
    zero_point = int(parameters.zero_point)
    low, high = scale * (parameters.lowest - zero_point), scale * (parameters.highest - zero_point)
    given = {n: numpy_helper.to_array(constants[n]) for n in node.input[1:] if n in constants}
    bounds = activation_bounds(node, given)
    if bounds is None:
        return False
    # float32 rounding of the scale may leave the largest integer a hair beyond the bound.
    return low >= bounds[0] and high <= bounds[1] + 1e-6 * abs(high)
