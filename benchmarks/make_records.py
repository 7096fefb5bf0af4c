"""Writes the records that the package ships from the recorded tables.

    python -m benchmarks.make_records

`optuna_quantune/records/configurations.csv` gets one row for every configuration of every complete
table: its knobs, what the noise model predicted, and what was measured, as gains on the float
model. Latencies, correct inputs and the like stay in the tables.
"""

from __future__ import annotations

import pandas as pd

from benchmarks import tables
from optuna_quantune import records


def main() -> None:
    frame = pd.concat([rows_of(name) for name in tables.complete()], ignore_index=True)
    frame.to_csv(records.FILE, index=False, float_format="%.5g", lineterminator="\n")
    print(f"{records.FILE}: {len(frame)} rows, {records.FILE.stat().st_size / 1000:.0f} kB")


def rows_of(name: str) -> pd.DataFrame:
    """The rows of one model."""
    table = tables.load(name)
    float_model = table.float_model
    rows = table.rows
    features = pd.DataFrame(
        [table.features(dict(row)) for _, row in rows[list(records.KNOBS)].iterrows()]
    )
    frame = rows[list(records.KNOBS)].copy()
    frame.insert(0, records.MODEL, name)
    frame.insert(1, records.FAMILY, table.family)
    frame["top1_gain"] = rows["top1"] - float_model["top1"]
    frame["top5_gain"] = rows["top5"] - float_model["top5"]
    frame["agreement"] = rows["agreement"]
    frame["sqnr_db"] = rows["sqnr_db"]
    frame["prior_gain"] = features["prior"] - float_model["top1"]
    return pd.concat([frame, features.drop(columns="prior")], axis=1)


if __name__ == "__main__":
    main()
