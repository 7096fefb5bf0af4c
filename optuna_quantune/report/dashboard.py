"""The result of a search as a note that optuna-dashboard shows beside the study."""

from __future__ import annotations

import re
from collections.abc import Iterable

import optuna

from optuna_quantune.report.result_rows import RESULT_COLUMNS
from optuna_quantune.report.result_rows import result_sections
from optuna_quantune.summary import Summary


def note_result(study: optuna.Study, summary: Summary) -> bool:
    """Writes a result into the note of its study, in place of what stands there.

    Args:
        study: The study.
        summary: What its search found.

    Returns:
        Whether it was written; not where optuna-dashboard (the extra ``dashboard``) is missing.
    """
    try:
        import optuna_dashboard
    except ImportError:
        return False
    optuna_dashboard.save_note(study, result_note(summary))
    return True


def result_note(summary: Summary) -> str:
    """A result as Markdown."""
    rows = []
    for section in result_sections(summary):
        if section.title:
            rows.append((f"**{_text(section.title)}**", "", "", ""))
        for row in section.rows:
            rows.append((_text(row.name), row.float_model, row.quantized, row.difference))
    knobs = [(_text(name), _text(value)) for name, value in summary.config.items()]
    versions = ", ".join(f"{name} {number}" for name, number in summary.versions.items())
    parts = [
        f"# Quantization of {_text(summary.model)}",
        *(f"**{_text(remark)}**" for remark in summary.remarks),
        f"Target {_text(summary.target)}, metric {_text(summary.metric)}. Intervals in brackets "
        "are 95 % intervals.",
        _table(RESULT_COLUMNS, rows),
        f"## Chosen configuration: trial {summary.trial}",
        _table(("knob", "value"), knobs),
        f"The search took {summary.seconds:.0f} s, with {_text(versions)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: object) -> str:
    """A text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", " ".join(str(value).split()))
