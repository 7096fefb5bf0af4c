"""Configuration + statistics -> Q/DQ model.

The placement of Q/DQ pairs is ONNX Runtime's (`placement.py`); ranges, scales and zero points are
computed here from the stored statistics, without another pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any
from typing import Final
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import ranging_scheme
from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.config import Fusion
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.dead_weights import live_weights
from optuna_quantune.quantization.digest import canonical_digest
from optuna_quantune.quantization.fusion import fuse
from optuna_quantune.quantization.fusion import separate
from optuna_quantune.quantization.gelu import find_gelus
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.graph import tensor_shapes
from optuna_quantune.quantization.implied_activations import remove_implied_activations
from optuna_quantune.quantization.islands import between_float_nodes
from optuna_quantune.quantization.kernel_channels import is_few_and_odd
from optuna_quantune.quantization.kernels import adapt
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.neighbours import adds_in_pairs
from optuna_quantune.quantization.neighbours import fit
from optuna_quantune.quantization.neighbours import in_order
from optuna_quantune.quantization.neighbours import in_shape
from optuna_quantune.quantization.neighbours import least_scales
from optuna_quantune.quantization.placement import ConstantSite
from optuna_quantune.quantization.placement import keep_float
from optuna_quantune.quantization.placement import keep_normalizations
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.placement import Placement
from optuna_quantune.quantization.placement import statistics_sources
from optuna_quantune.quantization.representation import DEFAULT_REPRESENTATION
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.scheme import refine_empty
from optuna_quantune.quantization.scheme import widen
from optuna_quantune.quantization.scheme import widen_for_bias
from optuna_quantune.quantization.weight_clipping import least_error_range
from optuna_quantune.quantization.weight_rounding import WeightRounding
from optuna_quantune.quantization.writing import QuantizationPlan
from optuna_quantune.quantization.writing import use_own_pairs
from optuna_quantune.quantization.writing import write


# Lower and upper ends, of shape () or (channels,).
Range: TypeAlias = tuple[NDArray[Any], NDArray[Any]]
CONFIG_KEY: Final = "optuna_quantune.config"


@dataclass(frozen=True)
class QuantizedModel:
    """A built model.

    Attributes:
        proto: The Q/DQ model; its metadata holds the configuration under `CONFIG_KEY`.
        config: What it was built from.
        digest: `canonical_digest` of the model: equal for configurations that build the same
            model, whatever their knobs.
    """

    proto: onnx.ModelProto
    config: QuantizationConfig
    digest: str


@dataclass(frozen=True)
class WeightIntegers:
    """Which integers a weight may be.

    Attributes:
        bits: Their width.
        least_scale: The smallest scale, of the weight or of each channel.
    """

    bits: int = 8
    least_scale: NDArray[np.float64] | float = 0.0


class Quantizer:
    """Builds any configuration of one float model from one set of calibration statistics.

    Placements and ranges are kept, so that configurations that share them pay once.

    Args:
        model: The prepared float model.
        statistics: Statistics of at least `required_activations` of the model.
        representation: How the device wants quantized tensors written.
        bias_correction: What configurations with the knob ``bias_correction`` take their biases
            from.
        weight_rounding: What the weights of configurations with the knob ``weight_rounding`` at
            ``compensated`` are rounded by.
        equalized: Whether `model` is what `equalization.equalize` gave: the only value of the knob
            ``equalization`` that this quantizer can build.
        placement: `place(model)`, if it is at hand; otherwise asked for when it is needed.

    Attributes:
        float_order: What the knob ``float_layers`` counts (`sensitivity.float_order`). It rests on
            the noise of what a quantizer builds, and is therefore set later.
    """

    def __init__(
        self,
        model: FloatModel,
        statistics: CalibrationStatistics,
        *,
        representation: Representation = DEFAULT_REPRESENTATION,
        bias_correction: BiasCorrection | None = None,
        weight_rounding: WeightRounding | None = None,
        equalized: bool = False,
        placement: Placement | None = None,
    ) -> None:
        self.model = model
        self.statistics = statistics
        self.representation = representation
        self.equalized = equalized
        self.float_order: Sequence[tuple[str, ...]] | None = None
        self._bias_correction = bias_correction
        self._weight_rounding = weight_rounding
        self._placements: dict[tuple[tuple[str, ...], Fusion], Placement] = {}
        self._given_placement = placement
        self._ranges: dict[tuple[str, int, str, str, int], tuple[float, float]] = {}
        self._constant_extremes: dict[tuple[str, int | None, bool], Range] = {}
        self._weight_ranges: dict[tuple[str, int | None, Scheme], Range] = {}
        self._least_scales: dict[tuple[str, bool], NDArray[np.float64]] = {}

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
        placement = self.placement(float_layers, config.fusion)
        activations = {
            site.tensor: self.activation_parameters(site.statistics, config)
            for site in placement.activations
        }
        by_scale = {site.scale: activations[site.tensor] for site in placement.activations}
        constants: dict[str, QuantizationParameters] = {}
        for site in placement.constants:
            if site.kind != "bias":
                constants[site.tensor] = self._constant_parameters(site, config)
        for site in placement.constants:
            if site.kind == "bias":  # ONNX Runtime makes integers of a float one, too
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
            InputError: As `plan` does, and if the configuration asks for a bias correction or a
                rounding of weights that the quantizer was not given.
        """
        plan = self.plan(config)
        placement = self.placement(plan.float_layers, config.fusion)
        integers = {
            site.tensor: self._integers(site, plan.constants[site.tensor], config)
            for site in placement.constants
            if site.kind != "bias"
        }
        biases = {
            site.quantized: self._constants[site.tensor]
            for site in placement.constants
            if site.kind == "bias"
        }
        if config.bias_correction:
            biases = self._corrected(biases, placement, plan.constants, integers)
        proto = write(placement, plan, integers, biases, self.representation)
        if config.fusion != "off":
            remove_implied_activations(proto.graph, plan.by_scale(placement))
        if self.representation.for_kernels:
            adapt(proto, self._shapes)
        if config.activation_bits == 16:
            use_own_pairs(proto)
        digest = canonical_digest(proto)
        proto.producer_name = "optuna-quantune"
        entry = proto.metadata_props.add()
        entry.key, entry.value = CONFIG_KEY, config.to_json()
        return QuantizedModel(proto, config, digest)

    def float_layers(self, config: QuantizationConfig) -> tuple[str, ...]:
        """Names of the layers, and of other nodes, that a configuration keeps in float.

        Raises:
            InputError: If it wants some of `float_order`, and there is none.
        """
        if config.float_layers and self.float_order is None:
            raise InputError(
                "knob 'float_layers': this quantizer knows no order of layers; set float_order"
            )
        names: list[str] = []
        layers = {layer.name for layer in self.model.layers}
        ends = [self.model.layers[0].name, self.model.layers[-1].name]
        if config.mixed_precision == "first_last" and not layers <= set(ends):
            names += ends
        for step in (self.float_order or ())[: config.float_layers]:
            if layers <= {*names, *step}:
                break  # it would be the float model
            names += step
        return tuple(dict.fromkeys(names))

    def placement(self, float_layers: tuple[str, ...], fusion: Fusion = "runtime") -> Placement:
        """Where Q/DQ pairs stand when `float_layers` are kept in float."""
        if (float_layers, fusion) not in self._placements:
            if fusion == "runtime":
                names = self._always_float + float_layers
                placement = self._whole
                if names:
                    placement = keep_float(placement, self.model, names)
            elif fusion == "on":
                placement = fuse(self.placement(float_layers))
            else:
                placement = separate(self.placement(float_layers), self.model.proto.graph)
            self._placements[float_layers, fusion] = placement
        return self._placements[float_layers, fusion]

    @cached_property
    def _whole(self) -> Placement:
        """With all pairs, before any node is kept in float."""
        placement = self._given_placement or place(self.model)
        kept = self.representation.for_kernels
        return keep_normalizations(placement, self.model) if kept else placement

    @cached_property
    def _always_float(self) -> tuple[str, ...]:
        """Names of the nodes that have no pairs in any configuration."""
        if not self.representation.for_kernels:
            return ()
        graph = self.model.proto.graph
        gelus = tuple(node.name for gelu in find_gelus(graph) for node in gelu.nodes)
        return gelus + between_float_nodes(graph, gelus)

    def weight_error(
        self, layer: Layer, parameters: QuantizationParameters
    ) -> NDArray[np.float32]:
        """What a layer's weight loses by rounding to the nearest integers: these minus it."""
        axis = layer.channel_axis if parameters.scale.ndim else None
        nearest = parameters.quantize(self.model.weights[layer.weight], axis)
        return self._error_of(layer, parameters, nearest)

    def _error_of(
        self, layer: Layer, parameters: QuantizationParameters, integers: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """What the integers of a layer's weight stand for, minus the float weight."""
        axis = layer.channel_axis if parameters.scale.ndim else None
        return parameters.dequantize(integers, axis) - self.model.weights[layer.weight]

    def share_left(self, layer: Layer, config: QuantizationConfig) -> float:
        """Which share of that error's power in the output `config` is expected to leave.

        Raises:
            InputError: If the configuration asks for a rounding that the quantizer was not given.
        """
        if config.weight_rounding == "nearest":
            return 1.0
        about_mean = layer.has_corrected_bias(config)
        return self._given_rounding().share_left(layer, about_mean=about_mean)

    def _given_rounding(self) -> WeightRounding:
        if self._weight_rounding is None:
            raise InputError(
                "knob 'weight_rounding': this quantizer was given no inputs to compensate on; "
                "give it a WeightRounding"
            )
        return self._weight_rounding

    def _integers(
        self, site: ConstantSite, parameters: QuantizationParameters, config: QuantizationConfig
    ) -> NDArray[np.int32]:
        """A constant as integers."""
        values = self._values(site.tensor, live=config.zero_dead_weights)
        layer = self._layers.get(site.tensor)
        if layer is not None and config.weight_rounding == "compensated":
            about_mean = layer.has_corrected_bias(config)
            integers = self._given_rounding().integers(
                layer, values, parameters, about_mean=about_mean
            )
        else:
            integers = parameters.quantize(values, site.axis if parameters.scale.ndim else None)
        # Rounded to the nearest, and not cut off, they fit by their scale.
        moved = config.weight_rounding == "compensated" or config.weight_clipping == "mse"
        paired = site.tensor in self._paired and not parameters.zero_point.any()
        if layer is not None and moved and paired:
            rows = fit(self._in_order(site, integers))
            integers = in_shape(rows, integers.shape, layer.op_type, layer.channel_axis)
        return integers

    def _corrected(
        self,
        biases: Mapping[str, NDArray[np.float32]],
        placement: Placement,
        constants: Mapping[str, QuantizationParameters],
        integers: Mapping[str, NDArray[np.int32]],
    ) -> dict[str, NDArray[np.float32]]:
        """The float biases that the knob ``bias_correction`` wants, by integer initializer."""
        if self._bias_correction is None:
            raise InputError(
                "knob 'bias_correction': this quantizer was given no inputs to correct with; "
                "give it a BiasCorrection"
            )
        shifts = self._bias_correction.shifts(
            {
                layer.name: self._error_of(layer, constants[layer.weight], integers[layer.weight])
                for layer in self.model.layers
                if layer.weight in constants
            }
        )
        corrected = dict(biases)
        for quantized, layer_name in _layers_of_biases(placement.template.graph).items():
            if quantized in biases and layer_name in shifts:
                bias = biases[quantized]
                corrected[quantized] = bias - shifts[layer_name].reshape(bias.shape)
        return corrected

    def clipping_ranges(self) -> dict[str, tuple[float, float]]:
        """For each activation with statistics the range that clips it on all inputs."""
        clipping = QuantizationConfig(scheme="symmetric_uint8", clipping="kl")
        return {name: self._range(name, clipping) for name in self.statistics.segments}

    def activation_parameters(
        self, tensor: str, config: QuantizationConfig
    ) -> QuantizationParameters:
        """Scale and zero point of an activation with statistics, whether it has a pair or not."""
        if tensor in self._tables:
            return self._constant_parameters(self._tables[tensor], config)
        low, high = self._range(tensor, config)
        return choose_parameters(low, high, config.scheme, bits=config.activation_bits)

    def _range(self, tensor: str, config: QuantizationConfig) -> tuple[float, float]:
        size, clipping = self.statistics.resolve(config.calibration_images), config.clipping
        histogram = self.statistics.histogram(tensor, size)
        scheme = ranging_scheme(histogram, clipping, config.scheme)
        key = (tensor, size, clipping, scheme, config.activation_bits)
        if key not in self._ranges:
            self._ranges[key] = choose_range(
                histogram, clipping, scheme, bits=config.activation_bits
            )
        return self._ranges[key]

    def _constant_parameters(
        self, site: ConstantSite, config: QuantizationConfig
    ) -> QuantizationParameters:
        scheme, axis = config.scheme, self._channel_axis(site, config)
        symmetric = site.kind == "weight" and self.representation.symmetric_weights
        # ONNX Runtime's integer kernels want one zero point for all channels, so per-channel
        # weights are symmetric with every scheme.
        if symmetric or axis is not None:
            scheme = "symmetric_power2" if scheme == "symmetric_power2" else "symmetric"
        if site.kind == "other":
            low, high = self._extremes(site.tensor, axis, live=False)
            return choose_parameters(low, high, scheme, bits=config.activation_bits)
        integers = self._integers_of(site, config, axis, scheme)
        if config.weight_clipping == "mse":
            low, high = self._least_error_range(site.tensor, axis, scheme, integers)
        else:
            low, high = self._extremes(site.tensor, axis, live=config.zero_dead_weights)
        parameters = choose_parameters(
            low, high, scheme, bits=integers.bits, narrow=self.representation.narrow_weights
        )
        return refine_empty(widen(parameters, integers.least_scale, scheme), low, high)

    def _values(self, constant: str, *, live: bool) -> NDArray[Any]:
        """A constant; if `live`, with 0 for weights that are multiplied with nothing but zeros."""
        if live and constant in self._live_weights:
            return self._live_weights[constant]
        return self._constants[constant]

    def _extremes(self, constant: str, axis: int | None, *, live: bool) -> Range:
        """The least and the largest of `_values`, of all or along an axis."""
        key = constant, axis, live
        if key not in self._constant_extremes:
            values = self._values(constant, live=live)
            others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
            self._constant_extremes[key] = values.min(axis=others), values.max(axis=others)
        return self._constant_extremes[key]

    def _channel_axis(self, site: ConstantSite, config: QuantizationConfig) -> int | None:
        """The axis along which a constant has one scale for each channel, if it has."""
        if config.granularity == "tensor":
            return None
        if site.kind == "weight" and site.tensor not in self._per_channel:
            return None
        return site.axis

    def _least_error_range(
        self, weight: str, axis: int | None, scheme: Scheme, integers: WeightIntegers
    ) -> Range:
        key = (weight, axis, scheme)
        if key not in self._weight_ranges:
            self._weight_ranges[key] = least_error_range(
                self._live_weights[weight],
                scheme,
                axis=axis,
                bits=integers.bits,
                narrow=self.representation.narrow_weights,
                least=integers.least_scale,
            )
        return self._weight_ranges[key]

    def _integers_of(
        self, site: ConstantSite, config: QuantizationConfig, axis: int | None, scheme: Scheme
    ) -> WeightIntegers:
        """Which integers a weight may be."""
        if site.tensor not in self._paired:
            return WeightIntegers()
        # Weights that count for nothing are cut off where the range is that of the others.
        live = config.zero_dead_weights or config.weight_clipping == "mse"
        lowest, _ = self._extremes(site.tensor, None, live=live)
        if scheme == "asymmetric" or (scheme == "symmetric_uint8" and lowest >= 0.0):
            # With a zero point of its own any weight can have the largest integer.
            return WeightIntegers(bits=7)
        key = site.tensor, live
        if key not in self._least_scales:
            values = self._values(site.tensor, live=live)
            self._least_scales[key] = least_scales(self._in_order(site, values))
        found = self._least_scales[key]
        return WeightIntegers(least_scale=found.max(initial=0.0) if axis is None else found)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of float tensors for one input, as far as they are known."""
        shapes = tensor_shapes(self.model.proto.graph)
        return {name: (1, *shape[1:]) for name, shape in shapes.items() if 0 not in shape[1:]}

    @cached_property
    def _tables(self) -> dict[str, ConstantSite]:
        """For each activation that was looked up the table, whose integers it keeps."""
        placement = self.placement(())
        constants = {site.scale: site for site in placement.constants}
        return {
            site.statistics: constants[site.scale]
            for site in placement.activations
            if site.scale in constants
        }

    def _in_order(self, site: ConstantSite, values: NDArray[Any]) -> NDArray[Any]:
        layer = self._layers[site.tensor]
        return in_order(values, layer.op_type, layer.channel_axis)

    @cached_property
    def _paired(self) -> frozenset[str]:
        """Weights whose products are added in pairs that saturate."""
        if not self.representation.adds_in_pairs:
            return frozenset()

        def groups(layer: Layer) -> int:
            made_dense = self.representation.for_kernels and is_few_and_odd(layer.groups)
            return 1 if made_dense else layer.groups

        return frozenset(
            name
            for name, layer in self._layers.items()
            if adds_in_pairs(layer.op_type, self.model.weights[name].shape, groups(layer))
        )

    @cached_property
    def _layers(self) -> dict[str, Layer]:
        """The layer, or one of the layers, that have each weight."""
        return {layer.weight: layer for layer in self.model.layers}

    @cached_property
    def _live_weights(self) -> dict[str, NDArray[np.float32]]:
        """Weights by initializer, with 0 for those that are multiplied with nothing but zeros."""
        sources = statistics_sources(self.model.proto.graph)

        def reach(tensor: str) -> float | None:
            source = sources.get(tensor, tensor)
            if source not in self.statistics.segments:
                return None
            histogram = self.statistics.histogram(source, ALL_IMAGES)
            return max(abs(histogram.minimum), abs(histogram.maximum))

        by_layer = live_weights(self.model, reach)
        live: dict[str, NDArray[np.float32]] = {}
        for layer in self.model.layers:
            weight = by_layer[layer.name]
            other = live.get(layer.weight, weight)  # of another layer with the same weight
            live[layer.weight] = np.where(other != 0.0, other, weight)
        return live

    @cached_property
    def _per_channel(self) -> frozenset[str]:
        """Weights that may have one scale for each channel."""
        operators = self.representation.per_channel
        return frozenset(x.weight for x in self.model.layers if x.op_type in operators)

    @cached_property
    def _constants(self) -> dict[str, NDArray[Any]]:
        return constant_values(self.model.proto.graph)


def required_activations(*placements: Placement) -> list[str]:
    """Names of the activations whose statistics placements need, sorted."""
    return sorted({site.statistics for item in placements for site in item.activations})


def _layers_of_biases(graph: onnx.GraphProto) -> dict[str, str]:
    """The name of the layer that reads each integer bias."""
    integers = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    return {
        integers[node.input[2]]: node.name
        for node in graph.node
        if node.op_type in WEIGHTED_OPS and len(node.input) > 2 and node.input[2] in integers
    }
