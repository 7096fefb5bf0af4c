"""The clock beside a peer, and what is made of its record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from numpy.typing import NDArray

from optuna_quantune.evaluation.dataset import ArrayInputs


pytest.importorskip("matplotlib", reason="needs the extra 'benchmarks'")

from benchmarks import collect_peers
from benchmarks import export_task
from benchmarks import finished_model
from benchmarks import machine
from benchmarks import onnxruntime_user
from benchmarks.peers.peer_run import BudgetSpent
from benchmarks.peers.peer_run import installed_mb
from benchmarks.peers.peer_run import is_quantized
from benchmarks.peers.peer_run import PeerRun
from benchmarks.peers.task import Task


PEERS = Path(collect_peers.__file__).parent / "peers"


@pytest.fixture
def task(toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path) -> Task:
    calibration = ArrayInputs(toy_inputs[:8])
    labels = np.arange(len(toy_inputs)) % 10
    evaluation = ArrayInputs(toy_inputs, labels=labels)
    return Task.load(
        export_task.write("toy", "Toy", toy_model, calibration, evaluation, tmp_path / "toy")
    )


@pytest.fixture
def quantized(task: Task, tmp_path: Path) -> bytes:
    path = tmp_path / "quantized.onnx"
    onnxruntime_user.quantize(task, onnxruntime_user.RULE_OF_THUMB, path)
    return path.read_bytes()


def test_the_float_model_is_no_candidate(task: Task, quantized: bytes, tmp_path: Path) -> None:
    assert not is_quantized(task.model)
    assert is_quantized(quantized)
    run = PeerRun("tool", task, tmp_path / "runs", 60.0)
    assert run.measure(task.model) == task.accuracy(task.model)
    assert not run.model.exists()
    assert run.measure(quantized) == task.accuracy(quantized)
    assert run.model.read_bytes() == quantized


def test_a_model_with_weights_in_another_file_is_kept_in_one(
    task: Task, quantized: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "parts.onnx"
    proto = onnx.load_model_from_string(quantized)
    onnx.save(proto, path, save_as_external_data=True, location="parts.data", size_threshold=0)
    run = PeerRun("tool", task, tmp_path / "runs", 60.0)
    run.measure(path)
    (tmp_path / "parts.data").unlink()
    assert task.accuracy(run.model) == task.accuracy(quantized)


def test_the_best_model_stays(task: Task, quantized: bytes, tmp_path: Path) -> None:
    """A second one that is not better, here the same with another name, does not replace it."""
    run = PeerRun("tool", task, tmp_path / "runs", 60.0)
    run.measure(quantized)
    other = onnx.load_model_from_string(quantized)
    other.graph.name = "other"
    run.measure(other.SerializeToString())
    assert run.model.read_bytes() == quantized


def test_the_budget_ends_the_search_and_no_handler_of_the_peer_stops_that(
    task: Task, quantized: bytes, tmp_path: Path
) -> None:
    run = PeerRun("tool", task, tmp_path / "runs", 0.0)

    def peer() -> None:
        try:
            run.measure(quantized)
        except Exception:
            pytest.fail("swallowed")

    with pytest.raises(BudgetSpent):
        peer()


def test_a_peer_that_measures_nothing_more_is_stopped(task: Task, tmp_path: Path) -> None:
    peer = (
        "import time; from benchmarks.peers.peer_run import main; "
        "main('sleeper', ('numpy',), lambda run: time.sleep(60))"
    )
    arguments = [task.model.parent, tmp_path / "runs", "--seconds", "0.1"]
    subprocess.run([sys.executable, "-c", peer, *map(str, arguments)], check=True, timeout=50)
    record = json.loads((tmp_path / "runs" / "toy-sleeper.json").read_text())
    assert record["ended"] == "stopped"
    assert record["seconds"] < 50


def test_a_record_becomes_a_row(task: Task, quantized: bytes, tmp_path: Path) -> None:
    run = PeerRun("tool", task, tmp_path / "runs", 60.0)
    accuracy = run.measure(quantized)
    run.write(("numpy",), "finished")
    (tmp_path / "runs" / "toy-broken.json").write_text(
        json.dumps(
            {
                "peer": "broken",
                "model": "toy",
                "ended": "ValueError: a | b",
                "seconds": 3.0,
                "accuracies": [],
                "memory_mb": 1,
                "install_mb": 2,
                "versions": {},
                "load": 0.0,
            }
        )
    )
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").glob("*.json"))]
    assert [record["peer"] for record in records] == ["broken", "tool"]
    records[1] |= finished_model.describe(task, run.model)
    records = [record | {"machine": machine.describe()} for record in records]
    live = pd.DataFrame(
        {
            "model": ["toy", "toy", "other", "toy"],
            "method": ["quantune", "random", "quantune", "quantune, extended"],
            "held_out_points": [-0.5, 0.0, 0.0, 0.25],
            "agreement": [0.9, 0.8, 0.8, 0.95],
            "latency_ratio": [0.5, 0.6, 0.6, 0.75],
            "whole_seconds": [7.0, 8.0, 8.0, 9.0],
        }
    )
    collect_peers.write(records, tmp_path / "results", live)
    text = (tmp_path / "results" / "README.md").read_text()
    assert f"| tool | 1 | {records[1]['seconds']:.0f} | {accuracy:.4f} |" in text
    assert "ValueError: a / b |" in text
    assert "| `tune`, preset `quantune` | 1 | -0.50 | -0.5 | 0.900 | 0.900 | 0.50 | 7 |" in text
    assert "latency | 1 | 0.25 | 0.2 | 0.950 | 0.950 | 0.75 | 9 |" in text
    assert "| random |" not in text
    assert (tmp_path / "results" / "toy.png").is_file()
    assert records[1]["versions"] == {"numpy": np.__version__}
    assert installed_mb() > 10


def test_every_peer_has_its_requirements_and_its_line() -> None:
    names = {p.stem for p in PEERS.glob("*.py")} - {"__init__", "task", "peer_run"}
    assert names == {p.stem for p in (PEERS / "requirements").glob("*.txt")}
    text = (PEERS / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in names)


def test_no_peer_needs_this_package_in_its_environment() -> None:
    for script in PEERS.glob("*.py"):
        assert "optuna_quantune" not in script.read_text(), script.name
