"""What the trials so far make of the candidates: surrogates and acquisition put together.

Objectives, constraints and failures each have a surrogate; the score of a candidate is the
logarithm of its expected improvement times the probability that it is feasible and does not fail.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.acquisition import log_expected_improvement
from optuna_quantune.search.acquisition import log_probability_below
from optuna_quantune.search.acquisition import tchebycheff
from optuna_quantune.search.configurations import Candidates
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.history import History
from optuna_quantune.search.prior import PriorLine
from optuna_quantune.search.surrogate import ModelInputs
from optuna_quantune.search.surrogate import Surrogate
from optuna_quantune.search.targets import TargetTransform


Array: TypeAlias = NDArray[np.float64]

# Trials that the surrogate of the objectives is fitted to at most, as its cost grows with their
# cube: half of them the best, half the latest of the rest.
_MAX_TRIALS = 300


class Scorer:
    """Scores candidates by what the trials say; the best candidate has the highest score.

    Args:
        configurations: The search space.
        reference: Candidates that stand for the whole space: features are standardised by their
            mean and spread.
        history: The trials. At least one of them has values, or there is a prior.
        prior_sign: -1 where the prior is of an objective that is maximised, else 1.
        weights: Weights of the objectives, non-negative, summing to 1.
    """

    def __init__(
        self,
        configurations: Configurations,
        reference: Candidates,
        history: History,
        prior_sign: float,
        weights: Array,
    ) -> None:
        self._n_params = configurations.encoding.n_params
        self._prior_column = configurations.prior_column
        self._prior_sign = prior_sign
        self._center, self._spread = _center_and_spread(reference.features)
        self._reference_prior = self._prior(reference)
        trials = configurations.candidates(history.codes)
        pending = self._inputs(configurations.candidates(history.pending))
        self._fit_objective(history, trials, pending, weights)
        self._fit_limits(history, trials, configurations.candidates(history.failed), pending)

    def score(self, candidates: Candidates) -> Array:
        """float64 of shape (n_candidates,)."""
        inputs = self._inputs(candidates)
        score = np.zeros(len(candidates))
        for limit in self._limits:
            score += log_probability_below(*limit.predict(inputs), 0.0)
        if self._surrogate is None:
            # No trial yet: nothing but the prior is known.
            return score - self._prior(candidates)
        if not self._any_feasible:
            # Whatever its value, a first feasible trial is an improvement.
            return score
        mean, std = self._surrogate.predict(inputs)
        mean = mean + self._expected(candidates)
        return score + log_expected_improvement(mean, std, self._best)

    def screen(self, candidates: Candidates) -> Array:
        """A cheap stand-in for many candidates: about what they will come out at, less is better.

        float64 of shape (n_candidates,).
        """
        if self._surrogate is None:
            return self._prior(candidates)
        return self._surrogate.screen(candidates.kernel) + self._expected(candidates)

    def _fit_objective(
        self, history: History, trials: Candidates, pending: ModelInputs, weights: Array
    ) -> None:
        self._surrogate = None
        if len(trials) == 0:
            return
        values = history.values
        if values.shape[1] > 1:
            scaled = [TargetTransform.fit(column)(column) for column in values.T]
            self._line = None
            combined = tchebycheff(np.stack(scaled, axis=1), weights)
            self._transform = TargetTransform.fit(combined)
        else:
            combined = values[:, 0]
            self._line = self._fit_line(trials, combined)
            self._transform = TargetTransform.fit(
                combined, None if self._line is None else self._line.spread
            )
        targets = self._transform(combined)
        feasible = history.feasible
        self._any_feasible = bool(feasible.any())
        self._best = float(targets[feasible].min()) if self._any_feasible else np.nan
        rows = _best_and_latest(targets)
        self._surrogate = Surrogate(
            self._inputs(trials[rows]),
            targets[rows] - self._expected(trials[rows]),
            self._n_params,
            pending=pending,
        )

    def _fit_line(self, trials: Candidates, values: Array) -> PriorLine | None:
        finite = np.isfinite(values)
        if self._prior_column is None or not finite.any():
            return None
        return PriorLine.fit(self._reference_prior, self._prior(trials)[finite], values[finite])

    def _expected(self, candidates: Candidates) -> Array:
        """The prior mean of the targets."""
        if self._line is None:
            return np.zeros(len(candidates))
        return self._transform(self._line(self._prior(candidates)))

    def _fit_limits(
        self, history: History, trials: Candidates, failed: Candidates, pending: ModelInputs
    ) -> None:
        """Surrogates of what must not exceed zero: constraints, and +1 / -1 for failure."""
        self._limits = []
        for values in history.constraints.values():
            known = ~np.isnan(values)
            if np.any(values[known] > 0.0):
                scale = np.median(np.abs(values[known & (values != 0.0)]))
                targets = np.arcsinh(np.clip(values[known] / (scale or 1.0), -1e6, 1e6))
                inputs = self._inputs(trials[known])
                self._limits.append(Surrogate(inputs, targets, self._n_params, pending=pending))
        if len(failed) and len(trials):
            inputs = self._inputs(trials).append(self._inputs(failed))
            targets = np.repeat([-1.0, 1.0], [len(trials), len(failed)])
            self._limits.append(Surrogate(inputs, targets, self._n_params, pending=pending))

    def _prior(self, candidates: Candidates) -> Array:
        """The prior of candidates, to be minimised; the mean of the space where it is unknown."""
        if self._prior_column is None:
            return np.zeros(len(candidates))
        column = candidates.features[:, self._prior_column]
        known = np.where(np.isnan(column), self._center[self._prior_column], column)
        return self._prior_sign * known

    def _inputs(self, candidates: Candidates) -> ModelInputs:
        standardised = (candidates.features - self._center) / self._spread
        return ModelInputs(
            candidates.kernel,
            np.concatenate([candidates.trees, candidates.features.astype(np.float32)], axis=1),
            np.nan_to_num(standardised, nan=0.0).astype(np.float32),
        )


def _best_and_latest(targets: Array) -> NDArray[np.int64]:
    if len(targets) <= _MAX_TRIALS:
        return np.arange(len(targets))
    order = np.argsort(targets, kind="stable")
    rest = np.sort(order[_MAX_TRIALS // 2 :])
    return np.sort(np.concatenate([order[: _MAX_TRIALS // 2], rest[-_MAX_TRIALS // 2 :]]))


def _center_and_spread(features: Array) -> tuple[Array, Array]:
    known = ~np.isnan(features)
    n = np.maximum(known.sum(axis=0), 1)
    center = np.where(known, features, 0.0).sum(axis=0) / n
    spread = np.sqrt((np.where(known, features - center, 0.0) ** 2).sum(axis=0) / n)
    return center, np.where(spread > 0.0, spread, 1.0)
