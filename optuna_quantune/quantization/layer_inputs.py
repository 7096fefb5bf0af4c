"""Second moments of what each layer multiplies with its weight.

A layer's output is a product of its weight, as a matrix, and of the vectors that it reads: the
windows of a convolution, the rows of a matrix. An error E in the weight makes an error in the
output that has the power tr(E S Eᵀ), where S is the mean of x xᵀ over these vectors x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from optuna_quantune.quantization.calibration import CalibrationInputs
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import with_outputs
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.session import make_session


# Inputs that moments are taken from, and windows of each at most.
MOMENT_INPUTS: Final = 32
_WINDOWS: Final = 256
# Layers that read longer vectors are left out: their moments would take over 20 MiB, and with the
# triangles made of them seconds.
LONGEST_VECTOR: Final = 2304
_MATRIX_OPS: Final = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Moments:
    """Of the vectors that the layers with one weight read.

    Attributes:
        covariance: Mean of (x - mean) (x - mean)ᵀ, where the mean is that of the same layer, shape
            (groups, values, values).
        mean: Mean of x for each of the layers, shape (layers, groups, values).
        share: Which share of the vectors each layer reads, shape (layers,).
        number: How many vectors there were for each group.
    """

    covariance: NDArray[np.float32]
    mean: NDArray[np.float32]
    share: NDArray[np.float32]
    number: int

    def power(self) -> NDArray[np.float32]:
        """Mean of x xᵀ, shape (groups, values, values)."""
        means = np.moveaxis(self.mean * np.sqrt(self.share)[:, None, None], 0, 2)
        power: NDArray[np.float32] = self.covariance + means @ means.swapaxes(1, 2)
        return power

    @property
    def is_finite(self) -> bool:
        """Whether no value has a square that is beyond float32."""
        return bool(np.isfinite(self.power()).all())

    def scaled(self, factors: NDArray[np.float64]) -> Moments:
        """What they are where the input channels are multiplied by factors.

        Args:
            factors: Of each input channel, shape (groups * channels of a group,).
        """
        groups, values = self.mean.shape[1:]
        taps = groups * values // len(factors)
        by = factors.astype(np.float32).repeat(taps).reshape(groups, values)
        with np.errstate(over="ignore", invalid="ignore"):
            covariance = self.covariance * by[:, :, None]
            covariance *= by[:, None, :]
            return Moments(covariance, self.mean * by, self.share, self.number)


def input_moments(
    model: FloatModel,
    inputs: CalibrationInputs,
    *,
    windows: int = _WINDOWS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Moments]:
    """Runs the float model and collects moments of the inputs of its layers.

    Args:
        model: The prepared float model.
        inputs: The calibration inputs; the first `MOMENT_INPUTS` are used.
        windows: How many windows of a convolution are taken of each input at most, evenly spread
            by chance.
        progress: Called after every input with the inputs done and the inputs in all.

    Returns:
        By weight, for Conv, Gemm and MatMul whose vectors have at most `LONGEST_VECTOR` values,
        none of which has a square that is beyond float32.
    """
    nodes = {node.name: node for node in model.proto.graph.node}
    layers = [layer for layer in model.layers if _is_matrix(layer, nodes[layer.name], model)]
    given = {spec.name for spec in model.inputs}
    names = [n for n in dict.fromkeys(layer.input for layer in layers) if n not in given]
    session = make_session(with_outputs(model.proto, names))
    sums = {layer.name: _Sums() for layer in layers}
    rng = np.random.default_rng(0)
    number = min(MOMENT_INPUTS, len(inputs))
    # One at a time: all that the layers read is held in memory together.
    for done, feed in enumerate(inputs.batches(1, np.arange(number)), start=1):
        found: dict[str, Any] = dict(feed)
        if names:  # ONNX Runtime takes an empty list for all outputs
            found |= dict(zip(names, session.run(names, feed), strict=True))
        for layer in layers:
            values = found[layer.input]
            if layer.op_type in _MATRIX_OPS:
                vectors = _rows(values, windows, rng)
            else:
                kernel = model.weights[layer.weight].shape[2:]
                vectors = _windows(values, layer.groups, nodes[layer.name], kernel, windows, rng)
            with np.errstate(over="ignore", invalid="ignore"):
                sums[layer.name].add(vectors)
        if progress is not None:
            progress(done, number)
    with np.errstate(over="ignore", invalid="ignore"):
        moments = dict(_by_weight(layers, sums))
        return {name: m for name, m in moments.items() if m.is_finite}


class _Sums:
    """Of one layer's vectors, less the mean of the first ones: where values vary little about a
    large mean, their squares would leave nothing of the covariances.
    """

    def __init__(self) -> None:
        self.number = 0
        self._origin: NDArray[np.float32] | None = None
        self._power: Any = np.float32(0.0)
        self._total: Any = np.float32(0.0)

    def add(self, vectors: NDArray[np.float32]) -> None:
        if self._origin is None:
            self._origin = vectors.mean(axis=1)
        off = vectors - self._origin[:, None]
        self.number += off.shape[1]
        power = off.swapaxes(1, 2) @ off
        power += self._power
        self._power = power
        self._total = self._total + off.sum(axis=1)

    def mean(self) -> NDArray[np.float32]:
        assert self._origin is not None
        mean: NDArray[np.float32] = self._origin + self._total / np.float32(self.number)
        return mean

    def squares(self) -> NDArray[np.float32]:
        """The sum of (x - mean) (x - mean)ᵀ."""
        total = self._total[:, :, None]
        squares: NDArray[np.float32] = self._power - total @ (total / self.number).swapaxes(1, 2)
        return squares


def _by_weight(
    layers: Sequence[Layer], sums: Mapping[str, _Sums]
) -> Iterator[tuple[str, Moments]]:
    for weight in dict.fromkeys(layer.weight for layer in layers):
        parts = [sums[layer.name] for layer in layers if layer.weight == weight]
        number = sum(part.number for part in parts)
        squares = np.asarray(sum(part.squares() for part in parts), dtype=np.float32)
        yield (
            weight,
            Moments(
                squares / np.float32(number),
                np.stack([part.mean() for part in parts]),
                np.array([part.number / number for part in parts], dtype=np.float32),
                number,
            ),
        )


def _is_matrix(layer: Layer, node: onnx.NodeProto, model: FloatModel) -> bool:
    weight = model.weights[layer.weight]
    if layer.op_type in _MATRIX_OPS:
        length = weight.shape[1 - layer.channel_axis]
        return length <= LONGEST_VECTOR and not attribute_of(node, "transA", 0)
    return layer.op_type == "Conv" and weight[0].size <= LONGEST_VECTOR


def _rows(
    values: NDArray[np.float32], windows: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """What a matrix is multiplied with, shape (1, vectors, values)."""
    rows = values.reshape(-1, values.shape[-1])
    most = windows * len(values)
    return rows[None] if len(rows) <= most else rows[None, _some(rng, len(rows), most)]


def _windows(
    values: NDArray[np.float32],
    groups: int,
    node: onnx.NodeProto,
    kernel: Sequence[int],
    windows: int,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """What a convolution multiplies with its weight, shape (groups, vectors, values)."""
    batch, channels, *sizes = values.shape
    flat, inside = _places(node, kernel, sizes, windows, rng)
    found = values.reshape(batch, channels, -1).take(flat, axis=2)
    if not inside.all():
        found *= inside
    grouped = found.reshape(batch, groups, channels // groups, *flat.shape)
    return grouped.transpose(1, 0, 3, 2, 4).reshape(groups, batch * len(flat), -1)


def _places(
    node: onnx.NodeProto,
    kernel: Sequence[int],
    sizes: Sequence[int],
    windows: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where a convolution takes the values of some windows, and which of them are no padding.

    Returns:
        Numbers in a flat channel, and marks, both of shape (windows, taps).
    """
    rank = len(kernel)
    strides = attribute_of(node, "strides", [1] * rank)
    dilations = attribute_of(node, "dilations", [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    before, behind = _padding(node, sizes, reach, strides)
    counts = [
        max(0, (b + n + e - r) // s + 1)
        for b, n, e, r, s in zip(before, sizes, behind, reach, strides, strict=True)
    ]
    chosen = np.unravel_index(_some(rng, math.prod(counts), windows), counts)
    flat = np.zeros((len(chosen[0]), 1), dtype=np.int64)
    inside = np.ones((len(chosen[0]), 1), dtype=np.bool_)
    for axis, size in enumerate(sizes):
        starts = chosen[axis] * strides[axis] - before[axis]
        at = starts[:, None] + np.arange(kernel[axis]) * dilations[axis]
        valid = (at >= 0) & (at < size)
        numbers = np.clip(at, 0, size - 1)
        flat = (flat[:, :, None] * size + numbers[:, None, :]).reshape(len(at), -1)
        inside = (inside[:, :, None] & valid[:, None, :]).reshape(len(at), -1)
    return flat, inside


def _some(rng: np.random.Generator, number: int, most: int) -> NDArray[np.int64]:
    if number <= most:
        return np.arange(number)
    return np.sort(rng.choice(number, most, replace=False))


def _padding(
    node: onnx.NodeProto, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """How many zeros stand before and behind each axis (ONNX ``Conv``, ``pads``, ``auto_pad``)."""
    rank = len(sizes)
    way = attribute_of(node, "auto_pad", b"NOTSET")
    if way in (b"SAME_UPPER", b"SAME_LOWER"):
        needed = [
            max(0, (-(-n // s) - 1) * s + r - n)
            for n, r, s in zip(sizes, reach, strides, strict=True)
        ]
        less, more = [n // 2 for n in needed], [n - n // 2 for n in needed]
        return (less, more) if way == b"SAME_UPPER" else (more, less)
    pads = attribute_of(node, "pads", [0] * 2 * rank) if way != b"VALID" else [0] * 2 * rank
    return list(pads[:rank]), list(pads[rank:])
