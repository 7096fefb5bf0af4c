"""Figures of a search: accuracy against speed, the way there, what was predicted, what it took.

They are made from the trials of a study alone. plotly is an extra of the package, so it is
imported when a figure is made.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from typing import Final
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.report.contents import Contents
from optuna_quantune.report.numbers import short
from optuna_quantune.report.trial_rows import attribute
from optuna_quantune.report.trial_rows import first_line
from optuna_quantune.report.trial_rows import keeps_bounds
from optuna_quantune.report.trial_rows import last_report
from optuna_quantune.report.trial_rows import number
from optuna_quantune.report.trial_rows import shared_knobs
from optuna_quantune.report.trial_rows import trial_interval
from optuna_quantune.report.trial_rows import trial_value
from optuna_quantune.report.trial_rows import TrialRow


if TYPE_CHECKING:
    import plotly.graph_objects as go

# The colours of M. Okabe and K. Ito (Color Universal Design, 2008), which people with any kind of
# colour vision tell apart. Marks differ in shape, too, for those who print in black and white.
_BLUE: Final = "#0072B2"
_ORANGE: Final = "#E69F00"
_GREEN: Final = "#009E73"
_VERMILION: Final = "#D55E00"
_PURPLE: Final = "#CC79A7"
# Visible on white and on black.
_GREY: Final = "#808080"
_GRID: Final = "rgba(128, 128, 128, 0.3)"

_HEIGHT: Final = 420  # CSS pixels
_AXIS_TITLES: Final = {
    "top1": "top-1 accuracy (share of inputs)",
    "top5": "top-5 accuracy (share of inputs)",
    "agreement": "agreement with float (share of inputs)",
    "sqnr_db": "output SQNR (dB)",
    "latency": "latency, batch 1 (ratio to the float model)",
    "size": "model file (bytes)",
}
# A few collapsed configurations would leave one pixel for the differences between good ones: an
# axis reaches this many times as far as the better half of the trials.
_OUTLYING: Final = 4.0


@dataclass(frozen=True)
class ReportFigure:
    """A figure with what is said about it.

    Attributes:
        title: The title.
        caption: How to read it; without a figure, why there is none.
        figure: The plotly figure; None where the study has nothing to show.
    """

    title: str
    caption: str
    figure: go.Figure | None


def report_figures(contents: Contents) -> list[ReportFigure]:
    """All figures of a report, those without anything to show included.

    Raises:
        ImportError: If plotly is not installed.
    """
    return [
        accuracy_against_latency(contents),
        history(contents),
        predicted_against_measured(contents),
        *worth_of_knobs(contents),
        seconds_of_trials(contents),
    ]


def accuracy_against_latency(contents: Contents) -> ReportFigure:
    """The metric of each completed trial against its latency, beside the float model."""
    title = "Accuracy against latency"
    trials = [trial for trial in contents.complete if _has_place(trial)]
    if len(trials) < 2:
        reason = "Needs two completed trials whose latency was measured."
        return ReportFigure(title, reason, figure=None)
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, style, members in _groups(trials):
        ratios = [_number(trial, "latency_ratio") for trial in members]
        latencies = [_latency_interval(trial) for trial in members]
        figure.add_trace(
            go.Scatter(
                **_points(members, contents),
                error_x=_bars(ratios, latencies, style["color"]),
                error_y=_bars(_values(members), map(trial_interval, members), style["color"]),
                name=name,
                marker=style,
            )
        )
    front = [trial for trial in contents.front if _has_place(trial)]
    if front:
        figure.add_trace(
            go.Scatter(
                x=[_number(trial, "latency_ratio") for trial in front],
                y=_values(front),
                name="Pareto front",
                mode="lines+markers",
                # Between two trials there is nothing: who gives up speed gains at the next one.
                line={"color": _GREEN, "dash": "dot", "shape": "hv"},
                marker={"color": _GREEN, "symbol": "square-open", "size": 14},
                hoverinfo="skip",
            )
        )
    marked = [trial for trial in contents.marked if _has_place(trial)]
    if marked:
        figure.add_trace(
            go.Scatter(
                **_points(marked, contents),
                name="best so far" if contents.summary is None else "chosen",
                marker={"color": _VERMILION, "symbol": "star", "size": 17},
            )
        )
    float_point = contents.float_point
    if float_point is not None:
        value = f"{_text(contents.metric)} {short(float_point.value)}"
        figure.add_trace(
            go.Scatter(
                x=[1.0],
                y=[float_point.value],
                hovertext=[f"float model<br>{value} on {_text(float_point.inputs)}"],
                hoverinfo="text",
                name="float model",
                mode="markers",
                marker={"color": _PURPLE, "symbol": "diamond", "size": 13},
            )
        )
    seen = [] if contents.summary is None else _values(marked)
    seen += [] if float_point is None else [float_point.value]
    outside = _focus(figure, _values(trials), seen, contents.direction)
    _lay_out(figure, _AXIS_TITLES["latency"], metric_title(contents.metric))
    figure.update_layout(showlegend=True)  # also where all trials break a bound
    better = "Up" if contents.direction == "maximize" else "Down"
    return ReportFigure(
        title,
        f"{better} and to the left is better. Bars are 95 % intervals: of the latency, and of "
        "what a trial that ended early would have measured on all its inputs. Pruned trials have "
        f"no latency. {outside}",
        figure,
    )


def history(contents: Contents) -> ReportFigure:
    """Each trial's first objective in the order of the trials, and the best so far."""
    title = "Optimization history"
    name, direction = contents.objectives[0]
    complete = [trial for trial in contents.complete if math.isfinite(trial.values[0])]
    pruned = [
        trial
        for trial in contents.trials
        if trial.state == TrialState.PRUNED and _is_finite(last_report(trial))
    ]
    if len(complete) + len(pruned) < 2:
        return ReportFigure(title, "Needs two trials that ended with a value.", figure=None)
    import plotly.graph_objects as go

    stopped = {"color": _GREY, "symbol": "x", "size": 8}
    figure = go.Figure()
    for group, style, members in (*_groups(complete), ("pruned, its estimate", stopped, pruned)):
        if members:
            figure.add_trace(
                go.Scatter(
                    x=[trial.number for trial in members],
                    y=[_objective(trial) for trial in members],
                    hovertext=[_hover(trial, contents) for trial in members],
                    hoverinfo="text",
                    name=group,
                    mode="markers",
                    marker=style,
                )
            )
    better = max if direction == "maximize" else min
    kept = [trial for trial in complete if keeps_bounds(trial)]
    best = list(itertools.accumulate((trial.values[0] for trial in kept), better))
    if kept:
        figure.add_trace(
            go.Scatter(
                x=[*(trial.number for trial in kept), contents.trials[-1].number],
                y=[*best, best[-1]],
                name="best so far",
                mode="lines",
                line={"color": _VERMILION, "shape": "hv"},
                hoverinfo="skip",
            )
        )
    ended = [_objective(trial) for trial in (*complete, *pruned)]
    outside = _focus(figure, ended, best[-1:], direction)
    _lay_out(figure, "trial (number)", metric_title(name))
    figure.update_layout(showlegend=True)  # also where all trials break a bound
    figure.update_xaxes(tickformat="d")
    crosses = (
        "A cross is a trial that was stopped since it could no longer win. " if pruned else ""
    )
    return ReportFigure(title, f"{crosses}{outside}", figure)


def predicted_against_measured(contents: Contents) -> ReportFigure:
    """What was predicted of each configuration before it ran, against what was measured."""
    title = "Predicted against measured"
    for predicted, measured, quantity in (
        ("predicted_sqnr_db", "sqnr_db", "output SQNR (dB)"),
        ("expected_agreement", "agreement", "agreement with float (share of inputs)"),
    ):
        trials = [
            trial
            for trial in contents.complete
            if _is_finite(attribute(trial, predicted)) and _is_finite(attribute(trial, measured))
        ]
        if len(trials) < 2:
            continue
        figure = _against_each_other(trials, predicted, measured, contents)
        _lay_out(figure, f"predicted {quantity}", f"measured {quantity}")
        caption = (
            "Predictions come from the calibration statistics and the weights, before anything "
            "is run. What counts for the search is their order: the closer the points are to any "
            "rising line, the better they told good configurations from bad ones."
        )
        return ReportFigure(title, caption, figure)
    return ReportFigure(title, "Needs two completed trials with a prediction.", figure=None)


def _against_each_other(
    trials: Sequence[FrozenTrial], predicted: str, measured: str, contents: Contents
) -> go.Figure:
    """Two attributes of trials, with the line on which they are the same."""
    import plotly.graph_objects as go

    x = [_number(trial, predicted) for trial in trials]
    y = [_number(trial, measured) for trial in trials]
    ends = [min(*x, *y), max(*x, *y)]
    return go.Figure(
        [
            go.Scatter(
                x=ends,
                y=ends,
                name="measured as predicted",
                mode="lines",
                line={"color": _GREY, "dash": "dot"},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=x,
                y=y,
                hovertext=[_hover(trial, contents) for trial in trials],
                hoverinfo="text",
                name="trial",
                mode="markers",
                marker={"color": _BLUE, "size": 9},
            ),
        ]
    )


def worth_of_knobs(contents: Contents) -> list[ReportFigure]:
    """Optuna's own figures of what the metric depends on."""
    importances, coordinates = "What each knob is worth", "Knobs and values, a line for each trial"
    trials = [t for t in contents.complete if _is_finite(trial_value(t))]
    knobs = shared_knobs(trials)[0]
    if len({trial_value(trial) for trial in trials}) < 2 or not knobs:
        reason = "Needs two completed trials with different knobs and different values."
        return [ReportFigure(importances, reason, figure=None)]
    study = _study_to_show(trials, knobs, contents.direction)
    label = _text(contents.metric)
    figures = []
    try:
        # Optuna warns where importances would say nothing.
        with warnings.catch_warnings(action="error"):
            figure = optuna.visualization.plot_param_importances(study, target_name=label)
    except UserWarning as warning:
        reason = f"Too few completed trials to tell: {first_line(warning)}"
        figures.append(ReportFigure(importances, reason, figure=None))
    else:
        figure.update_traces(marker_color=_BLUE)
        _lay_out(figure, "importance (share of all)", "")
        caption = (
            f"Optuna's PED-ANOVA over the {len(trials)} completed trials: how much the knob "
            "decides whether a trial is among the best tenth. Few trials say little, and a knob "
            "that the search soon settled on looks unimportant."
        )
        figures.append(ReportFigure(importances, caption, figure))
    with warnings.catch_warnings(action="ignore"):
        figure = optuna.visualization.plot_parallel_coordinate(study, target_name=label)
    _colour_lines(figure, contents.direction)
    _lay_out(figure, "", "")
    figure.update_xaxes(showgrid=False)
    caption = "Each completed trial is a line from its value through its knobs."
    return [*figures, ReportFigure(coordinates, caption, figure)]


def _colour_lines(figure: go.Figure, direction: Direction) -> None:
    """Colours Optuna's lines from worst to best; its palest ones cannot be seen on white."""
    from plotly.colors import sample_colorscale

    scale = [_ORANGE, _BLUE] if direction == "maximize" else [_BLUE, _ORANGE]
    for line in figure.select_traces({"mode": "lines", "showlegend": False}):
        # A line begins at its value, which lies from 0 to 1 on its axis.
        colour = sample_colorscale(scale, [min(1.0, max(0.0, float(line.y[0])))])[0]
        line.update(line_color=colour, line_width=2, opacity=0.8)
    marks = {"colorscale": scale, "reversescale": False}
    figure.update_traces({"marker": marks}, selector={"mode": "markers"})


def seconds_of_trials(contents: Contents) -> ReportFigure:
    """How long the parts of each trial took."""
    title = "Where the seconds went"
    trials = [trial for trial in contents.trials if trial.duration is not None]
    if len(trials) < 2:
        return ReportFigure(title, "Needs two trials that ended.", figure=None)
    import plotly.graph_objects as go

    parts = [_seconds(trial) for trial in trials]
    figure = go.Figure(
        [
            go.Bar(
                x=[trial.number for trial in trials],
                y=[seconds[part] for seconds in parts],
                name=label,
                marker={"color": colour, "pattern": _pattern(shape)},
                hovertemplate=f"trial %{{x}}<br>{label}: %{{y:.3f}} s<extra></extra>",
            )
            for part, label, colour, shape in (
                ("build", "build the model", _BLUE, ""),
                ("evaluate", "run the inputs", _ORANGE, "/"),
                ("latency", "measure latency", _GREEN, "."),
                ("other", "other", _GREY, "x"),
            )
        ]
    )
    _lay_out(figure, "trial (number)", "time (s)")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(tickformat="d")
    return ReportFigure(
        title,
        "What is not split up (other) is the choice of the configuration and its prediction; of "
        "trials that were pruned, failed or built the model of an earlier trial it is all. "
        "Calibration, the float model and the final measurement come on top.",
        figure,
    )


def metric_title(metric: str) -> str:
    """The title of an axis that shows a metric, with its unit, as plotly takes it."""
    return _AXIS_TITLES.get(metric, f"{_text(metric)} (in its own unit)")


def _groups(
    trials: Sequence[FrozenTrial],
) -> list[tuple[str, dict[str, Any], list[FrozenTrial]]]:
    """Completed trials that keep all bounds and those that do not, with their marks."""
    kept = [trial for trial in trials if keeps_bounds(trial)]
    broken = [trial for trial in trials if not keeps_bounds(trial)]
    groups = (
        ("trial", {"color": _BLUE, "symbol": "circle", "size": 9}, kept),
        ("breaks a bound", {"color": _ORANGE, "symbol": "circle-open", "size": 9}, broken),
    )
    return [group for group in groups if group[2]]


def _has_place(trial: FrozenTrial) -> bool:
    """Whether a trial has a place in the plane of latency and metric."""
    return _is_finite(attribute(trial, "latency_ratio")) and _is_finite(trial_value(trial))


def _points(trials: Sequence[FrozenTrial], contents: Contents) -> dict[str, Any]:
    return {
        "x": [_number(trial, "latency_ratio") for trial in trials],
        "y": _values(trials),
        "hovertext": [_hover(trial, contents) for trial in trials],
        "hoverinfo": "text",
        "mode": "markers",
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(trial: FrozenTrial, name: str) -> float:
    """A number that is known to be there."""
    value = attribute(trial, name)
    assert value is not None
    return value


def _values(trials: Iterable[FrozenTrial]) -> list[float]:
    return [value for value in map(trial_value, trials) if value is not None]


def _objective(trial: FrozenTrial) -> float:
    """The first objective of a trial that has ended with a value."""
    value = trial.values[0] if trial.state == TrialState.COMPLETE else last_report(trial)
    assert value is not None
    return float(value)


def _latency_interval(trial: FrozenTrial) -> tuple[float, float] | None:
    low, high = attribute(trial, "latency_low"), attribute(trial, "latency_high")
    return None if low is None or high is None else (low, high)


def _bars(
    centres: Iterable[float], intervals: Iterable[tuple[float, float] | None], colour: str
) -> dict[str, Any]:
    """Error bars of points, as plotly takes them; a point without an interval has none."""
    ends = [
        (centre, *((centre, centre) if interval is None else interval))
        for centre, interval in zip(centres, intervals, strict=True)
    ]
    return {
        "array": [max(0.0, high - centre) for centre, _, high in ends],
        "arrayminus": [max(0.0, centre - low) for centre, low, _ in ends],
        "symmetric": False,
        "color": colour,
        "thickness": 1,
        "width": 0,
    }


def _hover(trial: FrozenTrial, contents: Contents) -> str:
    """What is shown of a trial under the pointer.

    plotly reads a few HTML elements in it, links among them, and what stands in a study may be
    anyone's.
    """
    row = TrialRow.of(trial)
    told = (
        (_text(contents.metric), f"{row.value} {row.interval}".strip()),
        ("agreement", row.agreement if contents.metric != "agreement" else ""),
        ("SQNR", row.sqnr_db and f"{row.sqnr_db} dB"),
        ("latency", row.latency),
        ("file", row.megabytes and f"{row.megabytes} MB"),
        ("inputs run", row.inputs),
    )
    lines = [f"<b>trial {row.trial}, {row.state}</b>"]
    lines += [f"{name} {value}" for name, value in told if value]
    lines += [f"{_text(name)} {_text(value)}" for name, value in trial.params.items()]
    return "<br>".join([*lines, *([_text(row.note)] if row.note else [])])


def _text(value: object) -> str:
    """A text that plotly shows as it is; of entities it knows no quotation marks."""
    return escape(str(value), quote=False)


def _study_to_show(
    trials: Sequence[FrozenTrial], knobs: Sequence[str], direction: Direction
) -> optuna.Study:
    """A study of the metric alone, with names and values that plotly shows as they are."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study in memory is no news to anyone
    try:
        study = optuna.create_study(direction=direction)
    finally:
        optuna.logging.set_verbosity(verbosity)
    for trial in trials:
        params, distributions = {}, {}
        for name in knobs:
            if name in trial.params:
                params[_text(name)] = _choice(trial.params[name])
                distributions[_text(name)] = _distribution(trial.distributions[name])
        value = trial_value(trial)
        study.add_trial(create_trial(value=value, params=params, distributions=distributions))
    return study


def _distribution(distribution: BaseDistribution) -> BaseDistribution:
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution([_choice(choice) for choice in distribution.choices])
    return distribution


def _choice(choice: Any) -> Any:
    return _text(choice) if isinstance(choice, str) else choice


def _seconds(trial: FrozenTrial) -> dict[str, float]:
    """The time of each part of a trial that has ended."""
    found = trial.user_attrs.get("seconds")
    parts = dict.fromkeys(("build", "evaluate", "latency"), 0.0)
    # A trial that built the model of an earlier one has that one's attributes.
    if isinstance(found, Mapping) and "duplicate_of" not in trial.user_attrs:
        parts = {name: number(found.get(name)) or 0.0 for name in parts}
    total = 0.0 if trial.duration is None else trial.duration.total_seconds()
    return {**parts, "other": max(0.0, total - sum(parts.values()))}


def _pattern(shape: str) -> dict[str, Any]:
    """White marks on the colour of a bar."""
    return {"shape": shape, "fgcolor": "#ffffff", "fillmode": "overlay", "size": 6}


def _focus(
    figure: go.Figure, values: Sequence[float], also: Sequence[float], direction: Direction
) -> str:
    """Leaves values far beyond the better half out of the vertical axis, until one asks for them.

    Args:
        figure: The figure.
        values: Those of the trials in it.
        also: What has to be seen, too.
        direction: Which values are better.

    Returns:
        What to say about it.
    """
    ordered = sorted(values, reverse=direction == "maximize")
    half = [*ordered[: (len(ordered) + 1) // 2], *also]
    reach = _OUTLYING * (max(half) - min(half))
    if direction == "maximize":
        near = [value for value in values if value >= max(half) - reach]
    else:
        near = [value for value in values if value <= min(half) + reach]
    if reach == 0.0 or len(near) == len(values):
        return ""
    low, high = min(*near, *also), max(*near, *also)
    figure.update_yaxes(range=[low - 0.1 * (high - low), high + 0.1 * (high - low)])
    return (
        f"{len(values) - len(near)} of {len(values)} trials lie far outside of what is shown at "
        "first; a double click on the figure shows all."
    )


def _lay_out(figure: go.Figure, x_title: str, y_title: str) -> None:
    """Titles with units, and colours that a light and a dark page leave readable."""
    figure.update_layout(
        template="none",
        title={"text": ""},
        height=_HEIGHT,
        margin={"l": 60, "r": 10, "t": 40, "b": 60},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        modebar={"bgcolor": "rgba(0, 0, 0, 0)", "color": _GREY, "activecolor": _BLUE},
        hoverlabel={"bgcolor": "#222222", "font": {"color": "#ffffff"}, "align": "left"},
    )
    lines = {"gridcolor": _GRID, "linecolor": _GREY, "zeroline": False, "automargin": True}
    figure.update_xaxes(title={"text": x_title}, **lines)
    figure.update_yaxes(title={"text": y_title}, **lines)
