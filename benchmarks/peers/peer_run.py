"""The clock beside a peer: when it tried which accuracy, and what it cost."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import onnx

from benchmarks.peers.task import peak_memory_mb
from benchmarks.peers.task import Task


# A run is stopped after so many times its budget.
_PATIENCE = 3.0


class BudgetSpent(BaseException):
    """Ends a search from inside its evaluation; no peer catches it by mistake."""


class PeerRun:
    """One run of a peer on a task.

    Args:
        peer: Name of the peer.
        task: What it quantizes; read before the clock starts.
        folder: Where the best model and the record go.
        budget_seconds: Time after which the next evaluation ends the search.
    """

    def __init__(self, peer: str, task: Task, folder: Path, budget_seconds: float) -> None:
        self.peer = peer
        self.task = task
        folder.mkdir(parents=True, exist_ok=True)
        self.model = folder / f"{task.name}-{peer}.onnx"
        self._record = folder / f"{task.name}-{peer}.json"
        self._budget_seconds = budget_seconds
        self._accuracies: list[tuple[float, float]] = []
        _ = task.calibration, task.evaluation, task.labels
        self._memory_before_mb = peak_memory_mb()
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start

    def measure(self, model: str | Path | bytes) -> float:
        """Top-1 accuracy on the selecting inputs; the best quantized model so far is kept.

        The float model, which most peers measure first, only takes time.

        Raises:
            BudgetSpent: If the time is over.
        """
        accuracy = self.task.accuracy(model)
        print(f"{self.seconds:.1f} s: {accuracy:.4f}", flush=True)
        if is_quantized(model):
            best = max((value for _, value in self._accuracies), default=-1.0)
            self._accuracies.append((round(self.seconds, 3), accuracy))
            if accuracy > best:
                # In one file, wherever the peer keeps its weights.
                onnx.save(load(model), self.model)
        self.check()
        return accuracy

    def check(self) -> None:
        """Ends the search if the time is over.

        Raises:
            BudgetSpent: If it is.
        """
        if self.seconds > self._budget_seconds:
            raise BudgetSpent

    def write(self, packages: tuple[str, ...], ended: str) -> None:
        """Writes the record.

        Args:
            packages: Distributions whose versions matter.
            ended: Why the run ended: ``finished``, ``budget``, ``stopped`` or the error.
        """
        record = {
            "peer": self.peer,
            "model": self.task.name,
            "ended": ended,
            "seconds": round(self.seconds, 3),
            "accuracies": self._accuracies,
            "memory_mb": round(peak_memory_mb() - self._memory_before_mb),
            "install_mb": round(installed_mb()),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "load": round(os.getloadavg()[0], 2),
        }
        self._record.write_text(json.dumps(record) + "\n")


def main(peer: str, packages: tuple[str, ...], search: Callable[[PeerRun], None]) -> None:
    """The command line of every peer: ``TASK OUTPUT [--seconds 900]``.

    Args:
        peer: Name of the peer.
        packages: Distributions whose versions matter.
        search: Runs the peer and measures what it tries.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{peer}")
    parser.add_argument("task", type=Path, help="folder that benchmarks.export_task wrote")
    parser.add_argument("output", type=Path, help="folder of the best model and the record")
    parser.add_argument(
        "--seconds",
        type=float,
        default=900.0,
        help="end of the search, which is stopped after three times as long",
    )
    arguments = parser.parse_args()
    run = PeerRun(peer, Task.load(arguments.task), arguments.output.resolve(), arguments.seconds)

    def end(reason: str) -> None:
        run.write(packages, reason)
        # Some peers leave threads or processes behind that would keep this one alive.
        sys.stdout.flush()
        os._exit(0)

    # A peer that measures nothing for so long is not waited for.
    watch = threading.Timer(_PATIENCE * arguments.seconds, end, ["stopped"])
    watch.daemon = True
    watch.start()
    ended = "finished"
    try:
        search(run)
    except BudgetSpent:
        ended = "budget"
    except Exception as error:
        # How a peer fails is a result, too.
        ended = f"{type(error).__name__}: {error}"[:300]
    watch.cancel()
    end(ended)


def is_quantized(model: str | Path | bytes) -> bool:
    """Whether a model has any operator that quantizes, of whatever domain."""
    operators = {node.op_type for node in load(model).graph.node}
    return any("Quantize" in name or "QLinear" in name for name in operators)


def load(model: str | Path | bytes) -> onnx.ModelProto:
    """A model from its file or bytes, external weights included."""
    return onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model)


def installed_mb() -> float:
    """Size of this environment on disk, in MB."""
    files = (Path(folder) / name for folder, _, names in os.walk(sys.prefix) for name in names)
    return sum(file.lstat().st_size for file in files) / 1e6
