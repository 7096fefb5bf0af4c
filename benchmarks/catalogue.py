"""The models and images that benchmarks are run on: a folder DATA, and what the demo ships.

DATA holds

- `models/models.json`, by model name an object with `file` (in `models/`), `family` (its
  architecture), `preprocessing` (as `Preprocessing` reads it) and `output`: `classes`, and
  `offset`, which is added to a label to be its place in the output. Where `fp32` names an image
  set with a `resize_short_side`, it overrides that of `preprocessing`.
- `imagenet-val/` and `imagenet-calibration/`, folders of images with `labels.csv`;
- `cifar10/test.zip` and `cifar10/train5000.zip`, of `<label>_<class>/<id>.jpg`, for models of ten
  classes.

A model that is added there takes part in every benchmark.
"""

from __future__ import annotations

import functools
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from optuna_quantune.demo import load_demo
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.preprocessing import Preprocessing


DEMO = "demo"
# What a family's name begins with: MobileNetV2 and MobileNetV3 are one.
_FAMILY = re.compile("[A-Za-z]+?(?=V?[^A-Za-z]|$)")
_CIFAR10_CLASSES = 10
CALIBRATION_INPUTS = 512
# Images that a search sees where others are kept for its result. The first test images of CIFAR-10
# are those of the recorded tables.
CHOOSING = 256
TEST_IMAGES, FIRST_CHOOSING = 10_000, 2_000


def names(data: Path, wanted: Sequence[str] | None = None, *, demo: bool = False) -> list[str]:
    """The models to run on, the smallest files first.

    Args:
        data: The folder.
        wanted: Their names; all by default.
        demo: Whether the demo's model is one of them.

    Raises:
        SystemExit: If there is no such model, or no such folder.
    """
    models = sorted(_entries(data), key=lambda name: model_path(name, data).stat().st_size)
    known = [DEMO, *models] if demo else models
    for name in wanted or ():
        if name not in known:
            raise _unknown(name, data, known)
    return known if wanted is None else list(wanted)


def family(name: str, data: Path) -> str:
    """The architecture that a model belongs to, without version and size: ``ResNet``.

    Raises:
        SystemExit: If there is no such model, or its family is no word.
    """
    if name == DEMO:
        return load_demo().family
    given = str(_entry(name, data)["family"])
    found = _FAMILY.match(given)
    if found is None:
        raise SystemExit(f"model {name!r}: its family {given!r} does not begin with a word")
    return found[0]


def sources(name: str, data: Path) -> tuple[Path, InputSource, InputSource]:
    """Model file, calibration inputs and labelled evaluation inputs."""
    if name == DEMO:
        demo = load_demo()
        recipe = Preprocessing.from_mapping(demo.preprocessing)
        return (
            demo.model_path,
            ArrayInputs(demo.calibration, preprocessing=recipe),
            ArrayInputs(demo.evaluation, labels=demo.evaluation_labels, preprocessing=recipe),
        )
    path = model_path(name, data)
    if _is_cifar10(name, data):
        return (
            path,
            _cifar10(name, data, "train5000.zip", CALIBRATION_INPUTS),
            _cifar10(name, data, "test.zip", FIRST_CHOOSING),
        )
    return (
        path,
        _imagenet(name, data, "imagenet-calibration", CALIBRATION_INPUTS),
        _imagenet(name, data, "imagenet-val"),
    )


def choosing_and_validation(name: str, data: Path) -> tuple[InputSource, InputSource]:
    """Labelled images that a search sees, and those that its result is measured on.

    Neither are among the calibration inputs of `sources`.
    """
    if not _is_cifar10(name, data):
        folder = _imagenet(name, data, "imagenet-calibration")
        unused = np.random.default_rng(0).permutation(np.arange(CALIBRATION_INPUTS, len(folder)))
        return folder.subset(np.sort(unused[:CHOOSING])), _imagenet(name, data, "imagenet-val")
    everything = _cifar10(name, data, "test.zip", TEST_IMAGES)
    chosen = np.arange(FIRST_CHOOSING, FIRST_CHOOSING + CHOOSING)
    others = np.delete(np.arange(len(everything)), chosen)
    return everything.subset(chosen), everything.subset(others)


def preprocessing(name: str, data: Path, images: str) -> dict[str, Any]:
    """How an image of a set becomes an input, as `Preprocessing` reads it."""
    entry = _entry(name, data)
    measured = entry.get("fp32", {}).get(images, {})
    overriding = {key: measured[key] for key in ("resize_short_side",) if key in measured}
    return {**entry["preprocessing"], **overriding}


def model_path(name: str, data: Path) -> Path:
    """The model's file."""
    return data / "models" / str(_entry(name, data)["file"])


@functools.cache
def _entries(data: Path) -> dict[str, Any]:
    path = data / "models" / "models.json"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; DATA is a folder as benchmarks/catalogue.py says")
    entries: dict[str, Any] = json.loads(path.read_text())
    return entries


def _entry(name: str, data: Path) -> dict[str, Any]:
    entries = _entries(data)
    if name not in entries:
        raise _unknown(name, data, names(data))
    entry: dict[str, Any] = entries[name]
    return entry


def _unknown(name: str, data: Path, known: Sequence[str]) -> SystemExit:
    return SystemExit(f"model {name!r}: not in {data}; there are {', '.join(known)}")


def _is_cifar10(name: str, data: Path) -> bool:
    return bool(_entry(name, data)["output"]["classes"] == _CIFAR10_CLASSES)


def _imagenet(name: str, data: Path, images: str, limit: int | None = None) -> ImageFolder:
    recipe = Preprocessing.from_mapping(preprocessing(name, data, images))
    with tempfile.TemporaryDirectory() as folder:
        labels = pd.read_csv(data / images / "labels.csv")
        labels["label_index"] += _offset(name, data)
        shifted = Path(folder) / "labels.csv"
        labels.to_csv(shifted, index=False)
        return ImageFolder(data / images, labels=shifted, preprocessing=recipe, limit=limit)


def _cifar10(name: str, data: Path, archive: str, limit: int) -> ArrayInputs:
    recipe = Preprocessing.from_mapping(preprocessing(name, data, f"cifar10/{archive}"))
    images, labels = _unpacked(data / "cifar10" / archive, limit)
    return ArrayInputs(images, labels=labels + _offset(name, data), preprocessing=recipe)


def _offset(name: str, data: Path) -> int:
    return int(_entry(name, data)["output"].get("offset", 0))


def _unpacked(archive: Path, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first n images of a zip of `<label>_<class>/<id>.jpg` in a fixed random order."""
    with zipfile.ZipFile(archive) as file:
        members = sorted(member for member in file.namelist() if member.endswith(".jpg"))
        chosen = [members[i] for i in np.random.default_rng(0).permutation(len(members))[:n]]
        images = [Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in chosen]
    labels = [int(name.split("/")[-2].split("_")[0]) for name in chosen]
    return np.stack([np.asarray(image) for image in images]), np.array(labels)
