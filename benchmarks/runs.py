"""Runs of samplers on disk: a CSV that an interrupted comparison goes on from.

One line a run; the rows that a sampler asked for and its milliseconds are lists with spaces in
between. A run belongs to the table that it was made on: with another one recorded, it is made
anew.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from benchmarks.replay import Notion
from benchmarks.replay import Run


COLUMNS = ("table", "digest", "sampler", "notion", "seed", "rows", "milliseconds")


def load(path: Path) -> list[Run]:
    """The runs of a file; none if there is no file.

    Raises:
        ValueError: If a line names a notion of value that there is not.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def append(path: Path, run: Run) -> None:
    """Adds one run to a file, which is begun if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(_format(run))


def write(path: Path, runs: Iterable[Run]) -> None:
    """Replaces a file by these runs, in a fixed order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(_format(run) for run in sorted(runs, key=_order))
    unfinished.replace(path)


def _order(run: Run) -> tuple[str, str, str, int]:
    return run.notion, run.table, run.sampler, run.seed


def _format(run: Run) -> list[str]:
    return [
        run.table,
        run.digest,
        run.sampler,
        run.notion,
        str(run.seed),
        " ".join(map(str, run.rows)),
        " ".join(f"{value:.3g}" for value in run.milliseconds),
    ]


def _parse(line: dict[str, str]) -> Run:
    notion = line["notion"]
    for known in get_args(Notion):
        if notion == known:
            return Run(
                table=line["table"],
                digest=line["digest"],
                sampler=line["sampler"],
                notion=known,
                seed=int(line["seed"]),
                rows=tuple(map(int, line["rows"].split())),
                milliseconds=tuple(map(float, line["milliseconds"].split())),
            )
    raise ValueError(f"notion {notion!r}: use one of {', '.join(get_args(Notion))}")
