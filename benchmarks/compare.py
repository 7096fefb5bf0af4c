"""Compares samplers on the recorded tables.

    python -m benchmarks.compare [--samplers NAME ...] [--tables NAME ...] [--seeds 10]
        [--refresh NAME ...] [--quick] [--report]

Every sampler runs on every table with every seed (`benchmarks.replay` has the rules). Runs are
kept in `benchmarks/results/compare/runs.csv`, so that an interrupted comparison goes on and only
missing runs are made; `--refresh` makes those of the named samplers anew, for a sampler whose code
has changed. From the runs follow, in `benchmarks/results/compare/`:

- how many trials, and how many seconds of the recorded measurements, until within 0.2 and 0.1
  points of the best of all configurations;
- regret after each trial with bootstrap intervals, on the inputs that the search saw and on
  others;
- repeats, and what the sampler itself takes for a trial;
- ranks with a critical-difference diagram, and paired tests.

`--report` writes these from the runs that there are, and makes none. `--quick` makes the runs of
the fast samplers anew with two seeds, in at most two minutes, and writes their ranking beside the
committed one into `quick.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import optuna
from scipy import stats

from benchmarks import machine
from benchmarks import runs as stored
from benchmarks import tables
from benchmarks.compare_report import rank
from benchmarks.compare_report import write
from benchmarks.replay import digest
from benchmarks.replay import NOTIONS
from benchmarks.replay import replay
from benchmarks.replay import Run
from benchmarks.scores import score
from benchmarks.tables import Table


RESULTS = Path(__file__).parent / "results" / "compare"
SAMPLERS = (
    "quantune+transfer",
    "quantune+features",
    "quantune",
    "quantune_published+transfer",
    "quantune_published",
    "gp",
    "smac",
    "tpe",
    "auto",
    "cma",
    "genetic",
    "genetic_50",
    "qmc",
    "random",
    "random_without_replacement",
    "brute_force",
    "grid_lexicographic",
)
# These take a tenth of a second and more for a trial, or must be downloaded.
NOT_QUICK = ("gp", "smac", "auto")
QUICK_SEEDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--tables", nargs="+", help="all complete ones by default")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--refresh", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="two minutes, fast samplers only")
    parser.add_argument("--report", action="store_true", help="only of the runs that there are")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    loaded = {name: tables.load(name) for name in arguments.tables or tables.complete()}
    known = up_to_date(stored.load(RESULTS / "runs.csv"), loaded)
    if arguments.quick:
        quick(loaded, known)
        return
    known = [run for run in known if run.sampler not in arguments.refresh]
    stored.write(RESULTS / "runs.csv", known)
    for seed in () if arguments.report else range(arguments.seeds):
        known += missing_runs(loaded, arguments.samplers, seed, known)
    stored.write(RESULTS / "runs.csv", known)
    write(loaded, [score(loaded[run.table], run) for run in known], RESULTS)


def up_to_date(runs: list[Run], loaded: dict[str, Table]) -> list[Run]:
    """The runs that were made on the tables as they are."""
    digests = {
        (table, sampler): digest(loaded[table], sampler)
        for table, sampler in {(run.table, run.sampler) for run in runs if run.table in loaded}
    }
    return [run for run in runs if digests.get((run.table, run.sampler)) == run.digest]


def missing_runs(
    loaded: dict[str, Table], samplers: Iterable[str], seed: int, known: list[Run]
) -> list[Run]:
    """Makes the runs of one seed that are not known, and stores each as soon as it is made."""
    done = {(run.table, run.sampler, run.notion, run.seed) for run in known}
    made = []
    for sampler in samplers:
        start = time.perf_counter()
        try:
            for table in loaded.values():
                for notion in NOTIONS:
                    if (table.name, sampler, notion, seed) not in done:
                        made.append(replay(table, sampler, seed, notion))
                        stored.append(RESULTS / "runs.csv", made[-1])
        except (ImportError, ValueError) as error:
            print(f"{sampler}: not run ({error})", file=sys.stderr)
            continue
        print(f"seed {seed} {sampler}: {time.perf_counter() - start:.1f} s", flush=True)
    return made


def quick(loaded: dict[str, Table], known: list[Run]) -> None:
    """The ranking of the fast samplers, from new runs and from the committed ones."""
    start = time.perf_counter()
    scores = []
    for sampler in (name for name in SAMPLERS if name not in NOT_QUICK):
        try:
            for table in loaded.values():
                for seed in range(QUICK_SEEDS):
                    scores.append(score(table, replay(table, sampler, seed, "exact")))
        except (ImportError, ValueError) as error:
            print(f"{sampler}: not run ({error})", file=sys.stderr)
    seconds = time.perf_counter() - start
    new = rank(scores)
    committed = rank([score(loaded[run.table], run) for run in known if run.notion == "exact"])
    names = [name for name in committed.names if name in new.names]
    old_order = {name: committed.mean_ranks[committed.names.index(name)] for name in names}
    new_order = {name: new.mean_ranks[new.names.index(name)] for name in names}
    correlation = stats.spearmanr(list(old_order.values()), list(new_order.values())).statistic
    lines = [
        "# Quick ranking",
        "",
        f"`python -m benchmarks.compare --quick`; {machine.as_markdown(machine.describe())}.",
        "",
        f"{QUICK_SEEDS} seeds, {len(loaded)} tables, {seconds:.0f} s. Mean rank by the trials",
        "until within 0.1 points of the best; the committed ranks are among more samplers.",
        f"Spearman's correlation of the two: {correlation:.2f}.",
        "",
        "| sampler | now | committed |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {mean_rank:.1f} | "
            + (f"{old_order[name]:.1f} |" if name in old_order else "- |")
            for name, mean_rank in zip(new.names, new.mean_ranks, strict=True)
        ),
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / "quick.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
