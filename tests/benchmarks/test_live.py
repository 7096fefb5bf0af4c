"""The wall-clock comparison: tasks, the user's own search, child processes, extrapolation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.plan import split
from optuna_quantune.selection import pack


pytest.importorskip("matplotlib", reason="needs the extra 'benchmarks'")

from benchmarks import export_task
from benchmarks import finished_model
from benchmarks import live
from benchmarks import live_report
from benchmarks import onnxruntime_user
from benchmarks.onnxruntime_user import kinds_of_cost
from benchmarks.peers.task import Task


@pytest.fixture
def task(toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path) -> Task:
    labels = np.arange(len(toy_inputs)) % 10
    evaluation = ArrayInputs(toy_inputs, labels=labels)
    folder = export_task.write(
        "toy", "Toy", toy_model, ArrayInputs(toy_inputs[:40]), evaluation, tmp_path / "toy"
    )
    return Task.load(folder)


def test_a_task_is_the_model_and_its_inputs(task: Task, toy_inputs: NDArray[np.float32]) -> None:
    assert np.array_equal(task.evaluation, toy_inputs)
    assert np.array_equal(task.calibration, toy_inputs[:40])
    assert sorted([*task.selected, *task.held_out]) == list(range(len(toy_inputs)))
    assert task.accuracy(task.model, np.flatnonzero(task.labels == 3)) == pytest.approx(
        (task.outputs(task.model, np.flatnonzero(task.labels == 3)).argmax(axis=1) == 3).mean()
    )


def test_a_task_selects_by_the_half_that_tune_takes() -> None:
    inputs = ArrayInputs(np.zeros((501, 1), np.float32), labels=np.zeros(501, np.int64))
    selecting, held_out = split(inputs, export_task.SEED)
    assert selecting is not None
    assert np.array_equal(selecting.positions, export_task.selected(501))
    assert len(held_out) == 250
    assert live.SEED == export_task.SEED


def test_a_reader_gives_single_inputs_and_begins_again(task: Task) -> None:
    reader = task.reader(2)
    first = reader.get_next()
    assert first is not None
    assert first[task.input_name].shape == (1, 3, 16, 16)
    assert reader.get_next() is not None
    assert reader.get_next() is None
    reader.rewind()
    again = reader.get_next()
    assert again is not None
    assert np.array_equal(again[task.input_name], first[task.input_name])


def test_the_user_tries_96_different_configurations() -> None:
    assert len(set(onnxruntime_user.grid())) == 96
    assert onnxruntime_user.RULE_OF_THUMB not in onnxruntime_user.grid()


def test_options_of_the_user_reach_the_model(task: Task, tmp_path: Path) -> None:
    config = onnxruntime_user.UserConfig(4, "int8", True, False, True, True)
    onnxruntime_user.quantize(task, config, tmp_path / "a.onnx")
    graph = onnx.load(tmp_path / "a.onnx").graph
    types = {i.name: i.data_type for i in graph.initializer}
    sizes = {i.name: math.prod(i.dims) for i in graph.initializer}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {types[n.input[2]] for n in quantizers} == {onnx.TensorProto.INT8}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in types]
    assert max(sizes[n.input[1]] for n in weights) > 1, "scales of single channels"
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    # First and last layer keep their float weights.
    assert [n.input[1] in types for n in layers] == [True, False, False, True]


def test_a_finished_model_is_compared_with_float_on_the_held_out_inputs(task: Task) -> None:
    result = finished_model.describe(task, task.model)
    assert result["agreement_held_out"] == 1.0
    assert result["difference"][0] == 0.0
    assert result["difference"][1] < 0.0 < result["difference"][2]
    assert result["size_ratio"] == 1.0
    assert result["top1_held_out"] == task.accuracy(task.model, task.held_out)
    assert 0.3 < result["latency_ratio"] < 3.0


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> list[str]:
    (folder / "child_module.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return ["child_module"]


def test_a_step_gives_what_its_last_line_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = module(tmp_path, monkeypatch, "print('noise')\nprint('{\"a\": 1}')")
    outcome = live.run(command, tmp_path, 8.0)
    assert outcome.pop("seconds") > 0
    assert outcome == {"a": 1}


def test_a_step_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = module(tmp_path, monkeypatch, "raise SystemExit('out of luck')")
    assert live.run(command, tmp_path, 8.0)["failed"] == "out of luck"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_that_takes_too_much_memory_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time\nx = bytearray(400_000_000)\ntime.sleep(60)"
    outcome = live.run(module(tmp_path, monkeypatch, code), tmp_path, 0.2)
    assert outcome["failed"] == "memory"
    assert outcome["seconds"] < 30


def test_a_step_is_run_once_and_again_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "RESULTS", tmp_path)
    outcomes: list[dict[str, Any]] = [{"failed": "KeyError: x"}, {"failed": "memory"}, {}]
    monkeypatch.setattr(live, "run", lambda *_: outcomes.pop(0))
    for _ in range(3):
        live.run_step("m", "s", [], 8.0)
    assert len(outcomes) == 1, "stopped for memory is a result, an error is none"


def test_arrival_is_the_first_complete_trial_close_to_the_best() -> None:
    trials = [
        {"seconds": 1.0, "state": "COMPLETE", "value": 0.80},
        {"seconds": 2.0, "state": "PRUNED", "value": 0.90},
        {"seconds": 3.0, "state": "COMPLETE", "value": 0.899},
        {"seconds": 4.0, "state": "COMPLETE", "value": 0.9},
    ]
    for best, expected in ((0.9, (3, 3.0)), (0.95, (math.nan, math.nan))):
        goal = live_report.Best(best, None)
        found = live_report.arrival(trials, lambda trial, goal=goal: goal.is_close(trial["value"]))  # type: ignore[misc]
        assert found == pytest.approx(expected, nan_ok=True)


def test_a_tie_is_what_the_paired_interval_cannot_tell_from_the_best() -> None:
    best = np.arange(1000) < 800
    reference = live_report.Best(0.8, best)
    few, many = best.copy(), best.copy()
    few[:3] = False  # three inputs less, none more: z = 3 / sqrt(3) = 1.7
    many[:9] = False  # nine: z = 3
    assert reference.is_tied(pack(best))
    assert not reference.is_tied(pack(many))
    assert reference.is_tied(pack(few))
    assert not reference.is_tied(None)


def test_extrapolated_time_is_the_mean_of_the_sample_with_an_honest_interval() -> None:
    rng = np.random.default_rng(0)
    everything = rng.gamma(2.0, 10.0, size=96)
    hits = 0
    for _ in range(300):
        sample = rng.choice(everything, size=24, replace=False)
        steps = {
            f"exhaustive {n}": {"build_seconds": s, "evaluate_seconds": 0.0}
            for n, s in enumerate(sample)
        }
        result = live_report.exhaustive(steps)
        assert result is not None
        assert result.seconds == pytest.approx(4 * sample.sum())
        hits += result.low <= everything.sum() <= result.high
    assert 0.90 < hits / 300 <= 1.0
    steps = {
        f"exhaustive {n}": {"build_seconds": s, "evaluate_seconds": 1.0}
        for n, s in enumerate(everything)
    }
    result = live_report.exhaustive(steps)
    assert result is not None
    assert result.low == result.seconds == result.high == pytest.approx(everything.sum() + 96)


def test_a_sample_of_each_kind_is_extrapolated_kind_by_kind() -> None:
    rng = np.random.default_rng(0)
    kinds = kinds_of_cost()
    assert [len(kind) for kind in kinds.values()] == [16] * 6
    assert sorted(sum(kinds.values(), [])) == list(range(96))
    levels = dict(zip(kinds, (1.0, 2.0, 5.0, 20.0, 50.0, 300.0), strict=True))
    seconds = {
        number: levels[kind] * rng.uniform(0.9, 1.1)
        for kind, numbers in kinds.items()
        for number in numbers
    }
    chosen = live.sample(12)
    assert all(len(set(chosen) & set(numbers)) == 2 for numbers in kinds.values())
    total, low, high = live_report.extrapolated({n: seconds[n] for n in chosen})
    assert low < sum(seconds.values()) < high
    # One configuration in six takes most of the time: a plain sample would not be so certain.
    assert high - low < 0.3 * total
    assert live_report.extrapolated(seconds) == (pytest.approx(sum(seconds.values())),) * 3


def test_the_report_has_every_method_and_the_ratios(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = {
        "difference": [0.0, -0.01, 0.01],
        "agreement_held_out": 0.98,
        "latency_ratio": 0.5,
        "memory_mb": 10,
    }
    complete = {"state": "COMPLETE", "correct": None}
    trials = [{"seconds": 10.0, "value": 0.7, **complete}]
    late = [*trials, {"seconds": 50.0, "value": 0.8, **complete}]
    steps: dict[str, dict[str, Any]] = {
        "quantune": {**finished, "trials": late[1:], "total_seconds": 60.0},
        "rule of thumb": {
            **finished,
            "build_seconds": 4.0,
            "top1_selected": 0.8,
            "correct_selected": "00",
        },
        "random": {**finished, "trials": trials, "total_seconds": 400.0},
        "genetic": {"failed": "KeyError: x", "seconds": 1.0},
        "exhaustive 3": {**finished, "build_seconds": 90.0, "evaluate_seconds": 10.0},
        "exhaustive 5": {"failed": "memory", "seconds": 100.0},
    }
    shared = {"model": "toy", "load_before": 0.1, "machine": {"cores": "2"}}
    lines = [json.dumps({**shared, "step": name, **step}) for name, step in steps.items()]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["live", "somewhere"])
    live_report.write(tmp_path, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| quantune | 60 | - | - | 50.0 | 1 | 0.00 [-1.00, 1.00] | 0.980 | 0.50 | 10 |" in text
    assert "| random | 400 | - | - | - | - |" in text
    assert "| exhaustive (2 of 96 run, 1 failed) | 9600 [9600, 9600] |" in text
    assert "| exhaustive / close | 192.0 | 192.0 |" in text
    assert "| random, close | > 8.0 | 8.0 |" in text
    assert "genetic failed: KeyError: x after 1 s." in text
    assert "somewhere" not in text
