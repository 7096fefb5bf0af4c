"""From a range to a scale and a zero point: the schemes of Quantune with the semantics of Glow.

Integers are thought of as signed here (int8: -128 to 127). Storing them as unsigned ones shifts
both the integers and the zero point by 128 and changes no result, so that is a matter of the
target, not of the scheme.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
from numpy.typing import ArrayLike
from numpy.typing import NDArray

from optuna_quantune.quantization.config import Scheme


# Steps of a weight of zeros: finer than those that 31 bits of a bias of any use ask for.
_FINE: Final = 2.0**-40
# Largest integer of a bias; products of 8 bits, 33,000 of them at least, have the rest of int32.
_LARGEST_BIAS: Final = 2.0**30


@dataclass(frozen=True)
class QuantizationParameters:
    """Scale and zero point of a tensor: ``real = scale * (integer - zero_point)``.

    Attributes:
        scale: float32, shape () or (channels,), always positive.
        zero_point: int32 of the same shape, within the signed range of `bits`.
        bits: Width of the integers.
        narrow: Whether the lowest integer is left out, so that they are symmetric about 0.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    bits: int = 8
    narrow: bool = False

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return int(self.narrow) - (1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def quantize(self, values: NDArray[np.float32], axis: int | None = None) -> NDArray[np.int32]:
        """Rounds half to even and saturates, as ONNX ``QuantizeLinear`` does.

        Args:
            values: The tensor.
            axis: Axis of the channels when the parameters are per channel.
        """
        scale, zero_point = self._broadcast(values.ndim, axis)
        integers = np.rint(values / scale).astype(np.float64) + zero_point
        clipped: NDArray[np.int32] = np.clip(integers, self.lowest, self.highest).astype(np.int32)
        return clipped

    def dequantize(
        self, integers: NDArray[np.int32], axis: int | None = None
    ) -> NDArray[np.float32]:
        """The real values that `integers` stand for (ONNX ``DequantizeLinear``)."""
        scale, zero_point = self._broadcast(integers.ndim, axis)
        return ((integers - zero_point) * scale).astype(np.float32)

    def _broadcast(
        self, ndim: int, axis: int | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        if self.scale.ndim == 0 or axis is None:
            return self.scale, self.zero_point
        shape = [1] * ndim
        shape[axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


def choose_parameters(
    minimum: ArrayLike,
    maximum: ArrayLike,
    scheme: Scheme,
    *,
    bits: int = 8,
    narrow: bool = False,
) -> QuantizationParameters:
    """Scale and zero point for a range (Glow, ``quantization::chooseQuantizationParams``).

    The range is widened to contain 0 first, so that 0 is always represented exactly.

    - ``asymmetric``: the whole range on the whole integer range.
    - ``symmetric``: zero point 0; the end that would saturate first decides the scale.
    - ``symmetric_uint8``: a range without negative values gets the lowest integer as zero point
      (an unsigned tensor); any other is ``symmetric``.
    - ``symmetric_power2``: ``symmetric`` with the scale rounded up to a power of two.

    Args:
        minimum: Lower end, a number or one for each channel.
        maximum: Upper end, of the same shape.
        scheme: One of the four schemes.
        bits: Width of the integers.
        narrow: Whether the lowest integer is left out (-127 to 127).
    """
    low = np.minimum(np.asarray(minimum, dtype=np.float64), 0.0)
    high = np.maximum(np.asarray(maximum, dtype=np.float64), 0.0)
    lowest, highest = int(narrow) - (1 << (bits - 1)), (1 << (bits - 1)) - 1
    if scheme == "asymmetric":
        scale = _usable((high - low) / (highest - lowest))
        zero_point = np.clip(np.rint(lowest - low / scale), lowest, highest)
    else:
        scale = _usable(np.maximum(low / lowest, high / highest))
        zero_point = np.zeros_like(scale)
        if scheme == "symmetric_power2":
            scale = _power_of_two(scale)
        elif scheme == "symmetric_uint8":
            unsigned = low >= 0.0
            scale = np.where(unsigned, _usable(high / (highest - lowest)), scale)
            zero_point = np.where(unsigned, float(lowest), zero_point)
    return QuantizationParameters(
        scale.astype(np.float32), zero_point.astype(np.int32), bits, narrow
    )


def refine_empty(
    weight: QuantizationParameters, low: NDArray[Any], high: NDArray[Any]
) -> QuantizationParameters:
    """Gives the channels of a weight that hold nothing but zeros the finest steps of the others.

    Their own are of no use to the weight, and the steps of the bias are multiples of them. Where
    there are no others, the bias decides alone (`widen_for_bias`).

    Args:
        weight: Parameters of the weight.
        low: Smallest value of each channel or of all.
        high: Largest value.
    """
    empty = (np.asarray(low) == 0.0) & (np.asarray(high) == 0.0)
    if not empty.any():
        return weight
    finest = weight.scale[~empty].min(initial=np.inf) if weight.scale.ndim else np.inf
    steps = np.where(empty, finest if np.isfinite(finest) else _FINE, weight.scale)
    return dataclasses.replace(weight, scale=steps.astype(np.float32))


def widen_for_bias(
    weight: QuantizationParameters,
    bias: NDArray[np.float32],
    input_scale: float,
    scheme: Scheme,
) -> QuantizationParameters:
    """Enlarges weight scales until the bias fits into half of int32.

    A bias is stored as int32 with the scale ``input_scale * weight_scale``. A channel whose
    weights are tiny beside its bias would overflow; ONNX Runtime enlarges the weight's scale by
    the necessary ratio (``_adjust_weight_scale_for_int32_bias``), and so do we, keeping powers of
    two. The other half is for the products, which integer kernels add to the bias in int32: a sum
    beyond it would come out with the other sign.

    Args:
        weight: Parameters of the weight.
        bias: The float bias, shape (channels,).
        input_scale: Scale of the layer's input.
        scheme: Scheme of the weight.
    """
    magnitude = np.abs(bias.astype(np.float64))
    if weight.scale.ndim == 0:
        magnitude = magnitude.max(initial=0.0)
    return widen(weight, magnitude / _LARGEST_BIAS / input_scale, scheme)


def widen(
    weight: QuantizationParameters, least: NDArray[np.float64] | float, scheme: Scheme
) -> QuantizationParameters:
    """Enlarges scales until they are no smaller than the least ones, keeping powers of two.

    Args:
        weight: Parameters of the weight.
        least: The least scales, of a shape that broadcasts to that of the scales.
        scheme: Scheme of the weight.
    """
    if np.all(weight.scale >= least):
        return weight
    scale = np.maximum(weight.scale.astype(np.float64), least)
    if scheme == "symmetric_power2":
        scale = _power_of_two(scale)
    return dataclasses.replace(weight, scale=scale.astype(np.float32))


def _usable(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    # A tensor that is 0 everywhere has no scale of its own; Glow takes 0.1. Below the smallest
    # normal float32 a scale would be flushed to 0.
    return np.where(scale < np.finfo(np.float32).tiny, 0.1, scale)


def _power_of_two(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    # The scale is a float32 in the model: rounding to it first keeps an exact power of two as is.
    return np.asarray(np.exp2(np.ceil(np.log2(scale.astype(np.float32).astype(np.float64)))))
