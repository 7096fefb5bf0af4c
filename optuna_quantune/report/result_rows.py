"""The chosen model beside the float model as rows of text, for whatever shows them as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from optuna_quantune.comparison import Comparison
from optuna_quantune.report.numbers import figure
from optuna_quantune.report.numbers import points
from optuna_quantune.report.numbers import times
from optuna_quantune.summary import Summary


RESULT_COLUMNS: Final = ("", "float", "int8", "difference")


@dataclass(frozen=True)
class ResultRow:
    """One measured quantity.

    Attributes:
        name: What was measured.
        float_model: Its value of the float model.
        quantized: Its value of the quantized model.
        difference: The quantized model's against the float model's, with a 95 % interval in
            brackets where one is known.
    """

    name: str
    float_model: str
    quantized: str
    difference: str


@dataclass(frozen=True)
class ResultSection:
    """Rows that were measured on the same inputs.

    Attributes:
        title: Which inputs; empty for what does not depend on them.
        rows: One for each quantity.
    """

    title: str
    rows: tuple[ResultRow, ...]


def result_sections(summary: Summary) -> list[ResultSection]:
    """The result of a search, on all inputs, on those held out, and what needs no inputs."""
    everything = summary.all_inputs
    title = f"all {everything.inputs} inputs" if everything.inputs else "inputs of your own"
    sections = [ResultSection(title, _comparison_rows(everything, summary.metric))]
    if summary.held_out is not None:
        title = f"{summary.held_out.inputs} inputs held out of the search"
        sections.append(ResultSection(title, _comparison_rows(summary.held_out, summary.metric)))
    latency = summary.latency
    size = ResultRow(
        "size",
        f"{figure(summary.float_bytes / 1e6)} MB",
        f"{figure(summary.quantized_bytes / 1e6)} MB",
        times(summary.quantized_bytes / summary.float_bytes),
    )
    speed = ResultRow(
        "latency, batch 1",
        f"{figure(latency.reference_median_ms)} ms",
        f"{figure(latency.median_ms)} ms",
        times(latency.ratio, latency.low, latency.high),
    )
    return [*sections, ResultSection("", (size, speed))]


def _comparison_rows(comparison: Comparison, metric: str) -> tuple[ResultRow, ...]:
    rows = []
    before, after = comparison.float_model, comparison.quantized
    interval = comparison.difference
    for field, label, first, second in (
        ("top1", "top-1", before.top1, after.top1),
        ("top5", "top-5", before.top5, after.top5),
    ):
        if first is None or second is None:
            continue
        change = f"{100 * (second - first):+.2f} points"
        if field == metric and interval is not None:
            change += f" {points(interval.low, interval.high)}"
        rows.append(ResultRow(label, f"{first:.4f}", f"{second:.4f}", change))
    if before.own is not None and after.own is not None:
        change = f"{after.own - before.own:+.4g}"
        if interval is not None:
            change += f" [{interval.low:+.4g}, {interval.high:+.4g}]"
        rows.append(ResultRow(metric, f"{before.own:.4g}", f"{after.own:.4g}", change))
    if after.agreement is not None:
        change = ""
        if metric == "agreement" and interval is not None:
            change = f"{100 * (after.agreement - 1):+.2f} points "
            change += points(interval.low, interval.high)
        rows.append(ResultRow("agreement with float", "", f"{after.agreement:.4f}", change))
    if after.sqnr_db is not None:
        rows.append(ResultRow("output SQNR", "", f"{after.sqnr_db:.1f} dB", ""))
    return tuple(rows)
