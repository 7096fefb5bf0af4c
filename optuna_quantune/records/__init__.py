"""What was measured on reference models, so that the first trial on a new one is informed.

``configurations.csv`` has every configuration of the ``quantune`` preset for each of them: knobs,
what the noise model predicted before anything was run, and what was measured, as a loss against
the float model. `python -m benchmarks.make_records` makes it from the recorded tables.
"""

from __future__ import annotations

import csv
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any
from typing import Final

from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.search.configurations import PRIOR_FEATURE
from optuna_quantune.search.sources import SourceStudy


FILE: Final = Path(__file__).parent / "configurations.csv"
KNOBS: Final = ("calibration_images", "scheme", "clipping", "granularity", "mixed_precision")
# What a model's rows begin with, and what a metric's measured and predicted columns are.
MODEL: Final = "model"
FAMILY: Final = "family"
METRICS: Final = {
    "top1": ("top1_gain", "prior_gain"),
    "top5": ("top5_gain", "prior_gain"),
    "agreement": ("agreement", "expected_agreement"),
    "sqnr_db": ("sqnr_db", "predicted_sqnr_db"),
}


def source_studies(metric: str = "top1", *, without: str | None = None) -> tuple[SourceStudy, ...]:
    """The reference models as earlier studies of a metric, for `QuantuneSampler`.

    Args:
        metric: A metric of `QuantizationObjective`; none is known of any other.
        without: A family of models that is left out, such as ``ResNet``: what a benchmark of one
            of them must not know.

    Returns:
        One study a model. Values are gains on the float model (negative ones are losses) for
        ``top1`` and ``top5``, and the metric itself otherwise.
    """
    if metric not in METRICS:
        return ()
    measured, predicted = METRICS[metric]
    return tuple(
        SourceStudy(
            name=name,
            direction="maximize",
            params=tuple(_params(row) for row in rows),
            values=tuple(float(row[measured]) for row in rows),
            features=tuple(_features(row, predicted) for row in rows),
        )
        for name, rows in _rows_by_model()
        if rows[0][FAMILY] != without
    )


@cache
def _rows_by_model() -> list[tuple[str, list[dict[str, str]]]]:
    with FILE.open(newline="", encoding="utf-8") as file:
        return [
            (name, list(rows)) for name, rows in groupby(csv.DictReader(file), lambda r: r[MODEL])
        ]


def _params(row: dict[str, str]) -> dict[str, Any]:
    images = row["calibration_images"]
    return {**{knob: row[knob] for knob in KNOBS}, "calibration_images": _images(images)}


def _images(text: str) -> int | str:
    return text if text == ALL_IMAGES else int(text)


def _features(row: dict[str, str], predicted: str) -> dict[str, float]:
    measured = {column for pair in METRICS.values() for column in pair} - {
        "expected_agreement",
        "predicted_sqnr_db",
    }
    features = {
        name: float(text)
        for name, text in row.items()
        if name not in measured and name not in (MODEL, FAMILY, *KNOBS)
    }
    return {**features, PRIOR_FEATURE: float(row[predicted])}
