"""Calibration statistics on disk, complete or as far as they got; never half written.

A store belongs to one fingerprint (model, inputs, options). It is an npz file without pickles,
which carries a checksum of each of its arrays. A file that is damaged, of something else or of
another version counts as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.quantization.observation import Bounds
from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.whole_file import whole_file


@dataclass(frozen=True)
class StoredCounts:
    """What a calibration has counted.

    Attributes:
        done: The number of inputs that were counted.
        segments: For each activation its counts between one set size and the next; the last
            segment may be incomplete.
        extremes: For each activation its extremes in each of the first inputs, float32, shape
            (inputs, 2).
        tails: Where the tails of each activation begin; empty as long as that is not known.
    """

    done: int
    segments: Mapping[str, tuple[Counts, ...]]
    extremes: Mapping[str, NDArray[np.float32]]
    tails: Mapping[str, Bounds]


def save(path: Path, fingerprint: str, sizes: Sequence[int], stored: StoredCounts) -> None:
    """Writes a store, so that no half of it is ever left.

    Args:
        path: The file to write; its folder is made.
        fingerprint: What the statistics belong to.
        sizes: The set sizes.
        stored: What was counted.

    Raises:
        OSError: If the file cannot be written.
    """
    tensors = list(stored.segments)
    flat = [counts for tensor in tensors for counts in stored.segments[tensor]]
    tails = [stored.tails[tensor] for tensor in tensors if stored.tails]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.savez_compressed(
            file,
            fingerprint=np.array(fingerprint),
            tensors=np.array(tensors),
            sizes=np.array(sizes),
            done=np.array(stored.done),
            occupied=np.array([counts.bins.size for counts in flat]),
            bins=np.concatenate([counts.bins for counts in flat]),
            counts=np.concatenate([counts.counts for counts in flat]),
            extremes=np.array([(counts.minimum, counts.maximum) for counts in flat]),
            of_inputs=np.stack([stored.extremes[tensor] for tensor in tensors]),
            tails=np.array([(b.lower, b.upper) for b in tails], dtype=float).reshape(-1, 2),
        )


def load(
    path: Path, fingerprint: str, tensors: Sequence[str], sizes: Sequence[int]
) -> StoredCounts | None:
    """Reads a store; None if there is none that can be used.

    Args:
        path: The file.
        fingerprint: What the statistics must belong to.
        tensors: The activations that it must hold, in order.
        sizes: The set sizes that it must have.
    """
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as store:
            if (
                str(store["fingerprint"]) != fingerprint
                or store["tensors"].tolist() != list(tensors)
                or store["sizes"].tolist() != list(sizes)
            ):
                return None
            done = int(store["done"])
            ends = np.cumsum(store["occupied"])
            bins = np.split(store["bins"], ends)
            counts = np.split(store["counts"], ends)
            extremes = store["extremes"].tolist()
            of_inputs = store["of_inputs"]
            tails = store["tails"].tolist()
        begun = sum(size < done for size in sizes) + 1
        flat = [
            Counts(b, c, low, high)
            for b, c, (low, high) in zip(bins[:-1], counts[:-1], extremes, strict=True)
        ]
        if not (
            0 < done <= sizes[-1]
            and len(flat) == begun * len(tensors)
            and bins[-1].size == counts[-1].size == 0
            and all(_sound(part) for part in flat)
            and of_inputs.dtype == np.float32
            and of_inputs.shape == (len(tensors), of_inputs.shape[1], 2)
            and 0 < of_inputs.shape[1] <= done
            and np.isfinite(of_inputs).all()
            and np.all(of_inputs[..., 0] <= of_inputs[..., 1])
            and len(tails) in (0, len(tensors))
            and all(not lower > upper and abs(upper) < np.inf for lower, upper in tails)
        ):
            return None
    except Exception:  # a damaged file can raise anything: zipfile, zlib, struct, numpy, memory
        return None
    segments = {
        tensor: tuple(flat[i * begun : (i + 1) * begun]) for i, tensor in enumerate(tensors)
    }
    bounds = {
        tensor: Bounds(None if np.isnan(lower) else lower, upper)
        for tensor, (lower, upper) in zip(tensors, tails, strict=False)
    }
    return StoredCounts(done, segments, dict(zip(tensors, of_inputs, strict=True)), bounds)


def _sound(counts: Counts) -> bool:
    """Whether these can be counts at all, whoever wrote them."""
    bins = counts.bins.astype(np.int64)
    if not bins.size:  # an activation may have no values for some inputs
        return not counts.counts.size and counts.minimum > counts.maximum
    return bool(
        counts.bins.dtype == np.uint32
        and counts.counts.dtype == np.int64
        and bins.shape == counts.counts.shape
        and np.all(np.diff(bins) > 0)
        and bins[-1] < BINS
        and np.all(counts.counts > 0)
        and np.isfinite(counts.minimum)
        and counts.minimum <= counts.maximum < np.inf
        and Accumulator(counts).counts().counts.sum() == counts.counts.sum()
    )
