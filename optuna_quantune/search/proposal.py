"""From the history to the next configuration: candidates, startup design, scores, local search.

Nothing here knows of a study; the sampler reads the history and publishes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.candidates import Codes
from optuna_quantune.search.candidates import emptiness
from optuna_quantune.search.candidates import neighbours
from optuna_quantune.search.candidates import random_codes
from optuna_quantune.search.configurations import Candidates
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.history import History
from optuna_quantune.search.scoring import Scorer


# Up to this many candidates, all are scored; of more, those that a screening leaves.
_MAX_SCORED = 2560
# Uniform candidates among those, so that the screening hides no part of the space for good.
_N_RANDOM = 1024
# Further draws of as many where few are valid or, with most parameters fixed, few exist.
_MAX_REDRAWS = 15
# Best trials whose neighbours are candidates, and best candidates that the local search starts at.
_N_INCUMBENTS = 8
# Rounds of local search on the acquisition function.
_N_LOCAL_ROUNDS = 5


class Proposer:
    """Chooses the next configuration.

    Args:
        configurations: The search space.
        history: Its trials.
        fixed: Codes that are given, by column.
        signs: -1 for objectives that are maximised, else 1, float64 of shape (n_objectives,).
        n_startup_trials: Trials with values before the surrogate is asked, if there is no prior.
        avoid_seen: Whether a configuration that was seen is out of the question.
        rng: Random number generator.
    """

    def __init__(
        self,
        configurations: Configurations,
        history: History,
        *,
        fixed: Mapping[int, float],
        signs: NDArray[np.float64],
        n_startup_trials: int,
        avoid_seen: bool,
        rng: np.random.RandomState,
    ) -> None:
        self._configurations = configurations
        self._encoding = configurations.encoding
        self._history = history
        self._fixed = fixed
        self._signs = signs
        self._n_startup_trials = n_startup_trials
        self._avoid_seen = avoid_seen
        self._rng = rng

    def choose(self) -> Codes | None:
        """The next configuration.

        Returns:
            Its codes, float64 of shape (n_params,), or ``None`` when there is none left.
        """
        is_enumerable = self._configurations.is_enumerable
        space = self._configurations.all if is_enumerable else self._drawn()
        rows = np.flatnonzero(self._is_admissible(space.codes))
        if len(rows) == 0:
            return None
        has_prior = self._configurations.prior_column is not None
        if not has_prior and len(self._history.codes) < max(self._n_startup_trials, 1):
            return self._most_isolated(space, rows)

        n_objectives = len(self._signs)
        weights = self._rng.dirichlet(np.ones(n_objectives)) if n_objectives > 1 else np.ones(1)
        scorer = Scorer(self._configurations, space, self._history, self._signs[0], weights)
        is_exhaustive = is_enumerable and len(rows) <= _MAX_SCORED
        if is_exhaustive:
            candidates = space[rows]
        else:
            candidates = space[self._screened(scorer, space, rows)].append(
                self._neighbours(self._incumbents())
            )
        best = self._best(candidates, scorer.score(candidates))
        for _ in range(0 if is_exhaustive else _N_LOCAL_ROUNDS):
            best = best.append(self._neighbours(best.codes))
            best = self._best(best, scorer.score(best))
        return np.asarray(best.codes[0])

    def _most_isolated(self, space: Candidates, rows: NDArray[np.int64]) -> Codes:
        history = self._history
        taken = np.concatenate([history.codes, history.failed, history.pending])
        if len(rows) > _MAX_SCORED:
            rows = self._rng.choice(rows, _MAX_SCORED, replace=False)
        candidates = space[rows]
        scores = emptiness(candidates.kernel, self._encoding.kernel_features(taken))
        return np.asarray(self._best(candidates, scores).codes[0])

    def _screened(
        self, scorer: Scorer, space: Candidates, rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The rows with the best screening values, and some at random."""
        if len(rows) <= _MAX_SCORED:
            return rows
        values = scorer.screen(space)[rows]
        n_promising = _MAX_SCORED - _N_RANDOM
        promising = rows[np.argpartition(values, n_promising)[:n_promising]]
        return np.union1d(promising, self._rng.choice(rows, _N_RANDOM, replace=False))

    def _incumbents(self) -> Codes:
        order = np.argsort(self._history.values[:, 0], kind="stable")
        return np.asarray(self._history.codes[order[:_N_INCUMBENTS]])

    def _drawn(self) -> Candidates:
        """Random configurations of a large space; more of them where few are valid."""
        drawn = self._candidates(random_codes(self._encoding, _N_RANDOM, self._rng))
        for _ in range(_MAX_REDRAWS):
            if len(drawn) >= _N_RANDOM // 4:
                break
            more = random_codes(self._encoding, _N_RANDOM, self._rng)
            drawn = drawn.append(self._candidates(more))
        return drawn

    def _neighbours(self, codes: Codes) -> Candidates:
        candidates = self._candidates(neighbours(self._encoding, codes, self._rng))
        return candidates[np.flatnonzero(self._is_admissible(candidates.codes))]

    def _candidates(self, codes: Codes) -> Candidates:
        for column, code in self._fixed.items():
            codes[:, column] = code
        return self._configurations.candidates(
            self._configurations.only_valid(np.unique(codes, axis=0))
        )

    def _is_admissible(self, codes: Codes) -> NDArray[np.bool_]:
        admissible = np.ones(len(codes), dtype=bool)
        for column, code in self._fixed.items():
            admissible &= codes[:, column] == code
        if self._avoid_seen:
            admissible &= self._configurations.unseen(codes, self._history.seen)
        return admissible

    def _best(self, candidates: Candidates, scores: NDArray[np.float64]) -> Candidates:
        """The candidates with the highest scores, best first, ties in random order."""
        shuffled = self._rng.permutation(len(candidates))
        order = np.argsort(-scores[shuffled], kind="stable")
        return candidates[shuffled[order[:_N_INCUMBENTS]]]
