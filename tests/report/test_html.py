from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.process import PROCESS_KEY
from optuna_quantune.process import this_process
from optuna_quantune.report.html import write_report
from optuna_quantune.tuning import tune
from tests.report.studies import make_study
from tests.report.studies import make_summary
from tests.report.studies import make_trial
from tests.report.studies import measured


pytest.importorskip("plotly")

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&"


class Page(HTMLParser):
    """What a browser makes of a report: elements, rows of tables, text outside of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self._inside = ""
        self.feed(self.source)
        self.close()

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def figures(self) -> list[dict[str, object]]:
        attributes = [attributes for name, attributes in self.elements if name == "script"]
        place = [each.get("type") for each in attributes].index("application/json")
        figures: list[dict[str, object]] = json.loads(self.scripts[place])
        return figures

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self._inside not in ("script", "style"):
            self.texts.append(data)


def report(study: optuna.Study, folder: Path) -> Page:
    return Page(write_report(study, folder / "report.html"))


def test_the_result_is_shown_on_all_inputs_and_on_those_held_out(
    study: optuna.Study, tmp_path: Path
) -> None:
    page = report(study, tmp_path)
    begin = page.rows.index(["", "float", "int8", "difference"])
    assert page.rows[begin + 1 : begin + 11] == [
        ["all 1000 inputs"],
        ["top-1", "0.8000", "0.7900", "-1.00 points [-1.60, -0.40]"],
        ["agreement with float", "", "0.9500", ""],
        ["output SQNR", "", "30.0 dB", ""],
        ["500 inputs held out of the search"],
        ["top-1", "0.7800", "0.7750", "-0.50 points [-1.25, +0.25]"],
        ["agreement with float", "", "0.9400", ""],
        ["output SQNR", "", "29.0 dB", ""],
        ["size", "10.00 MB", "2.60 MB", "0.26x"],
        ["latency, batch 1", "4.00 ms", "2.00 ms", "0.50x [0.45, 0.55]"],
    ]
    assert ["scheme", "symmetric"] in page.rows
    assert ["float_layers", "2"] in page.rows
    assert "Chosen configuration: trial 1" in page.text
    for fact in ("net.onnx", "target: cpu", "metric: top1", "onnxruntime", "took 61 s"):
        assert fact in page.text


def test_a_missed_goal_stands_before_the_figures_of_the_result(
    study: optuna.Study, tmp_path: Path
) -> None:
    page = report(study, tmp_path)
    remark = "Goal not met: it loses 0.01, more than 0.001."
    assert ("div", {"class": "remarks"}) in page.elements
    assert page.texts.index(remark) < page.texts.index("all 1000 inputs")


def test_trials_are_listed_best_first_with_pruned_and_failed_ones_behind(
    study: optuna.Study, tmp_path: Path
) -> None:
    page = report(study, tmp_path)
    begin = next(place for place, row in enumerate(page.rows) if row[:2] == ["trial", "top1"])
    header, *rows = page.rows[begin : begin + 6]
    assert [row[0] for row in rows] == ["1", "0", "4", "2", "3"]
    assert rows[0][:4] == ["1", "0.7800", "[0.7700, 0.8000]", "0.8800"]
    assert rows[0][header.index("latency [95 %]")] == "0.50x [0.45, 0.60]"
    assert rows[0][header.index("clipping")] == "kl"
    assert rows[3][1] == "0.6000"  # its last estimate
    assert [row[header.index("state")] for row in rows[2:]] == ["complete", "pruned", "fail"]
    assert rows[4][header.index("note")] == "RuntimeError: no kernel"


def test_the_file_needs_nothing_else(study: optuna.Study, tmp_path: Path) -> None:
    page = report(study, tmp_path)
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "action"} & attributes.keys()
    assert page.source.count("* plotly.js v") == 1
    policy = next(
        attributes["content"]
        for name, attributes in page.elements
        if name == "meta" and "http-equiv" in attributes
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "http" not in policy
    # The button of plotly.js that uploads a figure is among those that are not shown.
    assert "modeBarButtons:" in page.scripts[-1]
    assert "sendChartToCloud" not in page.scripts[-1]


def test_every_figure_has_a_place_in_the_page(study: optuna.Study, tmp_path: Path) -> None:
    page = report(study, tmp_path)
    plots = [a["id"] for name, a in page.elements if name == "div" and a.get("class") == "plot"]
    assert plots == [f"figure-{place}" for place in range(len(page.figures))]
    assert len(plots) == 6


def test_nothing_that_stands_in_a_study_becomes_markup(tmp_path: Path) -> None:
    trials = [
        make_trial(
            0.5 + place / 10,
            params={HOSTILE: f"{HOSTILE}{place}", "same": HOSTILE},
            choices={HOSTILE: [f"{HOSTILE}{n}" for n in range(4)], "same": [HOSTILE]},
            metric_value=0.5 + place / 10,
            latency_ratio=0.5 + place / 10,
            predicted_sqnr_db=10.0,
            sqnr_db=12.0 + place,
            constraints={HOSTILE: 1.0} if place else {"size": -1.0},
        )
        for place in range(4)
    ]
    failed = make_trial(state=TrialState.FAIL, error=HOSTILE, seconds_of={HOSTILE: HOSTILE})
    study = optuna.create_study(direction="maximize", study_name=HOSTILE)
    study.set_metric_names([HOSTILE])
    study.set_user_attr("metric", HOSTILE)
    study.add_trials([*trials, failed])
    benign = report(make_study(*[measured(0.5 + n / 10, 0.5, 9.0) for n in range(4)]), tmp_path)
    for has_result in (False, True):
        if has_result:
            make_summary(
                model=HOSTILE,
                target=HOSTILE,
                metric=HOSTILE,
                config={HOSTILE: HOSTILE},
                remarks=(HOSTILE,),
                versions={HOSTILE: HOSTILE},
            ).note(study)
        page = report(study, tmp_path)
        known = {name for name, _ in benign.elements} | {"div"}
        assert {name for name, _ in page.elements} <= known
        scripts = [attributes for name, attributes in page.elements if name == "script"]
        assert [each.get("type") for each in scripts] == ["application/json", None, None]
        assert not any(key.startswith("on") for _, each in page.elements for key in each)
        assert HOSTILE in page.text.replace("  ", " ")  # it is shown as it is
        for text in _strings(page.figures):
            assert "<script" not in text
            assert "<img" not in text


def test_figures_cannot_end_the_element_that_holds_them(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import plotly.graph_objects as go

    # plotly escapes its JSON for pages, too, but promises it nowhere.
    as_json = go.Figure.to_json
    monkeypatch.setattr(go.Figure, "to_json", lambda f: as_json(f).replace("\\u003c", "<"))
    page = report(study, tmp_path)
    assert "\\u003cbr>" in page.source.replace("\\u003e", ">")
    assert "<" not in page.scripts[0]
    assert page.figures


def test_a_name_that_is_no_text_does_not_stop_the_report(
    study: optuna.Study, tmp_path: Path
) -> None:
    make_summary(model=b"n\xffet.onnx".decode(errors="surrogateescape")).note(study)
    assert "n\\udcffet.onnx" in report(study, tmp_path).text


def _strings(value: object) -> list[str]:
    """All texts in a JSON value, names of fields included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for each in item for text in _strings(each)]
    return [text for each in value for text in _strings(each)] if isinstance(value, list) else []


def test_scripts_carry_a_number_that_is_another_one_in_each_report(
    study: optuna.Study, tmp_path: Path
) -> None:
    nonces = []
    for _ in range(2):
        page = report(study, tmp_path)
        found = re.search(r"script-src 'nonce-([\w-]+)'", page.source)
        assert found is not None
        nonces.append(found[1])
        code = [each for name, each in page.elements if name == "script" and "type" not in each]
        assert [each["nonce"] for each in code] == [nonces[-1]] * 2
    assert nonces[0] != nonces[1]


def test_a_study_without_a_result_shows_the_best_so_far(tmp_path: Path) -> None:
    running = make_trial(state=TrialState.RUNNING)
    running.datetime_start = make_trial(0.1).datetime_start
    running.set_user_attr(PROCESS_KEY, this_process())
    never_began = make_trial(state=TrialState.RUNNING)
    never_began.datetime_start = running.datetime_start
    study = make_study(
        measured(0.7, 0.6, 20.0),
        measured(0.75, 0.5, 21.0, params={"scheme": "power2"}),
        running,
        never_began,
    )
    page = report(study, tmp_path)
    assert "Best so far" in page.text
    assert "Result" not in page.texts
    assert "trials still running: 1" in page.text
    assert "a study" in page.text
    begin = next(place for place, row in enumerate(page.rows) if row[:2] == ["trial", "top1"])
    assert page.rows[begin + 1][:2] == ["1", "0.7500"]
    assert page.rows[begin + 2][0] == "trial"  # the next table


def test_the_best_so_far_keeps_all_bounds(tmp_path: Path) -> None:
    broken = measured(0.9, 0.6, 20.0, constraints={"size": 0.5})
    page = report(
        make_study(broken, measured(0.7, 0.6, 20.0, constraints={"size": 0.0})), tmp_path
    )
    begin = next(place for place, row in enumerate(page.rows) if row[:2] == ["trial", "top1"])
    assert page.rows[begin + 1][:2] == ["1", "0.7000"]
    assert "breaks the bound on size" in page.text
    # A bound that came later is not known to the trials before it.
    study = make_study(measured(0.6, 0.6, 20.0), measured(0.7, 0.6, 20.0), broken)
    begin = report(study, tmp_path).rows
    assert next(row for row in begin if row[:1] == ["1"])[:2] == ["1", "0.7000"]
    page = report(make_study(broken), tmp_path)
    assert "No completed trial keeps all bounds." in page.text


@pytest.mark.parametrize("has_result", [False, True])
def test_several_objectives_show_their_front(has_result: bool, tmp_path: Path) -> None:
    study = make_study(
        measured(0.70, 0.4, 20.0, others=[0.4]),
        measured(0.80, 0.6, 20.0, others=[0.6]),
        measured(0.65, 0.5, 20.0, others=[0.5]),
        directions=("maximize", "minimize"),
    )
    if has_result:
        make_summary().note(study)
    page = report(study, tmp_path)
    assert ("Pareto front of top1, latency" in page.text) == has_result
    begin = next(place for place, row in enumerate(page.rows) if row[:2] == ["trial", "top1"])
    assert {page.rows[begin + 1][0], page.rows[begin + 2][0]} == {"0", "1"}
    assert page.rows[begin + 3][0] == "trial"


def test_trials_that_all_failed_are_reported_with_their_reasons(tmp_path: Path) -> None:
    study = make_study(make_trial(state=TrialState.FAIL, error="RuntimeError: no kernel"))
    page = report(study, tmp_path)
    assert page.figures == []
    assert "RuntimeError: no kernel" in page.text
    assert page.text.count("Needs two") == 5


def test_a_study_of_anything_else_is_reported(tmp_path: Path) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    distribution = CategoricalDistribution([1, None, "x", True])
    for place, choice in enumerate(distribution.choices):
        study.add_trial(
            optuna.trial.create_trial(
                values=[float(place), float("inf")],
                params={"p": choice},
                distributions={"p": distribution},
                user_attrs={"latency_ratio": "fast", "seconds": 3, "interval": [1], "n": 10**400},
            )
        )
    study.set_user_attr("result", {"trial": 0})  # of another program
    page = report(study, tmp_path)
    assert "value 0 (smaller is better)" in page.text


def test_a_result_of_tune_is_reported(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    inputs = ArrayInputs(toy_inputs)
    result = tune(toy_model, calibration=inputs, evaluation=inputs, n_trials=3, cache=None)
    page = report(result.study, tmp_path)
    assert ["all 80 inputs"] in page.rows
    agreement = f"{result.all_inputs.quantized.agreement:.4f}"
    assert any(row[:3] == ["agreement with float", "", agreement] for row in page.rows)
    assert [figure for figure in page.figures if figure]


def test_without_plotly_the_report_says_how_to_install_it(
    study: optuna.Study, without_package: Callable[[str], None], tmp_path: Path
) -> None:
    without_package("plotly")
    with pytest.raises(InputError, match="needs plotly, the extra 'report'; install"):
        write_report(study, tmp_path / "report.html")


def test_everything_is_imported_without_the_extras() -> None:
    code = (
        "import sys; sys.modules['plotly'] = sys.modules['optuna_dashboard'] = None; "
        "import optuna_quantune.cli, optuna_quantune.report.html, "
        "optuna_quantune.report.dashboard"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("states", [[], [TrialState.WAITING], [TrialState.RUNNING]])
def test_a_study_without_a_trial_that_ended_is_refused(
    states: list[TrialState], tmp_path: Path
) -> None:
    study = make_study(*(make_trial(state=state) for state in states))
    with pytest.raises(InputError, match="study 'a study': no trial has ended yet"):
        write_report(study, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_named(study: optuna.Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing/report.html", tmp_path / "file/report.html", tmp_path):
        with pytest.raises(InputError, match=f"^report {re.escape(str(path))}: "):
            write_report(study, path)
    with pytest.raises(InputError, match="cannot be written"):
        write_report(study, tmp_path / f"{'long' * 100}.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_report_that_could_not_be_written_leaves_the_old_one(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        write_report(study, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_report(study, path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]
