"""Accuracy of an ONNX classifier on a labelled image folder, with onnxruntime and numpy only.

Shares no code with optuna-quantune, so that the accuracy which `tune` prints can be checked:

    python benchmarks/independent_check.py MODEL FOLDER PREPROCESSING.json
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def top1(model: str, folder: str, preprocessing: str) -> float:
    """Share of the images in FOLDER/labels.csv whose label has the highest score."""
    recipe = json.loads(Path(preprocessing).read_text())
    mean, std = (np.array(recipe[key], dtype=np.float32) for key in ("mean", "std"))
    session = onnxruntime.InferenceSession(model)
    name = session.get_inputs()[0].name
    right = []
    with (Path(folder) / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            image = Image.open(Path(folder) / row["file"]).convert("RGB")
            left, top = (round((size - recipe["crop"]) / 2) for size in image.size)
            image = image.crop((left, top, left + recipe["crop"], top + recipe["crop"]))
            pixels = np.asarray(image, dtype=np.float32)
            if recipe["channel_order"] == "BGR":
                pixels = pixels[..., ::-1]
            x = (pixels * np.float32(recipe["scale"]) - mean) / std
            scores = session.run(None, {name: x.transpose(2, 0, 1)[None]})[0]
            right.append(scores.argmax() == int(row["label_index"]))
    return float(np.mean(right))


if __name__ == "__main__":
    print(f"top-1 {top1(*sys.argv[1:4]):.4f}")
