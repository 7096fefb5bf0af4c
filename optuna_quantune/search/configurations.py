"""The configurations of one search space, with all that is known of each before any trial.

What is computed here depends on the space, on the user's functions and on earlier studies only,
never on trials, so the sampler keeps it as a cache.

The user's ``features`` may take a millisecond for each configuration. A space of a few hundred is
described as a whole; of a larger one, a sample, and boosted trees fitted to it guess for the rest
(a *sketch*): good enough to choose the hundred configurations that are worth describing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution

from optuna_quantune.errors import InputError
from optuna_quantune.search.acquisition import Tchebycheff
from optuna_quantune.search.boosters import predictions
from optuna_quantune.search.candidates import Codes
from optuna_quantune.search.candidates import enumerate_codes
from optuna_quantune.search.candidates import MAX_ENUMERATED
from optuna_quantune.search.candidates import random_codes
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.prior import first_look
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.search.targets import center_and_spread
from optuna_quantune.search.targets import LARGEST
from optuna_quantune.search.transfer import normal_scores
from optuna_quantune.search.transfer import Scale
from optuna_quantune.search.transfer import Transfer


if TYPE_CHECKING:
    import xgboost

PRIOR_FEATURE = "prior"
"""The feature that estimates the objective's first value; ``prior_2`` that of its second."""

CONSTRAINT_PRIOR = "prior:"
"""With the name of a constraint behind it the feature that estimates the constraint's value."""

Features = Callable[[Mapping[str, Any]], Mapping[str, float]]
Valid = Callable[[Mapping[str, Any]], bool]
Suggest = Callable[[], Iterable[Mapping[str, Any]]]
# How many configurations were described, of how many that are to be.
Progress = Callable[[int, int], None]

# Numbers in the kernel features of all configurations of a space that is enumerated; more, as of
# parameters with hundreds of choices, take seconds for each trial and gigabytes.
_MAX_ENTRIES = 20_000_000
# Spaces with features up to this size are described as a whole.
MAX_DESCRIBED = 512
# Configurations of a larger space that are described to sketch the rest, first at random, then
# in rounds of those that the sketch so far takes for the best.
_N_SKETCHED = 256
_SKETCH_ROUNDS = 3
_N_IN_ROUND = 64
_SKETCH_POOL = 4096
_SKETCH_PARAMS: dict[str, Any] = {
    "max_depth": 5,
    "eta": 0.2,
    "lambda": 0.1,
    "min_child_weight": 1,
    "tree_method": "hist",
    "nthread": 1,
    "verbosity": 0,
    "base_score": 0.0,
    "seed": 0,
}
_N_SKETCH_TREES = 80


@dataclass(frozen=True)
class Candidates:
    """Configurations as the models see them; rows are configurations.

    Attributes:
        codes: float64 of shape (n_configs, n_params).
        kernel: ``SpaceEncoding.kernel_features`` of the codes.
        trees: ``SpaceEncoding.tree_features`` of the codes.
    """

    codes: Codes
    kernel: NDArray[np.float32]
    trees: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Candidates:
        return Candidates(self.codes[rows], self.kernel[rows], self.trees[rows])

    def append(self, other: Candidates) -> Candidates:
        """These candidates followed by others."""
        return Candidates(
            np.concatenate([self.codes, other.codes]),
            np.concatenate([self.kernel, other.kernel]),
            np.concatenate([self.trees, other.trees]),
        )


@dataclass(frozen=True)
class Guesses:
    """What is guessed of configurations before any trial; finite.

    Attributes:
        values: What the trials' values may rise and fall with, all to be minimised, best informed
            last: the prior if there is one, then what earlier studies make of it if there are any;
            float64 of shape (n_configs, n_guesses).
        further: Priors of the other objectives, to be minimised, in the order of
            `Configurations.further_objectives`; float64 of shape (n_configs, n_further).
        limits: The values of constraints, feasible when at most 0, in the order of
            `Configurations.limit_names`; float64 of shape (n_configs, n_limits).
    """

    values: NDArray[np.float64]
    further: NDArray[np.float64]
    limits: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Guesses:
        return Guesses(self.values[rows], self.further[rows], self.limits[rows])


@dataclass(frozen=True)
class Described:
    """Candidates with what is known of them before any trial.

    Attributes:
        candidates: The configurations.
        features: The user's features, columns sorted by name, standardised over the space, NaN
            where not finite, float64 of shape (n_configs, n_features).
        guesses: What is guessed of them.
    """

    candidates: Candidates
    features: NDArray[np.float64]
    guesses: Guesses

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Described:
        return Described(self.candidates[rows], self.features[rows], self.guesses[rows])


class Configurations:
    """A search space with the user's validity and features of its configurations.

    Args:
        search_space: Optuna distributions by parameter name.
        features: Named numbers of a configuration; always the same names.
        valid: Whether a configuration can be run.
        constants: Values of parameters that ``features`` and ``valid`` expect but the space lacks,
            as when a ``PartialFixedSampler`` has taken them out.
        signs: Of each objective -1 if it is maximised, else 1.
        sources: Earlier studies.
        suggest: Configurations that are worth looking at.
        progress: Called while configurations are described.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution],
        features: Features | None,
        valid: Valid | None,
        constants: Mapping[str, Any],
        *,
        signs: Sequence[float] = (1.0,),
        sources: Sequence[SourceStudy] = (),
        suggest: Suggest | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.encoding = SpaceEncoding(search_space)
        self._features = features
        self._valid = valid
        self._constants = dict(constants)
        self._signs = tuple(signs)
        self._sources = tuple(sources)
        self._suggest = suggest
        self._progress = progress
        self._feature_names: tuple[str, ...] = ()
        self._raw_features: dict[bytes, tuple[float, ...]] = {}

    @property
    def is_enumerable(self) -> bool:
        """Whether the space is small enough to look at every configuration."""
        size = self.encoding.size
        return size <= MAX_ENUMERATED and size * self.encoding.n_features <= _MAX_ENTRIES

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

    @cached_property
    def suggested(self) -> Candidates:
        """Valid configurations that the user has named; others of them are left out."""
        named = self._suggest() if self._suggest is not None else ()
        codes = [c for params in named if (c := self.encoding.encode(params)) is not None]
        rows = np.array(codes, dtype=np.float64).reshape(len(codes), self.encoding.n_params)
        return self.candidates(self.only_valid(np.unique(rows, axis=0)))

    @property
    def is_described(self) -> bool:
        """Whether any configuration may be described, so that no sketch is needed."""
        if self._features is None:
            return True
        return self.is_enumerable and len(self.all) <= MAX_DESCRIBED

    @cached_property
    def reference(self) -> Described:
        """What stands for the whole space: all of it, or the sample that the sketch is fitted to.

        The first call describes these configurations, the only long work in this class.
        """
        return self._with_guesses(self._reference_candidates, self._reference_features)

    @property
    def has_guess(self) -> bool:
        """Whether anything is known of the values before the first trial."""
        return bool(self.reference.guesses.values.shape[1])

    @property
    def further_objectives(self) -> tuple[int, ...]:
        """Which objectives behind the first one have a prior; known as the next."""
        numbers = range(1, len(self._signs))
        return tuple(n for n in numbers if f"{PRIOR_FEATURE}_{n + 1}" in self._feature_names)

    @property
    def limit_names(self) -> tuple[str, ...]:
        """The constraints whose values are guessed; known once a configuration was described."""
        names = self._feature_names
        return tuple(
            name.removeprefix(CONSTRAINT_PRIOR)
            for name in names
            if name.startswith(CONSTRAINT_PRIOR)
        )

    @property
    def may_share_unit(self) -> tuple[bool, ...]:
        """Of each guess, whether it can be in the unit of the values."""
        transferred = [] if self._transfer is None else [self._scale is not None]
        return tuple([True] * (self._prior_column is not None) + transferred)

    def candidates(self, codes: Codes) -> Candidates:
        """The given configurations with their model inputs."""
        return Candidates(
            codes, self.encoding.kernel_features(codes), self.encoding.tree_features(codes)
        )

    def describe(self, candidates: Candidates) -> Described:
        """The configurations with their features; calls the user's function for new ones."""
        if self.is_described and self.is_enumerable and candidates is self.all:
            return self.reference
        return self._with_guesses(candidates, self._raw(candidates.codes))

    def guesses(self, candidates: Candidates) -> Guesses:
        """The guesses for any number of configurations, sketched where that is needed."""
        if self.is_described:
            return self.describe(candidates).guesses
        if self.is_enumerable and candidates is self.all:
            return self._guesses_of_all
        return self._sketched_guesses(candidates)

    @cached_property
    def _guesses_of_all(self) -> Guesses:
        return self._sketched_guesses(self.all)

    def _sketched_guesses(self, candidates: Candidates) -> Guesses:
        return Guesses(*(_sketched(sketch, candidates.trees) for sketch in self._sketches))

    def unseen(self, codes: Codes, seen: Codes) -> NDArray[np.bool_]:
        """Which configurations are not among the seen ones.

        Args:
            codes: The configurations, float64 of shape (n_configs, n_params).
            seen: The seen ones, likewise; NaN stands for every value of a parameter.

        Returns:
            bool of shape (n_configs,).
        """
        asked = ~np.isnan(seen)
        whole = asked.all(axis=1)
        result = self._unseen(codes, seen[whole])
        for columns in np.unique(asked[~whole], axis=0):
            alike = seen[(asked == columns).all(axis=1)]
            known = {row.tobytes() for row in alike[:, columns]}
            unknown = [row.tobytes() not in known for row in codes[:, columns]]
            result &= np.array(unknown, dtype=bool)
        return result

    def _unseen(self, codes: Codes, seen: Codes) -> NDArray[np.bool_]:
        """`unseen` where no value is left open."""
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

    def named_features(self, codes: Codes) -> dict[str, float]:
        """The features of one configuration as the user's function gave them."""
        if self._features is None:
            return {}
        return dict(zip(self._feature_names, self._raw(codes[None])[0].tolist(), strict=True))

    @property
    def _further_columns(self) -> list[int]:
        numbers = self.further_objectives
        return [self._feature_names.index(f"{PRIOR_FEATURE}_{n + 1}") for n in numbers]

    @property
    def _prior_column(self) -> int | None:
        """Which column of the features is the prior; known once a configuration was described."""
        if PRIOR_FEATURE not in self._feature_names:
            return None
        return self._feature_names.index(PRIOR_FEATURE)

    @property
    def _limit_columns(self) -> list[int]:
        return [self._feature_names.index(CONSTRAINT_PRIOR + name) for name in self.limit_names]

    @cached_property
    def _reference_candidates(self) -> Candidates:
        if self.is_described and self.is_enumerable:
            return self.all
        # A sample of its own: the study's random numbers are for its proposals.
        rng = np.random.RandomState(0)
        pool = self._pool(rng)
        order = rng.permutation(len(pool))
        chosen = pool[order[:_N_SKETCHED]]
        rest = pool[order[_N_SKETCHED:]]
        for _ in range(_SKETCH_ROUNDS if self._features is not None else 0):
            raw = self._raw(chosen.codes)
            if self._prior_column is None or len(rest) == 0:
                break
            values = np.column_stack(
                [self._prior(raw, reference=raw), self._further(raw, reference=raw)]
            )
            limits = self._limits(raw, reference=raw)
            sketches = [_fit_sketch(chosen.trees, c) for c in (*values.T, *limits.T)]
            sketched = _sketched(sketches, rest.trees)
            n = values.shape[1]
            # Weights of its own for each, so that the whole of a front is looked at.
            weights = rng.dirichlet(np.ones(n), len(rest)) if n > 1 else np.ones(1)
            front = Tchebycheff.fit(values, weights)
            spread = float(np.std(front(values))) or 1.0 if n == 1 else 0.1
            merit = first_look(front(sketched[:, :n]) / spread, sketched[:, n:], limits)
            order = np.argsort(merit, kind="stable")
            chosen = chosen.append(rest[order[:_N_IN_ROUND]])
            rest = rest[order[_N_IN_ROUND:]]
        return chosen

    def _pool(self, rng: np.random.RandomState) -> Candidates:
        if self.is_enumerable:
            if len(self.all) <= _SKETCH_POOL:
                return self.all
            return self.all[rng.choice(len(self.all), _SKETCH_POOL, replace=False)]
        drawn = random_codes(self.encoding, _SKETCH_POOL, rng)
        codes = np.unique(np.concatenate([drawn, self.suggested.codes]), axis=0)
        valid = self.only_valid(codes)
        # Where hardly any is valid, what the rest would be like is better than nothing.
        return self.candidates(valid if len(valid) >= _N_IN_ROUND else codes)

    @cached_property
    def _reference_features(self) -> NDArray[np.float64]:
        return self._raw(self._reference_candidates.codes)

    @cached_property
    def _standard(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return center_and_spread(self._reference_features)

    @cached_property
    def _reference_prior(self) -> NDArray[np.float64]:
        return self._prior(self._reference_features, reference=self._reference_features)

    @cached_property
    def _transfer(self) -> Transfer | None:
        """What the sources say; made after the reference was described, as it needs the names."""
        if not self._sources:
            return None
        transfer = Transfer(self._sources, self.encoding, self._feature_names, self._prior_column)
        return None if transfer.is_empty else transfer

    @cached_property
    def _sketches(self) -> list[list[xgboost.Booster]]:
        """What guesses each part of the guesses of any configuration, column by column."""
        inputs, guesses = self.reference.candidates.trees, self.reference.guesses
        parts = (guesses.values, guesses.further, guesses.limits)
        return [[_fit_sketch(inputs, column) for column in part.T] for part in parts]

    def _with_guesses(self, candidates: Candidates, raw: NDArray[np.float64]) -> Described:
        features, prior = self._standardised(raw), None
        columns = []
        if self._prior_column is not None:
            prior = self._prior(raw, reference=self._reference_features)
            columns.append(prior)
        if self._transfer is not None:
            scores = self._scores(candidates, features, prior)
            columns.append(scores if self._scale is None else self._scale(scores))
        values = np.stack(columns, axis=1) if columns else np.empty((len(candidates), 0))
        further = self._further(raw, reference=self._reference_features)
        limits = self._limits(raw, reference=self._reference_features)
        return Described(candidates, features, Guesses(values, further, limits))

    def _standardised(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        center, spread = self._standard
        return (raw - center) / spread

    def _scores(
        self,
        candidates: Candidates,
        features: NDArray[np.float64],
        prior: NDArray[np.float64] | None,
    ) -> NDArray[np.float64]:
        """What the sources guess, as normal scores."""
        assert self._transfer is not None
        if prior is not None:
            prior = normal_scores(prior, self._reference_prior)
        return self._transfer.guess(candidates.trees, features, prior)

    @cached_property
    def _scale(self) -> Scale | None:
        """From the scores of the sources' guesses to the prior's values."""
        if self._prior_column is None:
            return None
        features = self._standardised(self._reference_features)
        scores = self._scores(self._reference_candidates, features, self._reference_prior)
        return Scale.fit(scores, self._reference_prior)

    def _prior(
        self, raw: NDArray[np.float64], *, reference: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The prior, to be minimised; where it is unknown, its mean over a reference."""
        assert self._prior_column is not None
        return self._signs[0] * _filled(raw, reference, [self._prior_column])[:, 0]

    def _further(
        self, raw: NDArray[np.float64], *, reference: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The priors of the other objectives, likewise."""
        signs = np.array([self._signs[n] for n in self.further_objectives])
        return signs * _filled(raw, reference, self._further_columns)

    def _limits(
        self, raw: NDArray[np.float64], *, reference: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What is guessed of constraints, likewise."""
        return _filled(raw, reference, self._limit_columns)

    def _raw(self, codes: Codes) -> NDArray[np.float64]:
        if self._features is None:
            return np.empty((len(codes), 0))
        new = [row for row in codes if row.tobytes() not in self._raw_features]
        for done, row in enumerate(new):
            self._tell(done, len(new))
            self._raw_one(row)
        self._tell(len(new), len(new))
        rows = [self._raw_one(row) for row in codes]
        return np.array(rows, dtype=np.float64).reshape(len(codes), len(self._feature_names))

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None and total:
            self._progress(done, total)

    def _raw_one(self, codes: Codes) -> tuple[float, ...]:
        key = codes.tobytes()
        if key not in self._raw_features:
            assert self._features is not None
            named = _numbers(self._features(self._params(codes)))
            names = tuple(sorted(named))
            if not self._raw_features:
                self._feature_names = names
            if names != self._feature_names:
                different = sorted(set(names) ^ set(self._feature_names))
                raise InputError(
                    f"features: {different} given for some configurations only; give every "
                    "configuration the same names (NaN where a number is unknown)"
                )
            self._raw_features[key] = tuple(named[name] for name in names)
        return self._raw_features[key]

    def _params(self, codes: Codes) -> dict[str, Any]:
        return {**self._constants, **self.encoding.decode(codes)}


def _numbers(named: object) -> dict[str, float]:
    """What the user's function gave as numbers, NaN where they are unknown or infinite."""
    if not isinstance(named, Mapping):
        raise InputError(f"features: it gave {named!r}; give a mapping from names to numbers")
    numbers = {}
    for name, value in named.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"features: {name!r} is {value!r}; give a number, or NaN") from None
        if not isinstance(name, str):
            raise InputError(f"features: the name {name!r} is no string; name features by strings")
        numbers[name] = min(max(number, -LARGEST), LARGEST) if math.isfinite(number) else math.nan
    return numbers


def _filled(
    raw: NDArray[np.float64], reference: NDArray[np.float64], columns: Sequence[int]
) -> NDArray[np.float64]:
    """Some columns of features; what is unknown is the mean over a reference."""
    mean, _ = center_and_spread(reference[:, columns])
    return np.where(np.isnan(raw[:, columns]), mean, raw[:, columns])


def _fit_sketch(inputs: NDArray[np.float32], values: NDArray[np.float64]) -> xgboost.Booster:
    import xgboost

    data = xgboost.DMatrix(inputs, values, nthread=1)
    booster = xgboost.Booster(_SKETCH_PARAMS, [data])
    for iteration in range(_N_SKETCH_TREES):
        booster.update(data, iteration)
    return booster


def _sketched(
    trees: Sequence[xgboost.Booster], inputs: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The columns that each of the boosters guesses; float64 of shape (n_configs, n_boosters)."""
    columns = [predicted.astype(np.float64) for predicted in predictions(trees, inputs)]
    return np.stack(columns, axis=1) if columns else np.empty((len(inputs), 0))
