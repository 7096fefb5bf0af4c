"""A placement and the numbers of a plan -> Q/DQ model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import import_own_domain
from optuna_quantune.quantization.graph import opset_of
from optuna_quantune.quantization.graph import OWN_DOMAIN
from optuna_quantune.quantization.graph import PAIR_OPS
from optuna_quantune.quantization.graph import refill
from optuna_quantune.quantization.placement import ConstantSite
from optuna_quantune.quantization.placement import Placement
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.quantization.scheme import QuantizationParameters


# The first in which QuantizeLinear knows 16-bit integers.
_OPSET_OF_16_BITS: Final = 21


@dataclass(frozen=True)
class QuantizationPlan:
    """Every number that a configuration puts into the model, before the model is built.

    Attributes:
        float_layers: Names of the layers kept in float.
        activations: Parameters by activation tensor.
        constants: Parameters by float initializer (weights and constant operands, not biases).
    """

    float_layers: tuple[str, ...]
    activations: Mapping[str, QuantizationParameters]
    constants: Mapping[str, QuantizationParameters]

    def by_scale(self, placement: Placement) -> dict[str, QuantizationParameters]:
        """Parameters of activations by scale initializer."""
        return {site.scale: self.activations[site.tensor] for site in placement.activations}


def write(
    placement: Placement,
    plan: QuantizationPlan,
    integers: Mapping[str, NDArray[np.int32]],
    biases: Mapping[str, NDArray[np.float32]],
    representation: Representation,
) -> onnx.ModelProto:
    """The template of a placement with all integers, scales and zero points.

    Args:
        placement: Where pairs stand.
        plan: Scales and zero points of the placement's tensors.
        integers: By float initializer what stands for it; biases are not among them.
        biases: The float values of each bias, by the integer initializer that it becomes. Layers
            that share a bias may each have one of their own.
        representation: How the device wants them written.
    """
    proto = copy_of(placement.template)
    initializers = proto.graph.initializer
    by_scale = plan.by_scale(placement)
    of_constants = {site.scale for site in placement.constants}
    for activation in placement.activations:
        if activation.scale in of_constants:
            continue  # looked up in a table, which brings its scale along
        parameters = by_scale[activation.scale]
        initializers.append(numpy_helper.from_array(parameters.scale, activation.scale))
        initializers.append(_zero_point(parameters, activation.zero_point, representation))
    for site in placement.constants:
        if site.kind != "bias":
            parameters = plan.constants[site.tensor]
            initializers.extend(_constant(site, integers[site.tensor], parameters, representation))
        elif representation.float_bias:
            _restore_float(proto.graph, site.quantized, biases[site.quantized])
        else:
            initializers.extend(_bias(site, biases[site.quantized], plan, by_scale))
    _match_axes(proto.graph, placement, plan)
    return proto


def _constant(
    site: ConstantSite,
    integers: NDArray[np.int32],
    parameters: QuantizationParameters,
    representation: Representation,
) -> list[onnx.TensorProto]:
    scale = numpy_helper.from_array(parameters.scale, site.scale)
    if site.kind == "other":  # an operand of an elementwise node is stored as activations are
        return [
            _as_activation(integers, parameters, site.quantized, representation),
            scale,
            _zero_point(parameters, site.zero_point, representation),
        ]
    return [
        numpy_helper.from_array(integers.astype(np.int8), site.quantized),
        scale,
        numpy_helper.from_array(parameters.zero_point.astype(np.int8), site.zero_point),
    ]


def _bias(
    site: ConstantSite,
    bias: NDArray[np.float32],
    plan: QuantizationPlan,
    by_scale: Mapping[str, QuantizationParameters],
) -> list[onnx.TensorProto]:
    assert site.weight is not None
    assert site.input_scale is not None
    # The scale of the int32 accumulator, which is what the integer kernels add the bias to.
    scale = by_scale[site.input_scale].scale * plan.constants[site.weight].scale
    steps = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    limits = np.iinfo(np.int32)
    integers = np.clip(steps, limits.min, limits.max).astype(np.int32)
    return [
        numpy_helper.from_array(integers, site.quantized),
        numpy_helper.from_array(np.asarray(scale, dtype=np.float32), site.scale),
        numpy_helper.from_array(np.zeros(scale.shape, dtype=np.int32), site.zero_point),
    ]


def _zero_point(
    parameters: QuantizationParameters, name: str, representation: Representation
) -> onnx.TensorProto:
    return _as_activation(parameters.zero_point, parameters, name, representation)


def _as_activation(
    integers: NDArray[np.int32],
    parameters: QuantizationParameters,
    name: str,
    representation: Representation,
) -> onnx.TensorProto:
    unsigned = representation.activations == "uint8"
    shift = 1 << (parameters.bits - 1) if unsigned else 0
    dtype = np.dtype(f"{'uint' if unsigned else 'int'}{parameters.bits}")
    return numpy_helper.from_array((integers + shift).astype(dtype), name)


def _restore_float(graph: onnx.GraphProto, quantized: str, values: NDArray[np.float32]) -> None:
    """Puts a float initializer in the place of an integer one and its DequantizeLinear node."""
    node = next(node for node in graph.node if node.input and node.input[0] == quantized)
    graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
    graph.node.remove(node)


def use_own_pairs(proto: onnx.ModelProto) -> None:
    """Lets pairs be ONNX Runtime's own operators, which know 16 bits before opset 21, too."""
    if opset_of(proto) >= _OPSET_OF_16_BITS:
        return
    for node in proto.graph.node:
        if node.op_type in PAIR_OPS:
            node.domain = OWN_DOMAIN
    import_own_domain(proto)


def _match_axes(graph: onnx.GraphProto, placement: Placement, plan: QuantizationPlan) -> None:
    """Drops the channel axis of constants that have one scale for the whole tensor."""
    whole = {
        site.quantized
        for site in placement.constants
        if plan.constants[site.weight or site.tensor].scale.ndim == 0
    }
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in whole:
            refill(node.attribute, (a for a in node.attribute if a.name != "axis"))
