"""For the terminal: tables of trials, the chosen model, a model's layers; lines of findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Final

from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.console import Console
from rich.console import ConsoleOptions
from rich.console import RenderResult
from rich.table import Table
from rich.text import Text

from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.quantization.lint import channel_spread
from optuna_quantune.quantization.lint import Finding
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.remarks import left_in_float_lines
from optuna_quantune.report.numbers import short
from optuna_quantune.report.result_rows import RESULT_COLUMNS
from optuna_quantune.report.result_rows import result_sections
from optuna_quantune.report.trial_rows import best_first
from optuna_quantune.report.trial_rows import first_line
from optuna_quantune.report.trial_rows import knob_text
from optuna_quantune.report.trial_rows import shared_knobs
from optuna_quantune.report.trial_rows import TrialRow
from optuna_quantune.tuning import TuningResult


# More knobs that differ between trials stand below the table, where they can be read.
_MOST_KNOB_COLUMNS: Final = 5
# Columns of a console that nothing is too wide for.
_UNBOUNDED: Final = 10_000


def trial_line(trial: FrozenTrial) -> str:
    """One finished trial as one line."""
    knobs = " ".join(str(value) for value in trial.params.values())
    if trial.state != TrialState.COMPLETE:
        reason = first_line(trial.user_attrs.get("error", ""))
        return f"trial {trial.number:>3}  {trial.state.name.lower():<9} {knobs}  {reason}"
    twin = trial.user_attrs.get("duplicate_of")
    note = "" if twin is None else f"  (the same model as trial {twin})"
    values = "  ".join(short(value) for value in trial.values)
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
    return TrialsTable("Trials, best first", best_first(complete, metric.direction), metric.name)


def pareto_table(result: TuningResult) -> TrialsTable:
    """The trials that no other beats in all objectives, fastest first."""
    trials = sorted(result.pareto, key=lambda trial: trial.user_attrs["latency_ratio"])
    objectives = ", ".join(result.study.metric_names or ())
    return TrialsTable(f"Pareto front of {objectives}", trials, result.metric.name)


def _table_of_trials(
    title: str, trials: Sequence[FrozenTrial], metric: str, *, most_knobs: int, narrow: bool
) -> Table:
    table = Table(title=title, title_justify="left")
    rows = [TrialRow.of(trial) for trial in trials]
    columns = [
        ("trial", [row.trial for row in rows]),
        (metric, [row.value for row in rows]),
        ("agreement", [row.agreement for row in rows]),
        ("SQNR dB", [row.sqnr_db for row in rows]),
        ("latency [95 %]", [row.latency for row in rows]),
        ("MB", [row.megabytes for row in rows]),
        ("s", [row.seconds for row in rows]),
    ]
    if not any(row.sqnr_db for row in rows):
        del columns[3]
    if metric == "agreement" or not any(row.agreement for row in rows):
        del columns[2]
    if narrow:
        columns = [columns[0], columns[1], *columns[-3:-1]]
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    knobs, common = shared_knobs(trials)
    notes = []
    if common:
        notes.append(f"The same in all: {knob_text(trials[0].params, common)}")
    if len(knobs) > most_knobs:
        notes += [f"Trial {trial.number}: {knob_text(trial.params, knobs)}" for trial in trials]
        knobs = []
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    for name in knobs:
        # Rich would wrap within words.
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    for trial, *cells in zip(trials, *(column for _, column in columns), strict=True):
        table.add_row(*cells, *(str(trial.params.get(name, "")) for name in knobs))
    return table


def result_table(result: TuningResult) -> Table:
    """The float model and the written one, side by side."""
    table = Table(title="Before and after", title_justify="left")
    for column in RESULT_COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for section in result_sections(result.summary):
        if section.title:
            table.add_row(Text(section.title, style="bold"))
        for row in section.rows:
            name = f"  {row.name}" if section.title else row.name
            table.add_row(name, row.float_model, row.quantized, row.difference)
        table.add_section()
    return table


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
    table.caption, table.caption_justify = "\n".join(left_in_float_lines(model)), "left"
    return table


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line for each finding of `lint`, warnings first."""
    ordered = sorted(findings, key=lambda finding: finding.severity != "warning")
    return [f"{finding.severity}: {finding.message} [{finding.rule}]" for finding in ordered]


def config_lines(result: TuningResult) -> str:
    """The chosen configuration, one knob a line."""
    knobs = dataclasses.asdict(result.config)
    return "\n".join(f"  {name:<20} {value}" for name, value in knobs.items())
