"""Expected quantization noise of any configuration, before one of them is run.

The error that a configuration makes in an activation follows from the activation's histogram and
its step; the error that a quantized weight makes in its layer's output follows from the weight and
the moments of the layer's input. How much of either reaches the model's output was probed once
(`probe.py`). Errors of different tensors are taken as independent, so that their powers add up
as long as they are small beside the signal; what becomes of larger sums is read off a simulation
of the few knobs that decide most (`joint.py`). The power is a mean over inputs; which predictions
change depends on how clipping is spread over them, too (`uneven_clipping.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Final
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.config import Fusion
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.graph import PAIR_OPS
from optuna_quantune.quantization.measurable_outputs import measurable_outputs
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.placement import MOVING_OPS
from optuna_quantune.quantization.placement import statistics_sources
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.probe import PROBED
from optuna_quantune.quantization.probe import Sides
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.statistics import Histogram
from optuna_quantune.quantization.uneven_clipping import as_if_even
from optuna_quantune.quantization.uneven_clipping import shares_of_inputs


# Noise-to-signal power ratio up to which errors add up: they are a third of the signal then.
ADDITIVE: Final = 0.1
# An activation whose clipping is a smaller share of what all contribute counts as clipped evenly.
_NEGLIGIBLE: Final = 0.001
# Behind them are the values of a tensor, or averages of them.
_PASSING_ON: Final = MOVING_OPS.union(PAIR_OPS)
# The share of clipping in the noise from which a simulation clips, too.
_MOSTLY: Final = 0.5


@dataclass(frozen=True)
class Saturation:
    """How errors of a kind of configuration fail to add up, from one that was simulated.

    Below `ADDITIVE` they do add up. From there the factor by which the simulated one departs from
    its sum is approached with the logarithm of the sum. A larger sum makes no more noise than the
    simulated one.

    Attributes:
        linear: The sum of the simulated configuration.
        total: What its noise really was, over that sum.
        confusion: What of it can change a prediction, over what that was expected to be.
        gain: What it left of the signal.
    """

    linear: float = 0.0
    total: float = 1.0
    confusion: float = 1.0
    gain: float = 1.0

    def share(self, linear: float) -> float:
        """How far beyond `ADDITIVE` a sum is, on the way to the simulated one, 0 to 1."""
        if min(linear, self.linear) <= ADDITIVE:
            return 0.0
        return min(1.0, float(np.log(linear / ADDITIVE) / np.log(self.linear / ADDITIVE)))

    def beyond(self, linear: float) -> float:
        """What part of a sum is as much as that of the simulated one, 0 to 1."""
        return min(1.0, self.linear / linear) if self.linear > ADDITIVE else 1.0


@dataclass(frozen=True)
class NoisePrediction:
    """Noise-to-signal power ratios at the model's output that a configuration is expected to have.

    Contributions of single tensors add up.

    Attributes:
        rounding: What the rounding of each quantized activation contributes.
        clipping: What the clipping of each quantized activation contributes.
        weights: What the quantized weight of each layer contributes, by weight name.
        scaling: The part of each activation's clipping that scales the output as a whole or
            bounds it, so that it changes no order in it.
        highest: Largest value that the quantized first output can have.
        saturation: What becomes of a sum that is not small.
        uneven: What clipping contributes to each of some inputs, without `scaling`, shape
            (inputs,); empty where that is little.
    """

    rounding: Mapping[str, float]
    clipping: Mapping[str, float]
    weights: Mapping[str, float]
    scaling: Mapping[str, float]
    highest: float = np.inf
    saturation: Saturation = Saturation()
    uneven: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False)

    @property
    def linear(self) -> float:
        """The sum of all contributions."""
        parts = (self.rounding, self.clipping, self.weights)
        return sum(sum(part.values()) for part in parts)

    @property
    def confusing(self) -> float:
        """The sum without what only scales the output, and without the bounds of the output.

        `highest_output` says exactly what those do. What few inputs have most of counts as the
        even noise that changes as many predictions.
        """
        confusing = self.linear - sum(self.scaling.values())
        if len(self.uneven) == 0:
            return confusing
        return as_if_even(max(confusing - float(self.uneven.mean()), 0.0), self.uneven)

    @property
    def total(self) -> float:
        """The predicted noise-to-signal power ratio of the output."""
        return self.linear * self._beyond * float(self.saturation.total**self._share)

    @property
    def confusion(self) -> float:
        """The part of the noise that can change a prediction, over what is left of the signal."""
        return self.confusing * self._beyond * float(self.saturation.confusion**self._share)

    @property
    def highest_output(self) -> float:
        """Largest value of the first output beside a signal of the float model's size."""
        return self.highest / float(self.saturation.gain**self._share)

    @property
    def _share(self) -> float:
        return self.saturation.share(self.linear)

    @property
    def _beyond(self) -> float:
        return self.saturation.beyond(self.linear)

    def features(self) -> dict[str, float]:
        """Named numbers for a cost model, in decibels (10 log10 of signal over noise)."""
        numbers = {"predicted_sqnr_db": _decibels(self.total)}
        for name in ("rounding", "clipping", "weights"):
            part: Mapping[str, float] = getattr(self, name)
            numbers[f"{name}_sqnr_db"] = _decibels(sum(part.values()))
            numbers[f"worst_{name}_sqnr_db"] = _decibels(max(part.values(), default=0.0))
        return numbers


@dataclass(frozen=True)
class _Activations:
    """What quantized activations contribute, by tensor with statistics.

    `averages` is what rounding would contribute if the values were spread evenly between the
    integers, as averages are; `scaling` is the part of clipping that changes no order in the
    output, `uneven` what the other part contributes to each of some inputs, where it is not
    negligible.
    """

    rounding: Mapping[str, float]
    averages: Mapping[str, float]
    clipping: Mapping[str, float]
    scaling: Mapping[str, float]
    uneven: Mapping[str, NDArray[np.float64]]
    highest_output: float


class _Rounded(NamedTuple):
    """How a placement rounds a tensor.

    Attributes:
        clipped: What of an error in the tensor comes out behind the readers that it is rounded
            for, 0 to 1: a float node reads what a float node wrote as it is.
        rounded: The same, and 0 where only averages of the tensor are rounded.
        taps: How many values each average that is rounded is of, summed up.
    """

    clipped: float
    rounded: float
    taps: float


class NoiseModel:
    """Predicts the noise of any configuration that a quantizer can build.

    Signal and clipping are measured on all calibration inputs, also for a configuration whose
    ranges come from fewer: what those ranges cut off is part of its noise.

    What a tensor contributes depends on few of the knobs, and not on the layers that are kept in
    float. It is computed once for each combination of those; a prediction only looks up what its
    configuration quantizes. (The scales of weights that are widened for their bias depend on the
    activations too; here they are those of activations that are not clipped.)

    Args:
        quantizer: What builds the configurations.
        probe: What errors in `quantizer.model` do to its output.
        closely: Whether errors that do not add up are simulated for every clipping, calibration
            size and mixed precision, too, rather than for every scheme and granularity, and for
            those only where clipping makes most of the noise. A simulation takes a few inferences,
            there can be hundreds of them, and they tell configurations apart that are all far from
            the best.
    """

    def __init__(self, quantizer: Quantizer, probe: Probe, *, closely: bool = False) -> None:
        self._quantizer = quantizer
        self._closely = closely
        self._probe = probe
        self._signal = max(probe.output_power, np.finfo(np.float64).tiny)
        self._layers = {layer.weight: layer for layer in quantizer.model.layers}
        output = measurable_outputs(quantizer.model)[0].name
        self._output = statistics_sources(quantizer.model.proto.graph).get(output, output)
        self._activations: dict[QuantizationConfig, _Activations] = {}
        self._weights: dict[QuantizationConfig, Mapping[str, float]] = {}
        self._layer_errors: dict[tuple[str, bytes, bytes], tuple[float, float]] = {}
        self._saturations: dict[QuantizationConfig, Saturation] = {}
        self._quantized: dict[
            tuple[tuple[str, ...], Fusion], tuple[Mapping[str, _Rounded], tuple[str, ...]]
        ] = {}
        self._probed_errors = self._errors_of_weights(PROBED)

    def predict(self, config: QuantizationConfig) -> NoisePrediction:
        """The expected noise of every tensor that `config` quantizes."""
        return self.predict_layers(config, self._quantizer.float_layers(config))

    def predict_layers(
        self, config: QuantizationConfig, float_layers: tuple[str, ...]
    ) -> NoisePrediction:
        """The expected noise of `config` with other layers kept in float than it says."""
        prediction = self._sum(config, float_layers)
        if prediction.linear <= ADDITIVE:
            return prediction
        return replace(prediction, saturation=self._saturation(config))

    def _sum(self, config: QuantizationConfig, float_layers: tuple[str, ...]) -> NoisePrediction:
        """The prediction where errors add up, however large they are."""
        tensors, names = self._quantized_tensors(float_layers, config.fusion)
        activations = self._activation_noise(config)
        weights = self._weight_noise(config)
        clipping = {t: r.clipped * activations.clipping[t] for t, r in tensors.items()}
        uneven = [
            tensors[tensor].clipped * of_inputs
            for tensor, of_inputs in activations.uneven.items()
            if tensor in tensors
        ]
        return NoisePrediction(
            rounding={
                t: r.rounded * activations.rounding[t] + r.taps * activations.averages[t]
                for t, r in tensors.items()
            },
            clipping=clipping,
            weights={name: weights[name] for name in names},
            scaling={t: r.clipped * activations.scaling[t] for t, r in tensors.items()},
            highest=activations.highest_output if self._output in clipping else np.inf,
            uneven=np.sum(uneven, axis=0) if uneven else np.zeros(0),
        )

    def _saturation(self, config: QuantizationConfig) -> Saturation:
        """From a simulation of the knobs that decide most, with the others at their defaults.

        Which values are cut off is among them where that makes most of the noise: what one tensor
        loses is not lost again in those behind it that hold the same values, as in the residual
        stream of a transformer.
        """
        key = replace(
            config,
            weight_clipping="max",
            weight_rounding="nearest",
            bias_correction=False,
            float_layers=0,
            zero_dead_weights=False,
        )
        if key not in self._saturations:
            self._saturations[key] = self._simulated(key)
        return self._saturations[key]

    def _simulated(self, config: QuantizationConfig) -> Saturation:
        expected = self._sum(config, self._quantizer.float_layers(config))
        cut_off = sum(expected.clipping.values())
        typical = replace(
            config, calibration_images=ALL_IMAGES, clipping="max", mixed_precision="none"
        )
        simple = not self._closely and cut_off < _MOSTLY * expected.linear
        if simple and config != typical:
            return self._saturation(typical)
        if expected.linear <= ADDITIVE:
            return Saturation()
        joint = self._probe.joint
        # Errors of 16-bit activations are nothing beside those of 8-bit weights.
        whole = config.activation_bits == 8
        found = joint.of_everything(config) if whole else joint.of_weights(config)
        return Saturation(
            expected.linear,
            found.total / expected.linear,
            found.confusion / expected.confusing,
            found.gain if found.gain > 0.0 else 1.0,
        )

    def _quantized_tensors(
        self, float_layers: tuple[str, ...], fusion: Fusion
    ) -> tuple[Mapping[str, _Rounded], tuple[str, ...]]:
        """Activations with how they are rounded, and weights.

        A Relu and its input are rounded alike, which counts once. An average is rounded again, and
        is as many times as sensitive as values are averaged: their own errors level out. It
        lies anywhere between the integers, also where they do not, as the zeros behind a Relu.
        """
        key = (float_layers, fusion)
        if key not in self._quantized:
            placement = self._quantizer.placement(float_layers, fusion)
            of_scale = {site.scale: site.statistics for site in placement.activations}
            shares: dict[str, float] = {}
            averages = dict.fromkeys(of_scale.values(), 0.0)
            view = GraphView(placement.template.graph)
            for node in placement.template.graph.node:
                if node.op_type == "QuantizeLinear":
                    tensor = of_scale[node.input[1]]
                    origin, taps = _origin(node.input[0], view)
                    if taps > 1.0:
                        averages[tensor] += taps
                    else:
                        share = self._share(tensor, *_readers(origin, view))
                        shares[tensor] = max(shares.get(tensor, 0.0), share)
            self._quantized[key] = (
                {
                    tensor: _Rounded(shares.get(tensor, 1.0), shares.get(tensor, 0.0), taps)
                    for tensor, taps in averages.items()
                },
                tuple(s.tensor for s in placement.constants if s.tensor in self._layers),
            )
        return self._quantized[key]

    def _share(self, tensor: str, exact: Set[str], rounded: Set[str]) -> float:
        """Which share of an error in a tensor comes out behind the readers that it is rounded for.

        Known of layers alone: where another node is among those, all of it counts.

        Args:
            tensor: A tensor with statistics.
            exact: Names of the nodes, and outputs, that read it as it is.
            rounded: Names of those that read it rounded.
        """
        gains, of_layers = self._probe.rounding_gain[tensor].gains, self._probe.layer_gain[tensor]
        if not exact or len(gains) == 0 or not rounded <= of_layers.keys():
            return 1.0
        return min(1.0, sum(of_layers[name] for name in rounded) / float(gains[0]))

    def _activation_noise(self, config: QuantizationConfig) -> _Activations:
        key = replace(
            config,
            granularity="channel",
            weight_clipping="max",
            weight_rounding="nearest",
            bias_correction=False,
            mixed_precision="none",
            float_layers=0,
            zero_dead_weights=False,
        )
        if key not in self._activations:
            tensors, _ = self._quantized_tensors((), key.fusion)
            parameters = {t: self._quantizer.activation_parameters(t, key) for t in tensors}
            errors = {
                tensor: self._activation_error(tensor, p) for tensor, p in parameters.items()
            }
            steps = {tensor: float(p.scale) for tensor, p in parameters.items()}
            gain = {t: self._probe.rounding_gain[t].at(s) / self._signal for t, s in steps.items()}
            rounding = {tensor: error * gain[tensor] for tensor, (error, _) in errors.items()}
            clipping = {
                tensor: np.multiply(cut_off, self._probe.clipping_gain[tensor]) / self._signal
                for tensor, (_, cut_off) in errors.items()
            }
            scaling = {t: sides * self._probe.clipping_scaling[t] for t, sides in clipping.items()}
            if self._output in scaling:
                scaling[self._output] = clipping[self._output]
            least = _NEGLIGIBLE * (sum(rounding.values()) + sum(map(np.sum, clipping.values())))
            extremes = self._quantizer.statistics.extremes
            self._activations[key] = _Activations(
                rounding,
                {tensor: step**2 / 12.0 * gain[tensor] for tensor, step in steps.items()},
                {tensor: float(sides.sum()) for tensor, sides in clipping.items()},
                {tensor: float(sides.sum()) for tensor, sides in scaling.items()},
                {
                    tensor: shares_of_inputs(extremes[tensor], *_ends(parameters[tensor])) @ left
                    for tensor, sides in clipping.items()
                    if sides.sum() > least and (left := sides - scaling[tensor]).any()
                },
                _ends(parameters[self._output])[1] if self._output in parameters else np.inf,
            )
        return self._activations[key]

    def _activation_error(
        self, tensor: str, parameters: QuantizationParameters
    ) -> tuple[float, Sides]:
        histogram = self._quantizer.statistics.histogram(tensor, ALL_IMAGES)
        return rounding_and_clipping_error(histogram, float(parameters.scale), *_ends(parameters))

    def _weight_noise(self, config: QuantizationConfig) -> Mapping[str, float]:
        key = replace(
            config,
            calibration_images=ALL_IMAGES,
            clipping="max",
            mixed_precision="none",
            float_layers=0,
            activation_bits=8,
        )
        if key not in self._weights:
            probed, tiny = self._probed_errors, np.finfo(np.float64).tiny
            measured = self._probe.weight_noise
            self._weights[key] = {
                name: error * measured[name] / max(probed[name], tiny) / self._signal
                for name, error in self._errors_of_weights(key).items()
            }
        return self._weights[key]

    def _errors_of_weights(self, config: QuantizationConfig) -> dict[str, float]:
        """Mean squared error of the output of each layer that `config` quantizes, by weight."""
        config = replace(config, equalization=self._quantizer.equalized)
        constants = self._quantizer.plan(config).constants
        errors = {}
        for name, layer in self._layers.items():
            if name in constants:
                varying, shift = self._layer_error(layer, constants[name])
                error = varying if layer.has_corrected_bias(config) else varying + shift
                errors[name] = error * self._quantizer.share_left(layer, config)
        return errors

    def _layer_error(
        self, layer: Layer, parameters: QuantizationParameters
    ) -> tuple[float, float]:
        """`layer_error` of a layer, once for all configurations with these parameters."""
        key = layer.name, parameters.scale.tobytes(), parameters.zero_point.tobytes()
        if key not in self._layer_errors:
            self._layer_errors[key] = layer_error(
                layer,
                self._quantizer.weight_error(layer, parameters),
                self._probe.channel_mean[layer.name],
                self._probe.channel_power[layer.name],
            )
        return self._layer_errors[key]


def _origin(tensor: str, view: GraphView) -> tuple[str, float]:
    """Where the values of a tensor were computed, before they were moved, averaged or rounded.

    Also over how many values one of its values is the average, since they were rounded.
    """
    taps, is_rounded = 1.0, False
    while (writer := view.writers.get(tensor)) is not None and writer.op_type in _PASSING_ON:
        is_rounded |= writer.op_type == "DequantizeLinear"
        if writer.op_type == "AveragePool" and not is_rounded:
            taps *= float(np.prod(attribute_of(writer, "kernel_shape")))
        tensor = writer.input[0]
    return tensor, taps


def _readers(tensor: str, view: GraphView) -> tuple[set[str], set[str]]:
    """Names of the nodes, and outputs, that read a tensor as it is, and of those rounded.

    Also behind nodes that only move values.
    """
    exact = {tensor} & view.outputs
    rounded: set[str] = set()
    for reader in view.readers.get(tensor, []):
        if reader.op_type not in _PASSING_ON:
            exact.add(reader.name)
            continue
        exact_behind, rounded_behind = _readers(reader.output[0], view)
        if reader.op_type == "QuantizeLinear":
            rounded |= exact_behind
        else:
            exact |= exact_behind
        rounded |= rounded_behind
    return exact, rounded


def _ends(parameters: QuantizationParameters) -> tuple[float, float]:
    """The smallest and the largest representable value."""
    scale, zero_point = float(parameters.scale), int(parameters.zero_point)
    return scale * (parameters.lowest - zero_point), scale * (parameters.highest - zero_point)


def rounding_and_clipping_error(
    histogram: Histogram, scale: float, low: float, high: float
) -> tuple[float, Sides]:
    """Mean squared rounding and clipping error of values quantized over a range.

    Values are taken as evenly spread within each bin. A value in the range loses its distance to
    the nearest multiple of the step: over many steps ``scale**2 / 12`` (B. Widrow), but less for
    values that are nearest to 0, and more or less where many are the same, as a background is. A
    value beyond the range loses its distance to the range.

    Args:
        histogram: The values.
        scale: Step of the integers.
        low: Smallest representable value.
        high: Largest representable value.
    """
    total = histogram.total
    if total == 0:
        return 0.0, Sides(0.0, 0.0)
    x = histogram.centers
    inside = slice(np.searchsorted(x, low), np.searchsorted(x, high, side="right"))
    edges = histogram.edges / scale
    start, stop = edges[:-1][inside], edges[1:][inside]
    width, off = stop - start, start - np.rint(start)
    squares = np.divide(
        _sum_of_squares(stop) - _sum_of_squares(start), width, out=off * off, where=width > 0.0
    )
    rounding = scale * scale * float(histogram.counts[inside] @ squares)
    below, above = histogram.cut_off(low, high)
    return rounding / total, Sides(below / total, above / total)


def _sum_of_squares(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The integral of the squared distance to the nearest whole number, from 0 to x."""
    nearest = np.rint(x)
    off = x - nearest
    result: NDArray[np.float64] = nearest / 12.0 + off * off * off / 3.0
    return result


def layer_error(
    layer: Layer,
    weight_error: NDArray[np.float32],
    channel_mean: NDArray[np.float64],
    channel_power: NDArray[np.float64],
) -> tuple[float, float]:
    """Mean squared error of a layer's output values when its weight is off by `weight_error`.

    An output value is off by the sum over its inputs of weight error times input. The varying part
    of the inputs is taken as uncorrelated; their means, which are large behind a ReLU, add up
    coherently and shift the whole channel.

    Args:
        layer: The layer.
        weight_error: Of the shape of the weight.
        channel_mean: Mean of each input channel, shape (channels,).
        channel_power: Mean square of each input channel, shape (channels,).

    Returns:
        The error about the shift of each channel, and that of the shifts, which a corrected bias
        takes away.
    """
    grouped = layer.by_group(weight_error)
    groups, _, inputs, _ = grouped.shape
    mean = channel_mean.reshape(groups, inputs, 1)
    variance = np.maximum(channel_power - channel_mean**2, 0.0).reshape(groups, inputs, 1)
    varying = np.einsum("goit,goit->goi", grouped, grouped) @ variance
    shift = grouped.sum(axis=3) @ mean
    return float(np.mean(varying)), float(np.mean(np.square(shift)))


def _decibels(noise_to_signal: float) -> float:
    return float(-10.0 * np.log10(max(noise_to_signal, 1e-12)))
