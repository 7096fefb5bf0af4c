"""The recorded tables, loaded: what `benchmarks.record` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from optuna_quantune.selection import unpack
from optuna_quantune.space import SearchSpace


FOLDER = Path(__file__).parent
_TEXT_COLUMNS = {"correct": str, "agrees": str, "digest": str, "calibration_images": str}
_NOT_FEATURES = ("top1", "top5", "agreement", "sqnr_db", "size_bytes")


@dataclass(frozen=True)
class Table:
    """All 96 configurations of one model.

    Attributes:
        name: The model.
        rows: One row a configuration, see the README of this folder.
        float_model: What the rows share.
    """

    name: str
    rows: pd.DataFrame
    float_model: dict[str, Any]

    @property
    def family(self) -> str:
        """The architecture that the model belongs to."""
        return _family(self.float_model)

    def key(self, params: Mapping[str, Any]) -> int:
        """Row number of a configuration."""
        return self._index[tuple(str(params[knob]) for knob in SearchSpace.preset("quantune"))]

    def correct(self, row: int) -> NDArray[np.bool_]:
        """Which inputs a configuration classifies rightly, shape (inputs,)."""
        return unpack(self.rows["correct"][row], self.float_model["inputs"])

    @cached_property
    def all_correct(self) -> NDArray[np.bool_]:
        """`correct` of all configurations, shape (configurations, inputs)."""
        return np.stack([self.correct(row) for row in range(len(self.rows))])

    @cached_property
    def all_agrees(self) -> NDArray[np.bool_]:
        """Which inputs each configuration predicts as the float model does, like `all_correct`."""
        inputs = self.float_model["inputs"]
        return np.stack([unpack(bits, inputs) for bits in self.rows["agrees"]])

    @cached_property
    def float_correct(self) -> NDArray[np.bool_]:
        """Which inputs the float model classifies rightly, shape (inputs,)."""
        return unpack(self.float_model["correct"], self.float_model["inputs"])

    def classes(self, row: int) -> NDArray[np.int64]:
        """What a configuration predicts for each input, shape (inputs,)."""
        changed = self.predictions[f"class_{row:02}"].to_numpy(np.int64)
        float_classes = self.predictions["float_class"].to_numpy(np.int64)
        predicted: NDArray[np.int64] = np.where(changed < 0, float_classes, changed)
        return predicted

    def margins(self, row: int) -> NDArray[np.float64]:
        """A configuration's score of the float model's class minus its largest other score."""
        margins: NDArray[np.float64] = self.predictions[f"margin_{row:02}"].to_numpy(np.float64)
        return margins

    def features(self, params: Mapping[str, Any]) -> dict[str, float]:
        """The recorded predictions of the noise model for a configuration."""
        row = self.rows.iloc[self.key(params)]
        names = [c for c in self.rows if c.endswith("sqnr_db") and c not in _NOT_FEATURES]
        return {name: float(row[name]) for name in [*names, "expected_agreement", "prior"]}

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """Predictions and margins, one row an input, see the README of this folder.

        Raises:
            FileNotFoundError: If the table was recorded without them.
        """
        return pd.read_parquet(FOLDER / f"{self.name}.parquet")

    @cached_property
    def _index(self) -> dict[tuple[str, ...], int]:
        knobs = list(SearchSpace.preset("quantune"))
        return {tuple(map(str, row)): i for i, row in enumerate(self.rows[knobs].to_numpy())}


def load(name: str) -> Table:
    """A table by the name of its model."""
    rows = pd.read_csv(FOLDER / f"{name}.csv", dtype=_TEXT_COLUMNS)
    return Table(name, rows, json.loads((FOLDER / f"{name}.json").read_text()))


@cache
def family(name: str) -> str:
    """The architecture that a table's model belongs to."""
    return _family(json.loads((FOLDER / f"{name}.json").read_text()))


def _family(float_model: dict[str, Any]) -> str:
    return str(float_model.get("family", float_model["model"]))


def complete() -> list[str]:
    """Names of the models whose tables have all 96 rows."""
    size = SearchSpace.preset("quantune").size
    names = []
    for path in sorted(FOLDER.glob("*.csv")):
        with path.open() as file:
            if sum(1 for _ in file) - 1 == size:
                names.append(path.stem)
    return names
