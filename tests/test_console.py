"""Tables of trials, as a terminal shows them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import optuna
import pytest
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto
from optuna.trial import FrozenTrial
from rich.console import Console

from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.report.console import layers_table
from optuna_quantune.report.console import result_table
from optuna_quantune.report.console import trials_table
from optuna_quantune.report.progress import ProgressBars
from optuna_quantune.report.result_rows import result_sections
from tests.report.studies import make_summary


def trial(number: int, **params: object) -> FrozenTrial:
    attributes = {"sqnr_db": 20.0 + number, "latency_ratio": 0.6, "size_bytes": 5e6}
    found = optuna.trial.create_trial(
        value=0.8 - number / 100,
        params=params,
        distributions={
            name: optuna.distributions.CategoricalDistribution([value])  # type: ignore[list-item]
            for name, value in params.items()
        },
        user_attrs=attributes | {"agreement": 0.98, "top1": 0.8 - number / 100},
    )
    found.number = number
    return found


def shown(trials: list[FrozenTrial], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(trials_table(trials, ChosenMetric("top1")))
    return console.export_text()


def test_a_knob_that_all_trials_share_stands_below_the_table() -> None:
    trials = [trial(n, scheme="symmetric", clipping=c) for n, c in enumerate(("max", "kl"))]
    text = shown(trials, 100)
    assert "The same in all: scheme symmetric" in text
    assert text.count("scheme") == 1
    assert text.count("clipping") == 1


def test_a_single_trial_shows_all_its_knobs() -> None:
    text = shown([trial(0, scheme="symmetric", clipping="max")], 100)
    assert "The same in all" not in text
    assert all(part in text for part in ("scheme", "symmetric", "clipping", "max"))


def test_knobs_that_would_need_too_many_columns_stand_below_the_table() -> None:
    names = (
        "clipping",
        "scheme",
        "granularity",
        "equalization",
        "float_layers",
        "bias_correction",
    )
    values = [
        ("max", "symmetric", "tensor", "True", "3", "False"),
        ("kl", "asymmetric", "channel", "no", "4", "yes"),
    ]
    trials = [
        trial(number, **dict(zip(names, row, strict=True))) for number, row in enumerate(values)
    ]
    for width in (80, 200):
        words = set(shown(trials, width).replace(",", " ").split())
        assert words >= {*names, *values[0], *values[1]}  # nothing is cut off


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_off_on_a_narrow_terminal(width: int) -> None:
    rows = [("max", "symmetric", "tensor", "none"), ("kl", "asymmetric", "channel", "first_last")]
    names = ("clipping", "scheme", "granularity", "mixed_precision")
    text = shown(
        [trial(n, **dict(zip(names, row, strict=True))) for n, row in enumerate(rows)], width
    )
    assert "…" not in text
    words = set(text.replace(",", " ").split())
    assert words >= {"0.8000", "0.7900", "0.60x", *rows[0], *rows[1]}
    assert max(map(len, text.splitlines())) <= width


def test_a_metric_of_the_users_may_have_the_name_of_a_column() -> None:
    trials = [trial(0, scheme="symmetric"), trial(1, scheme="asymmetric")]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(trials_table(trials, ChosenMetric("s")))
    assert {"0.8000", "0.7900"} <= set(console.export_text().split())


def test_the_terminal_shows_the_result_that_reports_show() -> None:
    summary = make_summary()
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(result_table(SimpleNamespace(summary=summary)))  # type: ignore[arg-type]
    lines = [re.sub(r"[│┃\s]+", " ", line).strip() for line in console.export_text().splitlines()]
    sections = result_sections(summary)
    assert len(sections) == 3
    for section in sections:
        assert not section.title or section.title in lines
        for row in section.rows:
            cells = (row.name, row.float_model, row.quantized, row.difference)
            assert " ".join(cell for cell in cells if cell) in lines


def test_a_stage_that_ended_early_makes_room_for_the_next() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ProgressBars(console) as progress:
        progress("trials", 1, 3)
        progress("evaluation", 64, 300)
        progress("final model", 1, 600)
        assert list(progress.stages) == ["trials", "final model"]


def test_without_a_terminal_the_long_wait_for_predictions_is_one_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with ProgressBars(console) as progress:
        for done in range(4):
            progress("calibration", done, 3)
            progress("predictions", done, 3)
    assert isinstance(console.file, io.StringIO)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("Predicting the noise of configurations")


def test_sizes_of_tiny_models_have_three_digits() -> None:
    trials = [trial(n, scheme=s) for n, s in enumerate(("symmetric", "asymmetric", "none"))]
    sizes = [52_043.0, 410_400.0, 10_861_000.0]
    for item, size in zip(trials, sizes, strict=True):
        item.set_user_attr("size_bytes", size)
    words = shown(trials, 100).split()
    assert {"0.0520", "0.410", "10.86"} <= set(words)


def test_what_stays_in_float_whatever_is_chosen_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 16, 3), "r": (1, 16, 4), "dense": (4, 2)}  # 48 + 64, and 8
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "inner"], ["product"])],
        "body",
        [],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [1, 1, 4])],
        [numpy_helper.from_array(rng.standard_normal((4, 4)).astype(np.float32), "inner")],
    )
    graph = helper.make_graph(
        [
            helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], "lstm", hidden_size=4),
            helper.make_node("If", ["flag"], ["mixed"], then_branch=body, else_branch=body),
            helper.make_node("MatMul", ["mixed", "dense"], ["y"], "dense"),
        ],
        "recurrent",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 1, 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in shapes.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "recurrent.onnx")
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(layers_table(load_float_model(tmp_path / "recurrent.onnx")))
    # 112 and twice 16 of 152.
    assert "95% of the parameters stay in float: those of LSTM, If." in console.export_text()
