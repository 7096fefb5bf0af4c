"""Expected quantization noise of a configuration, from histograms and weights alone.

Nothing is run: the error of an activation follows from its histogram and its step, that of a
weight from the weight itself. Each is taken relative to the power of its tensor; the ratios add up
as independent noises do, as if every relative error reached the output undamped. The sum orders
configurations of one model, and means the same on every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.statistics import Histogram


# A tensor whose error exceeds its signal by more carries no more information for being worse.
_LARGEST_RATIO = 10.0


@dataclass(frozen=True)
class NoisePrediction:
    """Noise-to-signal power ratios that a configuration is expected to have.

    Attributes:
        activations: For each quantized activation the ratio of its rounding and clipping error.
        weights: For each quantized layer weight the mean over output channels of the squared
            error over the squared weight.
        clipping: The part of `activations` that is clipping, summed.
    """

    activations: Mapping[str, float]
    weights: Mapping[str, float]
    clipping: float

    @property
    def total(self) -> float:
        """The predicted noise-to-signal power ratio at the output."""
        return sum(self.activations.values()) + sum(self.weights.values())

    def features(self) -> dict[str, float]:
        """Named numbers for a cost model, in decibels (10 log10 of signal over noise)."""
        return {
            "predicted_sqnr_db": _decibels(self.total),
            "activation_sqnr_db": _decibels(sum(self.activations.values())),
            "weight_sqnr_db": _decibels(sum(self.weights.values())),
            "clipping_sqnr_db": _decibels(self.clipping),
            "worst_activation_sqnr_db": _decibels(max(self.activations.values(), default=0.0)),
            "worst_weight_sqnr_db": _decibels(max(self.weights.values(), default=0.0)),
        }


class NoiseModel:
    """Predicts the noise of any configuration that a quantizer can build.

    Signal and clipping are measured on all calibration inputs, also for a configuration whose
    ranges come from fewer: what those ranges cut off is part of its noise.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._activation_errors: dict[tuple[str, float, int], tuple[float, float]] = {}
        self._weight_errors: dict[tuple[str, bytes], float] = {}

    def predict(self, config: QuantizationConfig) -> NoisePrediction:
        """The expected noise of every tensor that `config` quantizes."""
        quantizer = self._quantizer
        plan = quantizer.plan(config)
        placement = quantizer.placement(plan.float_layers)
        activations: dict[str, float] = {}
        clipping = 0.0
        for site in placement.activations:
            if site.statistics not in activations:  # a Relu and its input are rounded alike, once
                rounding, clipped = self._activation_error(
                    site.statistics, plan.activations[site.tensor]
                )
                activations[site.statistics] = min(rounding + clipped, _LARGEST_RATIO)
                clipping += clipped
        layers = {layer.weight: layer.channel_axis for layer in quantizer.model.layers}
        weights = {
            tensor: self._weight_error(tensor, layers[tensor], parameters)
            for tensor, parameters in plan.constants.items()
            if tensor in layers
        }
        return NoisePrediction(activations, weights, clipping)

    def _activation_error(
        self, tensor: str, parameters: QuantizationParameters
    ) -> tuple[float, float]:
        scale, zero_point = float(parameters.scale), int(parameters.zero_point)
        key = (tensor, scale, zero_point)
        if key not in self._activation_errors:
            histogram = self._quantizer.statistics.histogram(tensor, "all")
            low = scale * (parameters.lowest - zero_point)
            high = scale * (parameters.highest - zero_point)
            rounding, clipped = quantization_error(histogram, scale, low, high)
            power = max(histogram.mean_square, np.finfo(np.float64).tiny)
            self._activation_errors[key] = rounding / power, clipped / power
        return self._activation_errors[key]

    def _weight_error(
        self, tensor: str, channel_axis: int, parameters: QuantizationParameters
    ) -> float:
        key = (tensor, parameters.scale.tobytes() + parameters.zero_point.tobytes())
        if key not in self._weight_errors:
            weight = self._quantizer.model.weights[tensor]
            axis = channel_axis if parameters.scale.ndim else None
            restored = parameters.dequantize(parameters.quantize(weight, axis), axis)
            self._weight_errors[key] = _channel_error(weight, restored, channel_axis)
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


def _channel_error(
    weight: NDArray[np.float32], restored: NDArray[np.float32], channel_axis: int
) -> float:
    """Mean over channels of squared error over squared weight; a channel of zeros has none."""
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    error = np.square(weight - restored, dtype=np.float64).sum(axis=others)
    power = np.square(weight, dtype=np.float64).sum(axis=others)
    ratio = np.divide(error, power, out=np.zeros_like(error), where=power > 0)
    return float(np.minimum(ratio, _LARGEST_RATIO).mean())


def _decibels(noise_to_signal: float) -> float:
    return float(-10.0 * np.log10(max(noise_to_signal, 1e-12)))
