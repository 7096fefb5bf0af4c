from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.comparison import Comparison
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.report.contents import Contents
from optuna_quantune.report.figures import accuracy_against_latency
from optuna_quantune.report.figures import history
from optuna_quantune.report.figures import predicted_against_measured
from optuna_quantune.report.figures import report_figures
from optuna_quantune.report.figures import ReportFigure
from optuna_quantune.report.figures import seconds_of_trials
from optuna_quantune.report.figures import worth_of_knobs
from tests.report.studies import make_study
from tests.report.studies import make_summary
from tests.report.studies import make_trial
from tests.report.studies import measured


pytest.importorskip("plotly")


def traces(made: ReportFigure) -> dict[str, Any]:
    """The traces of a figure by name."""
    assert made.figure is not None, made.caption
    return {trace.name: trace for trace in made.figure.data}


def test_trials_stand_at_their_latency_and_value_with_their_intervals(
    study: optuna.Study,
) -> None:
    found = traces(accuracy_against_latency(Contents.of(study)))
    points = found["trial"]
    assert list(points.x) == [0.6, 0.5, 0.4]
    assert list(points.y) == [0.75, 0.78, 0.10]
    np.testing.assert_allclose(points.error_x.array, 0.1)
    np.testing.assert_allclose(points.error_x.arrayminus, 0.05)
    np.testing.assert_allclose(points.error_y.array, 0.02)
    np.testing.assert_allclose(points.error_y.arrayminus, 0.01)
    assert (list(found["chosen"].x), list(found["chosen"].y)) == ([0.5], [0.78])
    assert list(found["Pareto front"].x) == [0.4, 0.5]


def test_the_float_model_is_compared_on_the_inputs_that_trials_are_measured_on(
    study: optuna.Study,
) -> None:
    # .80 of 1000 inputs are 800 right ones, of which 390 are among the 500 held out.
    found = traces(accuracy_against_latency(Contents.of(study)))["float model"]
    assert list(found.x) == [1.0]
    assert list(found.y) == [pytest.approx(410 / 500)]
    assert "the 500 inputs of the search" in found.hovertext[0]


@pytest.mark.parametrize(
    ("metric", "value"), [("agreement", 1.0), ("psnr", 31.5), ("sqnr_db", None)]
)
def test_the_float_model_is_left_out_where_it_has_no_finite_value(
    metric: str, value: float | None
) -> None:
    before = Measurement(1000, None, None, 1.0, float("inf"), own=31.5)
    after = Measurement(1000, None, None, 0.9, 20.0, own=30.0)
    study = make_study(measured(0.7, 0.5, 20.0), measured(0.8, 0.6, 20.0))
    make_summary(metric=metric, all_inputs=Comparison(1000, before, after, None)).note(study)
    study.set_user_attr("metric", metric)
    found = traces(accuracy_against_latency(Contents.of(study)))
    assert [list(t.y) for name, t in found.items() if name == "float model"] == (
        [] if value is None else [[value]]
    )


def test_the_front_is_that_of_optuna() -> None:
    rng = np.random.default_rng(0)
    directions = ("maximize", "minimize")
    study = make_study(
        *(measured(v, r, 20.0, others=[r]) for v, r in rng.random((60, 2)) + 0.1),
        directions=directions,
    )
    front = Contents.of(study).front
    assert {trial.number for trial in front} == {trial.number for trial in study.best_trials}
    ratios = [trial.user_attrs["latency_ratio"] for trial in front]
    assert ratios == sorted(ratios)


def test_what_breaks_a_bound_is_marked_and_is_never_the_best_so_far() -> None:
    study = make_study(
        measured(0.7, 0.5, 20.0, constraints={"size": -0.1}),
        measured(0.9, 0.6, 20.0, constraints={"size": 0.1}),
        measured(0.8, 0.7, 20.0, constraints={"size": 0.0}),
    )
    contents = Contents.of(study)
    plane, course = traces(accuracy_against_latency(contents)), traces(history(contents))
    for found in (plane, course):
        assert list(found["breaks a bound"].y) == [0.9]
        assert list(found["trial"].y) == [0.7, 0.8]
        assert found["breaks a bound"].marker.symbol != found["trial"].marker.symbol
    assert list(plane["best so far"].y) == [0.8]
    assert list(plane["Pareto front"].y) == [0.7, 0.8]
    assert list(course["best so far"].y) == [0.7, 0.8, 0.8]


def test_where_all_trials_break_a_bound_the_legend_says_so() -> None:
    trials = (measured(value, 0.5, 20.0, constraints={"size": 0.1}) for value in (0.7, 0.8))
    contents = Contents.of(make_study(*trials))
    for made in (accuracy_against_latency(contents), history(contents)):
        assert list(traces(made)) == ["breaks a bound"]
        assert made.figure is not None
        assert made.figure.layout.showlegend


@pytest.mark.parametrize(("direction", "best"), [("maximize", max), ("minimize", min)])
def test_the_history_holds_the_best_so_far_and_pruned_trials_where_they_stopped(
    direction: str, best: Any
) -> None:
    values = [0.70, 0.72, 0.69, 0.75, 0.71]
    pruned = make_trial(state=TrialState.PRUNED, reports={0: 0.9, 16: 0.68, 8: 0.4})
    study = make_study(*(measured(v, 0.5, 20.0) for v in values), pruned, directions=(direction,))
    found = traces(history(Contents.of(study)))
    course = [best(values[: n + 1]) for n in range(5)]
    assert list(found["best so far"].x) == [0, 1, 2, 3, 4, 5]
    assert list(found["best so far"].y) == [*course, course[-1]]
    stopped = found["pruned, its estimate"]
    assert (list(stopped.x), list(stopped.y)) == ([5], [0.68])
    assert "inputs run 200" in found["trial"].hovertext[0]


@pytest.mark.parametrize("figure_of", [history, accuracy_against_latency])
@pytest.mark.parametrize(("direction", "collapsed"), [("maximize", 0.1), ("minimize", 9.0)])
def test_collapsed_trials_do_not_hide_the_differences_between_good_ones(
    figure_of: Callable[[Contents], ReportFigure], direction: str, collapsed: float
) -> None:
    def made(*values: float) -> ReportFigure:
        # The collapsed one is the fastest, so that it is on the Pareto front.
        trials = (measured(v, 0.4 if v == collapsed else 0.5, 20.0) for v in values)
        return figure_of(Contents.of(make_study(*trials, directions=(direction,))))

    found = made(0.801, 0.803, 0.802, collapsed)
    assert found.figure is not None
    low, high = found.figure.layout.yaxis.range
    assert 0.8 < low < 0.801
    assert 0.803 < high < 0.804
    assert "1 of 4 trials lie far outside" in found.caption
    alike = made(0.801, 0.803, 0.802)
    assert alike.figure is not None
    assert alike.figure.layout.yaxis.range is None


def test_predictions_are_compared_in_decibels_where_noise_was_measured(
    study: optuna.Study,
) -> None:
    made = predicted_against_measured(Contents.of(study))
    points = traces(made)["trial"]
    assert list(points.x) == [17.0, 22.0, -1.0]
    assert list(points.y) == [20.0, 25.0, 2.0]
    assert made.figure is not None
    assert made.figure.layout.xaxis.title.text == "predicted output SQNR (dB)"


def test_predictions_are_compared_as_agreement_where_no_noise_was_measured() -> None:
    trials = [measured(0.8, 0.5, float("inf"), expected_agreement=share) for share in (0.7, 0.9)]
    made = predicted_against_measured(Contents.of(make_study(*trials)))
    assert list(traces(made)["trial"].x) == [0.7, 0.9]


def test_the_knob_that_decides_is_worth_most() -> None:
    rng = np.random.default_rng(1)
    trials = []
    for number in range(40):
        params = {"scheme": "symmetric" if number % 2 else "power2"}
        params["clipping"] = "kl" if number // 2 % 2 else "max"
        value = 0.8 + 0.01 * rng.random() - (0.3 if params["scheme"] == "power2" else 0.0)
        trials.append(measured(value, 0.5, 20.0, params=params))
    importances, coordinates = worth_of_knobs(Contents.of(make_study(*trials)))
    assert importances.figure is not None
    bars = importances.figure.data[0]
    worth = dict(zip(bars.y, bars.x, strict=True))
    assert worth["scheme"] > 5 * worth["clipping"]
    assert "40 completed trials" in importances.caption
    assert coordinates.figure is not None


def test_seconds_add_up_to_the_duration_of_each_trial(study: optuna.Study) -> None:
    twin = measured(0.78, 0.5, 25.0, duplicate_of=1, duration=0.5)
    study.add_trial(twin)
    found = traces(seconds_of_trials(Contents.of(study)))
    total = np.sum([bar.y for bar in found.values()], axis=0)
    np.testing.assert_allclose(total, [2.0] * 5 + [0.5])
    assert list(found["run the inputs"].y) == [0.75, 0.75, 0.0, 0.0, 0.75, 0.0]
    assert found["other"].y[-1] == 0.5  # the twin's seconds are not its own


@pytest.mark.parametrize("trials", [[], [measured(0.7, 0.5, 20.0)]])
def test_a_figure_with_nothing_to_show_gives_a_sentence(trials: list[FrozenTrial]) -> None:
    made = report_figures(Contents.of(make_study(*trials)))
    assert len(made) >= 5
    for figure in made:
        assert figure.figure is None
        assert figure.caption.startswith("Needs two")


def test_axes_have_titles_with_units(study: optuna.Study) -> None:
    titles = []
    for made in report_figures(Contents.of(study)):
        if made.figure is not None and made.title != "Knobs and values, a line for each trial":
            layout = made.figure.layout
            titles += [layout.xaxis.title.text, layout.yaxis.title.text]
    assert [title for title in titles if title] == [
        "latency, batch 1 (ratio to the float model)",
        "top-1 accuracy (share of inputs)",
        "trial (number)",
        "top-1 accuracy (share of inputs)",
        "predicted output SQNR (dB)",
        "measured output SQNR (dB)",
        "importance (share of all)",
        "trial (number)",
        "time (s)",
    ]


def test_the_pointer_shows_the_knobs_as_text() -> None:
    choices = {"scheme": ["<a href='https://example.org'>x</a>", "symmetric"]}
    trials = [
        measured(0.7 + n / 10, 0.5, 20.0, params={"scheme": value}, choices=choices)
        for n, value in enumerate(choices["scheme"])
    ]
    shown = traces(accuracy_against_latency(Contents.of(make_study(*trials))))["trial"].hovertext
    assert "scheme symmetric" in shown[1]
    assert "scheme &lt;a href='https://example.org'&gt;x&lt;/a&gt;" in shown[0]
    assert "latency 0.50x [0.45, 0.60]" in shown[0]


def test_figures_leave_the_log_alone(
    study: optuna.Study, capfd: pytest.CaptureFixture[str]
) -> None:
    verbosity = optuna.logging.get_verbosity()
    capfd.readouterr()
    report_figures(Contents.of(study))
    assert capfd.readouterr().err == ""
    assert optuna.logging.get_verbosity() == verbosity
