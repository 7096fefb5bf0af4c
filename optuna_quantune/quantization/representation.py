"""How a device wants quantized tensors written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from typing import Literal

from optuna_quantune.quantization.model import WEIGHTED_OPS


@dataclass(frozen=True)
class Representation:
    """How a device wants quantized tensors written.

    Attributes:
        activations: 8-bit activations as ``uint8`` (int8 arithmetic with integers and zero points
            shifted by 128, the fast kernels of x86-64) or as ``int8``.
        adds_in_pairs: Whether products of activations and weights are added in pairs in int16, as
            on x86-64 processors without VNNI: weights are such that no pair saturates then
            (`neighbours.py`). ONNX Runtime's ``reduce_range`` gives them 7 bits for that.
        narrow_weights: Whether weights keep to -127 to 127 (-63 to 63), without the integer below.
        symmetric_weights: Whether weights have the zero point 0 with every scheme.
        per_channel: Operators whose weights may have one scale for each channel.
        float_bias: Whether biases stay float32 instead of int32.
        for_kernels: Whether models are written for the kernels of ONNX Runtime's processor
            provider (`kernels.py`).
    """

    activations: Literal["uint8", "int8"] = "uint8"
    adds_in_pairs: bool = False
    narrow_weights: bool = False
    symmetric_weights: bool = False
    per_channel: tuple[str, ...] = WEIGHTED_OPS
    float_bias: bool = False
    for_kernels: bool = False


DEFAULT_REPRESENTATION: Final = Representation()
