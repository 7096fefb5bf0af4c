"""From a weight to its range: all of it, or what is represented with the least squared error.

A weight is known, unlike the values of an activation, so that each candidate range is tried out on
it. A channel with few weights (9 of a depthwise convolution) gains even where nothing is cut off:
among slightly larger scales there is one on whose grid the weights happen to lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.scheme import widen


# Thresholds that are tried, in shares of the largest magnitude: those that clip, and those that do
# not but have another grid. So many of both that about this many numbers are rounded.
_VALUE_BUDGET: Final = 2_000_000
_FEWEST, _MOST = 8, 96
_SMALLEST_SHARE: Final = 0.25
_LARGEST_SHARE: Final = 1.15
# Rows are tried out in pieces of about this many numbers, which stay in the processor's cache.
_PIECE: Final = 1 << 15


def least_error_range(
    weight: NDArray[np.float32],
    scheme: Scheme,
    *,
    axis: int | None = None,
    bits: int = 8,
    narrow: bool = False,
    least: NDArray[np.float64] | float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The range in which a weight is quantized with the least squared error.

    Args:
        weight: The weight.
        scheme: What the range becomes a scale and a zero point by.
        axis: Axis of the channels if each of them has a range of its own.
        bits: Width of the integers.
        narrow: Whether the lowest integer is left out.
        least: Scales that are widened to if they are smaller, of shape () or (channels,).

    Returns:
        Lower and upper ends, of shape () or (channels,), containing 0.
    """
    rows = weight.reshape(1, -1)
    if axis is not None:
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    number = int(np.clip(_VALUE_BUDGET // rows.size, _FEWEST, _MOST))
    shares = np.concatenate(
        [
            np.linspace(1.0, _LARGEST_SHARE, number - number // 2),
            np.geomspace(1.0, _SMALLEST_SHARE, 1 + number // 2)[1:],
        ]
    )
    number = min(len(rows), -(-rows.size // _PIECE))
    scales = np.broadcast_to(least, len(rows))

    def choose(
        low: NDArray[np.float64], high: NDArray[np.float64], least: NDArray[np.float64]
    ) -> QuantizationParameters:
        chosen = choose_parameters(low, high, scheme, bits=bits, narrow=narrow)
        return widen(chosen, least, scheme)

    ranges = [
        _best_ranges(piece, shares, functools.partial(choose, least=part))
        for piece, part in zip(
            np.array_split(rows, number), np.array_split(scales, number), strict=True
        )
    ]
    low, high = (np.concatenate(ends) for ends in zip(*ranges, strict=True))
    return (low, high) if axis is not None else (low[0], high[0])


def _best_ranges(
    rows: NDArray[np.float32],
    shares: NDArray[np.float64],
    choose: Callable[..., QuantizationParameters],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low = np.minimum(rows.min(axis=1), 0.0).astype(np.float64)
    high = np.maximum(rows.max(axis=1), 0.0).astype(np.float64)
    thresholds = np.outer(shares, np.maximum(-low, high))
    stretched = np.maximum(shares, 1.0)
    below = np.maximum(np.outer(stretched, low), -thresholds)
    above = np.minimum(np.outer(stretched, high), thresholds)
    candidates = choose(below, above)
    errors = np.empty(below.shape)
    for index in range(len(shares)):
        errors[index] = _squared_error(
            rows,
            dataclasses.replace(
                candidates,
                scale=candidates.scale[index],
                zero_point=candidates.zero_point[index],
            ),
        )
    best = np.argmin(errors, axis=0), np.arange(len(rows))
    return below[best], above[best]


def _squared_error(
    rows: NDArray[np.float32], parameters: QuantizationParameters
) -> NDArray[np.float32]:
    """Squared error of each row, whose scale and zero point are those of the same index."""
    scale = parameters.scale[:, None]
    zero_point = parameters.zero_point[:, None].astype(np.float32)
    error = rows / scale
    np.rint(error, out=error)
    np.clip(error, parameters.lowest - zero_point, parameters.highest - zero_point, out=error)
    error *= scale
    error -= rows
    result: NDArray[np.float32] = np.einsum("ij,ij->i", error, error)
    return result
