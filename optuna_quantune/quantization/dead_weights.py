"""Weights that meet nothing but zeros: the knob ``zero_dead_weights``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.quantization.graph import activation_bounds
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.model import FloatModel


# A channel with less than this share of the median channel's weights computes nothing.
_NEGLIGIBLE: Final = 1e-4


def live_weights(
    model: FloatModel, reach: Callable[[str], float | None] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Weights by layer, with 0 where they meet input channels that are always 0.

    A channel of a convolution without weights worth mentioning and without a positive bias is 0
    behind its Relu. Folding a batch normalization whose gamma went to 0 leaves such channels, and
    nothing in training held the weights that read them.

    Args:
        model: The prepared float model.
        reach: The largest magnitude that a tensor has, None where that is not known. With it only
            channels count that cannot come to more than a ten-thousandth of what their tensor
            reaches; without it small weights are enough.
    """
    constants = constant_values(model.proto.graph)
    operands = {node.name: len([n for n in node.input if n]) for node in model.proto.graph.node}
    activations = {n.output[0]: n for n in model.proto.graph.node if n.op_type in ("Relu", "Clip")}
    layers = {layer.output: layer for layer in model.layers if layer.op_type == "Conv"}
    live: dict[str, NDArray[np.float32]] = {}
    for layer in model.layers:
        live[layer.name] = model.weights[layer.weight]
        activation = activations.get(layer.input)
        if layer.op_type != "Conv" or activation is None:
            continue
        before = layers.get(activation.input[0])
        bounds = activation_bounds(activation, constants)
        if before is None or bounds is None or bounds[0] != 0:
            continue
        if before.bias is None and operands[before.name] > 2:
            continue  # the bias is computed
        weight = model.weights[before.weight]
        bias = 0.0 if before.bias is None else model.weights[before.bias]
        sizes = np.abs(weight).sum(axis=tuple(range(1, weight.ndim)))
        dead = (sizes <= _NEGLIGIBLE * np.median(sizes)) & (np.asarray(bias) <= 0)
        if reach is not None:
            read, written = reach(before.input), reach(layer.input)
            if read is None or written is None:
                continue
            dead &= sizes * read + bias <= _NEGLIGIBLE * written
        live[layer.name] = _without(live[layer.name], layer.groups, np.flatnonzero(dead))
    return live


def _without(
    weight: NDArray[np.float32], groups: int, inputs: NDArray[np.intp]
) -> NDArray[np.float32]:
    """A convolution's weight, shape (outputs, inputs / groups, ...), blind to some inputs."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:]).copy()
    width = weight.shape[1]
    grouped[inputs // width, :, inputs % width] = 0
    return grouped.reshape(weight.shape)
