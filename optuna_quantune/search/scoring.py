"""What the trials so far make of the candidates: surrogates and acquisition put together.

Objectives, constraints and failures each have a surrogate; the score of a candidate is the
logarithm of its expected improvement times the probability that it is feasible and does not fail.

What is guessed of values beforehand (a prior, earlier studies) enters as mean functions of the
surrogate (`expectations.py`), and beside them the mean function that nothing is known. Trials
decide between them. What is guessed of constraints does likewise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.acquisition import log_expected_improvement
from optuna_quantune.search.acquisition import log_probability_below
from optuna_quantune.search.candidates import agree
from optuna_quantune.search.conditions import Conditions
from optuna_quantune.search.configurations import Candidates
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.configurations import CONSTRAINT_PRIOR
from optuna_quantune.search.configurations import Described
from optuna_quantune.search.configurations import Guesses
from optuna_quantune.search.expectations import before_trials
from optuna_quantune.search.expectations import combine
from optuna_quantune.search.history import History
from optuna_quantune.search.prior import LimitLine
from optuna_quantune.search.surrogate import ModelInputs
from optuna_quantune.search.surrogate import Surrogate
from optuna_quantune.search.targets import TargetTransform
from optuna_quantune.search.targets import widest_spread


Array: TypeAlias = NDArray[np.float64]

# Trials that a surrogate is fitted to at most, as its cost grows with their cube: half of them the
# best, or nearest to the limit of a constraint, half the latest of the rest. As many running and
# enqueued ones count at most.
_MAX_TRIALS = 300
# Belief, before any trial, in the mean function that nothing is known; 1 in each guess.
_BELIEF_IN_NOTHING = 0.2
# Where neither the end of a space nor a guess leads away from what was found, every third time
# only improvements count that are larger than this share of the spread that values had. In units
# of the targets' spread it is limited, as that may be next to nothing.
_AMBITIOUS = 3
_AMBITION = 0.1
_LARGEST_AMBITION = 1e3
# Standard deviation, in units of the targets' spread, of values whose uncertainty is unknown.
_UNKNOWN_NOISE = 1.0


class Scorer:
    """Scores candidates by what the trials say; the best candidate has the highest score.

    Args:
        configurations: The search space.
        history: The trials. At least one of them has values, or there is a guess.
        weights: Weights of the objectives, non-negative, summing to 1.
        fixed: Codes that all candidates share, by column: what is to be improved on is the best
            trial with these, if there is any.
    """

    def __init__(
        self,
        configurations: Configurations,
        history: History,
        weights: Array,
        fixed: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        self._configurations = configurations
        self._fixed = fixed
        self._n_params = configurations.encoding.n_params
        history = replace(history, pending=history.pending[:_MAX_TRIALS])
        self._conditions = Conditions(configurations.encoding, history.asked)
        trials, running = self._described(history.codes), self._described(history.pending)
        self._fit_limits(history, trials, self._described(history.failed), _inputs(running))
        if len(trials) == 0 and len(weights) == 1:
            # All workers would begin with what is guessed best, which is much alike.
            history, trials, running = _as_guessed(history, running), running, trials
        self._fit_objective(history, trials, _inputs(running), weights)

    def score(self, candidates: Described) -> Array:
        """float64 of shape (n_candidates,)."""
        inputs = _inputs(self._without_inactive(candidates))
        if self._surrogate is None:
            score = -before_trials(self._configurations, candidates.guesses, self._weights)
            for limit in self._limits:
                if limit.line is None:  # failures; what is guessed of constraints is in already
                    score += limit.log_probability(inputs, candidates.guesses)
            return score
        score = np.zeros(len(candidates))
        for limit in self._limits:
            score += limit.log_probability(inputs, candidates.guesses)
        mean, std = self._surrogate.predict(inputs, self._means(candidates.guesses))
        return score + log_expected_improvement(mean, std, self._best)

    def screen(self, candidates: Candidates) -> Array:
        """A cheap stand-in for many candidates: about what they will come out at, less is better.

        float64 of shape (n_candidates,).
        """
        guesses = self._configurations.guesses(candidates)
        if self._surrogate is None:
            return before_trials(self._configurations, guesses, self._weights)
        expected = self._means(guesses) @ self._surrogate.belief
        for limit in self._limits:
            expected = expected - limit.log_probability_as_guessed(guesses)
        kernel = self._conditions.kernel_features(candidates.codes, candidates.kernel)
        return self._surrogate.screen(kernel) + expected

    def _described(self, codes: Array) -> Described:
        described = self._configurations.describe(self._configurations.candidates(codes))
        return self._without_inactive(described)

    def _without_inactive(self, described: Described) -> Described:
        """Configurations as the models see them, without parameters that they do not have."""
        codes, conditions = described.candidates.codes, self._conditions
        seen = Candidates(
            codes,
            conditions.kernel_features(codes, described.candidates.kernel),
            conditions.tree_features(codes, described.candidates.trees),
        )
        return replace(described, candidates=seen)

    def _fit_objective(
        self, history: History, trials: Described, pending: ModelInputs, weights: Array
    ) -> None:
        self._surrogate = None
        self._weights = weights
        if len(trials) == 0:
            return
        combined = combine(self._configurations, history, trials, weights)
        self._expectations = combined.expectations
        self._transform = TargetTransform.fit(combined.values, combined.spread)
        targets, noise = self._transform(combined.values), combined.noise
        # An estimate is no result: a complete trial is what is to be improved on.
        complete = history.feasible & (history.noise == 0.0)
        eligible = complete if complete.any() else history.feasible
        alike = eligible & agree(history.codes, self._fixed)
        eligible = alike if alike.any() else eligible
        # A first feasible trial is an improvement, and the more so the better it is.
        self._best = float(targets[eligible].min() if eligible.any() else targets.max())
        is_endless = not self._configurations.is_enumerable and not self._expectations
        if is_endless and eligible.any() and len(targets) % _AMBITIOUS == 0:
            # Or what a good region can still gain, ever less, would keep the search there.
            scale = self._transform.scale
            wanted = _AMBITION * widest_spread(combined.values)
            self._best -= min(wanted, _LARGEST_AMBITION * scale) / scale
        rows = _best_and_latest(targets)
        self._surrogate = Surrogate(
            _inputs(trials[rows]),
            targets[rows],
            self._n_params,
            means=self._means(trials.guesses)[rows],
            beliefs=np.array([_BELIEF_IN_NOTHING] + [1.0] * len(self._expectations)),
            noise=np.where(
                np.isfinite(noise),
                np.nan_to_num(noise, posinf=0.0) * self._transform.slope(combined.values),
                _UNKNOWN_NOISE,
            )[rows],
            pending=pending,
            of_numbers=self._configurations.encoding.has_numbers,
        )

    def _means(self, guesses: Guesses) -> Array:
        """The targets as the mean functions expect them, shape (n_configs, 1 + n_guesses)."""
        means = np.zeros((len(guesses), 1 + len(self._expectations)))
        for column, expected in enumerate(self._expectations):
            means[:, 1 + column] = self._transform(expected(guesses))
        return means

    def _fit_limits(
        self, history: History, trials: Described, failed: Described, pending: ModelInputs
    ) -> None:
        """What must not exceed zero: constraints, and +1 / -1 for failure."""
        self._limits: list[_Limit] = []
        guessed = self._configurations.limit_names
        unknown = np.full(len(trials), np.nan)
        for name in sorted({*guessed, *history.constraints}):
            values = history.constraints.get(name, unknown)
            known = ~np.isnan(values)
            column = guessed.index(name) if name in guessed else None
            if column is not None and not known.any() and np.any(history.noise == 0.0):
                warnings.warn(
                    f"features: {CONSTRAINT_PRIOR + name!r} guesses a constraint that no complete "
                    "trial has set by Trial.set_constraint; it is ignored",
                    stacklevel=2,
                )
                continue
            if column is None and not np.any(values[known] > 0.0):
                continue  # as far as is known, all keep it
            reference = self._configurations.reference.guesses.limits
            self._limits.append(
                _Limit.fit(
                    trials[known],
                    values[known],
                    guess=None if column is None else (column, reference[:, column]),
                    n_params=self._n_params,
                    pending=pending,
                )
            )
        if len(failed):
            n_failed = min(len(failed), max(_MAX_TRIALS // 2, _MAX_TRIALS - len(trials)))
            trials, failed = _latest(trials, _MAX_TRIALS - n_failed), _latest(failed, n_failed)
            inputs = _inputs(trials).append(_inputs(failed))
            targets = np.repeat([-1.0, 1.0], [len(trials), len(failed)])
            surrogate = Surrogate(inputs, targets, self._n_params, pending=pending)
            self._limits.append(_Limit(surrogate))


@dataclass(frozen=True)
class _Limit:
    """What must not exceed zero, as far as it is known.

    Attributes:
        surrogate: What the trials make of it; None without trials.
        column: Which of the guesses of limits is its, if one is.
        line: What the trials make of that guess.
        scale: The unit of the surrogate.
    """

    surrogate: Surrogate | None
    column: int | None = None
    line: LimitLine | None = None
    scale: float = 1.0

    @classmethod
    def fit(
        cls,
        trials: Described,
        values: Array,
        *,
        guess: tuple[int, Array] | None,
        n_params: int,
        pending: ModelInputs,
    ) -> _Limit:
        """Fits it to trials that have a value of it.

        Args:
            trials: The trials.
            values: Their values, infinities allowed, float64 of shape (n_trials,).
            guess: The column of its guess and the guess over the space, if it is guessed.
            n_params: The number of parameters.
            pending: Configurations that are being measured.
        """
        sizes = np.abs(values[np.isfinite(values) & (values != 0.0)])
        scale = float(np.median(sizes)) if len(sizes) else 1.0
        largest = sizes.max(initial=scale)
        values = np.clip(values, -largest, largest)  # an infinite value is as bad as the worst
        limit = cls(None, scale=scale)
        if guess is not None:
            column, reference = guess
            line = LimitLine.fit(reference, trials.guesses.limits[:, column], values)
            limit = replace(limit, column=column, line=line)
        if len(trials) == 0:
            return limit
        rows = _best_and_latest(np.abs(values))
        trials, values = trials[rows], values[rows]
        means = limit._means(trials.guesses)
        surrogate = Surrogate(
            _inputs(trials),
            limit._target(values),
            n_params,
            means=means,
            beliefs=np.array([_BELIEF_IN_NOTHING, 1.0])[: means.shape[1]],
            pending=pending,
        )
        return replace(limit, surrogate=surrogate)

    def log_probability(self, inputs: ModelInputs, guesses: Guesses) -> Array:
        """Logarithm of the probability that candidates keep it, float64 of shape (n,)."""
        if self.surrogate is None:
            return self.log_probability_as_guessed(guesses)
        predicted = self.surrogate.predict(inputs, self._means(guesses))
        return log_probability_below(*predicted, 0.0)

    def log_probability_as_guessed(self, guesses: Guesses) -> Array:
        """The same by the guess alone; 0 where there is none."""
        if self.line is None:
            return np.zeros(len(guesses))
        return self.line.log_probability(guesses.limits[:, self.column])

    def _target(self, values: Array) -> Array:
        return np.arcsinh(np.clip(values / self.scale, -1e6, 1e6))

    def _means(self, guesses: Guesses) -> Array:
        """What nothing, and the guess, expect of it; float64 of shape (n, 1 or 2)."""
        nothing = np.zeros((len(guesses), 1))
        if self.line is None:
            return nothing
        expected = self._target(self.line.line(guesses.limits[:, self.column]))
        return np.column_stack([nothing, expected])


def _inputs(described: Described) -> ModelInputs:
    features = described.features.astype(np.float32)
    return ModelInputs(
        described.candidates.kernel,
        np.concatenate([described.candidates.trees, features], axis=1),
        np.nan_to_num(features, nan=0.0),
    )


def _as_guessed(history: History, running: Described) -> History:
    """The history if all running trials had come out as guessed."""
    guesses = running.guesses.values[:, -1:]
    return replace(
        history,
        codes=history.pending,
        values=guesses,
        noise=np.zeros(len(guesses)),
        constraints={},
        pending=history.codes,
    )


def _latest(described: Described, n: int) -> Described:
    return described[np.arange(max(len(described) - n, 0), len(described))]


def _best_and_latest(targets: Array) -> NDArray[np.int64]:
    if len(targets) <= _MAX_TRIALS:
        return np.arange(len(targets))
    order = np.argsort(targets, kind="stable")
    rest = np.sort(order[_MAX_TRIALS // 2 :])
    return np.sort(np.concatenate([order[: _MAX_TRIALS // 2], rest[-_MAX_TRIALS // 2 :]]))
