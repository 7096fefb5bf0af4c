"""Calibration, done once: a single streaming pass whose statistics serve every configuration.

The float model runs over the calibration inputs and observes its activations. Of each only counts
are kept (`statistics.py`), so memory does not depend on the number of inputs. Extremes are exact;
the histogram of a large activation counts a sample of its values. The counts are kept apart for
the segments between the wanted set sizes; those of the first n inputs are the sum of the segments
before n. The result is stored on disk under a fingerprint of the model, the inputs and the
options, and found again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
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
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import ordered_map
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.session import make_session
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import from_dense
from optuna_quantune.quantization.statistics import Histogram


# Raised when the meaning of a stored file changes; files of another version are not used.
STORE_VERSION: Final = 2
# Values of one tensor that are counted for each input; of a larger tensor an even sample of this
# size. The first input is counted whole.
_SAMPLE: Final = 1 << 13
# Inputs that are run at a time after the first.
_BATCH: Final = 4


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
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationStatistics:
    """Collects the statistics of `tensors` in one pass, or finds them on disk.

    Args:
        model: The prepared float model.
        inputs: The calibration inputs, bound to the model's input names.
        tensors: Names of the activations (model inputs included).
        sizes: Wanted set sizes; ``"all"``, and sizes beyond the number of inputs, mean all.
        cache: Folder of the store; None stores nothing.
        workers: Batches that are run side by side; None is one for each core.
        progress: Called after every batch with the inputs done and the inputs in all.

    Raises:
        InputError: If an activation is not finite for some input, or the model cannot be run.
    """
    total = len(inputs)
    bounds = tuple(sorted({total if s == "all" else min(int(s), total) for s in sizes} | {total}))
    workers = workers or available_cores()
    fingerprint = _fingerprint(model, inputs, tensors, bounds)
    stored = None if cache is None else cache / f"calibration-{fingerprint[:32]}.npz"
    if stored is not None and (found := _load(stored, fingerprint, tensors, bounds)) is not None:
        if progress is not None:
            progress(total, total)
        return found
    segments: dict[str, list[Counts]] = {tensor: [] for tensor in tensors}
    observer = _Observer(model, tensors)
    batch_size = 1
    done = 0
    for stop in bounds:
        collector = _Collector(tensors)
        batches = inputs.batches(batch_size, np.arange(done, stop))
        for observations, size in ordered_map(observer, enumerate(batches), workers=workers):
            collector.add(observations)
            done += size
            if progress is not None:
                progress(done, total)
        for tensor, counts in collector.counts().items():
            segments[tensor].append(counts)
        if all(spec.shape and spec.shape[0] is None for spec in model.inputs):
            batch_size = _BATCH
    statistics = CalibrationStatistics(
        bounds, {tensor: tuple(counts) for tensor, counts in segments.items()}, fingerprint
    )
    if stored is not None:
        _save(stored, statistics)
    return statistics


@dataclass(frozen=True)
class _Observation:
    """One tensor in one batch: exact extremes, and every `step`-th value from some offset on."""

    tensor: str
    minimum: float
    maximum: float
    sample: NDArray[np.float32]
    step: int


class _Observer:
    """Runs the float model and looks at its activations; called with (number, batch).

    Extremes and samples are taken inside the graph, so that whole activations never leave ONNX
    Runtime: copying them out costs more than computing them.
    """

    def __init__(self, model: FloatModel, tensors: Sequence[str]) -> None:
        self._model = model
        self._tensors = tensors
        # One batch on each core needs no synchronisation inside a layer.
        self._session = make_session(_observed(model, tensors), threads=1)
        self._sizes: dict[str, int] = {}  # values of each tensor for one input

    def __call__(
        self, numbered: tuple[int, dict[str, NDArray[Any]]]
    ) -> tuple[list[_Observation], int]:
        number, batch = numbered
        size = len(next(iter(batch.values())))
        steps = {t: _step(self._sizes.get(t, 0) * size, size) for t in self._tensors}
        # The offset goes through all residues, so that the samples of many batches miss nothing.
        places = {t: np.array([[number % step], [step]]) for t, step in steps.items()}
        feed = batch | {_place(tensor): place for tensor, place in places.items()}
        names = [_statistic(t, kind) for t in self._tensors for kind in ("min", "max", "sample")]
        try:
            outputs = iter(self._session.run(names, feed))
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"model {self._model.path}: cannot run a calibration input ({reason})"
            ) from error
        observations = [
            _Observation(tensor, float(next(outputs)), float(next(outputs)), next(outputs), step)
            for tensor, step in steps.items()
        ]
        for found in observations:
            self._sizes.setdefault(found.tensor, found.sample.size // size)
        return observations, size


class _Collector:
    """The counts of one segment."""

    def __init__(self, tensors: Sequence[str]) -> None:
        self._dense = {tensor: np.zeros(BINS, dtype=np.int64) for tensor in tensors}
        self._extremes = dict.fromkeys(tensors, (np.inf, -np.inf))

    def add(self, observations: list[_Observation]) -> None:
        for found in observations:
            if not (np.isfinite(found.minimum) and np.isfinite(found.maximum)):
                raise InputError(
                    f"activation {found.tensor!r}: not finite for some calibration input; "
                    "check the preprocessing and the float model"
                )
            low, high = self._extremes[found.tensor]
            self._extremes[found.tensor] = min(low, found.minimum), max(high, found.maximum)
            count_into(self._dense[found.tensor], found.sample, weight=found.step)

    def counts(self) -> dict[str, Counts]:
        return {
            tensor: from_dense(dense, *self._extremes[tensor])
            for tensor, dense in self._dense.items()
        }


def _step(values: int, inputs: int) -> int:
    """Distance of sampled values: 1 for a small tensor, otherwise odd.

    Widths and channel counts are mostly even, so that an odd step visits all of them.
    """
    step = -(-values // (_SAMPLE * inputs))
    return max(1, step | 1) if step > 1 else 1


def _place(tensor: str) -> str:
    return f"{tensor}__place"


def _statistic(tensor: str, kind: str) -> str:
    return f"{tensor}__{kind}"


def _observed(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with minimum, maximum and a strided sample of each tensor as outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    del graph.output[:]
    flat = onnx.numpy_helper.from_array(np.array([-1]), "calibration__flat")
    end = onnx.numpy_helper.from_array(np.array([np.iinfo(np.int64).max]), "calibration__end")
    first = onnx.numpy_helper.from_array(np.array(0), "calibration__first")
    second = onnx.numpy_helper.from_array(np.array(1), "calibration__second")
    graph.initializer.extend([flat, end, first, second])
    make = onnx.helper.make_node
    for tensor in tensors:
        place, values = _place(tensor), f"{tensor}__values"
        graph.input.append(
            onnx.helper.make_tensor_value_info(place, onnx.TensorProto.INT64, [2, 1])
        )
        graph.node.extend(
            [
                make("ReduceMin", [tensor], [_statistic(tensor, "min")], keepdims=0),
                make("ReduceMax", [tensor], [_statistic(tensor, "max")], keepdims=0),
                make("Reshape", [tensor, flat.name], [values]),
                make("Gather", [place, first.name], [f"{place}_start"], axis=0),
                make("Gather", [place, second.name], [f"{place}_step"], axis=0),
                make(
                    "Slice",
                    [values, f"{place}_start", end.name, "", f"{place}_step"],
                    [_statistic(tensor, "sample")],
                ),
            ]
        )
        graph.output.extend(
            onnx.ValueInfoProto(name=_statistic(tensor, kind)) for kind in ("min", "max", "sample")
        )
    return proto


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
