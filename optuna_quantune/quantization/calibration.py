"""Calibration, done once: a single streaming pass whose statistics serve every configuration.

The float model runs over the calibration inputs and its activations are looked at
(`observation.py`). Of each only counts are kept (`statistics.py`), so memory does not depend on
the number of inputs. The counts are kept apart for the segments between the wanted set sizes;
those of the first n inputs are the sum of the segments before n.

Resolution: histogram bins are bfloat16 numbers (0.8 % wide). The maximum and the minimum are exact
(the minimum of an activation that cannot be negative: of the values that were counted). The first
input is counted whole. Of the others the body of a large activation is counted by an even sample,
at least 2,048 values for each input and more for small sets, and its tails value by value. That
takes 2.5 times as long as running the model, so beyond the first 64 inputs of a segment every
other batch stands for two, and of the batch between only the extremes are taken.
So the percentiles of up to 64 inputs are those of all values, and of more inputs an estimate where
single inputs make the whole tail. `benchmarks/calibration_cost.py` compares the ranges with those
of all values, in decibels of quantization noise.

The result is stored on disk under a fingerprint of the model, the inputs and the options, and
found again by the next run. The store is also written from time to time during the pass, and a
pass that was interrupted goes on where it was written last, with the very same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
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
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import ordered_map
from optuna_quantune.quantization import calibration_store
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.observation import Observation
from optuna_quantune.quantization.observation import observe_whole
from optuna_quantune.quantization.observation import Observer
from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import Histogram


# Raised when the meaning of a stored file changes; files of another version are not used.
STORE_VERSION: Final = 3
# Values of a large activation that are sampled for each input, at least and at most, and about how
# many for a whole segment in between: small sets need more of each input.
_SAMPLE: Final = (1 << 11, 1 << 13)
_SEGMENT_SAMPLE: Final = 1 << 18
# Inputs of a segment that are looked at closely; beyond them one batch of so many is, and of the
# others only the extremes are taken.
_CLOSE: Final = 64
_EVERY: Final = 2
# Inputs that are run at a time after the first, at least and at most, and about how many values of
# all activations together: small models want larger batches to spread the cost of a call.
_BATCH: Final = (4, 16)
_BATCH_VALUES: Final = 1 << 22
# Seconds between two writings of an incomplete store; a writing takes about 0.1 s.
_SAVE_SECONDS: Final = 10.0


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
    fingerprint = _fingerprint(model, inputs, tensors, bounds)
    path = None if cache is None else cache / f"calibration-{fingerprint[:32]}.npz"
    stored = None if path is None else calibration_store.load(path, fingerprint, tensors, bounds)
    counting = _Counting(tensors, bounds, stored)
    if progress is not None and counting.done > 0:
        progress(counting.done, total)
    if counting.done < total:
        saved = time.monotonic()
        for _ in counting.go_on(model, inputs, workers or available_cores()):
            if progress is not None:
                progress(counting.done, total)
            due = time.monotonic() - saved >= _SAVE_SECONDS or counting.done == total
            if path is not None and due:
                calibration_store.save(path, fingerprint, bounds, counting.state())
                saved = time.monotonic()
    return CalibrationStatistics(bounds, counting.state().segments, fingerprint)


class _Counting:
    """The pass over the inputs, from the first input or from where another process stopped."""

    def __init__(
        self,
        tensors: Sequence[str],
        bounds: tuple[int, ...],
        stored: calibration_store.StoredCounts | None,
    ) -> None:
        self.done = 0
        self._tensors = tensors
        self._bounds = bounds
        self._finished: list[dict[str, Counts]] = []
        self._current: dict[str, Accumulator] = {t: Accumulator() for t in tensors}
        if stored is not None:
            self.done = stored.done
            *finished, current = zip(*stored.segments.values(), strict=True)
            self._finished = [dict(zip(tensors, part, strict=True)) for part in finished]
            self._current = {
                t: Accumulator(counts) for t, counts in zip(tensors, current, strict=True)
            }

    def go_on(self, model: FloatModel, inputs: CalibrationInputs, workers: int) -> Iterator[None]:
        """Counts what is not counted yet; yields after each batch."""
        # Run again where a store goes on: it says which activations are large.
        first = observe_whole(model, self._tensors, next(inputs.batches(1, np.arange(1))))
        if self.done == 0:
            self._add(first, 1)
            yield
        observer = Observer(model, first)
        values = sum(seen.sample.size for seen in first)
        del first
        free = all(None not in s.shape[1:] and s.shape[:1] == (None,) for s in model.inputs)
        batch_size = int(np.clip(_BATCH_VALUES // values, *_BATCH)) if free else 1
        for start, stop in zip((0, *self._bounds), self._bounds, strict=False):
            if stop <= self.done:
                continue
            if start == self.done > 0:
                self._begin_segment()
            sample = int(np.clip(_SEGMENT_SAMPLE // (stop - start), *_SAMPLE))

            def observe(
                numbered: tuple[int, dict[str, NDArray[Any]]],
                start: int = start,
                sample: int = sample,
            ) -> list[Observation]:
                offset, batch = numbered
                beyond = (offset - start) // batch_size - _CLOSE // batch_size
                if beyond >= 0 and beyond % _EVERY != _EVERY // 2:
                    return observer.glance(batch)
                weight = 1 if beyond < 0 else _EVERY
                return observer.observe(batch, offset=offset, sample=sample, weight=weight)

            indices = np.arange(self.done, stop)
            sizes = [len(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
            offsets = range(self.done, stop, batch_size)
            batches = zip(offsets, inputs.batches(batch_size, indices), strict=True)
            observed = ordered_map(observe, batches, workers=workers)
            for observations, size in zip(observed, sizes, strict=True):
                self._add(observations, size)
                yield

    def state(self) -> calibration_store.StoredCounts:
        """What is counted so far."""
        segments = [*self._finished, self._segment()]
        return calibration_store.StoredCounts(
            self.done, {t: tuple(part[t] for part in segments) for t in self._tensors}
        )

    def _begin_segment(self) -> None:
        self._finished.append(self._segment())
        self._current = {tensor: Accumulator() for tensor in self._tensors}

    def _segment(self) -> dict[str, Counts]:
        counts = {tensor: self._current[tensor].counts() for tensor in self._tensors}
        for tensor in self._tensors:
            if not self._current[tensor].finite:  # sampled values may show what extremes do not
                raise _not_finite(tensor)
        return counts

    def _add(self, observations: Sequence[Observation], inputs: int) -> None:
        for seen in observations:
            if not (math.isfinite(seen.minimum) and math.isfinite(seen.maximum)):
                raise _not_finite(seen.tensor)
            counter = self._current[seen.tensor]
            counter.extend(seen.minimum, seen.maximum)
            counter.add(seen.sample, weight=seen.weight, upper=seen.upper, lower=seen.lower)
        self.done += inputs


def _not_finite(tensor: str) -> InputError:
    return InputError(
        f"activation {tensor!r}: not finite for some calibration input; "
        "check the preprocessing and the float model"
    )


def _fingerprint(
    model: FloatModel, inputs: CalibrationInputs, tensors: Sequence[str], sizes: tuple[int, ...]
) -> str:
    parts = [STORE_VERSION, model.fingerprint, inputs.fingerprint(), list(tensors), list(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
