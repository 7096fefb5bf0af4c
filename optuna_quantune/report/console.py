"""For the terminal: tables of trials, the chosen model, a model's layers; lines of findings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from rich.table import Table

from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.lint import channel_spread
from optuna_quantune.quantization.lint import Finding
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.tuning import Comparison
from optuna_quantune.tuning import TuningResult


def trial_line(trial: FrozenTrial) -> str:
    """One finished trial as one line."""
    knobs = " ".join(str(value) for value in trial.params.values())
    if trial.state != TrialState.COMPLETE or trial.value is None:
        reason = str(trial.user_attrs.get("error", "")).split("\n")[0]
        return f"trial {trial.number:>3}  {trial.state.name.lower():<9} {knobs}  {reason}"
    twin = trial.user_attrs.get("duplicate_of")
    note = "" if twin is None else f"  (the same model as trial {twin})"
    return f"trial {trial.number:>3}  {trial.value:.4f}    {knobs}{note}"


def trials_table(trials: Iterable[FrozenTrial], metric: str) -> Table:
    """All completed trials, best first."""
    table = Table(title="Trials, best first", title_justify="left")
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    complete.sort(key=lambda t: (-(t.value or 0.0), t.user_attrs.get("latency_ratio", np.inf)))
    numbers = ("trial", metric, "agreement", "SQNR dB", "latency", "MB", "s")
    for name in numbers:
        table.add_column(name, justify="right")
    knobs = list(dict.fromkeys(name for trial in complete for name in trial.params))
    for name in knobs:
        table.add_column(name.replace("_", " "))
    for trial in complete:
        attributes = trial.user_attrs
        duration = trial.duration.total_seconds() if trial.duration else float("nan")
        table.add_row(
            str(trial.number),
            f"{trial.value:.4f}",
            f"{attributes['agreement']:.4f}",
            f"{attributes['sqnr_db']:.1f}",
            f"{attributes['latency_ratio']:.2f}x",
            f"{attributes['size_bytes'] / 1e6:.2f}",
            f"{duration:.1f}",
            *(str(trial.params.get(name, "")) for name in knobs),
        )
    return table


def result_table(result: TuningResult) -> Table:
    """The float model and the written one, side by side."""
    table = Table(title="Before and after", title_justify="left")
    table.add_column("")
    table.add_column("float", justify="right")
    table.add_column("int8", justify="right")
    table.add_column("difference", justify="right")
    _add_comparison(table, f"all {result.all_inputs.inputs} inputs", result.all_inputs)
    if result.held_out is not None:
        name = f"{result.held_out.inputs} inputs held out of the search"
        _add_comparison(table, name, result.held_out)
    table.add_row(
        "size",
        f"{result.float_bytes / 1e6:.2f} MB",
        f"{result.quantized_bytes / 1e6:.2f} MB",
        f"{result.quantized_bytes / result.float_bytes:.2f}x",
    )
    latency = result.latency
    table.add_row(
        "latency, batch 1",
        f"{latency.reference_median_ms:.2f} ms",
        f"{latency.median_ms:.2f} ms",
        f"{latency.ratio:.2f}x [{latency.low:.2f}, {latency.high:.2f}]",
    )
    return table


def _add_comparison(table: Table, name: str, comparison: Comparison) -> None:
    table.add_section()
    table.add_row(f"[bold]{name}")
    before, after = comparison.float_model, comparison.quantized
    for label, field in (("top-1", "top1"), ("top-5", "top5")):
        first, second = _number(before, field), _number(after, field)
        if first is None or second is None:
            continue
        change = f"{100 * (second - first):+.2f} points"
        if field == "top1" and comparison.difference is not None:
            interval = comparison.difference
            change += f" [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"
        table.add_row(f"  {label}", f"{first:.4f}", f"{second:.4f}", change)
    table.add_row("  agreement with float", "", f"{after.agreement:.4f}", "")
    table.add_row("  output SQNR", "", f"{after.sqnr_db:.1f} dB", "")
    table.add_section()


def _number(measurement: Measurement, field: str) -> float | None:
    value = getattr(measurement, field)
    return None if value is None else float(value)


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
