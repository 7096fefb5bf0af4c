"""The configurations of one search space, with all that is known of each before any trial.

What is computed here depends on the space and on the user's functions only, never on trials, so
the sampler keeps it as a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from optuna_quantune.errors import InputError
from optuna_quantune.search.candidates import Codes
from optuna_quantune.search.candidates import enumerate_codes
from optuna_quantune.search.candidates import MAX_ENUMERATED
from optuna_quantune.search.encoding import SpaceEncoding


PRIOR_FEATURE = "prior"
"""The feature that estimates the objective's first value."""

Features = Callable[[Mapping[str, Any]], Mapping[str, float]]
Valid = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Candidates:
    """Configurations as the models see them; rows are configurations.

    Attributes:
        codes: float64 of shape (n_configs, n_params).
        kernel: ``SpaceEncoding.kernel_features`` of the codes.
        trees: ``SpaceEncoding.tree_features`` of the codes.
        features: The user's features, columns sorted by name, NaN where not finite, float64 of
            shape (n_configs, n_features).
    """

    codes: Codes
    kernel: NDArray[np.float32]
    trees: NDArray[np.float32]
    features: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Candidates:
        return Candidates(
            self.codes[rows], self.kernel[rows], self.trees[rows], self.features[rows]
        )

    def append(self, other: Candidates) -> Candidates:
        """These candidates followed by others."""
        return Candidates(
            np.concatenate([self.codes, other.codes]),
            np.concatenate([self.kernel, other.kernel]),
            np.concatenate([self.trees, other.trees]),
            np.concatenate([self.features, other.features]),
        )


class Configurations:
    """A search space with the user's validity and features of its configurations.

    Args:
        search_space: Optuna distributions by parameter name.
        features: Named numbers of a configuration; always the same names.
        valid: Whether a configuration can be run.
        constants: Values of parameters that ``features`` and ``valid`` expect but the space lacks,
            as when a ``PartialFixedSampler`` has taken them out.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution],
        features: Features | None,
        valid: Valid | None,
        constants: Mapping[str, Any],
    ) -> None:
        self.encoding = SpaceEncoding(search_space)
        self._features = features
        self._valid = valid
        self._constants = dict(constants)
        self._feature_names: tuple[str, ...] | None = None
        self._described: dict[bytes, tuple[float, ...]] = {}

    @property
    def is_enumerable(self) -> bool:
        """Whether the space is small enough to look at every configuration."""
        return self.encoding.size <= MAX_ENUMERATED

    @cached_property
    def all(self) -> Candidates:
        """All valid configurations of an enumerable space.

        Raises:
            InputError: If no configuration of the space is valid.
        """
        codes = self.only_valid(enumerate_codes(self.encoding))
        if len(codes) == 0:
            raise InputError(
                "valid: it rejects every configuration of the search space; give the space more "
                "values or accept some"
            )
        return self.candidates(codes)

    def candidates(self, codes: Codes) -> Candidates:
        """The given configurations with their model inputs and features."""
        return Candidates(
            codes,
            self.encoding.kernel_features(codes),
            self.encoding.tree_features(codes),
            self._describe(codes),
        )

    def unseen(self, codes: Codes, seen: Codes) -> NDArray[np.bool_]:
        """Which configurations are not among the seen ones; bool of shape (n_configs,)."""
        if self.is_enumerable:
            is_seen = np.zeros(int(self.encoding.size), dtype=bool)
            is_seen[self.encoding.flat_index(seen)] = True
            return ~is_seen[self.encoding.flat_index(codes)]
        known = {row.tobytes() for row in seen}
        return np.array([row.tobytes() not in known for row in codes], dtype=bool)

    def only_valid(self, codes: Codes) -> Codes:
        """The configurations that can be run."""
        if self._valid is None:
            return codes
        mask = [bool(self._valid(self._params(row))) for row in codes]
        return np.asarray(codes[np.array(mask, dtype=bool)])

    @property
    def prior_column(self) -> int | None:
        """Which column of the features is the prior; known once a candidate was described."""
        if self._feature_names is None or PRIOR_FEATURE not in self._feature_names:
            return None
        return self._feature_names.index(PRIOR_FEATURE)

    def _describe(self, codes: Codes) -> NDArray[np.float64]:
        if self._features is None:
            return np.empty((len(codes), 0))
        rows = [self._describe_one(row) for row in codes]
        columns = len(self._feature_names or ())
        return np.array(rows, dtype=np.float64).reshape(len(codes), columns)

    def _describe_one(self, codes: Codes) -> tuple[float, ...]:
        key = codes.tobytes()
        if key not in self._described:
            assert self._features is not None
            named = self._features(self._params(codes))
            names = tuple(sorted(named))
            if self._feature_names is None:
                self._feature_names = names
            if names != self._feature_names:
                different = sorted(set(names) ^ set(self._feature_names))
                raise InputError(
                    f"features: {different} given for some configurations only; give every "
                    "configuration the same names (NaN where a number is unknown)"
                )
            numbers = (float(named[name]) for name in names)
            self._described[key] = tuple(x if math.isfinite(x) else math.nan for x in numbers)
        return self._described[key]

    def _params(self, codes: Codes) -> dict[str, Any]:
        return {**self._constants, **self.encoding.decode(codes)}
