"""Records tables: every configuration of the `quantune` preset of a model, measured exactly.

    python -m benchmarks.record DATA [--models NAME ...] [--limit N] [--refresh]

DATA is a folder of `models/models.json`, `imagenet-val/`, `imagenet-calibration/`, `cifar10/`;
the model `demo` needs none. Tables go to `benchmarks/tables/MODEL.csv`, one row a
configuration, with what a replay of racing needs: the inputs whose correctness or agreement with
float differs. An interrupted run goes on where it stopped; a row is written when it is complete.
The columns are described in `benchmarks/tables/README.md`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import machine
from optuna_quantune.demo import load_demo
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.selection import pack


TABLES = Path(__file__).parent / "tables"
# Ordered by the time that a table takes.
MODELS = (
    "demo",
    "cifar10_resnet8",
    "cifar10_resnet20",
    "shufflenetv1_0.5_g3",
    "mobilenetv2_1.0",
    "squeezenet1_1",
    "efficientnet_lite0",
    "googlenet",
)
CALIBRATION_INPUTS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--limit", type=int, help="stop after this many new rows of each model")
    parser.add_argument(
        "--refresh", action="store_true", help="only predict anew; measured columns stay"
    )
    parser.add_argument("--cache", type=Path, help="folder of calibration statistics")
    arguments = parser.parse_args()
    TABLES.mkdir(exist_ok=True)
    for name in arguments.models:
        if arguments.refresh:
            refresh(name, arguments.data, arguments.cache)
            continue
        record(name, arguments.data, arguments.cache, arguments.limit)


def record(name: str, data: Path, cache: Path | None, limit: int | None) -> None:
    """Appends the missing rows of one model's table."""
    path, calibration, evaluation = sources(name, data)
    objective = QuantizationObjective(
        path, calibration=calibration, evaluation=evaluation, cache=cache
    )
    table = TABLES / f"{name}.csv"
    done = set()
    if table.is_file():
        with table.open() as file:
            done = {key(row) for row in csv.DictReader(file)}
    missing = [params for params in objective.space.grid() if key(params) not in done]
    if not missing:
        return
    objective.prepare()
    write_float_model(name, objective)
    labels = evaluation.labels
    reference = objective.float_evaluation.outputs
    for params in missing[:limit]:
        start = time.perf_counter()
        quantized = objective.quantize(objective.space.config(params))
        built = time.perf_counter()
        result = objective.evaluate(quantized.proto)
        evaluated = time.perf_counter()
        model = quantized.proto.SerializeToString()
        latency = objective.latency(model)
        predictions = result.outputs.argmax(axis=1)
        row: dict[str, Any] = {
            **params,
            "top1": result.measurement.top1,
            "top5": result.measurement.top5,
            "agreement": result.measurement.agreement,
            "sqnr_db": round(result.measurement.sqnr_db, 3),
            "latency_ratio": round(latency.ratio, 4),
            "latency_ms": round(latency.median_ms, 4),
            "size_bytes": len(model),
            "build_seconds": round(built - start, 3),
            "evaluate_seconds": round(evaluated - built, 3),
            **{k: round(v, 4) for k, v in objective.features(params).items()},
            "digest": quantized.digest[:16],
            "correct": pack(predictions == labels),
            "agrees": pack(predictions == reference.argmax(axis=1)),
        }
        append(table, row)
        print(f"{name} {key(params)} {row['top1']:.4f} {row['agreement']:.4f}", flush=True)


def refresh(name: str, data: Path, cache: Path | None) -> None:
    """Replaces the predictions of a recorded table by those of the present noise model."""
    table = TABLES / f"{name}.csv"
    path, calibration, evaluation = sources(name, data)
    objective = QuantizationObjective(
        path, calibration=calibration, evaluation=evaluation, cache=cache
    )
    with table.open() as file:
        rows = list(csv.DictReader(file))
    by_key = {key(params): params for params in objective.space.grid()}
    for row in rows:
        features = objective.features(by_key[key(row)])
        row.update({k: str(round(v, 4)) for k, v in features.items()})
    with table.open("w") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key(row: dict[str, Any]) -> str:
    """The knobs of a row, as one string."""
    knobs = ("calibration_images", "scheme", "clipping", "granularity", "mixed_precision")
    return " ".join(str(row[knob]) for knob in knobs)


def append(table: Path, row: dict[str, Any]) -> None:
    """Appends a row in one write, with the header before the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row), lineterminator="\n")
    if not table.is_file():
        writer.writeheader()
    writer.writerow(row)
    with table.open("a") as file:
        file.write(text.getvalue())


def write_float_model(name: str, objective: QuantizationObjective) -> None:
    """What the rows of a table share: the float model, its margins, the machine."""
    outputs = objective.float_evaluation.outputs
    labels = objective.evaluation.labels
    ordered = np.sort(outputs, axis=1)
    float_latency = objective.latency(objective.model.path.read_bytes())
    description = {
        "model": name,
        "inputs": len(objective.evaluation),
        "calibration_inputs": len(objective.calibration),
        "layers": len(objective.model.layers),
        "parameters": sum(w.size for w in objective.model.weights.values()),
        "top1": objective.float_evaluation.measurement.top1,
        "top5": objective.float_evaluation.measurement.top5,
        "evaluate_seconds": round(objective.float_evaluation.seconds, 3),
        "latency_ms": round(float_latency.median_ms, 4),
        "size_bytes": objective.model.path.stat().st_size,
        "correct": pack(outputs.argmax(axis=1) == labels),
        "margins": [round(float(margin), 4) for margin in ordered[:, -1] - ordered[:, -2]],
        "machine": machine.describe(),
        "command": "python -m benchmarks.record DATA",
    }
    (TABLES / f"{name}.json").write_text(json.dumps(description) + "\n")


def sources(name: str, data: Path) -> tuple[Path, InputSource, InputSource]:
    """Model file, calibration inputs and labelled evaluation inputs."""
    if name == "demo":
        demo = load_demo()
        recipe = Preprocessing.from_mapping(demo.preprocessing)
        return (
            demo.model_path,
            ArrayInputs(demo.calibration, preprocessing=recipe),
            ArrayInputs(demo.evaluation, labels=demo.evaluation_labels, preprocessing=recipe),
        )
    entry = json.loads((data / "models" / "models.json").read_text())[name]
    recipe = Preprocessing.from_mapping({**entry["preprocessing"], "resize_short_side": None})
    path = data / "models" / entry["file"]
    if name.startswith("cifar10"):
        images, _ = cifar10(data / "cifar10" / "train5000.zip", CALIBRATION_INPUTS)
        held_out, labels = cifar10(data / "cifar10" / "test.zip", 2000)
        return (
            path,
            ArrayInputs(images, preprocessing=recipe),
            ArrayInputs(held_out, labels=labels, preprocessing=recipe),
        )
    return (
        path,
        ImageFolder(data / "imagenet-calibration", preprocessing=recipe, limit=CALIBRATION_INPUTS),
        ImageFolder(data / "imagenet-val", preprocessing=recipe),
    )


def cifar10(archive: Path, n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first n images of a zip of `<label>_<class>/<id>.jpg` in a fixed random order."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(member for member in file.namelist() if member.endswith(".jpg"))
        chosen = [names[i] for i in np.random.default_rng(0).permutation(len(names))[:n]]
        images = [Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in chosen]
    labels = [int(name.split("/")[-2].split("_")[0]) for name in chosen]
    return np.stack([np.asarray(image) for image in images]), np.array(labels)


if __name__ == "__main__":
    main()
