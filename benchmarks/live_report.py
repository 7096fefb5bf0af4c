"""What `benchmarks.live` writes: each model's methods side by side, and what follows for all."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from benchmarks import machine
from benchmarks import tables
from benchmarks.onnxruntime_user import grid
from benchmarks.onnxruntime_user import kinds_of_cost
from benchmarks.peers.task import Task
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.selection import unpack


# A trial whose value is this close to the best has arrived; values are shares of inputs.
CLOSE = 0.001
_SAME = 1e-9
# Ours in the larger space, which the others do not search.
EXTENDED = "quantune, extended"


@dataclass(frozen=True)
class Best:
    """The best of all 96 configurations of the preset on the inputs that select.

    Attributes:
        value: Its top-1 accuracy.
        correct: Which inputs it has right, shape (inputs,); None if no table was recorded and the
            value is that of the best trial of all searches.
    """

    value: float
    correct: NDArray[np.bool_] | None

    def is_close(self, value: float) -> bool:
        """Whether an accuracy is within `CLOSE`."""
        return value >= self.value - CLOSE - _SAME

    def is_tied(self, correct: str | None) -> bool:
        """Whether a paired 95 % interval cannot tell packed correct inputs from the best's."""
        if self.correct is None or correct is None:
            return False
        other = unpack(correct, len(self.correct))
        return paired_difference_interval(self.correct, other).low <= 0


@dataclass(frozen=True)
class Exhaustive:
    """The exhaustive search as far as it was measured.

    Attributes:
        measured: Configurations that were run.
        failed: Those among them that were stopped for their memory, or failed.
        seconds: Of all 96 configurations, extrapolated by the mean unless all were run.
        low: Lower end of the 95 % interval of it.
        high: Upper end.
    """

    measured: int
    failed: int
    seconds: float
    low: float
    high: float


def write(folder: Path, task_folder: Path) -> None:
    """Writes README.md and summary.csv beside the steps.

    Args:
        folder: Where `steps.jsonl` is.
        task_folder: The tasks, for which inputs selected.
    """
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    # Of a step that was run again, the last line is the result.
    lines = list({(line["model"], line["step"]): line for line in lines}.values())
    rows: list[dict[str, Any]] = []
    failures: dict[str, list[str]] = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        steps = {line["step"]: line for line in lines if line["model"] == model}
        task = Task.load(task_folder / model)
        rows += summarize(model, steps, best_selected(task, steps))
        failures[model] = [
            f"{name} failed: {s['failed']} after {s['seconds']:.0f} s."
            for name, s in steps.items()
            if "failed" in s
        ]
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "summary.csv", index=False, float_format="%.5g")
    loads = [line["load_before"] for line in lines]
    text = [
        "# Wall clock of the whole job",
        "",
        f"`{' '.join(['python -m benchmarks.live TASKS', *sys.argv[2:]])}`;",
        f"{machine.of_all(lines)}. Load of",
        f"the machine before a step: {min(loads):.1f} to {max(loads):.1f}.",
        "",
        "`whole`: seconds of everything, calibration and the final report included. `close`:",
        "until the first trial within 0.1 points of the best of all 96 configurations of the",
        "`quantune` preset, on the inputs that select; `tie`: until the first that a paired 95 %",
        "interval cannot tell from that best there; each with its number of trials; `-`: never.",
        "`held out`: top-1 accuracy of the chosen model on the inputs that nothing was chosen by,",
        "in points against float with the paired 95 % interval, its agreement with the float",
        "model there, and its batch-1 latency over float's. `MB`: peak memory beyond the inputs.",
        "One seed a method; `benchmarks.compare` replays many.",
        "",
    ]
    for model, group in frame.groupby("model", sort=False):
        text += [f"## {model}", "", *as_table(group), "", *failures[model], ""]
    text += speedups(frame)
    (folder / "README.md").write_text("\n".join(text) + "\n")


def summarize(model: str, steps: dict[str, dict[str, Any]], best: Best) -> list[dict[str, Any]]:
    """One row a method."""
    rows = []
    for name, step in steps.items():
        if name.startswith("exhaustive") or "failed" in step:
            continue
        estimate, low, high = (100 * end for end in step["difference"])
        row = {
            "model": model,
            "method": name,
            "memory_mb": step["memory_mb"],
            "held_out_points": estimate,
            "held_out_low": low,
            "held_out_high": high,
            "agreement": step["agreement_held_out"],
            "latency_ratio": step["latency_ratio"],
        }
        if "trials" in step:
            row |= {"whole_seconds": step["total_seconds"], "trials": len(step["trials"])}
            row["close_trials"], row["close_seconds"] = arrival(
                step["trials"], lambda trial: best.is_close(trial["value"])
            )
            row["tie_trials"], row["tie_seconds"] = arrival(
                step["trials"], lambda trial: best.is_tied(trial["correct"])
            )
        else:
            row |= {"whole_seconds": step["build_seconds"], "trials": 1}
            for goal, is_met in (
                ("close", best.is_close(step["top1_selected"])),
                ("tie", best.is_tied(step["correct_selected"])),
            ):
                row[f"{goal}_seconds"] = step["build_seconds"] if is_met else math.nan
                row[f"{goal}_trials"] = 1 if is_met else math.nan
        rows.append(row)
    total = exhaustive(steps)
    if total is not None:
        measured = [
            s for name, s in steps.items() if name.startswith("exhaustive") and "failed" not in s
        ]
        row = {
            "model": model,
            "method": "exhaustive",
            "whole_seconds": total.seconds,
            "low_seconds": total.low,
            "high_seconds": total.high,
            "trials": total.measured,
            "failed": total.failed,
            "memory_mb": max((s["memory_mb"] for s in measured), default=math.nan),
        }
        if total.measured == len(grid()) and measured:
            chosen = max(measured, key=lambda s: s["top1_selected"])
            row["held_out_points"] = 100 * chosen["difference"][0]
            row["held_out_low"], row["held_out_high"] = (100 * e for e in chosen["difference"][1:])
            row["agreement"] = chosen["agreement_held_out"]
            row["latency_ratio"] = chosen["latency_ratio"]
        rows.append(row)
    return rows


def arrival(
    trials: list[dict[str, Any]], is_met: Callable[[dict[str, Any]], bool]
) -> tuple[float, float]:
    """Number and seconds of the first complete trial that meets a goal; NaN if none does."""
    for number, trial in enumerate(trials, start=1):
        if trial["state"] == "COMPLETE" and is_met(trial):
            return number, trial["seconds"]
    return math.nan, math.nan


def exhaustive(steps: dict[str, dict[str, Any]]) -> Exhaustive | None:
    """Seconds of all configurations, from those that were run."""
    measured = {
        int(name.split()[1]): step for name, step in steps.items() if name.startswith("exhaustive")
    }
    if not measured:
        return None
    seconds = {
        number: step["seconds"]
        if "failed" in step
        else step["build_seconds"] + step["evaluate_seconds"]
        for number, step in measured.items()
    }
    total, low, high = extrapolated(seconds)
    failed = sum("failed" in step for step in measured.values())
    return Exhaustive(len(measured), failed, total, low, high)


def extrapolated(seconds: Mapping[int, float]) -> tuple[float, float, float]:
    """The sum over all configurations from those of a sample, with the ends of its interval.

    Stratified by `kinds_of_cost` where two of each kind were run, which is what decides how long
    a configuration takes; with the corrections for a finite population.
    """
    whole = list(range(len(grid())))
    kinds = list(kinds_of_cost().values())
    if any(len(seconds.keys() & set(kind)) < 2 for kind in kinds):
        kinds = [whole]
    total = variance = 0.0
    for kind in kinds:
        found = np.array([seconds[number] for number in kind if number in seconds])
        total += len(kind) * float(found.mean())
        if len(found) < len(kind):
            spread = found.var(ddof=1) if len(found) > 1 else math.inf
            variance += len(kind) * (len(kind) - len(found)) * float(spread) / len(found)
    if variance == 0.0:
        return total, total, total
    freedom = max(len(seconds) - len(kinds), 1)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return total, max(total - half, float(sum(seconds.values()))), total + half


def best_selected(task: Task, steps: dict[str, dict[str, Any]]) -> Best:
    """The best on the selecting inputs: of the recorded table, else of what was run."""
    if task.name in tables.complete():
        correct = tables.load(task.name).all_correct[:, task.selected]
        winner = max(correct, key=lambda bits: float(bits.mean()))
        return Best(float(winner.mean()), winner)
    values = [t["value"] for s in steps.values() for t in s.get("trials", ())]
    return Best(max(float(value) for value in values if value is not None), None)


def as_table(group: pd.DataFrame) -> list[str]:
    """The methods of one model, as Markdown."""
    lines = [
        "| method | whole, s | tie, s | trials | close, s | trials | held out, points "
        "| agreement | latency | MB |",
        "| --- |" + " --- |" * 9,
    ]
    for _, row in group.iterrows():
        whole = f"{row['whole_seconds']:.0f}"
        if row["method"] == "exhaustive" and row["trials"] < len(grid()):
            whole += f" [{row['low_seconds']:.0f}, {row['high_seconds']:.0f}]"
        name = row["method"]
        if name == "exhaustive":
            name += f" ({row['trials']:.0f} of {len(grid())} run, {row['failed']:.0f} failed)"
        cells = [
            whole,
            number(row["tie_seconds"], 1),
            number(row["tie_trials"], 0),
            number(row["close_seconds"], 1),
            number(row["close_trials"], 0),
            with_interval(row["held_out_points"], row["held_out_low"], row["held_out_high"]),
            number(row["agreement"], 3),
            number(row["latency_ratio"], 2),
            number(row["memory_mb"], 0),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def speedups(frame: pd.DataFrame) -> list[str]:
    """The other methods' time over ours, model by model and in the geometric mean."""
    ours = frame[frame["method"] == "quantune"].set_index("model")
    lines = [
        "## Time of the others over ours",
        "",
        "Exhaustive search: its whole time, over the time until `quantune` is tied or close and",
        "over its whole time. The other searches: time until tied or close over ours until the",
        "same; a search that never was counts with its whole time (>).",
        "",
        "| method | " + " | ".join(ours.index) + " | geometric mean |",
        "| --- |" + " --- |" * (len(ours) + 1),
    ]
    searches = [
        name
        for name in frame["method"].unique()
        if name not in ("quantune", EXTENDED, "exhaustive", "rule of thumb")
    ]
    comparisons = [
        ("exhaustive / tie", "exhaustive", "whole_seconds", "tie_seconds"),
        ("exhaustive / close", "exhaustive", "whole_seconds", "close_seconds"),
        ("exhaustive / whole", "exhaustive", "whole_seconds", "whole_seconds"),
        *((f"{name}, tie", name, "tie_seconds", "tie_seconds") for name in searches),
        *((f"{name}, close", name, "close_seconds", "close_seconds") for name in searches),
    ]
    for label, name, theirs, mine in comparisons:
        other = frame[frame["method"] == name].set_index("model")
        ratios, cells = [], []
        for model in ours.index:
            if model not in other.index or math.isnan(ours.loc[model, mine]):
                cells.append("-")
                continue
            seconds = other.loc[model, theirs]
            is_bound = math.isnan(seconds)
            if is_bound:
                seconds = other.loc[model, "whole_seconds"]
            ratios.append(seconds / ours.loc[model, mine])
            cells.append(f"{'> ' if is_bound else ''}{ratios[-1]:.1f}")
        mean = f"{stats.gmean(ratios):.1f}" if ratios else "-"
        lines.append(f"| {label} | {' | '.join(cells)} | {mean} |")
    return lines


def number(value: float, digits: int) -> str:
    """A number, or a dash if there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def with_interval(value: float, low: float, high: float) -> str:
    """A number with the ends of its interval, or a dash if there is none."""
    return "-" if math.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
