"""Records tables: every configuration of the `quantune` preset of a model, measured exactly.

    python -m benchmarks.record DATA [--models NAME ...] [--limit N] [--without-latency]
        [--refresh] [--cache FOLDER]

DATA is a folder of models and images as `benchmarks.catalogue` says; the model `demo` needs none
of them. A table is three files under `benchmarks/tables/`, described in the README there:
MODEL.csv (a row a configuration), MODEL.json (what the rows share) and MODEL.parquet (each
configuration's prediction and margin for each input, for replaying searches that stop early). An
interrupted run goes on where it stopped: whatever a configuration lacks is measured. A row stays
as long as its configuration still builds the very model that was measured, by its digest;
predictions are always those of the present noise model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks import catalogue
from benchmarks import machine
from benchmarks import tables
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.selection import pack
from optuna_quantune.target import get_target
from optuna_quantune.target import Target


KNOBS = ("calibration_images", "scheme", "clipping", "granularity", "mixed_precision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--limit", type=int, help="stop after this many configurations a model")
    parser.add_argument(
        "--without-latency",
        action="store_true",
        help="leave latencies to a later run, for a machine that has other work now",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="only predict anew; measured columns stay"
    )
    parser.add_argument("--cache", type=Path, help="folder of calibration statistics")
    arguments = parser.parse_args()
    for name in catalogue.names(arguments.data, arguments.models, demo=True):
        recording = Recording(name, arguments.data, arguments.cache)
        if arguments.refresh:
            recording.refresh()
        else:
            recording.complete(arguments.limit, latency=not arguments.without_latency)
    write_checksums()


class Recording:
    """One model's table while it grows.

    Args:
        name: A model of `data`, or the demo's.
        data: The folder of models and images.
        cache: Folder of calibration statistics.
    """

    def __init__(self, name: str, data: Path, cache: Path | None) -> None:
        path, calibration, evaluation = catalogue.sources(name, data)
        self.objective = QuantizationObjective(
            path,
            calibration=calibration,
            evaluation=evaluation,
            target=processor_of(name),
            cache=cache,
        )
        self.name = name
        self.family = catalogue.family(name, data)
        self.grid = list(self.objective.space.grid())
        self.csv = tables.FOLDER / f"{name}.csv"
        self.parquet = tables.FOLDER / f"{name}.parquet"
        self.rows: list[dict[str, Any]] = []
        self.predictions = pd.DataFrame()
        if self.csv.is_file():
            frame = pd.read_csv(self.csv, dtype=str, keep_default_na=False)
            self.rows = frame.to_dict("records")
        if self.parquet.is_file():
            self.predictions = pd.read_parquet(self.parquet)
        for row, params in zip(self.rows, self.grid, strict=False):
            if key(row) != key(params):
                raise SystemExit(f"{self.csv}: row {key(row)!r} stands where {params} should")

    def complete(self, limit: int | None, *, latency: bool) -> None:
        """Measures what is missing, or changed, configuration by configuration."""
        self.objective.prepare()
        for number in range(len(self.rows)):
            self._forget_if_changed(number)
        self.refresh()
        missing = [n for n in range(len(self.grid)) if not self._is_complete(n, latency=latency)]
        print(f"{self.name}: {len(missing)} of {len(self.grid)} to measure", flush=True)
        if not (tables.FOLDER / f"{self.name}.json").is_file():
            write_float_model(self.name, self.family, self.objective)
        for number in missing[:limit]:
            self._measure(number, latency=latency)
            self._write()
            row = self.rows[number]
            print(f"{self.name} {key(row)} {row['top1']} {row['agreement']}", flush=True)

    def refresh(self) -> None:
        """Replaces the predictions of recorded rows by those of the present noise model."""
        for row, params in zip(self.rows, self.grid, strict=False):
            row.update(self._predicted(params))
        self._write()

    def _forget_if_changed(self, number: int) -> None:
        """Drops the measurements of a row whose configuration builds another model today."""
        row = self.rows[number]
        config = self.objective.space.config(self.grid[number])
        if row["digest"] != self.objective.quantize(config).digest[:16]:
            row["latency_ratio"] = row["latency_ms"] = ""
            self.predictions = self.predictions.drop(
                columns=[f"class_{number:02}", f"margin_{number:02}"], errors="ignore"
            )

    def _is_complete(self, number: int, *, latency: bool) -> bool:
        return (
            number < len(self.rows)
            and f"class_{number:02}" in self.predictions
            and not (latency and self.rows[number]["latency_ratio"] == "")
        )

    def _measure(self, number: int, *, latency: bool) -> None:
        objective, params = self.objective, self.grid[number]
        start = time.perf_counter()
        quantized = objective.quantize(objective.space.config(params))
        build_seconds = time.perf_counter() - start
        model = quantized.proto.SerializeToString()
        digest = quantized.digest[:16]
        if number == len(self.rows):
            self.rows.append({**params, "digest": digest})
        row = self.rows[number]
        if f"class_{number:02}" not in self.predictions:
            row["digest"] = digest
            self._evaluate(number, quantized.proto)
            row["build_seconds"] = round(build_seconds, 3)
        if latency and not row.get("latency_ratio"):
            measured = objective.latency(model)
            row["latency_ratio"] = round(measured.ratio, 4)
            row["latency_ms"] = round(measured.median_ms, 4)

    def _evaluate(self, number: int, model: Any) -> None:
        objective, row = self.objective, self.rows[number]
        result = objective.evaluate(model)
        reference = objective.float_evaluation.outputs.argmax(axis=1)
        predictions = result.outputs.argmax(axis=1)
        assert result.measurement.sqnr_db is not None
        if self.predictions.empty:
            self.predictions = pd.DataFrame(
                {
                    "label": objective.evaluation.labels,
                    "float_class": reference.astype(np.int16),
                    "float_margin": margins(objective.float_evaluation.outputs, reference),
                }
            )
        same = predictions == reference
        columns: dict[str, Any] = {
            f"class_{number:02}": np.where(same, -1, predictions).astype(np.int16),
            f"margin_{number:02}": margins(result.outputs, reference),
        }
        self.predictions = self.predictions.assign(**columns)
        latency = {name: row.get(name, "") for name in ("latency_ratio", "latency_ms")}
        digest = row.pop("digest")
        row.update(
            {
                "top1": result.measurement.top1,
                "top5": result.measurement.top5,
                "agreement": result.measurement.agreement,
                "sqnr_db": round(result.measurement.sqnr_db, 3),
                **latency,
                "size_bytes": len(model.SerializeToString()),
                "build_seconds": row.get("build_seconds", ""),
                "evaluate_seconds": round(result.seconds, 3),
                **self._predicted(self.grid[number]),
                "digest": digest,
                "correct": pack(predictions == objective.evaluation.labels),
                "agrees": pack(same),
            }
        )

    def _predicted(self, params: dict[str, Any]) -> dict[str, float]:
        return {k: round(v, 4) for k, v in self.objective.features(params).items()}

    def _write(self) -> None:
        """Writes the files beside their names and renames them, so that none is ever half."""
        unfinished = self.csv.with_suffix(".tmp")
        pd.DataFrame(self.rows).to_csv(unfinished, index=False)
        unfinished.replace(self.csv)
        if not self.predictions.empty:
            self.predictions.to_parquet(unfinished, compression="zstd")
            unfinished.replace(self.parquet)


def key(row: dict[str, Any]) -> str:
    """The knobs of a row, as one string."""
    return " ".join(str(row[knob]) for knob in KNOBS)


def margins(outputs: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Score of the given class minus the largest other score, of shape (n,), 1e-3 resolution."""
    rows = np.arange(len(outputs))
    others = outputs.copy()
    others[rows, classes] = -np.inf
    margin: NDArray[np.float32] = outputs[rows, classes] - others.max(axis=1)
    return margin.round(3)


def write_checksums() -> None:
    """SHA-256 of every file of the tables, in the format of sha256sum."""
    files = sorted(f for f in tables.FOLDER.iterdir() if f.suffix in (".csv", ".json", ".parquet"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    (tables.FOLDER / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def write_float_model(name: str, family: str, objective: QuantizationObjective) -> None:
    """What the rows of a table share: the float model, its margins, the machine."""
    outputs = objective.float_evaluation.outputs
    labels = objective.evaluation.labels
    ordered = np.sort(outputs, axis=1)
    float_latency = objective.latency(objective.model.path.read_bytes())
    description = {
        "model": name,
        "family": family,
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
    (tables.FOLDER / f"{name}.json").write_text(json.dumps(description) + "\n")


def processor_of(name: str) -> Target:
    """The processor that a table was begun on, or this one: what it multiplies exactly counts."""
    target, described = get_target("cpu"), tables.FOLDER / f"{name}.json"
    if not described.is_file():
        return target
    pairs = json.loads(described.read_text())["machine"]["VNNI"] == "no"
    return replace(target, representation=replace(target.representation, adds_in_pairs=pairs))


if __name__ == "__main__":
    main()
