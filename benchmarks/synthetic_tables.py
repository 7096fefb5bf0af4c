"""Synthetic tables of configurations and their values, to measure search without running anything.

Several families, so that nothing is tuned to one: sums of knob effects, collapse of whole regions
as when a network falls to chance, and landscapes that no sum of main effects describes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


# The knobs of the `quantune` preset: calibration images, scheme, clipping, granularity, mixed
# precision.
QUANTUNE_SHAPE = (3, 4, 2, 2, 2)
LARGE_SHAPE = (3, 2, 2, 2, 2, 4, 6)


@dataclass(frozen=True)
class Table:
    """Every configuration of a categorical space with its value, to be minimised.

    Attributes:
        shape: The number of choices of each knob.
        codes: The choices of each configuration, int64 of shape (n_configs, n_knobs), in
            lexicographic order.
        regret: Values scaled to 0 (the best) to 1 (the worst), float64 of shape (n_configs,).
    """

    shape: tuple[int, ...]
    codes: NDArray[np.int64]
    regret: NDArray[np.float64]

    @classmethod
    def from_values(cls, shape: tuple[int, ...], values: NDArray[np.float64]) -> Table:
        """A table of values in lexicographic order of the configurations."""
        extent = values.max() - values.min()
        return cls(shape, _codes(shape), (values - values.min()) / extent)


def _codes(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.indices(shape).reshape(len(shape), -1).T.astype(np.int64)


def _effects(
    codes: NDArray[np.int64],
    shape: tuple[int, ...],
    rng: np.random.Generator,
    scales: NDArray[np.float64],
    pair_share: float,
) -> NDArray[np.float64]:
    values = np.zeros(len(codes))
    for i, n in enumerate(shape):
        values += scales[i] * rng.normal(size=n)[codes[:, i]]
        for j in range(i):
            if rng.random() < pair_share:
                effect = rng.normal(size=(n, shape[j]))[codes[:, i], codes[:, j]]
                values += np.sqrt(scales[i] * scales[j]) * effect
    return values


def pairwise(seed: int) -> Table:
    """Equal main effects and 40 % of the pairwise interactions on 1,152 configurations."""
    rng = np.random.default_rng(seed)
    codes = _codes(LARGE_SHAPE)
    values = _effects(codes, LARGE_SHAPE, rng, np.ones(len(LARGE_SHAPE)), 0.4)
    return Table.from_values(LARGE_SHAPE, values)


def uneven(seed: int) -> Table:
    """Knobs that matter very differently (log-normal scales), all pairs interacting."""
    rng = np.random.default_rng(1000 + seed)
    codes = _codes(LARGE_SHAPE)
    scales = rng.lognormal(0.0, 1.2, size=len(LARGE_SHAPE))
    return Table.from_values(LARGE_SHAPE, _effects(codes, LARGE_SHAPE, rng, scales, 1.0))


def _collapsing(seed: int, shape: tuple[int, ...]) -> Table:
    rng = np.random.default_rng(2000 + seed)
    codes = _codes(shape)
    power = np.zeros(len(codes))
    for _ in range(5):
        scales = np.where(rng.random(len(shape)) < 0.6, 1.0, 0.0)
        power += np.exp(1.2 * _effects(codes, shape, rng, scales, 0.3))
    knob = int(rng.integers(len(shape)))
    bad = codes[:, knob] == rng.integers(shape[knob])
    power[bad] *= 10.0 ** rng.uniform(0.5, 2.5)
    decibels = -10.0 * np.log10(power)
    half = np.quantile(decibels, rng.uniform(0.2, 0.7))
    accuracy = 0.72 / (1.0 + np.exp(-(decibels - half) / 2.0)) + 0.003 * rng.normal(
        size=len(codes)
    )
    return Table.from_values(shape, -np.round(accuracy, 3))


def collapse(seed: int) -> Table:
    """Noise sources whose powers add up, an accuracy that saturates at both ends (1,152).

    One choice of one knob multiplies the noise, as per-tensor scales do on MobileNetV2, so most
    of its configurations fall to chance. The accuracy is measured on 1,000 images: it has noise,
    and ties.
    """
    return _collapsing(seed, LARGE_SHAPE)


def collapse_small(seed: int) -> Table:
    """The same on the 96 configurations of the `quantune` preset."""
    return _collapsing(seed, QUANTUNE_SHAPE)


def trees(seed: int) -> Table:
    """A sum of six random decision trees of depth 4: regions, nothing additive (1,152)."""
    rng = np.random.default_rng(3000 + seed)
    codes = _codes(LARGE_SHAPE)
    values = 0.02 * rng.normal(size=len(codes))

    def grow(rows: NDArray[np.bool_], depth: int) -> None:
        if depth == 0 or rows.sum() < 2:
            values[rows] += rng.normal()
            return
        knob = int(rng.integers(len(LARGE_SHAPE)))
        left = (rng.random(LARGE_SHAPE[knob]) < 0.5)[codes[:, knob]]
        grow(rows & left, depth - 1)
        grow(rows & ~left, depth - 1)

    for _ in range(6):
        grow(np.ones(len(codes), dtype=bool), 4)
    return Table.from_values(LARGE_SHAPE, values)


def rugged(seed: int) -> Table:
    """An NK landscape, K = 2: every knob's effect depends on two others (1,152)."""
    rng = np.random.default_rng(4000 + seed)
    codes = _codes(LARGE_SHAPE)
    n_knobs = len(LARGE_SHAPE)
    values = np.zeros(len(codes))
    for knob in range(n_knobs):
        others = rng.choice([k for k in range(n_knobs) if k != knob], 2, replace=False)
        knobs = [knob, *others.tolist()]
        effect = rng.normal(size=[LARGE_SHAPE[k] for k in knobs])
        values += effect[tuple(codes[:, k] for k in knobs)]
    return Table.from_values(LARGE_SHAPE, values)


FAMILIES: dict[str, Callable[[int], Table]] = {
    "pairwise": pairwise,
    "uneven": uneven,
    "collapse": collapse,
    "collapse_small": collapse_small,
    "trees": trees,
    "rugged": rugged,
}
