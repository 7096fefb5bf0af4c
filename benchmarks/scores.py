"""What a run is worth: regret, trials and seconds until close to the best, repeats, overhead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from benchmarks import tables
from benchmarks.replay import exact_values
from benchmarks.replay import halves
from benchmarks.replay import HORIZON
from benchmarks.replay import Run
from benchmarks.tables import Table
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import paired_difference_interval


# Runs of each model when the objective measures a latency, warm-up included.
_LATENCY_RUNS = 25
_BOOTSTRAP_SAMPLES = 1000
_SAME = 1e-9


@dataclass(frozen=True)
class Score:
    """A run with what its table says about it.

    Attributes:
        run: The run.
        regret: Points of top-1 accuracy that the incumbent lacks after each trial, float64 of
            shape (trials,): of the best of all configurations for the notion ``exact``, with as
            many trials as the table has configurations; of what an exhaustive search on the same
            half would choose, on the other half, for ``half``.
        is_tied: For ``exact``, whether a paired 95 % interval cannot tell the incumbent after each
            trial from the best of all configurations, bool of the shape of `regret`; for ``half``,
            all false.
        seconds: Recorded seconds of each trial of the run and the sampler's own, float64 of shape
            (trials of the run,).
    """

    run: Run
    regret: NDArray[np.float64]
    is_tied: NDArray[np.bool_]
    seconds: NDArray[np.float64]

    def trials_within(self, points: float) -> tuple[int, float, bool]:
        """Trials and seconds until the regret is at most so many points, and whether it was.

        A run that never was counts with one trial more than there are configurations.
        """
        return self._until(self.regret <= points + _SAME)

    def trials_to_tie(self) -> tuple[int, float, bool]:
        """The same until the incumbent cannot be told from the best of all configurations."""
        return self._until(self.is_tied)

    def _until(self, reached: NDArray[np.bool_]) -> tuple[int, float, bool]:
        if not reached.any():
            return len(reached) + 1, float(self.seconds.sum()), False
        number = int(np.argmax(reached)) + 1
        return number, float(self.seconds[:number].sum()), True

    def repeats(self) -> float:
        """Share of the first trials that ask for a configuration again."""
        rows = self.run.rows[:HORIZON]
        return 1 - len(set(rows)) / len(rows)

    def overhead_ms(self) -> float:
        """Median milliseconds that the sampler takes for one of the first trials."""
        return float(np.median(self.run.milliseconds[:HORIZON]))


def score(table: Table, run: Run) -> Score:
    """Looks a run up in its table."""
    rows = np.array(run.rows)
    seconds = _seconds(table, rows) + np.array(run.milliseconds) / 1e3
    if run.notion == "exact":
        values = exact_values(table)
        incumbents = np.pad(rows[_incumbents(values[rows])], (0, len(values) - len(rows)), "edge")
        regret = 100 * (values.max() - values[incumbents])
        return Score(run, regret, _tied(table.name, run.digest)[incumbents], seconds)
    seen, hidden = halves(table, run.seed)
    incumbents = rows[_incumbents(seen[rows])]
    exhaustive = hidden[seen >= seen.max() - _SAME].mean()
    regret = 100 * (exhaustive - hidden[incumbents])
    return Score(run, regret, np.zeros(len(regret), dtype=bool), seconds)


def interval_of_mean(
    blocks: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of the blocks' means with a 95 % interval from resampling within each block.

    The blocks stay as they are: the interval is about other seeds on the same tables.

    Args:
        blocks: For each table the curves of its runs, shape (runs, trials).

    Returns:
        Lower end, mean and upper end, each of shape (trials,).
    """
    rng = np.random.default_rng(0)
    resampled = np.mean(
        [
            block[rng.integers(len(block), size=(_BOOTSTRAP_SAMPLES, len(block)))].mean(axis=1)
            for block in blocks
        ],
        axis=0,
    )
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return low, np.mean([block.mean(axis=0) for block in blocks], axis=0), high


def against_the_best(table: Table, row: int) -> tuple[float, float, Interval]:
    """Accuracy of a configuration and of the best, and the interval of best minus it."""
    values = exact_values(table)
    best = int(np.argmax(values))
    difference = paired_difference_interval(table.correct(best), table.correct(row))
    return float(values[row]), float(values[best]), difference


def among_the_best(table: Table, row: int) -> float:
    """The p-value of "no configuration is truly better than this one", from 0 to 1.

    The best of 96 on some inputs owes a part of its lead to luck on these, so that a test against
    it alone finds differences where there are none. Here the largest lead of any configuration, in
    standard errors, is compared with the largest that chance gives: multiple comparisons with the
    best (Hsu, *Constrained simultaneous confidence intervals for multiple comparisons with the
    best*, Annals of Statistics 12(3), 1984), its distribution by resampling the inputs.
    """
    correct = table.all_correct.astype(np.float64)
    lead = correct - correct[row]
    lead = lead[np.any(lead != 0, axis=1)]
    n = lead.shape[1]
    error = lead.std(axis=1) / np.sqrt(n)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAP_SAMPLES)
    by_chance = (counts @ lead.T / n - lead.mean(axis=1)) / error
    largest = (lead.mean(axis=1) / error).max()
    return float((by_chance.max(axis=1) >= largest).mean())


@cache
def _tied(name: str, digest: str) -> NDArray[np.bool_]:
    """Which configurations of a table cannot be told from its best, bool of shape (96,)."""
    table = tables.load(name)
    return np.array([against_the_best(table, row)[2].low <= 0 for row in range(len(table.rows))])


def _incumbents(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Position of the best value so far, the first of equals; int64 of shape (trials,)."""
    best = np.maximum.accumulate(values)
    is_new = np.concatenate([[True], values[1:] > best[:-1] + _SAME])
    incumbents: NDArray[np.int64] = np.maximum.accumulate(
        np.where(is_new, np.arange(len(values)), 0)
    )
    return incumbents


def _seconds(table: Table, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Recorded seconds of each trial; measured again is only what builds another model."""
    columns = {
        name: table.rows[name].to_numpy(np.float64)[rows]
        for name in ("build_seconds", "evaluate_seconds", "latency_ms", "latency_ratio")
    }
    both_ms = columns["latency_ms"] * (1 + 1 / columns["latency_ratio"])
    measure = columns["evaluate_seconds"] + _LATENCY_RUNS * np.nan_to_num(both_ms) / 1e3
    digests = table.rows["digest"].to_numpy()[rows]
    is_new = np.array([d not in digests[:n] for n, d in enumerate(digests)])
    seconds: NDArray[np.float64] = columns["build_seconds"] + is_new * measure
    return seconds
