"""What one quantization configuration is: Quantune's knobs (arXiv 2202.05048) and corrections."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any
from typing import Final
from typing import get_args
from typing import get_origin
from typing import get_type_hints
from typing import Literal

from optuna_quantune.errors import InputError


Scheme = Literal["asymmetric", "symmetric", "symmetric_uint8", "symmetric_power2"]
Clipping = Literal[
    "max",
    "kl",
    "percentile_99.9",
    "percentile_99.99",
    "percentile_99.999",
    "percentile_99.9999",
    "mse",
]
WeightClipping = Literal["max", "mse"]
WeightRounding = Literal["nearest", "compensated"]
Granularity = Literal["tensor", "channel"]
MixedPrecision = Literal["none", "first_last"]
ActivationBits = Literal[8, 16]
Fusion = Literal["runtime", "on", "off"]

ALL_IMAGES: Final = "all"


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """One choice of every knob; what `quantizer.quantize` builds a model from.

    Attributes:
        calibration_images: Number of calibration inputs that the activation ranges rest on: the
            first ones of the calibration set, or ``"all"``.
        scheme: How a range becomes a scale and a zero point, with the semantics of Glow
            (``quantization::chooseQuantizationParams``): ``asymmetric`` uses the whole range,
            ``symmetric`` has zero point 0, ``symmetric_uint8`` is unsigned for a tensor without
            negative values and symmetric otherwise, ``symmetric_power2`` is symmetric with scales
            rounded up to powers of two.
        clipping: How a histogram becomes a range: ``max`` (minimum to maximum), ``kl`` (least
            Kullback-Leibler divergence), ``percentile_P`` (P percent of the values on each side of
            zero lie inside) or ``mse`` (least mean squared quantization error).
        weight_clipping: How a weight becomes a range: ``max`` (smallest to largest value) or
            ``mse`` (least squared error of the weight, `weight_clipping.py`).
        weight_rounding: How a weight becomes integers: each by itself (``nearest``), or so that
            errors make up for each other in the layer's output (``compensated``,
            `weight_rounding.py`).
        granularity: One scale for a whole weight (``tensor``) or one for each output channel
            (``channel``). Activations always have one scale.
        mixed_precision: Which layers stay in float: ``none``, or the first and the last
            (``first_last``; none of a model that has no others).
        float_layers: How many steps of `sensitivity.float_order` are left in float beside these:
            the nodes whose rounding hurts most for the time that float costs come first. More
            steps than there are mean all but those that would leave no layer quantized.
        activation_bits: Width of the activations' integers; weights always have 8 bits.
        zero_dead_weights: Whether weights that meet nothing but zeros are set to 0, so that they
            decide no scale (`dead_weights.live_weights`).
        bias_correction: Whether the mean error that each quantized weight makes in its layer is
            taken off the layer's bias (`bias_correction.py`).
        equalization: Whether the channels of activations are rescaled to similar ranges first
            (`equalization.py`).
        fusion: Where values are brought back to 8 bits (`fusion.py`): where ONNX Runtime's kernels
            want it (``runtime``), once behind a layer and the Relu, Clip and Add that follow it
            (``on``), or behind every node with a range of its own (``off``).
    """

    calibration_images: int | Literal["all"] = ALL_IMAGES
    scheme: Scheme = "asymmetric"
    clipping: Clipping = "max"
    weight_clipping: WeightClipping = "max"
    weight_rounding: WeightRounding = "nearest"
    granularity: Granularity = "channel"
    mixed_precision: MixedPrecision = "none"
    float_layers: int = 0
    activation_bits: ActivationBits = 8
    zero_dead_weights: bool = False
    bias_correction: bool = False
    equalization: bool = False
    fusion: Fusion = "runtime"

    def __post_init__(self) -> None:
        size = self.calibration_images
        if size != ALL_IMAGES and not (type(size) is int and size >= 1):
            raise InputError(
                f"knob 'calibration_images': {size!r} is neither a positive integer nor 'all'"
            )
        for knob, allowed in _choices().items():
            value = getattr(self, knob)
            if value not in allowed or isinstance(value, float):  # 8.0 equals 8
                raise InputError(
                    f"knob '{knob}': {value!r} is not one of {', '.join(map(str, allowed))}"
                )
        if type(self.float_layers) is not int or self.float_layers < 0:
            raise InputError(
                f"knob 'float_layers': {self.float_layers!r} is not a number of steps, 0 or more"
            )
        for knob in ("bias_correction", "equalization", "zero_dead_weights"):
            value = getattr(self, knob)
            if type(value) is not bool:
                raise InputError(f"knob '{knob}': {value!r} is neither true nor false")

    @classmethod
    def from_dict(cls, knobs: dict[str, Any]) -> QuantizationConfig:
        """Builds a configuration from knob names and values; knobs left out keep their default.

        Raises:
            InputError: If a knob or its value is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in knobs:
            if name not in known:
                raise InputError(f"unknown knob {name!r}: use one of {', '.join(known)}")
        return cls(**knobs)

    def to_json(self) -> str:
        """The configuration as one line of JSON, readable by `from_dict`."""
        return json.dumps(dataclasses.asdict(self))


@functools.cache
def _choices() -> dict[str, tuple[Any, ...]]:
    """The values of each knob that has a list of them."""
    hints = get_type_hints(QuantizationConfig)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
