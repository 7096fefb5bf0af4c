"""The report of a search: one HTML file that needs nothing else, no network and no model.

A storage may hold what others wrote, so nothing of a study becomes markup. Text is escaped where
it becomes `Html`, which is all that the parts of a page are made of. Figures stand in the page as
data. And a content security policy leaves a browser nothing to run or load but the scripts that
are written here, each of which carries a number that nobody can know before.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any
from typing import Final
from typing import NewType

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.output_file import check_folder
from optuna_quantune.output_file import write_whole
from optuna_quantune.process import is_abandoned
from optuna_quantune.report.contents import Contents
from optuna_quantune.report.figures import report_figures
from optuna_quantune.report.figures import ReportFigure
from optuna_quantune.report.result_rows import RESULT_COLUMNS
from optuna_quantune.report.result_rows import result_sections
from optuna_quantune.report.trial_rows import best_first
from optuna_quantune.report.trial_rows import knob_text
from optuna_quantune.report.trial_rows import shared_knobs
from optuna_quantune.report.trial_rows import TrialRow
from optuna_quantune.summary import Summary


# A piece of a page, in which everything that could be markup by mistake is escaped.
Html = NewType("Html", str)

# What the cells of a column hold: classes of the style sheet.
_TEXT: Final = ""
_NUMBER: Final = "number"
_NOTE: Final = "note"

_HOW_TO_READ: Final = (
    "Held out: with enough evaluation inputs, half of them take no part in the search. The best "
    "of many noisy numbers is too good on the inputs that chose it; on those held out it is not. "
    "Believe the held-out figures where there are any.",
    "Intervals in brackets are 95 % intervals. That of a difference is paired: both models saw "
    "the same inputs. An interval that holds 0 points (or a latency of 1.00x) means that no "
    "difference was measured.",
    "Latency is that of one input at a time, run in turns with the float model on the machine of "
    "the search, as a ratio to it: below 1.00x the int8 model is faster. The chosen model was "
    "measured again, so that its latency differs from that of its trial.",
    "A trial ends as soon as its value is known closely enough; the interval beside it says where "
    "it would have come out on all the inputs that select, not how it will do on others. A pruned "
    "trial shows its estimate when it was stopped.",
    "Agreement is the share of inputs with the float model's prediction. SQNR is the ratio of the "
    "outputs' power to that of the noise that quantization adds to them, in decibels: 20 dB is a "
    "tenth, 40 dB a hundredth of the amplitude.",
)


def write_report(study: optuna.Study, path: str | Path) -> Path:
    """Writes a report of a study, also of one that is still running.

    The file works offline; plotly.js in it makes it about 5 MB large. A file that is there is
    replaced once the new one is complete.

    Args:
        study: A study of `tune`, or of a `QuantizationObjective`.
        path: The HTML file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        InputError: If no trial of the study has ended, plotly is not installed, or the file
            cannot be written.
    """
    path = check_report(path)
    contents = Contents.of(study)
    if not any(trial.state.is_finished() for trial in contents.trials):
        raise InputError(
            f"study {contents.study_name!r}: no trial has ended yet; there is nothing to report"
        )
    from plotly.offline import get_plotlyjs

    figures = report_figures(contents)
    page = _page(contents, figures, get_plotlyjs())
    # Names of files may hold bytes that are no characters.
    return write_whole(page.encode(errors="backslashreplace"), path, "report")


def check_report(path: str | Path) -> Path:
    """Refuses a report that could not be written, before a search that it is to tell of.

    Args:
        path: The HTML file to write.

    Returns:
        The path.

    Raises:
        InputError: If plotly is not installed, or the path is no HTML file that can be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"report {path}: must end with .html")
    check_folder(path, "report")
    if importlib.util.find_spec("plotly") is None:
        raise InputError(
            "report: needs plotly, the extra 'report'; install it with pip install plotly"
        )
    return path


def _page(contents: Contents, figures: Sequence[ReportFigure], plotly_js: str) -> Html:
    nonce = secrets.token_urlsafe()
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    title = f"Quantization of {_model_name(contents)}"
    body = _join(
        _header(contents, title),
        _result(contents),
        _figures(figures),
        _trials(contents),
        _element("h2", _text("How to read it")),
        _element("ul", *(_element("li", _text(line)) for line in _HOW_TO_READ)),
        _versions(contents.summary),
        Html('<noscript><p class="faint">The figures need JavaScript.</p></noscript>'),
        _data(figures),
        _script(nonce, plotly_js),
        _script(nonce, _resource("draw.js")),
    )
    return Html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{_element('title', _text(title))}\n<style>\n{_resource('page.css')}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _header(contents: Contents, title: str) -> Html:
    states = [trial.state for trial in contents.trials]
    counts = [f"{states.count(state)} {state.name.lower()}" for state in TrialState]
    trials = ", ".join(text for text in counts if not text.startswith("0 "))
    better = "larger" if contents.direction == "maximize" else "smaller"
    facts = [
        f"target: {contents.target}" if contents.target is not None else "",
        f"metric: {contents.metric} ({better} is better)",
        f"study: {contents.study_name}",
        f"{len(states)} trials: {trials}",
        f"report of {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    ]
    if len(contents.objectives) > 1:
        facts.insert(2, f"objectives: {', '.join(name for name, _ in contents.objectives)}")
    return _join(
        _element("h1", _text(title)),
        _element("p", _text(" · ".join(fact for fact in facts if fact)), kind="faint"),
    )


def _model_name(contents: Contents) -> str:
    return contents.study_name if contents.summary is None else contents.summary.model


def _result(contents: Contents) -> Html:
    running = sum(
        trial.state == TrialState.RUNNING and not is_abandoned(trial) for trial in contents.trials
    )
    remarks = [f"The search goes on: trials still running: {running}."] if running else []
    if contents.summary is None:
        return _best_so_far(contents, remarks)
    summary = contents.summary
    kinds = (_TEXT, _NUMBER, _NUMBER, _NUMBER)
    rows = []
    for section in result_sections(summary):
        if section.title:
            rows.append(
                Html(f'<tr><th class="section" colspan="4">{_text(section.title)}</th></tr>')
            )
        rows += [
            _row([row.name, row.float_model, row.quantized, row.difference], kinds)
            for row in section.rows
        ]
    return _join(
        _element("h2", _text("Result")),
        _remarks([*summary.remarks, *remarks]),
        _element(
            "div",
            _element("div", _table(RESULT_COLUMNS, kinds, rows)),
            _element(
                "div",
                _element("h3", _text(f"Chosen configuration: trial {summary.trial}")),
                _table(
                    ("knob", "value"),
                    (_TEXT, _TEXT),
                    [_row(knob, (_TEXT, _TEXT)) for knob in summary.config.items()],
                ),
            ),
            kind="side",
        ),
        _element("p", _text(f"The search took {summary.seconds:.0f} s."), kind="faint"),
        _front(contents) if len(contents.objectives) > 1 else Html(""),
    )


def _remarks(lines: Sequence[str]) -> Html:
    """What must not be overlooked."""
    if not lines:
        return Html("")
    return _element("div", *(_element("p", _text(line)) for line in lines), kind="remarks")


def _best_so_far(contents: Contents, remarks: Sequence[str]) -> Html:
    """What stands in place of a result that no search has left yet."""
    state = (
        "No search of `tune` has ended in this study, so that no model was chosen and measured on "
        "all inputs. What follows is the state of its trials."
    )
    if contents.best:
        best = _trials_table(contents.best, contents)
    else:
        reason = (
            "No completed trial keeps all bounds."
            if contents.complete
            else "No trial was completed."
        )
        best = _element("p", _text(reason))
    return _join(
        _element("h2", _text("Best so far")), _remarks(remarks), _element("p", _text(state)), best
    )


def _front(contents: Contents) -> Html:
    names = ", ".join(name for name, _ in contents.objectives)
    return _join(
        _element("h3", _text(f"Pareto front of {names}")),
        _element(
            "p", _text("The trials that no other one beats in all objectives."), kind="faint"
        ),
        _trials_table(contents.best, contents),
    )


def _trials(contents: Contents) -> Html:
    trials = best_first(contents.trials, contents.direction)
    return _join(_element("h2", _text("All trials, best first")), _trials_table(trials, contents))


def _trials_table(trials: Sequence[FrozenTrial], contents: Contents) -> Html:
    """Trials with what was measured and the knobs that differ, without empty columns."""
    # A trial that waits, or failed at once, has no knobs and says nothing about which differ.
    with_knobs = [trial for trial in trials if trial.params]
    knobs, same = shared_knobs(with_knobs)
    rows = [TrialRow.of(trial) for trial in trials]
    columns = [
        ("trial", _NUMBER, [row.trial for row in rows]),
        (contents.metric, _NUMBER, [row.value for row in rows]),
        ("[95 %]", _NUMBER, [row.interval for row in rows]),
        ("SQNR dB", _NUMBER, [row.sqnr_db for row in rows]),
        ("latency [95 %]", _NUMBER, [row.latency for row in rows]),
        ("MB", _NUMBER, [row.megabytes for row in rows]),
        ("inputs", _NUMBER, [row.inputs for row in rows]),
        ("s", _NUMBER, [row.seconds for row in rows]),
        *((name, _TEXT, [str(trial.params.get(name, "")) for trial in trials]) for name in knobs),
        ("state", _TEXT, [row.state for row in rows]),
        ("note", _NOTE, [row.note for row in rows]),
    ]
    if contents.metric != "agreement":
        columns.insert(3, ("agreement", _NUMBER, [row.agreement for row in rows]))
    columns = [column for column in columns if any(column[2])]
    names, kinds, cells = zip(*columns, strict=True)
    marked = {trial.number for trial in contents.marked} if len(trials) > 1 else set()
    body = [
        _row(row, kinds, marked=trial.number in marked)
        for trial, row in zip(trials, zip(*cells, strict=True), strict=True)
    ]
    shared = knob_text(with_knobs[0].params, same) if same else ""
    return _join(
        _table([name.replace("_", " ") for name in names], kinds, body),
        _element("p", _text(f"The same in all: {shared}."), kind="faint") if same else Html(""),
    )


def _figures(figures: Iterable[ReportFigure]) -> Html:
    parts = [_element("h2", _text("Figures"))]
    place = 0
    for figure in figures:
        plot = Html("")
        if figure.figure is not None:
            label = escape(figure.title)
            plot = Html(
                f'<div class="plot" id="figure-{place}" role="img" aria-label="{label}"></div>'
            )
            place += 1
        caption = _element("figcaption", _text(figure.caption.strip()))
        parts.append(_element("figure", _element("h3", _text(figure.title)), plot, caption))
    return _join(*parts)


def _versions(summary: Summary | None) -> Html:
    if summary is None:
        versions: Mapping[str, Any] = {
            name: version(name) for name in ("optuna-quantune", "optuna")
        }
        when = "The report was made with"
    else:
        versions, when = summary.versions, "The search ran with"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return _element("p", _text(f"{when} {listed}."), kind="faint")


def _table(names: Sequence[str], kinds: Sequence[str], rows: Iterable[Html]) -> Html:
    head = _element("thead", _row(names, kinds, name="th"))
    return _element("div", _element("table", head, _element("tbody", *rows)), kind="table")


def _row(
    cells: Sequence[object], kinds: Sequence[str], *, name: str = "td", marked: bool = False
) -> Html:
    columns = (
        _element(name, _text(cell), kind=kind) for cell, kind in zip(cells, kinds, strict=True)
    )
    return _element("tr", *columns, kind="marked" if marked else "")


def _element(name: str, *children: Html, kind: str = "") -> Html:
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{name}{attribute}>{''.join(children)}</{name}>")


def _text(value: object) -> Html:
    return Html(escape(str(value)))


def _join(*parts: Html) -> Html:
    return Html("\n".join(part for part in parts if part))


def _script(nonce: str, code: str) -> Html:
    return Html(f'<script nonce="{nonce}">{code}</script>')


def _data(figures: Iterable[ReportFigure]) -> Html:
    """What plotly.js draws, as JSON in which nothing can end the element that holds it."""
    drawn = ",".join(item.figure.to_json() for item in figures if item.figure is not None)
    escaped = f"[{drawn}]".replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="figures">{escaped}</script>')


def _resource(name: str) -> str:
    return (resources.files("optuna_quantune.report") / name).read_text("utf-8")
