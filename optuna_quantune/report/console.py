"""For the terminal: tables of trials, the chosen model, a model's layers; lines of findings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Final

import numpy as np
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Console
from rich.console import ConsoleOptions
from rich.console import RenderResult
from rich.table import Table

from optuna_quantune.comparison import Comparison
from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.lint import channel_spread
from optuna_quantune.quantization.lint import Finding
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.remarks import recurrent_lines
from optuna_quantune.selection import metric_value
from optuna_quantune.tuning import TuningResult


# More knobs that differ between trials stand below the table, where they can be read.
_MOST_KNOB_COLUMNS: Final = 5
# Columns of a console that nothing is too wide for.
_UNBOUNDED: Final = 10_000


def trial_line(trial: FrozenTrial) -> str:
    """One finished trial as one line."""
    knobs = " ".join(str(value) for value in trial.params.values())
    if trial.state != TrialState.COMPLETE:
        reason = str(trial.user_attrs.get("error", "")).split("\n")[0]
        return f"trial {trial.number:>3}  {trial.state.name.lower():<9} {knobs}  {reason}"
    twin = trial.user_attrs.get("duplicate_of")
    note = "" if twin is None else f"  (the same model as trial {twin})"
    values = "  ".join(_short(value) for value in trial.values)
    return f"trial {trial.number:>3}  {values:<9} {knobs}{note}"


class TrialsTable:
    """A table of trials that nothing is cut off of: on a narrow console with fewer columns.

    Args:
        title: The title.
        trials: One row each.
        metric: The metric's name.
    """

    def __init__(self, title: str, trials: Sequence[FrozenTrial], metric: str) -> None:
        self.trials = trials
        self._tables = [
            _table_of_trials(title, trials, metric, most_knobs=knobs, narrow=narrow)
            for knobs, narrow in ((_MOST_KNOB_COLUMNS, False), (0, False), (0, True))
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=_UNBOUNDED)
        widths = (console.measure(table, options=unbounded).maximum for table in self._tables)
        fitting = (t for t, w in zip(self._tables, widths, strict=True) if w <= options.max_width)
        yield next(fitting, self._tables[-1])


def trials_table(trials: Iterable[FrozenTrial], metric: ChosenMetric) -> TrialsTable:
    """All completed trials, best first."""
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    complete.sort(
        key=lambda t: (-metric.sign * metric_value(t), t.user_attrs.get("latency_ratio", np.inf))
    )
    return TrialsTable("Trials, best first", complete, metric.name)


def pareto_table(result: TuningResult) -> TrialsTable:
    """The trials that no other beats in all objectives, fastest first."""
    trials = sorted(result.pareto, key=lambda trial: trial.user_attrs["latency_ratio"])
    objectives = ", ".join(result.study.metric_names or ())
    return TrialsTable(f"Pareto front of {objectives}", trials, result.metric.name)


def _table_of_trials(
    title: str, trials: Sequence[FrozenTrial], metric: str, *, most_knobs: int, narrow: bool
) -> Table:
    table = Table(title=title, title_justify="left")
    numbers = ["trial", metric, "agreement", "SQNR dB", "latency [95 %]", "MB", "s"]
    if metric == "agreement" or all(t.user_attrs.get("agreement") is None for t in trials):
        numbers.remove("agreement")
    if narrow:
        numbers = ["trial", metric, "latency [95 %]", "MB"]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    knobs = list(dict.fromkeys(name for trial in trials for name in trial.params))
    notes = []
    common = [k for k in knobs if len({str(t.params.get(k)) for t in trials}) == 1]
    if len(trials) > 1 and common:
        notes.append(f"The same in all: {_knobs(trials[0].params, common)}")
        knobs = [name for name in knobs if name not in common]
    if len(knobs) > most_knobs:
        notes += [f"Trial {trial.number}: {_knobs(trial.params, knobs)}" for trial in trials]
        knobs = []
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    for name in knobs:
        # Rich would wrap within words.
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    for trial in trials:
        attributes = trial.user_attrs
        duration = trial.duration.total_seconds() if trial.duration else float("nan")
        cells = {
            "trial": str(trial.number),
            metric: _short(metric_value(trial)),
            "agreement": _optional(attributes.get("agreement"), ".4f"),
            "SQNR dB": _optional(attributes.get("sqnr_db"), ".1f"),
            "latency [95 %]": _latency(attributes),
            "MB": figure(attributes["size_bytes"] / 1e6),
            "s": f"{duration:.1f}",
        }
        table.add_row(
            *(cells[name] for name in numbers),
            *(str(trial.params.get(name, "")) for name in knobs),
        )
    return table


def _knobs(params: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name} {params[name]}" for name in names if name in params)


def _latency(attributes: Mapping[str, Any]) -> str:
    ratio = f"{attributes['latency_ratio']:.2f}x"
    if "latency_low" not in attributes:
        return ratio
    return f"{ratio} [{attributes['latency_low']:.2f}, {attributes['latency_high']:.2f}]"


def _optional(number: float | None, style: str) -> str:
    return "" if number is None else f"{number:{style}}"


def figure(number: float) -> str:
    """Two decimals, but at least three digits: tiny models take 0.0124 ms and have 0.0521 MB."""
    zeros = -math.floor(math.log10(number)) - 1 if 0 < number < 1 else -1
    return f"{number:.{max(2, 3 + zeros)}f}"


def _short(number: float) -> str:
    """Accuracies and ratios with four decimals, bytes without."""
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:,.0f}"


def result_table(result: TuningResult) -> Table:
    """The float model and the written one, side by side."""
    table = Table(title="Before and after", title_justify="left")
    table.add_column("")
    table.add_column("float", justify="right")
    table.add_column("int8", justify="right")
    table.add_column("difference", justify="right")
    everything = result.all_inputs
    name = f"all {everything.inputs} inputs" if everything.inputs else "inputs of your own"
    _add_comparison(table, name, everything, result.metric)
    if result.held_out is not None:
        name = f"{result.held_out.inputs} inputs held out of the search"
        _add_comparison(table, name, result.held_out, result.metric)
    table.add_row(
        "size",
        f"{figure(result.float_bytes / 1e6)} MB",
        f"{figure(result.quantized_bytes / 1e6)} MB",
        f"{result.quantized_bytes / result.float_bytes:.2f}x",
    )
    latency = result.latency
    table.add_row(
        "latency, batch 1",
        f"{figure(latency.reference_median_ms)} ms",
        f"{figure(latency.median_ms)} ms",
        f"{latency.ratio:.2f}x [{latency.low:.2f}, {latency.high:.2f}]",
    )
    return table


def _add_comparison(table: Table, name: str, comparison: Comparison, metric: ChosenMetric) -> None:
    table.add_section()
    table.add_row(f"[bold]{name}")
    before, after = comparison.float_model, comparison.quantized
    for field, label, first, second in (
        ("top1", "top-1", before.top1, after.top1),
        ("top5", "top-5", before.top5, after.top5),
    ):
        if first is None or second is None:
            continue
        change = f"{100 * (second - first):+.2f} points"
        if field == metric.name and comparison.difference is not None:
            change += f" {_points(comparison.difference)}"
        table.add_row(f"  {label}", f"{first:.4f}", f"{second:.4f}", change)
    if before.own is not None and after.own is not None:
        change = f"{after.own - before.own:+.4g}"
        if comparison.difference is not None:
            interval = comparison.difference
            change += f" [{interval.low:+.4g}, {interval.high:+.4g}]"
        table.add_row(f"  {metric.name}", f"{before.own:.4g}", f"{after.own:.4g}", change)
    if after.agreement is not None:
        change = ""
        if metric.name == "agreement" and comparison.difference is not None:
            change = f"{100 * (after.agreement - 1):+.2f} points "
            change += _points(comparison.difference)
        table.add_row("  agreement with float", "", f"{after.agreement:.4f}", change)
    if after.sqnr_db is not None:
        table.add_row("  output SQNR", "", f"{after.sqnr_db:.1f} dB", "")
    table.add_section()


def _points(interval: Interval) -> str:
    return f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def layers_table(model: FloatModel) -> Table:
    """The quantizable layers of a model and how far their channels' ranges lie apart."""
    table = Table(title="Quantizable layers", title_justify="left")
    table.add_column("layer")
    table.add_column("operator")
    table.add_column("weight", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("channel range, max / median", justify="right")
    for layer in model.layers:
        weight = model.weights[layer.weight]
        table.add_row(
            layer.name,
            layer.op_type,
            "x".join(map(str, weight.shape)),
            f"{weight.size:,}",
            f"{channel_spread(weight, layer.channel_axis):.1f}",
        )
    table.caption, table.caption_justify = "\n".join(recurrent_lines(model)), "left"
    return table


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line for each finding of `lint`, warnings first."""
    ordered = sorted(findings, key=lambda finding: finding.severity != "warning")
    return [f"{finding.severity}: {finding.message} [{finding.rule}]" for finding in ordered]


def predictions_table(objective: QuantizationObjective, limit: int) -> Table:
    """The configurations of a space with the least predicted noise, none of them run."""
    table = Table(title="Least predicted noise, nothing run", title_justify="left")
    table.add_column("predicted SQNR dB", justify="right")
    table.add_column("rounding dB", justify="right")
    table.add_column("clipping dB", justify="right")
    table.add_column("weights dB", justify="right")
    for name in objective.space:
        table.add_column(name.replace("_", " "))
    rows = [(objective.features(params), params) for params in objective.space.grid()]
    rows.sort(key=lambda row: -row[0]["predicted_sqnr_db"])
    for features, params in rows[:limit]:
        table.add_row(
            f"{features['predicted_sqnr_db']:.1f}",
            f"{features['rounding_sqnr_db']:.1f}",
            f"{features['clipping_sqnr_db']:.1f}",
            f"{features['weights_sqnr_db']:.1f}",
            *(str(params[name]) for name in objective.space),
        )
    return table


def config_lines(result: TuningResult) -> str:
    """The chosen configuration, one knob a line."""
    knobs = dataclasses.asdict(result.config)
    return "\n".join(f"  {name:<20} {value}" for name, value in knobs.items())
