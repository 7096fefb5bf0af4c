"""Numbers for the configurations of a search space.

Everything behind the sampler works on arrays, never on dictionaries of parameters. A configuration
is a row of *codes*: the index of the choice (categorical), the index of the step (int, and float
with a step), or the position in the unit interval (continuous float); log scales are already
undone. Codes identify a configuration, can be enumerated and be changed one at a time. From them
come the two kinds of model inputs: unit-norm kernel features and plain columns for trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_quantune.errors import InputError


# Length scale of the Matérn 5/2 similarity of two values of a numerical parameter, in units of the
# parameter's range; the surrogate's products of similarities make it locally shorter.
_LENGTH_SCALE = 0.4
# Knots that carry the similarity of a numerical parameter with more values than that. Matérn 5/2
# is smooth: with knots at 1/6 of the length scale the approximation error is below 1e-3.
_MAX_KNOTS = 16
# Codes are float64, which cannot tell more integers apart.
_MAX_VALUES = 2**53


class SpaceEncoding:
    """Codes and model inputs of the configurations of one search space.

    Args:
        search_space: Optuna distributions by parameter name. Parameters are ordered by name, so
            that two processes that list them differently encode alike.

    Attributes:
        names: The parameter names, sorted; the columns of every array of codes.
        name_set: The same without an order.
        n_values: How many values each parameter has, 0 for a continuous one; int64 of shape
            (n_params,).
        size: How many configurations the space has; ``math.inf`` with a continuous parameter.

    Raises:
        InputError: If a parameter has more values than a float64 can count.
    """

    def __init__(self, search_space: Mapping[str, BaseDistribution]) -> None:
        self.names = tuple(sorted(search_space))
        self.name_set = frozenset(search_space)
        self.distributions = tuple(_distinct(search_space[name]) for name in self.names)
        n_values = [_n_values(distribution) for distribution in self.distributions]
        for name, distribution in zip(self.names, self.distributions, strict=True):
            if not is_countable(distribution):
                raise InputError(
                    f"search_space[{name!r}]: {distribution!r} has more than 2**53 values; make "
                    "its step coarser, or let it be a float without a step"
                )
        self.n_values = np.array(n_values, dtype=np.int64)
        self.size = math.inf if 0 in n_values else math.prod(n_values)
        # Optuna looks a choice up one by one, which for a hundred trials takes longer than a fit.
        self._choice_codes = [_choice_codes(d) for d in self.distributions]
        self._knot_positions = [
            None if isinstance(d, CategoricalDistribution) else _knot_positions(d)
            for d in self.distributions
        ]

    @property
    def n_params(self) -> int:
        """The number of parameters."""
        return len(self.names)

    @property
    def n_features(self) -> int:
        """The number of kernel features."""
        return sum(self.block_sizes)

    @property
    def block_sizes(self) -> list[int]:
        """How many of the kernel features are those of each parameter."""
        knots = zip(self.n_values.tolist(), self._knot_positions, strict=True)
        return [n if positions is None else len(positions) for n, positions in knots]

    @property
    def strides(self) -> NDArray[np.int64]:
        """How far apart in rank neighbouring values of each parameter of a finite space are."""
        return np.append(np.cumprod(self.n_values[:0:-1])[::-1], 1)

    @cached_property
    def neutral(self) -> NDArray[np.float64]:
        """Codes that stand for no value: the middle of numbers, the first choice of categories."""
        codes = np.zeros(self.n_params)
        for column, n_values in enumerate(self.n_values):
            if not self.is_categorical(column) and n_values != 1:
                codes[column] = self.codes_at(np.array([0.5]), column)[0]
        return codes

    @property
    def has_numbers(self) -> bool:
        """Whether the values of some parameter have an order."""
        return not all(map(self.is_categorical, range(self.n_params)))

    def is_categorical(self, column: int) -> bool:
        """Whether the values of a parameter have no order."""
        return isinstance(self.distributions[column], CategoricalDistribution)

    def encode(self, params: Mapping[str, Any]) -> NDArray[np.float64] | None:
        """The codes of one configuration.

        Args:
            params: Parameter values as the study shows them; further names are ignored.

        Returns:
            float64 of shape (n_params,), or ``None`` when a parameter is missing or its value lies
            outside this space, as for trials from before a change of the space.
        """
        codes = self.encode_columns(params)
        return np.array(list(codes.values())) if len(codes) == self.n_params else None

    def encode_columns(self, params: Mapping[str, Any]) -> dict[int, float]:
        """Codes by column, of those parameters only that have a value in this space."""
        codes = {}
        for column, name in enumerate(self.names):
            if name not in params:
                continue
            value = params[name]
            if isinstance(value, (str, int)) and value in self._choice_codes[column]:
                codes[column] = self._choice_codes[column][value]
                continue
            distribution = self.distributions[column]
            try:
                internal = distribution.to_internal_repr(value)
            except ValueError:
                continue
            if distribution._contains(internal):
                codes[column] = _code(distribution, internal)
        return codes

    def encode_known(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Codes of parameters that have a value in this space, NaN for the others.

        Args:
            rows: Parameter values of configurations, which may lack some or have others.

        Returns:
            float64 of shape (n_rows, n_params).
        """
        codes = np.full((len(rows), self.n_params), np.nan)
        for row, params in zip(codes, rows, strict=True):
            for column, code in self.encode_columns(params).items():
                row[column] = code
        return codes

    def flat_index(self, codes: NDArray[np.float64]) -> NDArray[np.int64]:
        """The rank of configurations of a finite space in lexicographic order of their codes."""
        return np.asarray(codes.astype(np.int64) @ self.strides)

    def decode(self, codes: NDArray[np.float64]) -> dict[str, Any]:
        """The parameter values, native Python objects, of one row of codes."""
        return {
            name: _value(distribution, float(code))
            for name, distribution, code in zip(self.names, self.distributions, codes, strict=True)
        }

    def positions(self, codes: NDArray[np.float64], column: int) -> NDArray[np.float64]:
        """Where values of a numerical parameter lie in its (log) range, each in [0, 1]."""
        distribution = self.distributions[column]
        values = codes[:, column]
        return values if self.n_values[column] == 0 else _unit(distribution, values)

    def codes_at(self, positions: NDArray[np.float64], column: int) -> NDArray[np.float64]:
        """Codes of the values of a numerical parameter that lie nearest to places in its range.

        Args:
            positions: Places as `positions` gives them; those beyond the range are at its end.
            column: Which parameter.

        Returns:
            float64 of the shape of `positions`.
        """
        distribution = self.distributions[column]
        assert isinstance(distribution, (IntDistribution, FloatDistribution))
        if self.n_values[column] == 0:
            return np.clip(positions, 0.0, 1.0)
        low, high = _bounds(distribution)
        values = low + positions * (high - low)
        if distribution.log:
            values = np.exp(values)
        assert distribution.step is not None
        codes = np.round((values - distribution.low) / distribution.step)
        # Codes are compared as bytes, in which -0.0 is another number than 0.0.
        return np.clip(codes, 0.0, self.n_values[column] - 1.0) + 0.0

    def has_log_steps(self, column: int) -> bool:
        """Whether a parameter takes whole numbers on a logarithmic scale."""
        distribution = self.distributions[column]
        return isinstance(distribution, IntDistribution) and distribution.log

    def kernel_features(self, codes: NDArray[np.float64]) -> NDArray[np.float32]:
        """Features whose inner product counts how many parameters of two configurations agree.

        Every parameter has a block of unit norm: one-hot for a categorical one, so that two
        values agree (1) or do not (0); for a numerical one the Nyström features of a Matérn 5/2
        kernel, so that agreement falls off smoothly with distance.

        Args:
            codes: float64 of shape (n_configs, n_params).

        Returns:
            float32 of shape (n_configs, n_features).
        """
        blocks = []
        for column, knots in enumerate(self._knot_positions):
            if knots is None:
                blocks.append(_one_hot(codes[:, column], int(self.n_values[column])))
            else:
                blocks.append(_nystroem(self.positions(codes, column), knots))
        return np.concatenate(blocks, axis=1)

    def tree_features(self, codes: NDArray[np.float64]) -> NDArray[np.float32]:
        """Columns for trees: one-hot for categorical parameters, positions for numerical ones.

        Args:
            codes: float64 of shape (n_configs, n_params), NaN where unknown.

        Returns:
            float32 of shape (n_configs, n_columns), NaN where unknown.
        """
        blocks = []
        for column in range(self.n_params):
            if self.is_categorical(column):
                blocks.append(_one_hot(codes[:, column], int(self.n_values[column])))
            else:
                blocks.append(self.positions(codes, column)[:, None].astype(np.float32))
        return np.concatenate(blocks, axis=1)


def is_countable(distribution: BaseDistribution) -> bool:
    """Whether codes can tell the values of a parameter apart."""
    return _n_values(distribution) <= _MAX_VALUES


def plain(value: Any) -> Any:
    """A parameter's value as JSON can hold it: a tuple, a function, a numpy number by its name."""
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)


def _distinct(distribution: BaseDistribution) -> BaseDistribution:
    """Choices that compare equal, as True and 1 do, are one: Optuna stores the first of them."""
    if not isinstance(distribution, CategoricalDistribution):
        return distribution
    choices = distribution.choices
    first = [c for index, c in enumerate(choices) if distribution.to_internal_repr(c) == index]
    return distribution if len(first) == len(choices) else CategoricalDistribution(first)


def _n_values(distribution: BaseDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if distribution.single():
        return 1
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, FloatDistribution):
        if distribution.step is None:
            return 0
        return round((distribution.high - distribution.low) / distribution.step) + 1
    raise TypeError(f"unknown kind of distribution: {distribution!r}")


def _choice_codes(distribution: BaseDistribution) -> dict[Any, float]:
    """Codes of the choices that are strings or integers, or stand as strings in a plan."""
    if not isinstance(distribution, CategoricalDistribution):
        return {}
    # What is a string itself comes last: it goes before another choice of that name.
    choices = sorted(distribution.choices, key=lambda choice: isinstance(choice, str))
    codes = {plain(c): float(distribution.to_internal_repr(c)) for c in choices}
    return {choice: code for choice, code in codes.items() if isinstance(choice, (str, int))}


def _code(distribution: BaseDistribution, internal: float) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(internal)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if distribution.single():
        return 0.0
    if distribution.step is not None:
        return float(round((internal - distribution.low) / distribution.step))
    low, high = _bounds(distribution)
    value = math.log(internal) if distribution.log else internal
    return (value - low) / (high - low)


def _value(distribution: BaseDistribution, code: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(code)]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if distribution.single():
        return distribution.low
    if isinstance(distribution, IntDistribution):
        return distribution.low + int(code) * distribution.step
    if distribution.step is not None:
        return float(min(distribution.low + code * distribution.step, distribution.high))
    low, high = _bounds(distribution)
    value = low + code * (high - low)
    value = math.exp(value) if distribution.log else value
    return float(min(max(value, distribution.low), distribution.high))


def _bounds(distribution: IntDistribution | FloatDistribution) -> tuple[float, float]:
    if distribution.log:
        return math.log(distribution.low), math.log(distribution.high)
    return float(distribution.low), float(distribution.high)


def _unit(distribution: BaseDistribution, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if distribution.single():
        return np.zeros(len(steps))
    assert distribution.step is not None
    values = distribution.low + steps * distribution.step
    low, high = _bounds(distribution)
    return ((np.log(values) if distribution.log else values) - low) / (high - low)


def _knot_positions(distribution: BaseDistribution) -> NDArray[np.float64]:
    n_values = _n_values(distribution)
    if 0 < n_values <= _MAX_KNOTS:
        return _unit(distribution, np.arange(n_values, dtype=np.float64))
    return np.linspace(0.0, 1.0, _MAX_KNOTS)


def _matern52(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    distance = math.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / _LENGTH_SCALE
    result: NDArray[np.float64] = (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)
    return result


def _nystroem(positions: NDArray[np.float64], knots: NDArray[np.float64]) -> NDArray[np.float32]:
    covariance = _matern52(knots, knots) + 1e-8 * np.eye(len(knots))
    whitening = np.linalg.inv(np.linalg.cholesky(covariance))
    features = _matern52(positions, knots) @ whitening.T
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32)


def _one_hot(codes: NDArray[np.float64], n_values: int) -> NDArray[np.float32]:
    result = np.full((len(codes), n_values), np.nan, dtype=np.float32)
    known = np.flatnonzero(~np.isnan(codes))
    result[known] = 0.0
    result[known, codes[known].astype(np.int64)] = 1.0
    return result
