from __future__ import annotations

import re
from collections.abc import Callable

import optuna
import pytest

from optuna_quantune.report.dashboard import note_result
from optuna_quantune.report.dashboard import result_note
from tests.report.studies import make_summary


def test_the_note_of_the_study_is_the_last_result(study: optuna.Study) -> None:
    optuna_dashboard = pytest.importorskip("optuna_dashboard")
    assert note_result(study, make_summary(remarks=("The search was interrupted.",)))
    assert note_result(study, make_summary())
    note = optuna_dashboard.get_note(study)
    assert note == result_note(make_summary())
    assert "interrupted" not in note


def test_the_note_has_the_result_as_a_table() -> None:
    lines = result_note(make_summary()).splitlines()
    for line in (
        "# Quantization of net.onnx",
        "**Goal not met: it loses 0.01, more than 0.001.**",
        "|  | float | int8 | difference |",
        "| --- | ---: | ---: | ---: |",
        "| **500 inputs held out of the search** |  |  |  |",
        "| top-1 | 0.7800 | 0.7750 | -0.50 points [-1.25, +0.25] |",
        "| latency, batch 1 | 4.00 ms | 2.00 ms | 0.50x [0.45, 0.55] |",
        "## Chosen configuration: trial 1",
        r"| float\_layers | 2 |",
    ):
        assert line in lines


def test_without_the_dashboard_nothing_is_noted(
    study: optuna.Study, without_package: Callable[[str], None]
) -> None:
    without_package("optuna_dashboard")
    assert not note_result(study, make_summary())


def test_nothing_in_a_result_becomes_markup() -> None:
    hostile = "|x\n\n# <img src=x> [a](javascript:b) `c` *d* &lt;"
    summary = make_summary(
        model=hostile,
        target=hostile,
        metric=hostile,
        config={hostile: hostile, "knob": 1},
        remarks=(hostile,),
        versions={hostile: hostile},
    )
    note = result_note(summary)
    plain = re.sub(r"\\.", "", note)  # what is not escaped
    assert len(plain.splitlines()) == len(result_note(make_summary()).splitlines())
    assert {line.count("|") for line in plain.splitlines() if "|" in line} == {3, 5}
    assert not set("<>`&") & set(plain)
    assert "](" not in plain
