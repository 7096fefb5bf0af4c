"""What `benchmarks.compare` writes: the runs of all samplers as tables, curves and ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from benchmarks import foreknowledge
from benchmarks import machine
from benchmarks import ranking
from benchmarks.replay import exact_values
from benchmarks.replay import HORIZON
from benchmarks.replay import NOTIONS
from benchmarks.replay import SLOW
from benchmarks.scores import against_the_best
from benchmarks.scores import among_the_best
from benchmarks.scores import interval_of_mean
from benchmarks.scores import Score
from benchmarks.tables import Table


BUDGETS = (1, 3, 5, 10, 15, 25)
TESTED_BUDGETS = BUDGETS[1:]
# The samplers that the others are compared with, the first that has runs.
OURS = ("quantune+transfer", "quantune+features", "quantune")


def rank(scores: list[Score]) -> ranking.Ranking:
    """Samplers by their mean trials until within 0.1 points, ranked within each table."""
    exact = [s for s in scores if s.run.notion == "exact"]
    costs = pivot(exact, lambda s: s.trials_within(0.1)[0])
    return ranking.rank(list(costs.columns), costs.to_numpy())


def write(loaded: dict[str, Table], scores: list[Score], folder: Path) -> None:
    """Writes everything that follows from the runs into a folder.

    Samplers that have not run on every table yet are left out.
    """
    scores = [s for s in scores if s.run.sampler in on_all_tables(scores, list(loaded))]
    exact = [s for s in scores if s.run.notion == "exact"]
    half = [s for s in scores if s.run.notion == "half"]
    summary = summarize(scores)
    summary.to_csv(folder / "summary.csv", index=False, float_format="%.4g")
    ranks = rank(exact)
    ranking.draw(
        ranks,
        "Trials until within 0.1 points of the best: mean ranks over "
        f"{ranks.blocks} tables (Friedman p = {ranks.friedman_p:.2g})",
        [folder / "ranking.png", folder / "ranking.svg"],
    )
    order = list(ranks.names)
    curves = pd.concat([regret_curves(exact, "exact"), regret_curves(half, "half")])
    curves.to_csv(folder / "regret.csv", index=False, float_format="%.4g")
    plot(curves, order, folder)
    ours = next(name for name in (*OURS, *order) if name in order)
    lines = [
        "# Samplers on the recorded tables",
        "",
        f"`{' '.join(['python -m benchmarks.compare', *sys.argv[1:]])}`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        f"Tables: {', '.join(loaded)}. Seeds: {seeds_of(exact)}. Where a sampler learns from",
        "other models, those of the same architecture are left out.",
        "",
        *trials_section(summary, order, len(next(iter(loaded.values())).rows)),
        *speedup_section(exact, order, ours),
        *ranking_section(ranks, exact, ours),
        *paired_section(loaded, exact, order),
        *regret_section(curves, order),
        *foreknowledge.section(loaded, [s.run for s in half], OURS, BUDGETS),
        *first_trial_section(loaded, exact),
        *by_table_section(summary, order, list(loaded)),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def on_all_tables(scores: list[Score], names: list[str]) -> set[str]:
    """Samplers that have runs of both notions on every table."""
    needed = {(name, notion) for name in names for notion in NOTIONS}
    present: dict[str, set[tuple[str, str]]] = {}
    for s in scores:
        present.setdefault(s.run.sampler, set()).add((s.run.table, s.run.notion))
    return {sampler for sampler, pairs in present.items() if pairs >= needed}


def seeds_of(scores: list[Score]) -> str:
    """How many seeds the samplers have, those apart that have another number."""
    counts = pd.Series({(s.run.sampler, s.run.seed): 1 for s in scores}).groupby(level=0).size()
    common = int(counts.mode().max())
    others = [f"{name} {n}" for name, n in counts.items() if n != common]
    return f"{common}" + (f" ({', '.join(others)})" if others else "")


def summarize(scores: list[Score]) -> pd.DataFrame:
    """One row a table, sampler and notion: means over seeds."""
    rows: list[dict[str, Any]] = []
    for s in scores:
        row: dict[str, Any] = {
            "notion": s.run.notion,
            "table": s.run.table,
            "sampler": s.run.sampler,
            **{f"regret_{n}": s.regret[n - 1] for n in BUDGETS},
            "repeats": s.repeats(),
            "overhead_ms": s.overhead_ms(),
        }
        if s.run.notion == "exact":
            for points in (0.2, 0.1):
                trials, seconds, reached = s.trials_within(points)
                row[f"trials_{points}"] = trials
                row[f"seconds_{points}"] = seconds
                row[f"reached_{points}"] = float(reached)
            row["trials_tie"], row["seconds_tie"], _ = s.trials_to_tie()
        rows.append(row)
    keys = ["notion", "table", "sampler"]
    return pd.DataFrame(rows).groupby(keys, sort=True).mean().reset_index()


def regret_curves(scores: list[Score], notion: str) -> pd.DataFrame:
    """Mean regret over tables after each trial, with a bootstrap interval over seeds."""
    rows = []
    for sampler in dict.fromkeys(s.run.sampler for s in scores):
        groups = by_table([s for s in scores if s.run.sampler == sampler])
        blocks = [np.stack([s.regret[:HORIZON] for s in group]) for group in groups.values()]
        low, mean, high = interval_of_mean(blocks)
        rows += [
            {
                "notion": notion,
                "sampler": sampler,
                "trials": n + 1,
                "regret_points": mean[n],
                "low": low[n],
                "high": high[n],
            }
            for n in range(HORIZON)
        ]
    return pd.DataFrame(rows)


def by_table(scores: list[Score]) -> dict[str, list[Score]]:
    """Scores grouped by their table, in order of the seed."""
    groups: dict[str, list[Score]] = {}
    for s in sorted(scores, key=lambda s: (s.run.table, s.run.seed)):
        groups.setdefault(s.run.table, []).append(s)
    return groups


def trials_section(summary: pd.DataFrame, order: list[str], size: int) -> list[str]:
    """Trials and seconds until close to the best."""
    means = summary[summary["notion"] == "exact"].groupby("sampler").mean(numeric_only=True)
    lines = [
        "## Trials until close to the best",
        "",
        "Accuracy on all inputs is the truth and what the samplers see; the best is that of all",
        f"{size} configurations. Means over tables and seeds; a run that did not get there in",
        f"{size} trials ({HORIZON} for {' and '.join(SLOW)}) counts with {size + 1} and all its",
        "seconds, and `reached` is the share of runs that did. `tie`: a paired 95 % interval",
        "cannot tell the best so far from the best of all; the rest is luck on these",
        "inputs. Seconds are the recorded ones of each trial (build, evaluation, latency) and the",
        "sampler's own; a configuration that",
        "builds the model of an earlier trial costs its build only. What all share (calibration,",
        "outputs of the float model) is not in them. `repeats`: share of the first",
        f"{HORIZON} trials that ask again; `sampler`: median milliseconds a trial.",
        "",
        "| name | to a tie | to 0.2 | to 0.1 | reached | seconds to 0.1 | repeats | sampler |",
        "| --- |" + " --- |" * 7,
    ]
    for name in order:
        row = means.loc[name]
        lines.append(
            f"| {name} | {row['trials_tie']:.1f} | {row['trials_0.2']:.1f} | "
            f"{row['trials_0.1']:.1f} | {row['reached_0.1']:.0%} | {row['seconds_0.1']:.0f} | "
            f"{row['repeats']:.0%} | "
            f"{row['overhead_ms']:.1f} ms |"
        )
    return [*lines, ""]


def speedup_section(scores: list[Score], order: list[str], ours: str) -> list[str]:
    """Search time of the others over ours, by table and in the geometric mean."""
    lines = [
        f"## Search time over that of {ours}",
        "",
        f"Mean seconds of a sampler over those of {ours}, counted as above.",
        "",
    ]
    goals: dict[str, Callable[[Score], float]] = {
        "Until within 0.1 points of the best:": lambda s: s.trials_within(0.1)[1],
        "Until a tie with the best:": lambda s: s.trials_to_tie()[1],
    }
    for text, seconds_of in goals.items():
        seconds = pivot(scores, seconds_of)
        ratios = seconds.div(seconds[ours], axis=0)
        names = list(ratios.index)
        lines += [
            text,
            "",
            "| sampler | " + " | ".join(names) + " | geometric mean |",
            "| --- |" + " --- |" * (len(names) + 1),
        ]
        for name in (n for n in order if n != ours):
            column = ratios[name]
            cells = " | ".join(f"{ratio:.1f}" for ratio in column)
            lines.append(f"| {name} | {cells} | {stats.gmean(column):.1f} |")
        lines.append("")
    return lines


def pivot(scores: list[Score], cost: Callable[[Score], float]) -> pd.DataFrame:
    """Mean cost over seeds, a row a table and a column a sampler that has run on all of them."""
    frame = pd.DataFrame(
        {"table": s.run.table, "sampler": s.run.sampler, "cost": cost(s)} for s in scores
    )
    means = frame.pivot_table(index="table", columns="sampler", values="cost")
    return means.dropna(axis="columns")


def ranking_section(ranks: ranking.Ranking, scores: list[Score], ours: str) -> list[str]:
    """The diagram, and paired tests against ours."""
    costs = pd.DataFrame(
        {
            "run": (s.run.table, s.run.seed),
            "sampler": s.run.sampler,
            "trials": s.trials_within(0.1)[0],
        }
        for s in scores
    ).pivot_table(index="run", columns="sampler", values="trials")
    lines = [
        "## Ranks",
        "",
        f"By the mean trials until within 0.1 points, within each of {ranks.blocks} tables.",
        f"Friedman's test: p = {ranks.friedman_p:.2g}. Samplers under one bar are not told apart",
        f"by Nemenyi's test (critical difference {ranks.critical_difference:.1f}), which has",
        "little power with so few tables. `p`: Wilcoxon's signed-rank test against",
        f"{ours} over all runs, paired by table and seed, corrected by Holm's method: it speaks",
        "of these tables, not of models in general.",
        "",
        "![critical-difference diagram](ranking.png)",
        "",
        f"| sampler | mean rank | p against {ours} |",
        "| --- | --- | --- |",
    ]
    p_values = {}
    for name in (n for n in ranks.names if n != ours):
        both = costs[[ours, name]].dropna()
        p_values[name] = ranking.signed_rank_p_value(
            both[name].to_numpy(np.float64), both[ours].to_numpy(np.float64)
        )
    corrected = dict(zip(p_values, ranking.holm(np.array(list(p_values.values()))), strict=True))
    for name, mean_rank in zip(ranks.names, ranks.mean_ranks, strict=True):
        p = f"{corrected[name]:.2g}" if name in corrected else ""
        lines.append(f"| {name} | {mean_rank:.1f} | {p} |")
    return [*lines, ""]


def paired_section(loaded: dict[str, Table], scores: list[Score], order: list[str]) -> list[str]:
    """Normalised regret of ours against every other sampler, with paired tests."""
    extents = {name: 100 * float(np.ptp(exact_values(table))) for name, table in loaded.items()}
    frame = pd.DataFrame(
        {"sampler": s.run.sampler, "table": s.run.table, "seed": s.run.seed}
        | {n: 100 * s.regret[n - 1] / extents[s.run.table] for n in TESTED_BUDGETS}
        for s in scores
    )
    regrets = {
        name: group.set_index(["table", "seed"]) for name, group in frame.groupby("sampler")
    }
    lines = [
        "## Paired tests of the normalised regret",
        "",
        "Normalised regret is regret in percent of what lies between the best and the worst",
        "configuration of a table. Each cell: the regret of the row's sampler minus that of ours,",
        "mean over the tables and the seeds that both have; p of Wilcoxon's signed-rank test,",
        "paired by table and seed and corrected by Holm's method over the rows; and p of the",
        "permutation test by signs of the tables' mean differences, which speaks of models in",
        f"general and cannot be below {2 / 2 ** len(loaded):.2g} with {len(loaded)} tables.",
        "Above 0: ours is ahead.",
        "",
    ]
    for ours in (name for name in OURS if name in order):
        others = [name for name in order if name != ours]
        lines += [
            f"{ours}: mean normalised regret "
            + ", ".join(f"{regrets[ours][n].mean():.3f} at {n}" for n in TESTED_BUDGETS)
            + " trials.",
            "",
            f"| minus {ours} | " + " | ".join(f"{n} trials" for n in TESTED_BUDGETS) + " |",
            "| --- |" + " --- |" * len(TESTED_BUDGETS),
        ]
        columns = [paired_cells(regrets, ours, others, n) for n in TESTED_BUDGETS]
        for row, name in enumerate(others):
            lines.append(f"| {name} | " + " | ".join(column[row] for column in columns) + " |")
        lines.append("")
    return lines


def paired_cells(
    regrets: dict[str, pd.DataFrame], ours: str, others: list[str], budget: int
) -> list[str]:
    """Mean difference of each of the others to ours, and its two p values, as text."""
    means, over_runs, over_tables = [], [], []
    for name in others:
        columns = [regrets[name][budget], regrets[ours][budget]]
        pairs = pd.concat(columns, axis="columns", join="inner", keys=["theirs", "ours"])
        theirs, own = pairs.to_numpy(np.float64).T
        by_table = (pairs["theirs"] - pairs["ours"]).groupby(level="table").mean()
        means.append(float(by_table.mean()))
        over_runs.append(ranking.signed_rank_p_value(theirs, own))
        over_tables.append(ranking.sign_flip_p_value(by_table.to_numpy(np.float64)))
    corrected = ranking.holm(np.array(over_runs))
    return [
        f"{mean:+.3f} (p {p:.1g}; {p_tables:.2g})"
        for mean, p, p_tables in zip(means, corrected, over_tables, strict=True)
    ]


def regret_section(curves: pd.DataFrame, order: list[str]) -> list[str]:
    """Regret after the budgets, in both notions."""
    heads = {
        "exact": (
            "## Regret, accuracy on all inputs",
            "Best of all configurations minus the best so far, in points of top-1 accuracy.",
        ),
        "half": (
            "## Regret on inputs that the search did not see",
            "The search sees a random half of the inputs; what it would choose is compared, on "
            "the other half, with what an exhaustive search on the same half would choose. "
            "Negative is possible: the winner of all configurations is partly a lucky one.",
        ),
    }
    lines = []
    for notion, (title, text) in heads.items():
        lines += [
            title,
            "",
            f"{text} Mean over tables, with 95 % bootstrap intervals over seeds.",
            "",
            f"![regret by trials](regret_{notion}.png)",
            "",
            "| sampler | " + " | ".join(f"{n} trials" for n in BUDGETS) + " |",
            "| --- |" + " --- |" * len(BUDGETS),
        ]
        chosen = curves[curves["notion"] == notion].set_index(["sampler", "trials"])
        for name in (n for n in order if n in chosen.index.get_level_values(0)):
            cells = []
            for n in BUDGETS:
                point = chosen.loc[(name, n)]
                cells.append(
                    f"{point['regret_points']:.2f} [{point['low']:.2f}, {point['high']:.2f}]"
                )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def first_trial_section(loaded: dict[str, Table], scores: list[Score]) -> list[str]:
    """Whether the first trial can be told from the best of all configurations."""
    lines = [
        "## The first trial",
        "",
        "Top-1 accuracy of the configuration that is tried first, on all inputs, beside the best",
        "of all, and the paired 95 % interval of the difference in points; `told apart`: the",
        "interval is above 0. The best of 96 is ahead by luck as well, which this test takes for",
        "merit; `p` is that of multiple comparisons with the best (Hsu 1984), which allows for",
        "it: below 0.05, some configuration is truly better than the first. Seed 0.",
        "",
        "| sampler | table | first | best | best minus first | told apart | p |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for s in scores:
        if s.run.sampler not in OURS or s.run.seed != 0:
            continue
        table, row = loaded[s.run.table], s.run.rows[0]
        first, best, difference = against_the_best(table, row)
        lines.append(
            f"| {s.run.sampler} | {s.run.table} | {first:.4f} | {best:.4f} | "
            f"{100 * difference.estimate:.2f} [{100 * difference.low:.2f}, "
            f"{100 * difference.high:.2f}] | {'yes' if difference.low > 0 else 'no'} | "
            f"{among_the_best(table, row):.3f} |"
        )
    return [*lines, ""]


def by_table_section(summary: pd.DataFrame, order: list[str], names: list[str]) -> list[str]:
    """Trials to 0.1 points, table by table."""
    exact = summary[summary["notion"] == "exact"].set_index(["sampler", "table"])
    lines = [
        "## By table",
        "",
        "Mean trials until within 0.1 points.",
        "",
        "| sampler | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for name in order:
        cells = [
            f"{exact.loc[(name, t), 'trials_0.1']:.1f}" if (name, t) in exact.index else "-"
            for t in names
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def plot(curves: pd.DataFrame, order: list[str], folder: Path) -> None:
    """Regret curves of both notions as PNG and SVG, with the intervals of ours."""
    colours = plt.get_cmap("tab20")(np.arange(len(order)) % 20)
    for notion, label in (("exact", "on all inputs"), ("half", "on unseen inputs")):
        figure, axes = plt.subplots(figsize=(8.0, 5.0), constrained_layout=True)
        chosen = curves[curves["notion"] == notion]
        for name, colour in zip(order, colours, strict=True):
            curve = chosen[chosen["sampler"] == name]
            style = "-" if name in OURS else "--"
            axes.plot(
                curve["trials"], curve["regret_points"], style, color=colour, label=name, lw=1.6
            )
            if name in OURS:  # the intervals of all would hide the curves
                axes.fill_between(
                    curve["trials"], curve["low"], curve["high"], color=colour, alpha=0.15
                )
        if notion == "exact":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("symlog", linthresh=0.5)
        axes.set_xlabel("trials")
        axes.set_ylabel(f"regret {label}, points of top-1")
        axes.legend(fontsize=7, ncols=2)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"regret_{notion}.{suffix}", dpi=130)
        plt.close(figure)
