"""Evaluations of one process side by side: they share its cores, and latency has them alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx import numpy_helper

from optuna_quantune import pipeline
from optuna_quantune.evaluation import runner
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.evaluation.runner import run


INPUTS = np.ones((12, 2), np.float32)


class Watched:
    """A session that counts the threads of all runs under way; a run takes 5 ms."""

    busy = 0
    most = 0
    lock = threading.Lock()

    def __init__(self, threads: int | None) -> None:
        self._session = make_session(identity(), threads=threads)
        self._threads = threads or 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Any, feed: Any) -> Any:
        with self.lock:
            Watched.busy += self._threads
            Watched.most = max(Watched.most, Watched.busy)
        time.sleep(0.005)
        with self.lock:
            Watched.busy -= self._threads
        return self._session.run(names, feed)


def identity() -> bytes:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "identity",
        [helper.make_tensor_value_info("x", kind, ["n", 2])],
        [helper.make_tensor_value_info("y", kind, ["n", 2])],
        [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    data: bytes = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    return data


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runner, pipeline):
        monkeypatch.setattr(module, "available_cores", lambda: 2)
    Watched.busy = Watched.most = 0


def at_the_same_time(*functions: Any) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_two_evaluations_together_use_no_more_cores_than_one() -> None:
    def evaluate() -> None:
        session: Any = Watched(1)
        assert run(session, ArrayInputs(INPUTS), batch_size=1)["y"].shape == (12, 2)

    at_the_same_time(evaluate, evaluate, evaluate)
    assert Watched.most == 2


def test_nothing_else_of_the_process_runs_while_latency_is_measured() -> None:
    alone: list[int] = []

    class Timed(Watched):
        def run(self, names: Any, feed: Any) -> Any:
            alone.append(Watched.busy)
            return super().run(names, feed)

    def evaluate() -> None:
        session: Any = Watched(1)
        run(session, ArrayInputs(np.ones((60, 2), np.float32)), batch_size=1)

    def measure() -> None:
        session: Any = Timed(None)
        latency_ratio(session, session, [{"x": INPUTS[:1]}], repeats=6, seconds=0, warmup=1)

    at_the_same_time(evaluate, measure)
    assert len(alone) == 14
    assert set(alone) == {0}
