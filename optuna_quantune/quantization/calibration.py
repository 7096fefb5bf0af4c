"""Calibration, done once: a single streaming pass whose statistics serve every configuration.

The float model runs over the calibration inputs with its activations as extra outputs. Of each
activation only counts are kept (`statistics.py`), so memory does not depend on the number of
inputs. The counts are kept apart for the segments between the wanted set sizes; those of the first
n inputs are the sum of the segments before n. The result is stored on disk under a fingerprint of
the model, the inputs and the options, and found again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any
from typing import Final
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import from_dense
from optuna_quantune.quantization.statistics import Histogram


# Raised when the meaning of a stored file changes; files of another version are not used.
STORE_VERSION: Final = 1
# Activations of one batch held at a time; MobileNetV2 at 224 pixels has 27 MB an image.
_BATCH_BYTES: Final = 128 << 20
_LARGEST_BATCH: Final = 16


class CalibrationInputs(Protocol):
    """What calibration needs of its inputs."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Yields inputs by model input name, in order."""
        ...

    def fingerprint(self) -> str:
        """A hash of the inputs' content."""
        ...


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of every wanted activation for nested sets of calibration inputs.

    Attributes:
        sizes: The set sizes in ascending order; the last one is the number of all inputs.
        segments: For each activation its counts between one size and the next.
        fingerprint: Of the model, the inputs and the options that these statistics belong to.
    """

    sizes: tuple[int, ...]
    segments: Mapping[str, tuple[Counts, ...]]
    fingerprint: str

    def resolve(self, images: int | str) -> int:
        """The size that serves a wish for `images` inputs; more than there are means all.

        Raises:
            InputError: If statistics for that size were not collected.
        """
        size = self.sizes[-1] if images == "all" else min(int(images), self.sizes[-1])
        if size not in self.sizes:
            raise InputError(
                f"knob 'calibration_images': {images!r} was not collected; "
                f"use one of {', '.join(map(str, self.sizes))}"
            )
        return size

    def histogram(self, tensor: str, images: int | str) -> Histogram:
        """The histogram of an activation over the first `images` inputs."""
        key = (tensor, self.resolve(images))
        if key not in self._histograms:
            counts = self.segments[tensor][: self.sizes.index(key[1]) + 1]
            self._histograms[key] = reduce(add, counts).histogram()
        return self._histograms[key]

    @cached_property
    def _histograms(self) -> dict[tuple[str, int], Histogram]:
        return {}


def calibrate(
    model: FloatModel,
    inputs: CalibrationInputs,
    tensors: Sequence[str],
    *,
    sizes: Sequence[int | str],
    cache: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationStatistics:
    """Collects the statistics of `tensors` in one pass, or finds them on disk.

    Args:
        model: The prepared float model.
        inputs: The calibration inputs, bound to the model's input names.
        tensors: Names of the activations (model inputs included).
        sizes: Wanted set sizes; ``"all"``, and sizes beyond the number of inputs, mean all.
        cache: Folder of the store; None stores nothing.
        threads: Threads of ONNX Runtime and of the counting; None leaves the choice to them.
        progress: Called after every batch with the inputs done and the inputs in all.

    Raises:
        InputError: If an activation is not finite for some input, or the model cannot be run.
    """
    total = len(inputs)
    bounds = tuple(sorted({total if s == "all" else min(int(s), total) for s in sizes} | {total}))
    fingerprint = _fingerprint(model, inputs, tensors, bounds)
    stored = None if cache is None else cache / f"calibration-{fingerprint[:32]}.npz"
    if stored is not None and (found := _load(stored, fingerprint, tensors, bounds)) is not None:
        if progress is not None:
            progress(total, total)
        return found
    segments: dict[str, list[Counts]] = {tensor: [] for tensor in tensors}
    session = _session(model, tensors, threads)
    batch_size = 1
    done = 0
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count()) as pool:
        for stop in bounds:
            collector = _Collector(tensors)
            for batch in inputs.batches(batch_size, np.arange(done, stop)):
                values = dict(zip(tensors, _run(session, tensors, batch, model), strict=True))
                list(pool.map(collector.add, values.items()))
                done += len(next(iter(batch.values())))
                if progress is not None:
                    progress(done, total)
            for tensor, counts in collector.counts().items():
                segments[tensor].append(counts)
            if _free_batch_axis(model):
                # The first input has shown how large its activations are.
                size = sum(array.nbytes for array in values.values()) // batch_size
                batch_size = int(np.clip(_BATCH_BYTES // size, 1, _LARGEST_BATCH))
    statistics = CalibrationStatistics(
        bounds, {tensor: tuple(counts) for tensor, counts in segments.items()}, fingerprint
    )
    if stored is not None:
        _save(stored, statistics)
    return statistics


class _Collector:
    """The counts of one segment; tensors are independent, so they can be added in parallel."""

    def __init__(self, tensors: Sequence[str]) -> None:
        self._dense = {tensor: np.zeros(BINS, dtype=np.int64) for tensor in tensors}
        self._extremes = dict.fromkeys(tensors, (np.inf, -np.inf))

    def add(self, item: tuple[str, NDArray[np.float32]]) -> None:
        tensor, values = item
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(
                f"activation {tensor!r}: not finite for some calibration input; "
                "check the preprocessing and the float model"
            )
        minimum, maximum = self._extremes[tensor]
        self._extremes[tensor] = min(minimum, low), max(maximum, high)
        count_into(self._dense[tensor], np.ascontiguousarray(values, dtype=np.float32))

    def counts(self) -> dict[str, Counts]:
        return {
            tensor: from_dense(dense, *self._extremes[tensor])
            for tensor, dense in self._dense.items()
        }


def _session(
    model: FloatModel, tensors: Sequence[str], threads: int | None
) -> onnxruntime.InferenceSession:
    augmented = onnx.ModelProto()
    augmented.CopyFrom(model.proto)
    existing = {output.name for output in augmented.graph.output}
    inputs = {spec.name for spec in model.inputs}
    for tensor in tensors:
        if tensor not in existing and tensor not in inputs:
            augmented.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Fusing Conv and Relu is allowed; layouts that ONNX Runtime would have to convert back for
    # every extra output are not worth it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        augmented.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(
    session: onnxruntime.InferenceSession,
    tensors: Sequence[str],
    batch: dict[str, NDArray[Any]],
    model: FloatModel,
) -> list[NDArray[np.float32]]:
    computed = [tensor for tensor in tensors if tensor not in batch]
    try:
        outputs = dict(zip(computed, session.run(computed, batch), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model {model.path}: cannot run a calibration input ({reason})"
        ) from error
    return [(outputs if tensor in outputs else batch)[tensor] for tensor in tensors]


def _free_batch_axis(model: FloatModel) -> bool:
    return all(spec.shape and spec.shape[0] is None for spec in model.inputs)


def _fingerprint(
    model: FloatModel, inputs: CalibrationInputs, tensors: Sequence[str], sizes: tuple[int, ...]
) -> str:
    parts = [STORE_VERSION, model.fingerprint, inputs.fingerprint(), list(tensors), list(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _save(path: Path, statistics: CalibrationStatistics) -> None:
    """Writes the store beside its final name and renames it: no half file is ever found."""
    tensors = list(statistics.segments)
    flat = [counts for tensor in tensors for counts in statistics.segments[tensor]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.savez_compressed(
                file,
                fingerprint=np.array(statistics.fingerprint),
                tensors=np.array(tensors),
                sizes=np.array(statistics.sizes),
                occupied=np.array([counts.bins.size for counts in flat]),
                bins=np.concatenate([counts.bins for counts in flat]),
                counts=np.concatenate([counts.counts for counts in flat]),
                extremes=np.array([(counts.minimum, counts.maximum) for counts in flat]),
            )
        Path(file.name).replace(path)
    except OSError as error:
        raise InputError(
            f"calibration cache {path.parent}: cannot be written ({error.strerror})"
        ) from error


def _load(
    path: Path, fingerprint: str, tensors: Sequence[str], sizes: tuple[int, ...]
) -> CalibrationStatistics | None:
    """Reads a store; one that is missing, damaged or of something else gives None."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as store:
            if (
                str(store["fingerprint"]) != fingerprint
                or store["tensors"].tolist() != list(tensors)
                or store["sizes"].tolist() != list(sizes)
            ):
                return None
            ends = np.cumsum(store["occupied"])[:-1]
            bins = np.split(store["bins"], ends)
            counts = np.split(store["counts"], ends)
            extremes = store["extremes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    flat = [
        Counts(b, c, float(e[0]), float(e[1]))
        for b, c, e in zip(bins, counts, extremes, strict=True)
    ]
    per_tensor = len(sizes)
    return CalibrationStatistics(
        sizes,
        {t: tuple(flat[i * per_tensor : (i + 1) * per_tensor]) for i, t in enumerate(tensors)},
        fingerprint,
    )
