"""Searches by several samplers and seeds: what was made is kept, and the rest is made."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def complete(
    file: Path,
    subject: str,
    subjects: Iterable[str],
    samplers: Iterable[str],
    search: Callable[[str, str, int], NDArray[np.float64]],
    *,
    seeds: int,
    budgets: Sequence[int],
    float_format: str,
) -> pd.DataFrame:
    """All searches, of which those that `file` lacks are made and written there one by one.

    Args:
        file: CSV of what there is.
        subject: Name of the column that says what is searched.
        subjects: What is searched.
        samplers: Names of samplers.
        search: Called with a subject, a sampler and a seed; gives the regret after each trial,
            shape (n_trials,).
        seeds: How many, from 0 on.
        budgets: Numbers of trials after which the regret is kept.
        float_format: Of the regrets in the file.

    Returns:
        Rows with the columns `subject`, ``sampler``, ``seed``, ``trials`` and ``regret``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.read_csv(file) if file.exists() else pd.DataFrame()
    done = set()
    if not frame.empty:
        done = set(zip(frame[subject], frame.sampler, frame.seed, strict=True))
    for seed, item, name in itertools.product(range(seeds), subjects, samplers):
        if (item, name, seed) not in done:
            regret = search(item, name, seed)
            run = {subject: item, "sampler": name, "seed": seed}
            rows = [{**run, "trials": n, "regret": regret[n - 1]} for n in budgets]
            frame = pd.concat([frame, pd.DataFrame(rows)], ignore_index=True)
            frame.to_csv(file, index=False, float_format=float_format)
            print(item, name, seed, *(f"{row['regret']:.4f}" for row in rows), flush=True)
    return frame
