"""Goals, inputs and metrics of one's own on the command line."""

from __future__ import annotations

import importlib
import io
import logging
import shutil
import sys
from pathlib import Path

import onnxruntime
import pytest

from optuna_quantune.cli import main


OWN = """
import numpy as np

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(24, 3, 16, 16)).astype(np.float32)


def data(split):
    return IMAGES[:8] if split == "calibration" else {"input": IMAGES}


def no_data(split):
    return 5


def everything():
    return IMAGES


def unreadable(split):
    return [0, 1][2]


def largest_error(outputs, reference):
    return float(np.abs(outputs - reference).max())


def mean_logit(session):
    return float(session.run(None, {"input": IMAGES})[0].mean())


NOT_A_FUNCTION = 3
"""


@pytest.fixture
def call(tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs the command line in a folder with model.onnx and own.py; gives the exit code."""
    shutil.copy(toy_model, tmp_path / "model.onnx")
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)

    def call(*arguments: str) -> int:
        try:
            main([*arguments, "--cache", "cache"])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


TUNE = ("tune", "model.onnx", "--data", "own:data", "--n-trials", "3", "--output", "out.onnx")


def test_own_data_and_an_own_metric_are_found_in_the_current_folder(  # type: ignore[no-untyped-def]
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*TUNE, "--metric", "own:largest_error", "--direction", "minimize") == 0
    printed, logged = capsys.readouterr()
    own = importlib.import_module("own")
    outputs, reference = (
        onnxruntime.InferenceSession(name).run(None, {"input": own.IMAGES})[0]
        for name in ("out.onnx", "model.onnx")
    )
    expected = own.largest_error(outputs, reference)
    row = next(line for line in printed.splitlines() if line.startswith("│   largest_error"))
    assert f"{expected:.4g}" in row
    assert "24 evaluation inputs are too few" in " ".join(logged.split())


def test_objectives_print_a_pareto_front(call, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert call(*TUNE, "--objectives", "accuracy, size") == 0
    printed = capsys.readouterr().out
    assert "Pareto front of agreement, size" in printed
    assert "latency [95 %]" in printed


def test_a_bound_that_cannot_be_kept_still_writes_a_model_and_says_so(  # type: ignore[no-untyped-def]
    call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*TUNE, "--max-size", "10") == 0
    assert (tmp_path / "out.onnx").is_file()
    assert "Goal not met: it has" in capsys.readouterr().out


def test_a_loop_needs_no_evaluation_inputs(call, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert call(*TUNE, "--evaluate", "own:mean_logit", "--provider", "CPUExecutionProvider") == 0
    assert "mean_logit" in capsys.readouterr().out


def test_a_warning_is_printed_once_whatever_other_handlers_there_are(  # type: ignore[no-untyped-def]
    call, capsys: pytest.CaptureFixture[str]
) -> None:
    other = io.StringIO()
    handler = logging.StreamHandler(other)
    logging.getLogger().addHandler(handler)
    try:
        assert call(*TUNE) == 0
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.count("evaluation inputs are too few") == 1
    assert other.getvalue() == ""


def test_quantize_and_inspect_take_own_data(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert call("quantize", "model.onnx", "--config", "{}", "--data", "own:data") == 0
    assert (tmp_path / "model.int8.onnx").is_file()
    assert call("inspect", "model.onnx", "--data", "own:data") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "own:missing"), "--metric 'own:missing': cannot be imported"),
        (("--metric", "own:NOT_A_FUNCTION"), "--metric 'own:NOT_A_FUNCTION': is a int"),
        (("--evaluate", "mean_logit"), "--evaluate 'mean_logit': must be module:function"),
        (("--data", "own:no_data"), "cannot take inputs from a int"),
        (("--data", "own:everything"), "'own:everything': is called with 'calibration' or"),
        (("--data", "own:unreadable"), "'own:unreadable': fails for 'calibration': IndexError: "),
        (("--calibration", "images"), "--calibration: give a folder of images, or inputs by --"),
        (("--labels", "labels.csv"), "--data: its inputs bring their own labels"),
        (("--objectives", "accuracy,speed"), "objective 'speed': use accuracy, latency, size"),
        (("--provider", "Abacus"), "execution provider Abacus is not in this ONNX Runtime"),
        (("--provider", "CPUExecutionProvider:arena"), "options must be KEY=VALUE"),
        (("--max-latency", "0"), "--max-latency"),
        (("--prefer", "beauty"), "--prefer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(  # type: ignore[no-untyped-def]
    call, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert call(*TUNE, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("optuna-quantune: ")
    assert message in error
    assert error.count("\n") == 1
