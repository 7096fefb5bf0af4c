"""Configuration + statistics -> Q/DQ model.

The placement of Q/DQ pairs is ONNX Runtime's (`placement.py`); ranges, scales and zero points are
computed here from the stored statistics, without another pass over the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any
from typing import Final
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.placement import ConstantSite
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.placement import Placement
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.scheme import widen_for_bias


ActivationStorage = Literal["uint8", "int8"]

CONFIG_KEY: Final = "optuna_quantune.config"


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


@dataclass(frozen=True)
class QuantizedModel:
    """A built model.

    Attributes:
        proto: The Q/DQ model; its metadata holds the configuration under `CONFIG_KEY`.
        config: What it was built from.
        digest: SHA-256 of nodes and initializers: equal for configurations that build the same
            model, whatever their knobs.
    """

    proto: onnx.ModelProto
    config: QuantizationConfig
    digest: str


class Quantizer:
    """Builds any configuration of one float model from one set of calibration statistics.

    Placements and ranges are kept, so that configurations that share them pay once.

    Args:
        model: The prepared float model.
        statistics: Statistics of at least `required_activations` of the model.
        activation_storage: How 8-bit activations are written: ``uint8`` (int8 arithmetic with
            integers and zero points shifted by 128, the fast kernels of x86-64) or ``int8``.
        bias_correction: What configurations with the knob ``bias_correction`` take their biases
            from.
        equalized: Whether `model` is what `equalization.equalize` gave: the only value of the knob
            ``equalization`` that this quantizer can build.
    """

    def __init__(
        self,
        model: FloatModel,
        statistics: CalibrationStatistics,
        *,
        activation_storage: ActivationStorage = "uint8",
        bias_correction: BiasCorrection | None = None,
        equalized: bool = False,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.activation_storage = activation_storage
        self.equalized = equalized
        self._bias_correction = bias_correction
        self._placements: dict[tuple[str, ...], Placement] = {}
        self._ranges: dict[tuple[str, int, str, bool], tuple[float, float]] = {}

    def plan(self, config: QuantizationConfig) -> QuantizationPlan:
        """Chooses scales and zero points of a configuration; the model is not built.

        Raises:
            InputError: If the statistics do not cover the configuration's `calibration_images`, or
                its `equalization` is not what the quantizer's model is.
        """
        if config.equalization != self.equalized:
            raise InputError(
                f"knob 'equalization': {config.equalization}, but this quantizer's model is "
                f"{'an' if self.equalized else 'not an'} equalized one"
            )
        float_layers = self.float_layers(config)
        placement = self.placement(float_layers)
        activations = {
            site.tensor: choose_parameters(*self._range(site.statistics, config), config.scheme)
            for site in placement.activations
        }
        by_scale = {site.scale: activations[site.tensor] for site in placement.activations}
        constants: dict[str, QuantizationParameters] = {}
        for site in placement.constants:
            if site.kind != "bias":
                constants[site.tensor] = self._constant_parameters(site, config)
        for site in placement.constants:
            if site.kind == "bias":
                assert site.weight is not None
                assert site.input_scale is not None
                constants[site.weight] = widen_for_bias(
                    constants[site.weight],
                    self._constants[site.tensor],
                    float(by_scale[site.input_scale].scale),
                    config.scheme,
                )
        return QuantizationPlan(
            float_layers, MappingProxyType(activations), MappingProxyType(constants)
        )

    def quantize(self, config: QuantizationConfig) -> QuantizedModel:
        """Builds the Q/DQ model of a configuration.

        Raises:
            InputError: As `plan` does, and if the configuration asks for a bias correction and the
                quantizer was given none.
        """
        plan = self.plan(config)
        placement = self.placement(plan.float_layers)
        proto = onnx.ModelProto()
        proto.CopyFrom(placement.template)
        by_scale: dict[str, QuantizationParameters] = {}
        for activation in placement.activations:
            parameters = plan.activations[activation.tensor]
            by_scale[activation.scale] = parameters
            proto.graph.initializer.extend(
                [
                    numpy_helper.from_array(parameters.scale, activation.scale),
                    self._stored_activation(parameters.zero_point, activation.zero_point),
                ]
            )
        corrected: Mapping[str, NDArray[np.float32]] = {}
        if config.bias_correction:
            corrected = self._corrected_biases(placement, plan.constants)
        for site in placement.constants:
            if site.kind == "bias":
                bias = corrected.get(site.quantized, self._constants[site.tensor])
                proto.graph.initializer.extend(self._bias(site, bias, plan, by_scale))
            else:
                proto.graph.initializer.extend(self._constant(site, plan.constants[site.tensor]))
        _match_axes(proto.graph, placement, plan)
        _remove_implied_activations(proto.graph, by_scale)
        digest = _digest(proto)
        proto.producer_name = "optuna-quantune"
        entry = proto.metadata_props.add()
        entry.key, entry.value = CONFIG_KEY, config.to_json()
        return QuantizedModel(proto, config, digest)

    def float_layers(self, config: QuantizationConfig) -> tuple[str, ...]:
        """Names of the layers that a configuration keeps in float."""
        if config.mixed_precision == "none":
            return ()
        layers = self.model.layers
        return tuple(dict.fromkeys((layers[0].name, layers[-1].name)))

    def placement(self, float_layers: tuple[str, ...]) -> Placement:
        """Where Q/DQ pairs stand when `float_layers` are kept in float."""
        if float_layers not in self._placements:
            self._placements[float_layers] = place(self.model, float_nodes=float_layers)
        return self._placements[float_layers]

    def weight_error(
        self, layer: Layer, parameters: QuantizationParameters
    ) -> NDArray[np.float32]:
        """What the integers of a layer's weight stand for, minus the float weight."""
        weight = self.model.weights[layer.weight]
        axis = layer.channel_axis if parameters.scale.ndim else None
        return parameters.dequantize(parameters.quantize(weight, axis), axis) - weight

    def _corrected_biases(
        self, placement: Placement, constants: Mapping[str, QuantizationParameters]
    ) -> dict[str, NDArray[np.float32]]:
        """The float biases that the knob ``bias_correction`` wants, by integer initializer."""
        if self._bias_correction is None:
            raise InputError(
                "knob 'bias_correction': this quantizer was given no inputs to correct with; "
                "give it a BiasCorrection"
            )
        shifts = self._bias_correction.shifts(
            {
                layer.name: self.weight_error(layer, constants[layer.weight])
                for layer in self.model.layers
                if layer.weight in constants
            }
        )
        readers = _layers_of_biases(placement.template.graph)
        corrected = {}
        for site in placement.constants:
            if site.kind == "bias":
                bias, shift = self._constants[site.tensor], shifts[readers[site.quantized]]
                corrected[site.quantized] = bias - shift.reshape(bias.shape)
        return corrected

    def clipping_ranges(self) -> dict[str, tuple[float, float]]:
        """For each activation with statistics the range that clips it on all inputs."""
        clipping = QuantizationConfig(scheme="symmetric_uint8", clipping="kl")
        return {name: self._range(name, clipping) for name in self.statistics.segments}

    def _range(self, tensor: str, config: QuantizationConfig) -> tuple[float, float]:
        size = self.statistics.resolve(config.calibration_images)
        histogram = self.statistics.histogram(tensor, size)
        symmetric = config.scheme in ("symmetric", "symmetric_power2") or (
            config.scheme == "symmetric_uint8" and histogram.minimum < 0
        )
        key = (tensor, size, config.clipping, symmetric)
        if key not in self._ranges:
            self._ranges[key] = choose_range(histogram, config.clipping, symmetric=symmetric)
        return self._ranges[key]

    def _constant_parameters(
        self, site: ConstantSite, config: QuantizationConfig
    ) -> QuantizationParameters:
        values = self._constants[site.tensor]
        if site.axis is None or config.granularity == "tensor":
            return choose_parameters(values.min(), values.max(), config.scheme)
        # ONNX Runtime's integer kernels want one zero point for all channels, so per-channel
        # weights are symmetric with every scheme.
        power2 = config.scheme == "symmetric_power2"
        scheme: Scheme = "symmetric_power2" if power2 else "symmetric"
        others = tuple(axis for axis in range(values.ndim) if axis != site.axis)
        return choose_parameters(values.min(axis=others), values.max(axis=others), scheme)

    def _constant(
        self, site: ConstantSite, parameters: QuantizationParameters
    ) -> list[onnx.TensorProto]:
        axis = site.axis if parameters.scale.ndim else None
        integers = parameters.quantize(self._constants[site.tensor], axis)
        scale = numpy_helper.from_array(parameters.scale, site.scale)
        if site.kind == "other":  # an operand of an elementwise node is stored as activations are
            return [
                self._stored_activation(integers, site.quantized),
                scale,
                self._stored_activation(parameters.zero_point, site.zero_point),
            ]
        return [
            numpy_helper.from_array(integers.astype(np.int8), site.quantized),
            scale,
            numpy_helper.from_array(parameters.zero_point.astype(np.int8), site.zero_point),
        ]

    def _bias(
        self,
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

    def _stored_activation(self, integers: NDArray[np.int32], name: str) -> onnx.TensorProto:
        if self.activation_storage == "uint8":
            return numpy_helper.from_array((integers + 128).astype(np.uint8), name)
        return numpy_helper.from_array(integers.astype(np.int8), name)

    @cached_property
    def _constants(self) -> dict[str, NDArray[Any]]:
        return {i.name: numpy_helper.to_array(i) for i in self.model.proto.graph.initializer}


def required_activations(placement: Placement) -> list[str]:
    """Names of the activations whose statistics a placement needs, sorted."""
    return sorted({site.statistics for site in placement.activations})


def _layers_of_biases(graph: onnx.GraphProto) -> dict[str, str]:
    """The name of the layer that reads each integer bias."""
    integers = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return {
        integers[node.input[2]]: node.name
        for node in graph.node
        if node.op_type in WEIGHTED_OPS and len(node.input) > 2 and node.input[2] in integers
    }


def _match_axes(graph: onnx.GraphProto, placement: Placement, plan: QuantizationPlan) -> None:
    """Drops the channel axis of constants that have one scale for the whole tensor."""
    whole = {
        site.quantized
        for site in placement.constants
        if plan.constants[site.weight or site.tensor].scale.ndim == 0
    }
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in whole:
            kept = [attribute for attribute in node.attribute if attribute.name != "axis"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _remove_implied_activations(
    graph: onnx.GraphProto, by_scale: Mapping[str, QuantizationParameters]
) -> None:
    """Removes each Relu or Clip that the saturation of the tensor's integers performs already.

    ``x -> Q -> DQ -> Relu -> Q -> DQ`` becomes ``x -> Q -> DQ`` when both pairs have the same
    parameters and no integer stands for a value that the node would change. ONNX Runtime's own
    quantizer removes the node without looking at the parameters, which loses it for any range with
    negative values (its ``QDQRemovableActivation``).
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {output.name for output in graph.output}
    removed: set[int] = set()
    for node in graph.node:
        if node.op_type not in ("Relu", "Clip") or node.output[0] in outputs:
            continue
        before = producers.get(node.input[0])
        behind = readers.get(node.output[0], [])
        if before is None or before.op_type != "DequantizeLinear" or len(behind) != 1:
            continue
        after, quantize = behind[0], producers[before.input[0]]
        if (
            after.op_type != "QuantizeLinear"
            or len(readers[before.output[0]]) != 1
            or len(readers[before.input[0]]) != 1
            or not _same_parameters(by_scale[before.input[1]], by_scale[after.input[1]])
            or not _implied(node, by_scale[after.input[1]], initializers)
        ):
            continue
        after.input[0] = quantize.input[0]
        readers[quantize.input[0]].remove(quantize)
        readers[quantize.input[0]].append(after)
        removed |= {id(quantize), id(before), id(node)}
    kept = [node for node in graph.node if id(node) not in removed]
    used = {name for node in kept for name in node.input}
    parameters = [tensor for tensor in graph.initializer if tensor.name in used]
    kept_nodes = [_copy(node) for node in kept]
    del graph.node[:]
    graph.node.extend(kept_nodes)
    del graph.initializer[:]
    graph.initializer.extend(parameters)


def _same_parameters(first: QuantizationParameters, second: QuantizationParameters) -> bool:
    return bool(first.scale == second.scale and first.zero_point == second.zero_point)


def _implied(
    node: onnx.NodeProto,
    parameters: QuantizationParameters,
    initializers: Mapping[str, onnx.TensorProto],
) -> bool:
    scale = float(parameters.scale)
    zero_point = int(parameters.zero_point)
    low, high = scale * (parameters.lowest - zero_point), scale * (parameters.highest - zero_point)
    if node.op_type == "Relu":
        return low >= 0.0
    bounds = [
        float(numpy_helper.to_array(initializers[name])) if name in initializers else unbounded
        for name, unbounded in zip((*node.input[1:3], "", "")[:2], (-np.inf, np.inf), strict=True)
    ]
    # float32 rounding of the scale may leave the largest integer a hair beyond the bound.
    return low >= bounds[0] and high <= bounds[1] + 1e-6 * abs(high)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _digest(proto: onnx.ModelProto) -> str:
    """Canonical hash: nodes in graph order, initializers by name; documentation is left out."""
    digest = hashlib.sha256()
    for item in (*proto.graph.node, *sorted(proto.graph.initializer, key=lambda i: i.name)):
        digest.update(item.SerializeToString(deterministic=True))
    return digest.hexdigest()
