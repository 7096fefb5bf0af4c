"""What it helps a search under a bound on latency to know about how long configurations take.

    python -m benchmarks.latency_bound DATA [--models NAME ...] [--seeds 2] [--n-trials 12]

DATA is a folder as in `benchmarks.catalogue`. For each model, trials in the `extended` space under
the bound of `benchmarks.accuracy`, 0.55 times the float latency (ShuffleNet 0.8) or a tenth more
than what is fastest of the model, with one thread: by `QuantuneSampler` with all features of the
objective, and without ``prior:latency``, the estimate of the constraint. Every trial runs all of
256 inputs.

`bound`: that bound. `kept`: share of the trials that keep it. `first`: the first trial that does,
counted from 1. `SQNR after n`: decibels of the trial with the least output noise among those of
the first n that keep it, 0 if none does. Means over the seeds. A trial's latency is the quick
measurement that the search has.

Results go to `benchmarks/results/latency_bound/`; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import TrialState

from benchmarks import catalogue
from benchmarks import machine
from benchmarks.accuracy import MAX_LATENCY
from benchmarks.accuracy import possible_bound
from benchmarks.accuracy import SLOWER
from optuna_quantune.goals import LATENCY_CONSTRAINT
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.search.configurations import CONSTRAINT_PRIOR
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "latency_bound"
SAMPLERS = ("with estimate", "without")
BUDGETS = (1, 3, 6, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n-trials", type=int, default=max(BUDGETS))
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = RESULTS / "runs.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["model"], row["sampler"], row["seed"]) for row in rows}
    for name in catalogue.names(arguments.data, arguments.models):
        cases = [(s, seed) for s in SAMPLERS for seed in range(arguments.seeds)]
        missing = [case for case in cases if (name, *case) not in done]
        objective = prepare(name, arguments.data) if missing else None
        for sampler, seed in missing:
            assert objective is not None
            trials = search(objective, sampler, seed, arguments.n_trials)
            row = {"model": name, "sampler": sampler, "seed": seed}
            row |= {"bound": objective.goals.max_latency, "trials": trials}
            row["machine"] = machine.describe()
            with lines.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(name, sampler, seed, flush=True)
        write(rows)


def prepare(name: str, data: Path) -> QuantizationObjective:
    """The objective of a model, calibrated."""
    path, calibration, _ = catalogue.sources(name, data)
    choosing, _ = catalogue.choosing_and_validation(name, data)
    build = functools.partial(
        QuantizationObjective,
        path,
        calibration=calibration,
        evaluation=choosing,
        metric="agreement",
        space=SearchSpace.preset("extended"),
        exact=True,
        threads=1,
        cache=Path(tempfile.gettempdir()) / "latency_bound",
    )
    bound = possible_bound(build(), SLOWER.get(name, MAX_LATENCY))
    objective = build(max_latency=bound)
    objective.prepare()
    return objective


def search(
    objective: QuantizationObjective, sampler: str, seed: int, n_trials: int
) -> list[dict[str, Any]]:
    """Constraint, latency ratio and output SQNR of each complete trial."""

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        found = objective.features(params)
        if sampler == "without":
            found.pop(CONSTRAINT_PRIOR + LATENCY_CONSTRAINT)
        return found

    study = optuna.create_study(
        directions=objective.directions,
        sampler=QuantuneSampler(objective.space, features=features, seed=seed),
        pruner=optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=n_trials, catch=(TrialFailure,))
    return [
        {
            "violation": trial.constraints[LATENCY_CONSTRAINT],
            "latency_ratio": trial.user_attrs["latency_ratio"],
            "sqnr_db": trial.user_attrs["sqnr_db"],
        }
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
    ]


def scores(trials: list[dict[str, Any]]) -> dict[str, float]:
    """What the table says of one run."""
    kept = [trial["violation"] <= 0 for trial in trials]
    found: dict[str, float] = {
        "kept": sum(kept) / len(kept),
        "first": kept.index(True) + 1 if any(kept) else len(kept) + 1,
    }
    for budget in BUDGETS:
        decibels = [t["sqnr_db"] for t, k in zip(trials[:budget], kept, strict=False) if k]
        found[f"SQNR after {budget}"] = max(decibels, default=0.0)
    return found


def write(rows: list[dict[str, Any]]) -> None:
    """The table of all that is done."""
    frame = pd.DataFrame(
        {"model": row["model"], "sampler": row["sampler"], "bound": row["bound"]}
        | scores(row["trials"])
        for row in rows
    )
    means = frame.groupby(["model", "sampler"], sort=False).mean()
    overall = frame.groupby("sampler", sort=False).mean(numeric_only=True)
    lines = [
        "# Searches under a bound on latency",
        "",
        f"`python -m benchmarks.latency_bound DATA`; {machine.as_markdown(rows[-1]['machine'])}.",
        "",
        *"\n\n".join(__doc__.split("\n\n")[2:-1]).splitlines(),
        "",
        "| model | sampler | " + " | ".join(means.columns) + " |",
        "| --- | --- |" + " ---: |" * len(means.columns),
    ]
    for (model, sampler), row in means.iterrows():
        lines.append(f"| {model} | {sampler} | " + " | ".join(cells(row)) + " |")
    for sampler, row in overall.iterrows():
        lines.append(f"| mean | {sampler} | " + " | ".join(cells(row)) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def cells(row: pd.Series) -> list[str]:
    """One cell for each score: a ratio, a share, a number of trials, decibels."""
    shares = [f"{row[name]:.2f}" for name in ("bound", "kept")]
    return [*shares, *(f"{x:.1f}" for x in row.iloc[2:])]


if __name__ == "__main__":
    main()
