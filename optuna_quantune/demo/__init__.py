"""The small model and the images of ``optuna-quantune demo``; see ``DATA.md`` for their source.

They are here so that a first search runs minutes after the install, with nothing to download.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["DemoData", "load_demo"]


@dataclasses.dataclass(frozen=True)
class DemoData:
    """A float model with the images that calibrate and evaluate it.

    Attributes:
        model_path: The float ONNX model, from ``input`` of shape (batch, 1, 28, 28), float32, to
            ``logits`` of shape (batch, 10), float32.
        family: The architecture, as the records of reference models name it.
        calibration: Images of shape (n, 28, 28), uint8, from the data that the model was trained
            on. They are in random order, so any first few of them are a fair sample.
        evaluation: Images of shape (n, 28, 28), uint8, that took no part in the training.
        evaluation_labels: Class indices of the evaluation images, shape (n,), int64.
        class_names: The name of each class, by its index.
        preprocessing: How an image becomes the model's input, with the keys of a
            ``--preprocessing`` file.
    """

    model_path: Path
    family: str
    calibration: NDArray[np.uint8]
    evaluation: NDArray[np.uint8]
    evaluation_labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    preprocessing: Mapping[str, Any]


def load_demo() -> DemoData:
    """Read the demo's model and images from the installed package."""
    # A wheel is unpacked when it is installed, so its resources are ordinary files.
    folder = Path(str(resources.files(__name__)))
    with np.load(folder / "images.npz", allow_pickle=False) as images:
        return DemoData(
            model_path=folder / "model.onnx",
            family="MobileNet",
            calibration=images["calibration"],
            evaluation=images["evaluation"],
            evaluation_labels=images["evaluation_labels"],
            class_names=tuple(images["class_names"].tolist()),
            preprocessing=json.loads((folder / "preprocessing.json").read_text("utf-8")),
        )
