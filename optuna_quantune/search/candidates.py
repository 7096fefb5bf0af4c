"""Which configurations are looked at: all of a small space, a pool of a large one.

Arrays of codes (see ``SpaceEncoding``) in and out; nothing here knows of a study.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.encoding import SpaceEncoding


Codes: TypeAlias = NDArray[np.float64]

# Spaces up to this size are enumerated and every configuration is scored.
MAX_ENUMERATED = 100_000
# Up to this many values, all of them are neighbours of each other; of more, a sample is.
_MAX_VALUE_CHANGES = 16
# Standard deviations of the moves of a numerical parameter, in shares of its range.
_MOVES = (0.3, 0.1, 0.03, 0.01)


def agree(codes: Codes, fixed: Mapping[int, float]) -> NDArray[np.bool_]:
    """Which configurations have the given codes, by column; bool of shape (n_configs,)."""
    columns = list(fixed)
    return np.asarray((codes[:, columns] == list(fixed.values())).all(axis=1))


def enumerate_codes(encoding: SpaceEncoding) -> Codes:
    """All configurations of a finite space, in lexicographic order of their codes.

    Returns:
        float64 of shape (encoding.size, n_params).
    """
    ranks = np.arange(encoding.size, dtype=np.int64)
    return (ranks[:, None] // encoding.strides % encoding.n_values).astype(np.float64)


def random_codes(encoding: SpaceEncoding, n: int, rng: np.random.RandomState) -> Codes:
    """Independent configurations, uniform on the scale of each parameter.

    Returns:
        float64 of shape (n, n_params).
    """
    uniform = rng.uniform(size=(n, encoding.n_params))
    codes = np.where(encoding.n_values > 0, np.floor(uniform * encoding.n_values), uniform)
    for column in filter(encoding.has_log_steps, range(encoding.n_params)):
        codes[:, column] = encoding.codes_at(uniform[:, column], column)
    return codes


def neighbours(encoding: SpaceEncoding, codes: Codes, rng: np.random.RandomState) -> Codes:
    """Configurations that differ from one of the given ones in a single parameter.

    Args:
        encoding: The space.
        codes: Configurations to start from, float64 of shape (n_configs, n_params).
        rng: Source of the moves where not all values can be tried.

    Returns:
        float64 of shape (n_neighbours, n_params); may hold one configuration twice.
    """
    moved = []
    for column, n_values in enumerate(encoding.n_values):
        if n_values == 1:
            continue
        if 0 < n_values <= _MAX_VALUE_CHANGES:
            values = np.tile(np.arange(n_values, dtype=np.float64), (len(codes), 1))
        elif encoding.is_categorical(column):
            values = rng.randint(n_values, size=(len(codes), _MAX_VALUE_CHANGES)).astype(float)
        else:
            shares = rng.normal(size=(len(codes), len(_MOVES))) * np.array(_MOVES)
            values = _moved(encoding, codes, column, shares)
        rows = np.repeat(codes, values.shape[1], axis=0)
        rows[:, column] = values.ravel()
        moved.append(rows[rows[:, column] != np.repeat(codes[:, column], values.shape[1])])
    return np.concatenate(moved) if moved else codes[:0]


def _moved(
    encoding: SpaceEncoding, codes: Codes, column: int, shares: NDArray[np.float64]
) -> Codes:
    """Codes of a numerical parameter after moves by shares of its (log) range.

    A move shorter than a step is a step.
    """
    n_values, before = encoding.n_values[column], codes[:, column, None]
    if n_values == 0:
        return np.clip(before + shares, 0.0, 1.0)
    if encoding.has_log_steps(column):
        after = encoding.codes_at(encoding.positions(codes, column)[:, None] + shares, column)
        after = np.where(after == before, before + np.sign(shares), after)
    else:
        steps = shares * (n_values - 1)
        after = before + np.sign(steps) * np.maximum(np.round(np.abs(steps)), 1.0)
    return np.clip(after, 0.0, n_values - 1.0)


def emptiness(
    kernel_features: NDArray[np.float32], taken: NDArray[np.float32]
) -> NDArray[np.float64]:
    """How far configurations lie from all taken ones; the largest is the next one of a design.

    Choosing the largest again and again is a greedy maximin design (Johnson, Moore and Ylvisaker,
    *Minimax and maximin distance designs*, J. Statist. Plann. Inference 26, 1990), with the mean
    distance to decide between equals. It needs no plan made in advance, so any process can go on.

    Args:
        kernel_features: The candidates, float32 of shape (n_candidates, n_features).
        taken: Measured and running configurations, float32 of shape (n_taken, n_features).

    Returns:
        float64 of shape (n_candidates,).
    """
    if len(taken) == 0:
        return np.zeros(len(kernel_features))
    agreement = (kernel_features @ taken.T).astype(np.float64)
    result: NDArray[np.float64] = -agreement.max(axis=1) - 1e-3 * agreement.mean(axis=1)
    return result
