"""Weights whose products are exact on processors that add them in pairs in int16.

x86-64 processors without VNNI add products of uint8 activations and int8 weights in pairs in int16
(VPMADDUBSW) before anything else, and what leaves int16 there is cut off. ONNX Runtime's remedy,
``reduce_range``, takes a bit from every weight, so that any two fit. But which two meet is known:
neighbours among the inputs of an output channel, which its kernels take with the channels last.
Two of the largest weights are seldom neighbours, so that most of the bit is spared
(`benchmarks/saturation.py`).

Whether a weight stands in an even place is not asked: zeros that are written between groups, or
behind the last channel, move it, and part neighbours, but bring no others together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import Final

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.quantization.graph import is_depthwise


# Largest sum of two int8 weights whose products with uint8 activations fit into int16 together.
LARGEST_SUM: Final = np.iinfo(np.int16).max // np.iinfo(np.uint8).max


def adds_in_pairs(op_type: str, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether the kernel of an integer layer adds products in pairs on such a processor.

    That of a depthwise convolution adds them one by one; a transposed one is computed in float.

    Args:
        op_type: Of the layer, in Q/DQ or in ``QOperator`` format.
        weight_shape: Of its weight.
        groups: Its number of groups.
    """
    return op_type != "ConvTranspose" and not is_depthwise(weight_shape, groups)


def in_order(weight: NDArray[Any], op_type: str, channel_axis: int) -> NDArray[Any]:
    """The weights of each output channel in the order in which the kernels add their products.

    Args:
        weight: The weight of a convolution or matrix product, or its integers.
        op_type: Of the layer, in Q/DQ or in ``QOperator`` format.
        channel_axis: Axis of the output channels.

    Returns:
        Shape (output channels, weights).
    """
    rows = np.moveaxis(weight, channel_axis, 0)
    if op_type.endswith("Conv"):
        rows = np.moveaxis(rows, 1, -1)
    return rows.reshape(len(rows), -1)


def in_shape(
    rows: NDArray[Any], shape: Sequence[int], op_type: str, channel_axis: int
) -> NDArray[Any]:
    """What `in_order` gave of a weight, in the shape of the weight again."""
    if op_type.endswith("Conv"):
        return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    others = (*shape[:channel_axis], *shape[channel_axis + 1 :])
    return np.moveaxis(rows.reshape(shape[channel_axis], *others), 0, channel_axis)


def largest_sums(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The largest magnitude of two neighbours of one sign together, or of one weight alone.

    Args:
        rows: Shape (output channels, weights).

    Returns:
        Shape (output channels,).
    """
    found = np.zeros(len(rows))
    for part in (np.maximum(rows, 0), -np.minimum(rows, 0)):
        sums = part[:, 1:] + part[:, :-1] if part.shape[1] > 1 else part
        found = np.maximum(found, sums.max(axis=1, initial=0))
    return found


def least_scales(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each output channel the smallest scale with which its rounded weights fit in pairs.

    Rounding adds half a step to each of two, one to their sum.
    """
    return largest_sums(rows.astype(np.float64)) / (LARGEST_SUM - 1)


def fit(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Moves the second of two neighbours that do not fit towards zero, from the first to the last.

    For integers that were not rounded to the nearest, or were cut off: others fit by their scale.

    Args:
        rows: Shape (output channels, weights), with the zero point 0.
    """
    fitting = rows.copy()
    over = np.flatnonzero(largest_sums(rows) > LARGEST_SUM)
    part = fitting[over]
    for place in range(part.shape[1] - 1):
        first, second = part[:, place], part[:, place + 1]
        excess = np.where(
            np.sign(first) == np.sign(second),
            np.maximum(np.abs(first) + np.abs(second) - LARGEST_SUM, 0),
            0,
        )
        second -= np.sign(second) * excess
    fitting[over] = part
    return fitting
