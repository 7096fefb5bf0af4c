"""The main job on a real model and real images; `benchmarks/tune_real.py` is the large version."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.tuning import tune


@pytest.mark.shared_data
def test_tune_keeps_squeezenet_and_prints_what_an_independent_script_measures(
    shared_data: Path, tmp_path: Path
) -> None:
    entry = json.loads((shared_data / "models/models.json").read_text())["squeezenet1_1"]
    recipe = {**entry["preprocessing"], "resize_short_side": None}
    calibration = ImageFolder(shared_data / "imagenet-calibration", preprocessing=recipe, limit=32)
    evaluation = ImageFolder(shared_data / "imagenet-val", preprocessing=recipe, limit=60)
    result = tune(
        shared_data / "models" / entry["file"],
        calibration=calibration,
        evaluation=evaluation,
        n_trials=2,
        output=tmp_path / "int8.onnx",
        cache=None,
    )
    session = onnxruntime.InferenceSession(str(result.path))
    right = []
    assert evaluation.labels is not None
    for file, label in zip(evaluation.files, evaluation.labels, strict=True):
        pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32)[..., ::-1]
        x = (pixels - np.array(recipe["mean"], np.float32)).transpose(2, 0, 1)[None]
        right.append(session.run(None, {"input": x})[0].argmax() == label)
    assert result.all_inputs.quantized.top1 == pytest.approx(np.mean(right))
    assert result.all_inputs.quantized.agreement >= 0.9
    assert result.quantized_bytes < 0.6 * result.float_bytes
