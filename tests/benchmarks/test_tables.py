"""The recorded tables are whole: what their README promises holds for the files that are there."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from benchmarks import tables
from optuna_quantune.selection import unpack


def test_the_checksums_are_those_of_the_files() -> None:
    lines = (tables.FOLDER / "SHA256SUMS").read_text().splitlines()
    checksums = {name: digest for digest, name in (line.split() for line in lines)}
    files = {f for f in tables.FOLDER.iterdir() if f.suffix in (".csv", ".json", ".parquet")}
    assert {file.name for file in files} == set(checksums)
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == checksums[file.name], file.name


@pytest.mark.parametrize("name", tables.complete())
def test_recorded_predictions_give_the_recorded_shares(name: str) -> None:
    pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
    rows = pd.read_csv(tables.FOLDER / f"{name}.csv", dtype={"correct": str, "agrees": str})
    predictions = pd.read_parquet(tables.FOLDER / f"{name}.parquet")
    label, float_class = predictions["label"], predictions["float_class"]
    assert len(rows) == 96
    for number, row in rows.iterrows():
        changed = predictions[f"class_{number:02}"]
        classes = np.where(changed == -1, float_class, changed)
        np.testing.assert_array_equal(unpack(row["agrees"], len(label)), changed == -1)
        np.testing.assert_array_equal(unpack(row["correct"], len(label)), classes == label)
        assert row["agreement"] == pytest.approx(float((changed == -1).mean()), abs=1e-6)
        assert row["top1"] == pytest.approx(float((classes == label).mean()), abs=1e-6)
