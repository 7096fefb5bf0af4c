"""From the history to the next configuration: candidates, startup design, scores, local search.

Nothing here knows of a study; the sampler reads the history and publishes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.search.candidates import agree
from optuna_quantune.search.candidates import Codes
from optuna_quantune.search.candidates import emptiness
from optuna_quantune.search.candidates import neighbours
from optuna_quantune.search.candidates import random_codes
from optuna_quantune.search.configurations import Candidates
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.configurations import Described
from optuna_quantune.search.history import History
from optuna_quantune.search.scoring import Scorer


# Up to this many candidates, all are scored; of more, as many as a screening leaves, some of them
# uniform, so that the screening hides no part of the space for good.
_MAX_SCORED = 1536
_N_SCORED_RANDOM = 512
# The same where describing a candidate may take a millisecond, and how many of them at random.
_MAX_DESCRIBED = 96
_N_DESCRIBED_RANDOM = 16
# Share of different features from which on these are taken to tell configurations apart.
_TELLING = 0.1
# Uniform configurations that are drawn from a space too large to list; and further draws of as
# many where few are valid or, with most parameters fixed, few exist.
_N_DRAWN = 1024
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
        n_objectives: How many objectives the study has.
        n_startup_trials: Trials with values, or running, before the surrogate is asked, if
            nothing is guessed beforehand.
        avoid_seen: Whether a configuration that was seen is out of the question.
        rng: Random number generator.
    """

    def __init__(
        self,
        configurations: Configurations,
        history: History,
        *,
        fixed: Mapping[int, float],
        n_objectives: int,
        n_startup_trials: int,
        avoid_seen: bool,
        rng: np.random.RandomState,
    ) -> None:
        self._configurations = configurations
        self._encoding = configurations.encoding
        self._history = history
        self._fixed = fixed
        self._n_objectives = n_objectives
        self._n_startup_trials = n_startup_trials
        self._avoid_seen = avoid_seen
        self._rng = rng

    def choose(self) -> Codes | None:
        """The next configuration.

        Returns:
            Its codes, float64 of shape (n_params,), or ``None`` when there is none left.

        Raises:
            InputError: If no valid configuration of a large space is found.
        """
        configurations = self._configurations
        space = configurations.all if configurations.is_enumerable else self._drawn()
        rows = np.flatnonzero(self._is_admissible(space.codes))
        if len(rows) == 0 and not configurations.is_enumerable:
            is_any_valid = len(space) > 0
            space = self._promising()
            rows = np.arange(len(space))
            if len(rows) == 0 and not is_any_valid and not self._fixed:
                raise InputError(
                    "valid: it rejects all configurations that were drawn from the search space, "
                    "and candidates are all used up; accept more or name more as candidates"
                )
        if len(rows) == 0:
            return None
        n_known = len(self._history.codes)
        n_begun = n_known + len(self._history.pending)
        if not configurations.has_guess and (n_known == 0 or n_begun < self._n_startup_trials):
            return self._most_isolated(space, rows)

        n = self._n_objectives
        weights = self._rng.dirichlet(np.ones(n)) if n > 1 else np.ones(1)
        scorer = Scorer(configurations, self._history, weights, self._fixed)
        if not configurations.is_described:
            return self._best_described(scorer, self._improved_by_screening(scorer, space, rows))
        if configurations.is_enumerable and len(rows) <= _MAX_SCORED:
            described = configurations.reference[rows]
            return np.asarray(space.codes[rows][self._order(scorer.score(described))[0]])
        candidates = space[self._screened(scorer, space, rows)].append(self._promising())
        best = self._best(candidates, self._scores(scorer, candidates))
        for _ in range(_N_LOCAL_ROUNDS):
            before = best
            best = best.append(self._neighbours(best.codes))
            best = self._best(best, self._scores(scorer, best))
            if np.array_equal(best.codes, before.codes):
                break
        return np.asarray(best.codes[0])

    def _improved_by_screening(
        self, scorer: Scorer, space: Candidates, rows: NDArray[np.int64]
    ) -> Candidates:
        """Candidates of the best screening values, after a local search on these."""
        pool = space[self._screened(scorer, space, rows)].append(self._promising())
        for _ in range(0 if self._configurations.is_enumerable else _N_LOCAL_ROUNDS):
            best = self._best(pool, -scorer.screen(pool))
            pool = pool.append(self._neighbours(best.codes))
        _, first = np.unique(pool.codes, axis=0, return_index=True)
        return pool[first]

    def _best_described(self, scorer: Scorer, pool: Candidates) -> Codes:
        """The best of those that are worth describing, and of a few others."""
        order = self._order(-scorer.screen(pool))
        promising, rest = order[:_MAX_DESCRIBED], order[_MAX_DESCRIBED:]
        others = self._rng.permutation(rest)[:_N_DESCRIBED_RANDOM]
        described = self._configurations.describe(pool[np.concatenate([promising, others])])
        described = described[self._is_news(described)]
        return np.asarray(self._best(described.candidates, scorer.score(described)).codes[0])

    def _is_news(self, described: Described) -> NDArray[np.bool_]:
        """Which configurations have features that none had before.

        Where features tell most configurations apart, equal ones stand for the same thing by
        another name: a parameter that has no effect beside the others. If they tell few apart, or
        nothing is new, all count as new.
        """
        found = [row.tobytes() for row in described.features]
        every = np.ones(len(found), dtype=bool)
        if not self._avoid_seen or len(set(found)) < _TELLING * len(found):
            return every
        history = self._history
        taken = np.concatenate([history.codes, history.failed, history.pending])
        before = self._configurations.describe(self._configurations.candidates(taken)).features
        seen = {row.tobytes() for row in before}
        news = np.array([row not in seen for row in found])
        return news if news.any() else every

    def _scores(self, scorer: Scorer, candidates: Candidates) -> NDArray[np.float64]:
        return scorer.score(self._configurations.describe(candidates))

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
        n_promising = _MAX_SCORED - _N_SCORED_RANDOM
        promising = rows[np.argpartition(values, n_promising)[:n_promising]]
        return np.union1d(promising, self._rng.choice(rows, _N_SCORED_RANDOM, replace=False))

    def _promising(self) -> Candidates:
        """Neighbours of the best trials, and what the user has named."""
        suggested = self._configurations.suggested
        admissible = suggested[np.flatnonzero(self._is_admissible(suggested.codes))]
        return self._neighbours(self._incumbents()).append(admissible)

    def _incumbents(self) -> Codes:
        order = np.argsort(self._history.values[:, 0], kind="stable")
        others = ~agree(self._history.codes[order], self._fixed)
        order = order[np.argsort(others, kind="stable")]
        return np.asarray(self._history.codes[order[:_N_INCUMBENTS]])

    def _drawn(self) -> Candidates:
        """Random configurations of a large space; more of them where few are valid."""
        drawn = self._candidates(random_codes(self._encoding, _N_DRAWN, self._rng))
        for _ in range(_MAX_REDRAWS):
            if len(drawn) >= _N_DRAWN // 4:
                break
            more = random_codes(self._encoding, _N_DRAWN, self._rng)
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
        admissible = agree(codes, self._fixed)
        if self._avoid_seen:
            admissible &= self._configurations.unseen(codes, self._history.seen)
        return admissible

    def _best(self, candidates: Candidates, scores: NDArray[np.float64]) -> Candidates:
        """The candidates with the highest scores, best first."""
        return candidates[self._order(scores)[:_N_INCUMBENTS]]

    def _order(self, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows from the highest score to the lowest, ties in random order."""
        shuffled = self._rng.permutation(len(scores))
        return np.asarray(shuffled[np.argsort(-scores[shuffled], kind="stable")])
