from __future__ import annotations

import json
from pathlib import Path

import pytest

from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import near_chance
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.evaluation.runner import run


@pytest.mark.shared_data
def test_squeezenet_has_its_accuracy_on_real_images_and_loses_it_with_a_wrong_recipe(
    shared_data: Path,
) -> None:
    recipe = json.loads((shared_data / "models" / "models.json").read_text())["squeezenet1_1"]
    preprocessing = {**recipe["preprocessing"], "resize_short_side": None}
    session = make_session(shared_data / "models" / recipe["file"])
    images = ImageFolder(shared_data / "imagenet-val", preprocessing=preprocessing, limit=100)
    outputs = run(session, images)["logits"]
    measurement = measure(outputs, reference=outputs, labels=images.labels)
    assert measurement.top1 is not None
    assert measurement.top1 >= 0.6
    assert not near_chance(measurement.top1, measurement.n, outputs.shape[1])

    wrong = ImageFolder(
        shared_data / "imagenet-val", preprocessing={**preprocessing, "scale": 1 / 255}, limit=40
    )
    outputs = run(session, wrong)["logits"]
    top1 = measure(outputs, reference=outputs, labels=wrong.labels).top1
    assert top1 is not None
    assert near_chance(top1, len(wrong), outputs.shape[1])
