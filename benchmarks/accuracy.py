"""How much accuracy the best configuration of a space loses, on images that did not choose it.

    python -m benchmarks.accuracy DATA [--models NAME ...] [--spaces NAME ...] [--n-trials N]
        [--target vta]

DATA is a folder as in `benchmarks.catalogue`. For each model and space `QuantuneSampler` looks for
the configuration that agrees most often with the float model and is fast enough: batch-1 latency
with one thread of at most 0.55 times the float model's, 0.8 for ShuffleNet, whose float model is
the fastest. Of a model with which nothing is that fast, it may be a tenth slower than the
fastest. The search sees 256 calibration images that calibration did not use (of CIFAR-10 test
images). What the package knows of models of the same family is left out. The trials that a paired
test cannot tell from the best are ranked by the noise of the margins between classes, as in
`tune`. A trial's latency is a quick measurement; it is repeated for the best trials, from the best
one down, until one is fast enough. That model is measured on the 1,000 labelled validation images
(CIFAR-10: on the other 9,744 of the 10,000 test images), and its latency five times more, with one
thread and with all; the table has the middle one.

With `--target vta`, an integer-only accelerator, the spaces are the paper's 12 configurations and
`extended`; nothing is said of latency, which this machine's would tell nothing about.

Results go to `benchmarks/results/accuracy/`, on processors without VNNI to
`accuracy_without_vnni/`, for the accelerator to `accuracy_vta/`, one line of `results.jsonl` for
each model and space; what is there is not run again, and an interrupted search goes on where it
stopped (`--work`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import Any
from typing import get_args

import numpy as np
import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from benchmarks import catalogue
from benchmarks import machine
from optuna_quantune import records
from optuna_quantune.chosen_sampler import make_sampler
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.evaluation.metrics import wilson_interval
from optuna_quantune.evaluation.runner import input_specs
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.quantization.config import MixedPrecision
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.sensitivity import LONGEST_ORDER
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import little_noise
from optuna_quantune.selection import rank
from optuna_quantune.selection import tells_apart
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results"
# By target.
SPACES = {"cpu": ("quantune", "extended"), "vta": ("vta", "extended")}
# The largest latency over the float model's that the search may choose.
MAX_LATENCY = 0.55
SLOWER = {"shufflenetv1_0.5_g3": 0.8}
LATENCY_REPEATS = 60
LATENCY_ROUNDS = 5
# Trials whose latency is measured again.
CANDIDATES = 12
EXPLANATION = "\n\n".join(__doc__.split("\n\n")[2:-1])
INTERVALS = """\
Intervals hold with 95 %: Tango's paired one for the difference, Wilson's for agreement,
order statistics of interleaved runs for latency. Knobs not named are as by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--target", default="cpu", choices=SPACES)
    parser.add_argument("--spaces", nargs="+", help="both of the target's by default")
    parser.add_argument("--n-trials", type=int, default=30)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "accuracy")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = RESULTS / results_of(arguments.target)
    folder.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    lines = folder / "results.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["model"], row["space"]) for row in rows}
    for name in catalogue.names(arguments.data, arguments.models):
        for space in arguments.spaces or SPACES[arguments.target]:
            if (name, space) in done:
                continue
            row = run(name, space, arguments)
            with lines.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            write(rows, folder, arguments.target)
            print(json.dumps(row), flush=True)
    if rows:
        write(rows, folder, arguments.target)


def results_of(target: str) -> str:
    """The folder of a target's results."""
    return machine.results_of("accuracy") if target == "cpu" else f"accuracy_{target}"


def run(name: str, space: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Searches one space, and measures what it chose on the validation images."""
    path, calibration, _ = catalogue.sources(name, arguments.data)
    choosing, validation = catalogue.choosing_and_validation(name, arguments.data)
    wanted = SLOWER.get(name, MAX_LATENCY)
    start = time.perf_counter()
    build = functools.partial(
        QuantizationObjective,
        path,
        calibration=calibration,
        evaluation=choosing,
        metric="agreement",
        threads=1,
        cache=arguments.work / "cache",
        target=arguments.target,
    )
    preset = SearchSpace.preset(space)
    case = f"{name}-{arguments.target}-{space}"
    known = arguments.work / f"{case}.json"  # an interrupted search keeps its bound
    bound = None
    if arguments.target == "cpu":
        if not known.exists():
            known.write_text(json.dumps(possible_bound(build(space=preset), wanted)))
        bound = json.loads(known.read_text())
    objective = build(space=preset, max_latency=bound)
    family = catalogue.family(name, arguments.data)
    studies = records.source_studies("agreement", without=family)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(arguments.work / f"{case}.journal"))),
        study_name=case,
        load_if_exists=True,
        directions=objective.directions,
        sampler=make_sampler("quantune", objective, seed=0, source_studies=studies),
        pruner=optuna.pruners.NopPruner(),
    )
    possible = min(arguments.n_trials, objective.space.size or arguments.n_trials)
    missing = possible - len(study.get_trials(states=(TrialState.COMPLETE,)))
    study.optimize(objective, n_trials=max(missing, 0), catch=(TrialFailure,))
    config, quantized = choose(study, objective, bound)
    seconds = time.perf_counter() - start
    int8_path = arguments.work / f"{case}.onnx"
    int8_path.write_bytes(quantized)
    return {
        "model": name,
        "space": space,
        "trials": len(study.trials),
        "max_latency": bound,
        "chosen": not_default(config),
        **report(objective, int8_path, validation, timed=bound is not None),
        "seconds": round(seconds, 1),
        "machine": machine.describe(),
    }


def possible_bound(objective: QuantizationObjective, bound: float) -> float:
    """The bound; if no number of float layers meets it, a tenth more than the least ratio."""
    steps = range(LONGEST_ORDER + 1 if "float_layers" in objective.space else 1)
    ratios = []
    for number, ends in itertools.product(steps, get_args(MixedPrecision)):
        config = QuantizationConfig(float_layers=number, mixed_precision=ends)
        model = objective.quantize(config).proto.SerializeToString()
        ratios.append(objective.latency(model, repeats=LATENCY_REPEATS).ratio)
    return bound if min(ratios) <= bound else round(1.1 * min(ratios), 3)


def choose(
    study: optuna.Study, objective: QuantizationObjective, bound: float | None
) -> tuple[QuantizationConfig, bytes]:
    """The best trial that is fast enough when it is measured again, or the fastest one."""
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    best = max(trials, key=lambda trial: rank(trial, "maximize"))
    ranked = sorted(
        (trial for trial in trials if not tells_apart(best, trial, AGREES_KEY)),
        key=little_noise,
        reverse=True,
    )
    if bound is None:
        config = objective.space.config(ranked[0].params)
        return config, objective.quantize(config).proto.SerializeToString()
    fast_once = [t for t in ranked if t.user_attrs.get("latency_ratio", 9.0) <= 1.1 * bound]
    fastest, found = np.inf, None
    for trial in (fast_once or ranked)[:CANDIDATES]:
        config = objective.space.config(trial.params)
        model = objective.quantize(config).proto.SerializeToString()
        ratio = objective.latency(model, repeats=LATENCY_REPEATS).ratio
        if found is None or ratio < fastest:
            fastest, found = ratio, (config, model)
        if ratio <= bound:
            break
    assert found is not None
    return found


def not_default(config: QuantizationConfig) -> dict[str, Any]:
    """The knobs of a configuration that are not as by default."""
    default = QuantizationConfig()
    return {
        knob: value
        for knob, value in dataclasses.asdict(config).items()
        if value != getattr(default, knob)
    }


def report(
    objective: QuantizationObjective, int8_path: Path, validation: InputSource, *, timed: bool
) -> dict[str, Any]:
    """Both models on the validation images."""
    float_path = objective.model.path
    reference, outputs = (
        next(iter(objective.outputs(path, validation, "validation").values()))
        for path in (float_path, int8_path)
    )
    labels = validation.labels
    assert labels is not None
    float_correct, correct = (top_k_correct(o, labels, k=1) for o in (reference, outputs))
    difference = paired_difference_interval(correct, float_correct)
    measured = measure(outputs, reference=reference, labels=labels)
    same = round(float(measured.agreement or 0.0) * measured.n)
    agreement = wilson_interval(same, measured.n)
    found = {
        "images": measured.n,
        "float_top1": float(float_correct.mean()),
        "top1": measured.top1,
        "difference": dataclasses.astuple(difference),
        "agreement": dataclasses.astuple(agreement),
        "sqnr_db": measured.sqnr_db,
        "bytes": int8_path.stat().st_size,
        "float_bytes": float_path.stat().st_size,
    }
    if timed:
        for key, threads in (("latency_1_thread", 1), ("latency_all_threads", None)):
            found[key] = latency(float_path, int8_path, validation, threads=threads)
    return found


def latency(
    float_path: Path, int8_path: Path, inputs: InputSource, *, threads: int | None
) -> tuple[float, float, float]:
    """Ratio with its 95 % interval, the middle one of several measurements.

    Each has sessions of its own; other work on the machine may slow one of the two models more.
    """
    found = []
    for _ in range(LATENCY_ROUNDS):
        sessions = [make_session(path, threads=threads) for path in (int8_path, float_path)]
        feeds = list(inputs.bind(input_specs(sessions[0])).batches(1, np.arange(1)))
        ratio = latency_ratio(sessions[0], sessions[1], feeds, repeats=LATENCY_REPEATS)
        found.append((ratio.ratio, ratio.low, ratio.high))
    return sorted(found)[len(found) // 2]


def write(rows: list[dict[str, Any]], folder: Path, target: str) -> None:
    """The table of all that is done."""
    table = pd.DataFrame(
        {
            "model": row["model"],
            "space": row["space"],
            "float": f"{row['float_top1']:.3f}",
            "int8": f"{row['top1']:.3f}",
            "int8 - float, points": "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * value for value in row["difference"])
            ),
            "agreement, %": "{:.1f} ({:.1f} to {:.1f})".format(
                *(100 * value for value in row["agreement"])
            ),
            "SQNR, dB": f"{row['sqnr_db']:.1f}",
            **{
                f"latency, {threads.replace('_', ' ')}": "{:.2f} ({:.2f} to {:.2f})".format(*ratio)
                for key, ratio in row.items()
                if (threads := key.removeprefix("latency_")) != key
            },
            "trials": row["trials"],
            "configuration": ", ".join(f"{k} {v}" for k, v in row["chosen"].items()),
        }
        for row in sorted(rows, key=itemgetter("model", "space"))
    )
    command = "python -m benchmarks.accuracy DATA" + (
        f" --target {target}" if target != "cpu" else ""
    )
    lines = [
        f"# Accuracy of the chosen configurations ({target})",
        "",
        f"`{command}`; {machine.as_markdown(rows[-1]['machine'])}.",
        "",
        *EXPLANATION.splitlines(),
        "",
        *INTERVALS.splitlines(),
        "",
        "| " + " | ".join(table.columns) + " |",
        "|" + " --- |" * len(table.columns),
        *("| " + " | ".join(map(str, row)) + " |" for row in table.to_numpy()),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
