"""What one quantization configuration is: Quantune's knobs (arXiv 2202.05048) and corrections."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any
from typing import Final
from typing import get_args
from typing import get_type_hints
from typing import Literal

from optuna_quantune.errors import InputError


Scheme = Literal["asymmetric", "symmetric", "symmetric_uint8", "symmetric_power2"]
Clipping = Literal["max", "kl"]
Granularity = Literal["tensor", "channel"]
MixedPrecision = Literal["none", "first_last"]

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
        clipping: How a histogram becomes a range: ``max`` (minimum to maximum) or ``kl`` (least
            Kullback-Leibler divergence).
        granularity: One scale for a whole weight (``tensor``) or one for each output channel
            (``channel``). Activations always have one scale.
        mixed_precision: Which layers stay in float: ``none``, or the first and the last
            (``first_last``).
        bias_correction: Whether the mean error that each quantized weight makes in its layer is
            taken off the layer's bias (`bias_correction.py`).
        equalization: Whether the channels of activations are rescaled to similar ranges first
            (`equalization.py`).
    """

    calibration_images: int | Literal["all"] = ALL_IMAGES
    scheme: Scheme = "asymmetric"
    clipping: Clipping = "max"
    granularity: Granularity = "channel"
    mixed_precision: MixedPrecision = "none"
    bias_correction: bool = False
    equalization: bool = False

    def __post_init__(self) -> None:
        size = self.calibration_images
        if size != ALL_IMAGES and not (type(size) is int and size >= 1):
            raise InputError(
                f"knob 'calibration_images': {size!r} is neither a positive integer nor 'all'"
            )
        for knob in ("scheme", "clipping", "granularity", "mixed_precision"):
            allowed = get_args(get_type_hints(QuantizationConfig)[knob])
            if getattr(self, knob) not in allowed:
                raise InputError(
                    f"knob '{knob}': {getattr(self, knob)!r} is not one of {', '.join(allowed)}"
                )
        for knob in ("bias_correction", "equalization"):
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
