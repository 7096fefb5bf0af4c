"""How close to the best of all a search can come by what can be known beforehand.

The best of 96 configurations on some inputs owes a part of its lead to luck on these. Whoever
knows how good every configuration is on other inputs does not know that luck, and needs trials for
it. How many, is shown with an oracle: the inputs of a table are split in halves as for the runs of
the notion ``half`` (`benchmarks.replay`), and the oracle tries the configurations in the order of
their measured accuracies on the half that the search does not see.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.replay import halves
from benchmarks.replay import HORIZON
from benchmarks.replay import inputs_of_halves
from benchmarks.replay import Run
from benchmarks.tables import Table
from optuna_quantune.evaluation.metrics import paired_difference_interval


ORACLE = "accuracy on the other half, known"


def section(
    loaded: Mapping[str, Table],
    runs: Iterable[Run],
    samplers: Sequence[str],
    budgets: Sequence[int],
) -> list[str]:
    """Regret on the half that the search sees, beside that of the oracle, as Markdown.

    Args:
        loaded: The tables by name.
        runs: Runs of the notion ``half``.
        samplers: Whose runs to show.
        budgets: Numbers of trials.
    """
    curves: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    apart: dict[str, list[bool]] = {}
    splits: set[tuple[str, int]] = set()
    for run in (run for run in runs if run.sampler in samplers):
        splits.add((run.table, run.seed))
        table = loaded[run.table]
        curve = regret_on_the_seen_half(table, run.seed, run.rows)
        curves.setdefault(run.sampler, {}).setdefault(run.table, []).append(curve)
        apart.setdefault(run.sampler, []).append(is_told_apart(table, run.seed, run.rows[0]))
    for name, seed in sorted(splits):
        rows = order_of_oracle(loaded[name], seed)[:HORIZON]
        curve = regret_on_the_seen_half(loaded[name], seed, rows)
        curves.setdefault(ORACLE, {}).setdefault(name, []).append(curve)
        apart.setdefault(ORACLE, []).append(is_told_apart(loaded[name], seed, rows[0]))
    lines = [
        "## What can be known beforehand",
        "",
        "The best of all on some inputs is partly a lucky one, and luck is found by trials only.",
        "Here regret is counted on the random half of the inputs that the search sees. An oracle",
        "that knows the measured accuracy of every configuration on the other half tries them in",
        "that order. `first told apart`: share of the runs in which a paired 95 % interval tells",
        "the first trial from the best of all on the seen half.",
        "",
        "| order of trials | "
        + " | ".join(f"{n} trials" for n in budgets)
        + " | first told apart |",
        "| --- |" + " --- |" * (len(budgets) + 1),
    ]
    for name in (ORACLE, *(sampler for sampler in samplers if sampler in curves)):
        means = np.mean([np.mean(of_table, axis=0) for of_table in curves[name].values()], axis=0)
        cells = " | ".join(f"{means[n - 1]:.2f}" for n in budgets)
        lines.append(f"| {name} | {cells} | {np.mean(apart[name]):.0%} |")
    return [*lines, ""]


def order_of_oracle(table: Table, seed: int) -> NDArray[np.int64]:
    """Rows by falling accuracy on the half that is not seen, equals in random order."""
    hidden = halves(table, seed)[1]
    shuffled = np.random.default_rng(seed).permutation(len(hidden))
    order: NDArray[np.int64] = shuffled[np.argsort(-hidden[shuffled], kind="stable")]
    return order


def regret_on_the_seen_half(
    table: Table, seed: int, rows: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float64]:
    """Points of top-1 from the best on the seen half after each trial, shape (trials,)."""
    seen = halves(table, seed)[0]
    regret: NDArray[np.float64] = 100 * (seen.max() - np.maximum.accumulate(seen[np.array(rows)]))
    return regret


def is_told_apart(table: Table, seed: int, row: int) -> bool:
    """Whether a paired 95 % interval on the seen half tells a row from the best there."""
    correct = table.all_correct[:, inputs_of_halves(table, seed)[0]]
    best = int(np.argmax(correct.mean(axis=1)))
    return paired_difference_interval(correct[best], correct[row]).low > 0
