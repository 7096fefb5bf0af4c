"""Expected quantization noise of any configuration, before one of them is run.

The error that a configuration makes in an activation follows from the activation's histogram and
its step; the error that a quantized weight makes in its layer's output follows from the weight and
the moments of the layer's input. How much of either reaches the model's output was probed once
(`probe.py`). Errors of different tensors are taken as independent, so that their powers add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.placement import statistics_sources
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.statistics import Histogram


@dataclass(frozen=True)
class NoisePrediction:
    """Noise-to-signal power ratios at the model's output that a configuration is expected to have.

    Attributes:
        rounding: What the rounding of each quantized activation contributes.
        clipping: What the clipping of each quantized activation contributes.
        weights: What the quantized weight of each layer contributes, by weight name.
    """

    rounding: Mapping[str, float]
    clipping: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def total(self) -> float:
        """The predicted noise-to-signal power ratio of the output."""
        parts = (self.rounding, self.clipping, self.weights)
        return sum(sum(part.values()) for part in parts)

    def features(self) -> dict[str, float]:
        """Named numbers for a cost model, in decibels (10 log10 of signal over noise)."""
        numbers = {"predicted_sqnr_db": _decibels(self.total)}
        for name in ("rounding", "clipping", "weights"):
            part: Mapping[str, float] = getattr(self, name)
            numbers[f"{name}_sqnr_db"] = _decibels(sum(part.values()))
            numbers[f"worst_{name}_sqnr_db"] = _decibels(max(part.values(), default=0.0))
        return numbers


class NoiseModel:
    """Predicts the noise of any configuration that a quantizer can build.

    Signal and clipping are measured on all calibration inputs, also for a configuration whose
    ranges come from fewer: what those ranges cut off is part of its noise.

    Args:
        quantizer: What builds the configurations.
        probe: The gains of `quantizer.model`, of every activation with statistics.
    """

    def __init__(self, quantizer: Quantizer, probe: Probe) -> None:
        self._quantizer = quantizer
        self._probe = probe
        self._layers = {layer.weight: layer for layer in quantizer.model.layers}
        self._sources = statistics_sources(quantizer.model.proto.graph)
        self._activation_errors: dict[tuple[str, float, int, int], tuple[float, float]] = {}
        self._weight_errors: dict[tuple[str, int, bytes, bool], float] = {}

    def predict(self, config: QuantizationConfig) -> NoisePrediction:
        """The expected noise of every tensor that `config` quantizes."""
        quantizer, probe = self._quantizer, self._probe
        plan = quantizer.plan(config)
        signal = max(probe.output_power, np.finfo(np.float64).tiny)
        rounding: dict[str, float] = {}
        clipping: dict[str, float] = {}
        for site in quantizer.placement(plan.float_layers).activations:
            tensor = site.statistics
            if tensor in rounding:  # a Relu and its input are rounded alike, once
                continue
            rounded, clipped = self._activation_error(tensor, plan.activations[site.tensor])
            rounding[tensor] = rounded * probe.noise_gain[tensor] / signal
            clipping[tensor] = clipped * probe.clipping_gain[tensor] / signal
        weights: dict[str, float] = {}
        for name, parameters in plan.constants.items():
            if name in self._layers:
                layer = self._layers[name]
                output = self._sources.get(layer.output, layer.output)
                gain = probe.noise_gain.get(output, 0.0)
                shifted = layer.bias is None or not config.bias_correction
                error = self._weight_error(layer, parameters, shifted=shifted)
                weights[name] = error * gain / signal
        return NoisePrediction(rounding, clipping, weights)

    def _activation_error(
        self, tensor: str, parameters: QuantizationParameters
    ) -> tuple[float, float]:
        scale, zero_point = float(parameters.scale), int(parameters.zero_point)
        key = (tensor, scale, zero_point, parameters.bits)
        if key not in self._activation_errors:
            self._activation_errors[key] = quantization_error(
                self._quantizer.statistics.histogram(tensor, "all"),
                scale,
                scale * (parameters.lowest - zero_point),
                scale * (parameters.highest - zero_point),
            )
        return self._activation_errors[key]

    def _weight_error(
        self, layer: Layer, parameters: QuantizationParameters, *, shifted: bool
    ) -> float:
        scales = parameters.scale.tobytes() + parameters.zero_point.tobytes()
        key = (layer.weight, parameters.bits, scales, shifted)
        if key not in self._weight_errors:
            self._weight_errors[key] = layer_error(
                layer,
                self._quantizer.weight_error(layer, parameters).astype(np.float64),
                self._probe.channel_mean[layer.name],
                self._probe.channel_power[layer.name],
                shifted=shifted,
            )
        return self._weight_errors[key]


def quantization_error(
    histogram: Histogram, scale: float, low: float, high: float
) -> tuple[float, float]:
    """Mean squared rounding and clipping error of values quantized over a range.

    Rounding is uniform within a step, ``scale**2 / 12`` (B. Widrow), for every value in the range
    but those within half a step of zero, which lose their own square (exact zeros nothing).
    A value beyond the range loses its distance to the range.

    Args:
        histogram: The values.
        scale: Step of the integers.
        low: Smallest representable value.
        high: Largest representable value.
    """
    if histogram.total == 0:
        return 0.0, 0.0
    x, counts = histogram.centers, histogram.counts
    inside = (x >= low) & (x <= high)
    rounding = np.where(np.abs(x) < scale / 2.0, x * x, scale * scale / 12.0)
    beyond = np.where(x > high, x - high, low - x)
    return (
        float(counts[inside] @ rounding[inside]) / histogram.total,
        float(counts[~inside] @ np.square(beyond[~inside])) / histogram.total,
    )


def layer_error(
    layer: Layer,
    weight_error: NDArray[np.float64],
    channel_mean: NDArray[np.float64],
    channel_power: NDArray[np.float64],
    *,
    shifted: bool = True,
) -> float:
    """Mean squared error of a layer's output values when its weight is off by `weight_error`.

    An output value is off by the sum over its inputs of weight error times input. The varying part
    of the inputs is taken as uncorrelated; their means, which are large behind a ReLU, add up
    coherently and shift the whole channel.

    Args:
        layer: The layer.
        weight_error: Of the shape of the weight.
        channel_mean: Mean of each input channel, shape (channels,).
        channel_power: Mean square of each input channel, shape (channels,).
        shifted: Whether the shift of the channels is part of the error: a corrected bias takes it
            away.
    """
    grouped = _by_group(layer, weight_error)
    groups, _, inputs, _ = grouped.shape
    mean = channel_mean.reshape(groups, 1, inputs)
    variance = np.maximum(channel_power - channel_mean**2, 0.0).reshape(groups, 1, inputs)
    varying = (np.square(grouped).sum(axis=3) * variance).sum(axis=2)
    if not shifted:
        return float(np.mean(varying))
    shift = (grouped.sum(axis=3) * mean).sum(axis=2)
    return float(np.mean(varying + np.square(shift)))


def expected_agreement(margins: NDArray[np.float64], noise_power: float) -> float:
    """Share of inputs whose top-1 class is expected to survive noise at the output.

    Independent Gaussian noise of the given power on every logit changes the difference of the two
    largest ones by a Gaussian of twice that power; the class survives while the difference stays
    positive.

    Args:
        margins: Largest minus second largest logit of the float model, shape (n,).
        noise_power: Expected squared error of a logit.
    """
    deviation = np.sqrt(max(2.0 * noise_power, np.finfo(np.float64).tiny))
    return float(np.mean(ndtr(margins / deviation)))


def _by_group(layer: Layer, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """A weight as (groups, output channels of a group, input channels of a group, taps)."""
    if layer.op_type == "Conv":
        outputs, inputs = weight.shape[:2]
        return weight.reshape(layer.groups, outputs // layer.groups, inputs, -1)
    if layer.op_type == "ConvTranspose":
        inputs, outputs = weight.shape[:2]
        parts = weight.reshape(layer.groups, inputs // layer.groups, outputs, -1)
        return parts.swapaxes(1, 2)
    inputs_last = np.moveaxis(weight, layer.channel_axis, 0)
    return inputs_last.reshape(1, inputs_last.shape[0], -1, 1)


def _decibels(noise_to_signal: float) -> float:
    return float(-10.0 * np.log10(max(noise_to_signal, 1e-12)))
