"""Benchmarks take whatever models a folder has, and every one of them can be started."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks
from benchmarks import catalogue
from optuna_quantune.evaluation.dataset import ImageFolder


RECIPE = {
    "mean": [0.0] * 3,
    "std": [1.0] * 3,
    "scale": 1.0,
    "channel_order": "RGB",
    "crop": 8,
    "interpolation": "nearest",
}
MODULES = {
    path.stem: path.read_text() for path in sorted(Path(benchmarks.__file__).parent.glob("*.py"))
}
# The others take no options.
WITH_OPTIONS = [name for name, text in MODULES.items() if "ArgumentParser" in text]
NEEDS_TORCH = "demo_model"


def entry(file: str, family: str, classes: int, offset: int = 0) -> dict[str, object]:
    return {
        "file": file,
        "family": family,
        "preprocessing": {**RECIPE, "resize_short_side": 12},
        "output": {"classes": classes, "offset": offset},
        "fp32": {"imagenet-val": {"resize_short_side": None}},
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models; images whose brightness is their number, smaller ones for validation."""
    monkeypatch.setattr(catalogue, "CALIBRATION_INPUTS", 3)
    monkeypatch.setattr(catalogue, "CHOOSING", 2)
    monkeypatch.setattr(catalogue, "TEST_IMAGES", 9)
    monkeypatch.setattr(catalogue, "FIRST_CHOOSING", 4)
    models = tmp_path / "models"
    models.mkdir()
    (models / "large.onnx").write_bytes(b"12345")
    (models / "small.onnx").write_bytes(b"1")
    entries = {
        "large": entry("large.onnx", "MobileNetV3-Large", 1001, offset=1),
        "small": entry("small.onnx", "ResNet (CIFAR-10)", 10),
    }
    (models / "models.json").write_text(json.dumps(entries))
    for images, size in (("imagenet-val", 8), ("imagenet-calibration", 16)):
        folder = tmp_path / images
        folder.mkdir()
        lines = [f"{index}.png,{index},n{index}" for index in range(7)]
        (folder / "labels.csv").write_text("\n".join(["file,label_index,synset", *lines]))
        for index in range(7):
            Image.new("RGB", (size, size), (index,) * 3).save(folder / f"{index}.png")
    (tmp_path / "cifar10").mkdir()
    for name, images_of in (("test.zip", 9), ("train5000.zip", 5)):
        with zipfile.ZipFile(tmp_path / "cifar10" / name, "w") as archive:
            for index in range(images_of):
                buffer = BytesIO()
                Image.new("RGB", (8, 8), (20 * index,) * 3).save(buffer, "JPEG")
                archive.writestr(f"{index}_class/{index:04}.jpg", buffer.getvalue())
    return tmp_path


def brightness(source: object) -> list[float]:
    assert hasattr(source, "batches")
    return [float(x.mean()) for batch in source.batches(1) for x in batch.values()]


def test_all_models_take_part_the_smallest_first(data: Path) -> None:
    assert catalogue.names(data) == ["small", "large"]
    assert catalogue.names(data, demo=True) == ["demo", "small", "large"]
    assert catalogue.names(data, ["large"]) == ["large"]
    with pytest.raises(SystemExit, match=r"model 'medium': not in .*; there are small, large"):
        catalogue.names(data, ["medium"])
    with pytest.raises(SystemExit, match=r"models\.json: no such file"):
        catalogue.names(data / "models")


def test_a_family_is_a_word_without_version_and_size(data: Path) -> None:
    assert catalogue.family("large", data) == "MobileNet" == catalogue.family("demo", data)
    assert catalogue.family("small", data) == "ResNet"


def test_labels_are_places_in_the_output(data: Path) -> None:
    path, calibration, evaluation = catalogue.sources("large", data)
    assert path == data / "models" / "large.onnx"
    assert len(calibration) == 3
    assert evaluation.labels is not None
    assert evaluation.labels.tolist() == [index + 1 for index in range(7)]
    assert brightness(evaluation) == list(range(7))


def test_an_image_set_may_be_resized_otherwise(data: Path) -> None:
    assert catalogue.preprocessing("large", data, "imagenet-val")["resize_short_side"] is None
    assert (
        catalogue.preprocessing("large", data, "imagenet-calibration")["resize_short_side"] == 12
    )


@pytest.mark.parametrize("name", ["small", "large"])
def test_no_image_both_chooses_and_reports_or_calibrates(data: Path, name: str) -> None:
    _, calibration, _ = catalogue.sources(name, data)
    choosing, validation = catalogue.choosing_and_validation(name, data)
    assert len(choosing) == 2
    assert len(validation) == 7
    assert choosing.labels is not None
    if isinstance(validation, ImageFolder):  # other folders
        assert not set(brightness(choosing)) & set(brightness(calibration))
    else:
        assert validation.labels is not None
        assert not set(choosing.labels) & set(validation.labels)
        assert np.allclose(np.divide(brightness(choosing), 20), choosing.labels, atol=0.1)


@pytest.mark.parametrize("name", [name for name in MODULES if name != NEEDS_TORCH])
def test_every_benchmark_can_be_imported(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", [name for name in WITH_OPTIONS if name != NEEDS_TORCH])
def test_every_benchmark_explains_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out
