"""What racing saves, and what it costs, on the recorded tables.

    python -m benchmarks.racing [--tables NAME ...] [--seeds 10]
    python -m benchmarks.racing --live DATA

Nothing is run: the margins that each configuration left on each input were recorded, and races are
replayed from them. Four questions: after how many inputs a trial ends, with which error, and how
often its interval was right; what an estimate from so many inputs is worth for ranking
configurations; what whole searches cost and find with each pruner, in random order and in
`QuantuneSampler`'s; and, live, what the clock says of one `tune` with and without racing. Results
go to `benchmarks/results/racing/`. A run goes on where the last one stopped; without the CSV files
it begins anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.pruners import MedianPruner
from optuna.pruners import NopPruner
from optuna.pruners import SuccessiveHalvingPruner
from optuna.pruners import WilcoxonPruner
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from scipy.stats import spearmanr

from benchmarks import catalogue
from benchmarks import machine
from benchmarks import tables
from benchmarks.tables import Table
from optuna_quantune import QuantuneSampler
from optuna_quantune import RacingPruner
from optuna_quantune import SearchSpace
from optuna_quantune import tune
from optuna_quantune.evaluation import racing
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.objective import DEFAULT_PRECISION
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.search.pruner import DEFAULT_INDIFFERENCE
from optuna_quantune.search.pruner import RUNGS_KEY
from optuna_quantune.search.pruner import SEEN_KEY
from optuna_quantune.selection import pack


RESULTS: Final = Path(__file__).parent / "results" / "racing"
PRECISIONS: Final = (0.002, 0.005, 0.01)
# Half of the float model's agreement: below it a configuration counts as collapsed.
COLLAPSED: Final = 0.5
TRIALS: Final = {"random": 96, "quantune": 20}
# Tables that the method and its constants were chosen with. All others were run only afterwards.
CHOSEN_WITH: Final = (
    "cifar10_resnet20",
    "cifar10_resnet8",
    "demo",
    "efficientnet_lite0",
    "squeezenet1_1",
)
# How many of the seeds each part replays: an informed order is slow to replay, and WilcoxonPruner
# compares input by input; it looks eight times in a trial.
PARTS: Final = {"random": 100, "quantune": 3, "wilcoxon": 1}
WILCOXON_LOOKS: Final = 8
SPLIT: Final = {"Tables that it was chosen with": True, "Not seen while choosing": False}


@dataclass(frozen=True)
class Look:
    """What is known of a configuration after some inputs."""

    inputs: int
    top1: Interval
    agreement: Interval


@dataclass(frozen=True)
class Records:
    """A table as races need it.

    Attributes:
        table: The table.
        margins: The float model's, shape (n,).
        float_right: Whether the float model is right, shape (n,).
        left: What each configuration left of the margins, shape (configurations, n).
        right: Whether it is right, of the same shape.
        agrees: Whether it predicts what the float model predicts, of the same shape.
    """

    table: Table
    margins: NDArray[np.float64]
    float_right: NDArray[np.bool_]
    left: NDArray[np.float64]
    right: NDArray[np.bool_]
    agrees: NDArray[np.bool_]

    @classmethod
    def of(cls, table: Table) -> Records:
        """Loads a table's predictions."""
        float_class = table.predictions["float_class"].to_numpy()
        labels = table.predictions["label"].to_numpy()
        rows = range(len(table.rows))
        classes = np.stack([table.classes(row) for row in rows])
        return cls(
            table,
            table.predictions["float_margin"].to_numpy(np.float64),
            float_class == labels,
            np.stack([table.margins(row) for row in rows]),
            classes == labels,
            classes == float_class,
        )

    def climb(self, row: int, order: NDArray[np.int64]) -> Iterator[Look]:
        """A configuration's race, look by look."""
        race = racing.Race(self.margins)
        everywhere = np.ones(len(order), np.bool_)
        for start, stop in pairwise([0, *racing.looks(len(order))]):
            indices = order[start:stop]
            race.add(indices, self.left[row][indices])
            yield Look(
                stop,
                race.estimate(self.right[row], self.float_right),
                race.estimate(self.agrees[row], everywhere),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--live", type=Path, metavar="DATA", help="one tune with and without")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if arguments.live is not None:
        live(arguments.live)
        return
    names = arguments.tables or [
        name for name in tables.complete() if (tables.FOLDER / f"{name}.parquet").is_file()
    ]
    for seed in range(arguments.seeds):
        for part in (part for part, seeds in PARTS.items() if seed < seeds):
            for name in names:
                if replay(name, part, seed):
                    write()  # what is there so far is a result of its own
                    print(f"{name} {part} seed {seed}", flush=True)
    write()


def replay(name: str, part: str, seed: int) -> bool:
    """Replays one part on one table, unless it is there already."""
    searches = read("searches")
    if (
        len(searches)
        and (searches[["table", "part", "seed"]] == [name, part, seed]).all(axis=1).any()
    ):
        return False
    records = Records.of(tables.load(name))
    raced = race_all(records, seed)
    if part == "random":
        append("ends", ends_of(records, raced, seed))
        append("rungs", worth(records, raced, seed))
    append(
        "searches",
        [{"part": part, **search(records, raced, seed, way, part)} for way in ways(part)],
    )
    return True


def read(name: str) -> pd.DataFrame:
    """A table of results so far."""
    path = RESULTS / f"{name}.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def append(name: str, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a table of results."""
    frame = pd.concat([read(name), pd.DataFrame(rows)], ignore_index=True)
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.5f")


def race_all(records: Records, seed: int) -> list[list[Look]]:
    """Every configuration's looks, with the pilot of a seed; equal models are raced once."""
    order = racing.order(records.margins, seed=seed)
    by_digest: dict[str, list[Look]] = {}
    for row, digest in enumerate(records.table.rows["digest"]):
        if digest not in by_digest:
            by_digest[digest] = list(records.climb(row, order))
    return [by_digest[digest] for digest in records.table.rows["digest"]]


def end(looks: list[Look], precision: float | None, metric: str = "top1") -> int:
    """Index of the look at which a trial ends."""
    for index, look in enumerate(looks[:-1]):
        interval = getattr(look, metric)
        if precision is None or look.inputs < racing.PILOT:
            continue
        if racing.half_width(interval) <= precision:
            return index
    return len(looks) - 1


def ends_of(records: Records, raced: list[list[Look]], seed: int) -> list[dict[str, Any]]:
    """For every metric and precision: where the trials of all distinct models end, and how."""
    rows = []
    distinct = list(records.table.rows["digest"].drop_duplicates().index)
    healthy = records.agrees[distinct].mean(axis=1) >= COLLAPSED
    for metric, bits in (("top1", records.right), ("agreement", records.agrees)):
        truth = bits[distinct].mean(axis=1)
        intervals = [[getattr(look, metric) for look in raced[row]] for row in distinct]
        held = [
            float(np.mean([holds(interval, value) for interval in looks[:-1]]))
            for looks, value in zip(intervals, truth, strict=True)
        ]
        for precision in PRECISIONS:
            ends = [end(raced[row], precision, metric) for row in distinct]
            share = np.array(
                [raced[row][last].inputs for row, last in zip(distinct, ends, strict=True)]
            ) / len(records.margins)
            last = [looks[index] for looks, index in zip(intervals, ends, strict=True)]
            error = np.array([interval.estimate for interval in last]) - truth
            covered = np.array([holds(i, value) for i, value in zip(last, truth, strict=True)])
            early = share < 1
            rows.append(
                {
                    "table": records.table.name,
                    "seed": seed,
                    "metric": metric,
                    "precision": precision,
                    "share": share[healthy].mean(),
                    "share_all": share.mean(),
                    "mean_square": np.mean(np.square(100 * error[healthy])),
                    "largest_error": 100 * np.abs(error).max(),
                    "early": int(early.sum()),
                    "covered": int(covered[early].sum()),
                    "covered_looks": np.mean(held),
                }
            )
    return rows


def holds(interval: Interval, truth: float) -> bool:
    """Whether an interval holds the truth, up to rounding."""
    return interval.low - 1e-9 <= truth <= interval.high + 1e-9


def worth(records: Records, raced: list[list[Look]], seed: int) -> list[dict[str, Any]]:
    """Rank correlation over all configurations of each rung's estimate with the measurement."""
    rows = []
    n = len(records.margins)
    for metric, bits in (("top1", records.right), ("agreement", records.agrees)):
        truth = bits.mean(axis=1)
        good = records.agrees.mean(axis=1) >= COLLAPSED

        def rung(name: str, inputs: float, values: Any) -> None:
            rows.append(
                {
                    "table": records.table.name,
                    "seed": seed,
                    "metric": metric,  # noqa: B023
                    "rung": name,
                    "share": inputs / n,
                    "rank": spearmanr(values, truth).statistic,  # noqa: B023
                    "rank_good": spearmanr(
                        np.asarray(values)[good],  # noqa: B023
                        truth[good],  # noqa: B023
                    ).statistic,
                    "first_choice_loss": 100 * (truth.max() - truth[np.argmax(values)]),  # noqa: B023
                }
            )

        rung("predicted noise", 0, records.table.rows["prior"])
        first = raced[0]
        for index, look in enumerate(first):
            if look.inputs in (racing.HANDFUL, racing.PILOT) or index == len(first) // 2:
                values = [getattr(looks[index], metric).estimate for looks in raced]
                rung(f"{look.inputs} inputs", look.inputs, values)
        for precision in PRECISIONS:
            ends = [looks[end(looks, precision, metric)] for looks in raced]
            rung(
                f"certain to {precision}",
                float(np.mean([look.inputs for look in ends])),
                [getattr(look, metric).estimate for look in ends],
            )
        rung("all inputs", n, truth)
    return rows


@dataclass(frozen=True)
class Way:
    """One way to spend inputs in a search."""

    name: str
    pruner: BasePruner
    precision: float | None


def ways(part: str) -> list[Way]:
    """What is compared. All but Wilcoxon's see the same estimates at the same looks."""
    default = f"certain to {DEFAULT_PRECISION}"
    racing_ways = [
        Way("all inputs", NopPruner(), None),
        *(Way(f"certain to {p}, RacingPruner", RacingPruner(), p) for p in PRECISIONS),
        Way(
            f"{default}, RacingPruner(confidence=0.95)",
            RacingPruner(confidence=0.95),
            DEFAULT_PRECISION,
        ),
    ]
    if part == "quantune":
        return racing_ways
    if part == "wilcoxon":
        return [Way("all inputs, WilcoxonPruner", WilcoxonPruner(), None)]
    return [
        *racing_ways,
        *(Way(f"certain to {p}, no pruner", NopPruner(), p) for p in PRECISIONS),
        Way("all inputs, RacingPruner", RacingPruner(), None),
        *(
            Way(
                f"{default}, RacingPruner(indifference={i})",
                RacingPruner(indifference=i),
                DEFAULT_PRECISION,
            )
            for i in (0.0, 2 * DEFAULT_INDIFFERENCE)
        ),
        Way("all inputs, MedianPruner", MedianPruner(), None),
        Way(f"{default}, MedianPruner", MedianPruner(), DEFAULT_PRECISION),
        Way("all inputs, SuccessiveHalving", SuccessiveHalvingPruner(min_resource=16), None),
    ]


def search(
    records: Records, raced: list[list[Look]], seed: int, way: Way, part: str
) -> dict[str, Any]:
    """One search: which share of the inputs of its trials it ran, and what its winner is worth.

    A trial that builds the very model of an earlier one costs nothing, here as in the objective,
    and counts neither among the inputs that were run nor among all.
    """
    sampler = "quantune" if part == "quantune" else "random"
    study = optuna.create_study(
        direction="maximize", pruner=way.pruner, sampler=make_sampler(records.table, sampler, seed)
    )
    space = SearchSpace.preset("quantune")
    order = racing.order(records.margins, seed=seed)
    truth = records.right.mean(axis=1)
    n = len(order)
    spent = total = 0
    visited: dict[str, tuple[float | None, TrialState]] = {}
    grid = list(space.grid())
    shuffled = np.random.default_rng(seed).permutation(len(grid))
    start = time.perf_counter()
    for number in range(TRIALS[sampler]):
        if sampler == "random":  # a random order of the whole table
            study.enqueue_trial(grid[shuffled[number]])
        trial = study.ask(dict(space))
        row = records.table.key(trial.params)
        digest = records.table.rows["digest"][row]
        if digest in visited:
            value, state = visited[digest]
            study.tell(trial, value, state=state)
            continue
        run = wilcoxon if isinstance(way.pruner, WilcoxonPruner) else climb
        inputs, value = run(records, raced[row], row, order, way, trial)
        spent, total = spent + inputs, total + n
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        study.tell(trial, value, state=state)
        visited[digest] = (value, state)
    worth = {state: [0.0] for state in TrialState}
    for finished in study.trials:
        worth[finished.state].append(truth[records.table.key(finished.params)])
    lost, kept = worth[TrialState.PRUNED], worth[TrialState.COMPLETE]
    winner = truth[records.table.key(study.best_trial.params)]
    return {
        "table": records.table.name,
        "sampler": sampler,
        "way": way.name,
        "seed": seed,
        "share": spent / total,
        "pruned": (len(lost) - 1) / TRIALS[sampler],
        # What is the best of all that was tried, and was it pruned?
        "pruned_best_points": 100 * max(0.0, max(lost) - max(kept)),
        "winner_loss_points": 100 * (max(*lost, *kept) - winner),
        "seconds": time.perf_counter() - start,
    }


def climb(
    records: Records,
    looks: list[Look],
    row: int,
    order: NDArray[np.int64],
    way: Way,
    trial: optuna.Trial,
) -> tuple[int, float | None]:
    """A trial as the objective runs it: inputs that were run, and its value unless pruned."""
    prior = float(records.table.rows["prior"][row])
    rungs = [[0, prior, 0.0, 1.0]]
    trial.report(prior, step=0)
    last = end(looks, way.precision)
    for index, look in enumerate(looks[: last + 1]):
        rungs.append([look.inputs, look.top1.estimate, look.top1.low, look.top1.high])
        seen = np.zeros(len(order), np.bool_)
        seen[order[: look.inputs]] = True
        trial.set_user_attr(RUNGS_KEY, rungs)
        trial.set_user_attr(SEEN_KEY, pack(seen))
        trial.set_user_attr(
            CORRECT_KEY, pack(np.where(seen, records.right[row], records.float_right))
        )
        trial.report(look.top1.estimate, step=look.inputs)
        if index < last and trial.should_prune():
            return look.inputs, None
    return looks[last].inputs, looks[last].top1.estimate


def wilcoxon(
    records: Records,
    looks: list[Look],
    row: int,
    order: NDArray[np.int64],
    way: Way,
    trial: optuna.Trial,
) -> tuple[int, float | None]:
    """A trial as WilcoxonPruner wants it: every input is a step, 1 where it is right, else 0."""
    n = len(order)
    shuffled = np.random.default_rng(0).permutation(n)
    for done, index in enumerate(shuffled, start=1):
        trial.report(float(records.right[row][index]), step=int(index))
        if done % (n // WILCOXON_LOOKS) == 0 and done < n and trial.should_prune():
            return done, None
    return n, float(records.right[row].mean())


def make_sampler(table: Table, name: str, seed: int) -> BaseSampler:
    """The sampler of a search; in random order the configurations are enqueued."""
    if name == "random":
        return RandomSampler(seed=seed)
    space = SearchSpace.preset("quantune")
    return QuantuneSampler(space, features=lambda params: table.features(dict(params)), seed=seed)


def write() -> None:
    """The tables so far as Markdown."""
    ends, rungs, searches = (read(name) for name in ("ends", "rungs", "searches"))
    rung_kinds = ["metric", "rung"]
    values = ["share", "rank", "rank_good", "first_choice_loss"]
    named = rungs.assign(rung=rungs["rung"].where(~is_middle(rungs), "middle of the looks"))
    ladder = named.groupby(rung_kinds, sort=False)[values].mean().reset_index()
    lines = [
        "# Racing",
        "",
        f"`python -m benchmarks.racing {' '.join(sys.argv[1:])}`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        "Replayed from recorded margins: nothing was run. The seed chooses the pilot and the",
        "order of the trials. Losses and errors are in points (hundredths) of the metric on all",
        "inputs of the table.",
        "",
        f"The method and its constants were chosen with {', '.join(CHOSEN_WITH)} in view: there",
        "the results say how well they fit. The other tables were run only after they were",
        "fixed, and say how well they carry over. No constant was changed for them, but the first",
        "two, mobilenetv2_1.0 and shufflenetv1_0.5_g3, showed a defect: collapsed models with the",
        "same output for every input were taken for perfect ones. With its repair, a floor under",
        "the noise and the outcome in place of the margin where scores are equal, all tables were",
        "run again.",
        "",
        "## Where a trial ends",
        "",
        "A trial ends when half the width of its 95 % interval is at most the precision.",
        f"`share of inputs` and `rms error` leave out collapsed configurations (agreement below "
        f"{COLLAPSED}):",
        "no certainty is to be had of them before the end, and pruners stop them. Coverage: how",
        "often the interval held what all inputs say; of trials that ended early, with the",
        "standard error over seeds, and of every look of every configuration.",
        "",
    ]
    for title, chosen in SPLIT.items():
        part = ends[ends["table"].isin(CHOSEN_WITH) == chosen]
        if len(part):
            lines += [f"{title}:", "", *markdown(ends_summary(part)), ""]
    lines += [
        "## What a rung is worth",
        "",
        "Rank correlation (Spearman) of the estimate with the full measurement over the 96",
        "configurations, and over those that did not collapse; loss of choosing by it.",
        "",
        *markdown(ladder),
        "",
        "## Searches",
        "",
        "`random`: all 96 configurations in random order; `quantune`: 20 trials of",
        "`QuantuneSampler` with the noise features. The value of a trial is its estimate. The",
        "winner is the complete trial with the best value; its loss is counted from the best of",
        "all trials, pruned ones included, on all inputs. `best pruned by more than 0.1`: share",
        "of searches in which a pruned configuration was better than every complete one by more",
        f"than 0.1 points. `RacingPruner` is indifferent to {100 * DEFAULT_INDIFFERENCE} points",
        "unless another number is named.",
        "",
    ]
    for title, chosen in SPLIT.items():
        part = searches[searches["table"].isin(CHOSEN_WITH) == chosen]
        if len(part):
            found, per_table = searches_summary(part)
            lines += [f"{title}:", "", *markdown(found), "", "Share of inputs by table:", ""]
            lines += [*markdown(per_table), ""]
    (RESULTS / "README.md").write_text("\n".join(lines[:-1]) + "\n")


def ends_summary(ends: pd.DataFrame) -> pd.DataFrame:
    """Where trials end by table, metric and precision."""
    grouped = ends.groupby(["table", "metric", "precision"])
    by_seed = ends.assign(coverage=ends["covered"] / ends["early"].replace(0, np.nan))
    coverage = by_seed.groupby(["table", "metric", "precision"])["coverage"]
    summary = pd.DataFrame(
        {
            "seeds": grouped["seed"].nunique(),
            "share of inputs": grouped["share"].mean(),
            "with collapsed ones": grouped["share_all"].mean(),
            "rms error, points": np.sqrt(grouped["mean_square"].mean()),
            "largest error": grouped["largest_error"].max(),
            "coverage of early ends": grouped["covered"].sum() / grouped["early"].sum(),
            "its standard error": coverage.sem(),
            "coverage of all looks": grouped["covered_looks"].mean(),
        }
    )
    return summary.reset_index()


def searches_summary(searches: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each way costs and finds, and its share of inputs on each table."""
    search_kinds = ["sampler", "way"]
    grouped = searches.groupby(search_kinds, sort=False)
    by_table = searches.groupby([*search_kinds, "table"], sort=False)["share"].mean()
    found = pd.DataFrame(
        {
            "seeds": grouped["seed"].nunique(),
            # Tables count alike, also while some have run more seeds.
            "share of inputs": by_table.groupby(search_kinds, sort=False).mean(),
            "largest share": by_table.groupby(search_kinds, sort=False).max(),
            "pruned": grouped["pruned"].mean(),
            "winner within 0.1 points": grouped["winner_loss_points"].apply(within),
            "winner's mean loss": grouped["winner_loss_points"].mean(),
            "largest loss": grouped["winner_loss_points"].max(),
            "best pruned by more than 0.1": 1 - grouped["pruned_best_points"].apply(within),
            "largest cost of it": grouped["pruned_best_points"].max(),
        }
    )
    return found.reset_index(), by_table.unstack().reset_index()


def is_middle(rungs: pd.DataFrame) -> pd.Series[bool]:
    """Which rungs stand in the middle of the looks, at another number in each table."""
    known = (f"{racing.HANDFUL} inputs", f"{racing.PILOT} inputs", "all inputs")
    return rungs["rung"].str.endswith(" inputs") & ~rungs["rung"].isin(known)


def within(loss: pd.Series[float]) -> float:
    """Share of searches whose winner is within a tenth of a point of the best."""
    return float((loss <= 0.1 + 1e-9).mean())


def markdown(frame: pd.DataFrame) -> list[str]:
    """A table's lines."""
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def live(data: Path, model: str = "mobilenetv2_1.0", n_trials: int = 20) -> None:
    """One whole `tune` on real images with and without racing, after one that fills the cache."""
    path, calibration, evaluation = catalogue.sources(model, data)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        search = functools.partial(
            tune, path, calibration=calibration, evaluation=evaluation, cache=cache, seed=0
        )
        search(n_trials=1)
        for name, racing_on in (("all inputs", False), ("racing", True)):
            start = time.perf_counter()
            result = search(
                n_trials=n_trials,
                exact=not racing_on,
                pruner=RacingPruner() if racing_on else NopPruner(),
            )
            seconds = time.perf_counter() - start
            trials = [t for t in result.study.trials if "duplicate_of" not in t.user_attrs]
            assert result.held_out is not None
            rows.append(
                {
                    "tune": name,
                    "seconds": seconds,
                    "evaluating": sum(
                        t.user_attrs.get("seconds", {}).get("evaluate", 0.0) for t in trials
                    ),
                    "trials": len(result.study.trials),
                    "pruned": sum(t.state == TrialState.PRUNED for t in trials),
                    "inputs run": sum(t.user_attrs["inputs_evaluated"] for t in trials),
                    "configuration": " ".join(
                        str(v) for v in dataclasses.asdict(result.config).values()
                    ),
                    "top-1 of the winner, all inputs": result.all_inputs.quantized.top1,
                }
            )
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(RESULTS / "live.csv", index=False, float_format="%.4f")
    lines = [
        f"# `tune` of {model} with {len(evaluation)} images, with and without racing",
        "",
        f"`python -m benchmarks.racing --live DATA`, one run; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        "Same seeds, statistics of the calibration in the cache. `evaluating` counts complete",
        f"trials only. Load average at the end: {os.getloadavg()[1]:.0f} on {os.cpu_count()} "
        "cores;",
        "where it is above the number of cores the seconds are rough.",
        "",
        *markdown(frame),
    ]
    (RESULTS / "live.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
