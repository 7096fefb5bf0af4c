"""A task in a folder: one model and its inputs as arrays, for whatever tool is to quantize it.

`python -m benchmarks.export_task` writes such folders. Every method that is compared by wall clock
reads its inputs from one, so that none of them decodes images or prepares them differently, and
chooses by the same inputs. Needs numpy and onnxruntime only.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


BATCH_SIZE = 25


@dataclass(frozen=True)
class Task:
    """One model and its inputs.

    Attributes:
        folder: Where they are: ``model.onnx``, ``calibration.npy``, ``evaluation.npy``,
            ``labels.npy``, ``task.json``.
        name: The model's name.
        family: Its architecture: a method that learned from models leaves it out.
        input_name: Name of the model's input.
        selected: Which evaluation inputs a method may choose by, int64 of shape (n,), ascending;
            the others only report.
    """

    folder: Path
    name: str
    family: str
    input_name: str
    selected: NDArray[np.int64]

    @classmethod
    def load(cls, folder: str | Path) -> Task:
        """Reads a folder.

        Raises:
            FileNotFoundError: If it is not the folder of a task.
        """
        folder = Path(folder).resolve()
        description = json.loads((folder / "task.json").read_text())
        return cls(
            folder,
            description["name"],
            description["family"],
            description["input"],
            np.array(description["selected"]),
        )

    @property
    def model(self) -> Path:
        """The float model."""
        return self.folder / "model.onnx"

    @cached_property
    def calibration(self) -> NDArray[np.float32]:
        """Inputs for calibration, shape (n, channels, height, width)."""
        calibration: NDArray[np.float32] = np.load(self.folder / "calibration.npy")
        return calibration

    @cached_property
    def evaluation(self) -> NDArray[np.float32]:
        """All inputs with labels, shape (n, channels, height, width)."""
        evaluation: NDArray[np.float32] = np.load(self.folder / "evaluation.npy")
        return evaluation

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class indices of the evaluation inputs, shape (n,)."""
        labels: NDArray[np.int64] = np.load(self.folder / "labels.npy")
        return labels

    @cached_property
    def held_out(self) -> NDArray[np.int64]:
        """Evaluation inputs that nothing is chosen by."""
        return np.setdiff1d(np.arange(len(self.labels)), self.selected)

    def reader(self, n: int | None = None) -> CalibrationReader:
        """The first calibration inputs, one at a time, in the form that quantizers read."""
        return CalibrationReader(self.input_name, self.calibration[:n])

    def outputs(self, model: str | bytes | Path, indices: NDArray[np.int64]) -> NDArray[Any]:
        """A model's first output, shape (inputs, classes), with ONNX Runtime's default session."""
        source = model if isinstance(model, bytes) else str(model)
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        parts = []
        for start in range(0, len(indices), BATCH_SIZE):
            x = self.evaluation[indices[start : start + BATCH_SIZE]]
            parts.append(session.run(None, {session.get_inputs()[0].name: x})[0])
        scores = np.concatenate(parts)
        return scores.reshape(len(scores), -1)

    def accuracy(
        self, model: str | bytes | Path, indices: NDArray[np.int64] | None = None
    ) -> float:
        """Top-1 accuracy of a model on the selected inputs, or on others."""
        indices = self.selected if indices is None else indices
        predicted = self.outputs(model, indices).argmax(axis=1)
        return float((predicted == self.labels[indices]).mean())


def peak_memory_mb() -> float:
    """The most resident memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss it does not begin with the peak of the process that forked this one.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class CalibrationReader:
    """A calibration data reader of ONNX Runtime, with the method names that others expect.

    Args:
        name: The model's input.
        inputs: Shape (n, ...); each is given with a batch axis of 1.
    """

    def __init__(self, name: str, inputs: NDArray[np.float32]) -> None:
        self._name = name
        self._inputs = inputs
        self._iterator = self._batches()

    def __len__(self) -> int:
        return len(self._inputs)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next input, or None after the last."""
        return next(self._iterator, None)

    def rewind(self) -> None:
        """Begins again."""
        self._iterator = self._batches()

    reset_iter = rewind

    def _batches(self) -> Iterator[dict[str, NDArray[np.float32]]]:
        for n in range(len(self._inputs)):
            yield {self._name: self._inputs[n : n + 1]}
