from __future__ import annotations

import math
from typing import Any

import pytest
from optuna.trial import TrialState

from optuna_quantune.comparison import Comparison
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.report.numbers import short
from optuna_quantune.report.result_rows import result_sections
from optuna_quantune.report.trial_rows import best_first
from optuna_quantune.report.trial_rows import TrialRow
from tests.report.studies import make_study
from tests.report.studies import make_summary
from tests.report.studies import make_trial
from tests.report.studies import measured


def first_rows(metric: str, difference: Interval | None, **fields: Any) -> list[tuple[str, ...]]:
    before = Measurement(100, None, None, None, None)
    after = Measurement(100, None, None, None, None)
    for name, (first, second) in fields.items():
        object.__setattr__(before, name, first)
        object.__setattr__(after, name, second)
    summary = make_summary(
        metric=metric, all_inputs=Comparison(100, before, after, difference), held_out=None
    )
    section, rest = result_sections(summary)
    assert section.title == "all 100 inputs"
    assert [row.name for row in rest.rows] == ["size", "latency, batch 1"]
    return [(row.name, row.float_model, row.quantized, row.difference) for row in section.rows]


def test_the_interval_stands_beside_the_metric_alone() -> None:
    interval = Interval(-0.01, -0.02, 0.005)
    rows = first_rows("top5", interval, top1=(0.7, 0.6), top5=(0.9, 0.89), agreement=(1.0, 0.8))
    assert rows == [
        ("top-1", "0.7000", "0.6000", "-10.00 points"),
        ("top-5", "0.9000", "0.8900", "-1.00 points [-2.00, +0.50]"),
        ("agreement with float", "", "0.8000", ""),
    ]


def test_agreement_as_the_metric_is_compared_with_certain_agreement() -> None:
    rows = first_rows("agreement", Interval(-0.2, -0.3, -0.1), agreement=(1.0, 0.8))
    assert rows == [("agreement with float", "", "0.8000", "-20.00 points [-30.00, -10.00]")]


@pytest.mark.parametrize(
    ("interval", "change"),
    [(Interval(-0.5, -1.25, 0.25), "-0.5 [-1.25, +0.25]"), (None, "-0.5")],
)
def test_a_metric_of_ones_own_is_in_its_own_unit(interval: Interval | None, change: str) -> None:
    assert first_rows("psnr", interval, own=(31.5, 31.0)) == [("psnr", "31.5", "31", change)]


def test_inputs_of_ones_own_loop_are_not_counted() -> None:
    measurement = Measurement(0, None, None, None, None, own=1.0)
    summary = make_summary(all_inputs=Comparison(0, measurement, measurement, None))
    assert result_sections(summary)[0].title == "inputs of your own"


def test_equal_outputs_have_an_infinite_ratio() -> None:
    assert TrialRow.of(measured(0.8, 0.5, math.inf)).sqnr_db == "inf"


def test_what_is_no_number_is_left_empty() -> None:
    row = TrialRow.of(
        make_trial(
            0.5, latency_ratio="<b>", size_bytes=None, n=True, sqnr_db=math.nan, agreement=10**400
        )
    )
    assert (row.latency, row.megabytes, row.inputs, row.sqnr_db, row.agreement) == ("",) * 5
    assert row.value == "0.5000"


def test_notes_say_what_a_trial_copied_and_which_bounds_it_breaks() -> None:
    constraints = {"accuracy_drop": 0.1, "latency": -0.5, "size": 0.2}
    row = TrialRow.of(measured(0.8, 0.5, 20.0, duplicate_of=3, constraints=constraints))
    assert row.note == "the same model as trial 3; breaks the bound on accuracy drop, size"


@pytest.mark.parametrize(
    ("direction", "order"), [("maximize", [3, 2, 0, 1, 4]), ("minimize", [0, 3, 2, 1, 4])]
)
def test_the_best_comes_first_and_of_equal_ones_the_fastest(
    direction: Any, order: list[int]
) -> None:
    study = make_study(
        measured(0.7, 0.3, 20.0),
        make_trial(state=TrialState.PRUNED, reports={16: 0.99}),
        measured(0.8, 0.5, 20.0),
        measured(0.8, 0.4, 20.0),
        make_trial(state=TrialState.FAIL),
    )
    assert [trial.number for trial in best_first(study.trials, direction)] == order


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0.0000"),
        (0.75, "0.7500"),
        (3.14159e-6, "3.142e-06"),
        (-0.0012, "-0.0012"),
        (2e6, "2,000,000"),
    ],
)
def test_small_errors_are_no_zeros(number: float, text: str) -> None:
    assert short(number) == text
