"""Writes the tasks that methods are compared on by wall clock: a model and its inputs as arrays.

    python -m benchmarks.export_task DATA TASKS [--models NAME ...]

DATA is as `benchmarks.catalogue` says; each model becomes the folder TASKS/NAME, which
`benchmarks.peers.task` describes. An ImageNet model's takes about 1 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import catalogue
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.runner import input_specs


SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    arguments = parser.parse_args()
    for name in catalogue.names(arguments.data, arguments.models, demo=True):
        print(export(name, arguments.data, arguments.tasks))


def export(name: str, data: Path, tasks: Path) -> Path:
    """Writes one task, unless it is there, and returns its folder."""
    folder = tasks / name
    if (folder / "task.json").is_file():
        return folder
    path, calibration, evaluation = catalogue.sources(name, data)
    family = catalogue.family(name, data)
    return write(name, family, path, calibration, evaluation, folder)


def write(
    name: str,
    family: str,
    model: Path,
    calibration: InputSource,
    evaluation: InputSource,
    folder: Path,
) -> Path:
    """Writes a model and its inputs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    specs = input_specs(session)
    np.save(folder / "calibration.npy", array(calibration.bind(specs)))
    np.save(folder / "evaluation.npy", array(evaluation.bind(specs)))
    assert evaluation.labels is not None
    np.save(folder / "labels.npy", evaluation.labels)
    description = {
        "name": name,
        "family": family,
        "input": specs[0].name,
        "selected": selected(len(evaluation)).tolist(),
    }
    (folder / "task.json").write_text(json.dumps(description) + "\n")
    return folder


def selected(n: int) -> NDArray[np.int64]:
    """Which of n inputs select: the half that `tune` takes with the seed `SEED`."""
    order = np.random.default_rng(SEED).permutation(n)
    return np.sort(order[: n - n // 2])


def array(inputs: InputSource) -> NDArray[np.float32]:
    """All inputs of a model with one input, shape (n, ...)."""
    return np.concatenate([next(iter(batch.values())) for batch in inputs.batches(64)])


if __name__ == "__main__":
    main()
