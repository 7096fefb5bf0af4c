"""Calibration, done once: a single streaming pass whose statistics serve every configuration.

The float model runs over the calibration inputs and its activations are looked at
(`observation.py`). Of each only counts are kept (`statistics.py`), so memory does not depend on
the number of inputs. The counts are kept apart for the segments between the wanted set sizes;
those of the first n inputs are the sum of the segments before n.

Resolution: histogram bins are 0.1 to 0.2 % wide. All values of the first inputs are counted; they
say where the tails of an activation begin. Of the other inputs the tails are counted value by
value, of every input, and what lies between them by an even sample. So the maximum and the minimum
are exact, and percentiles are those of all values unless the first inputs are unlike the others.
`benchmarks/calibration_cost.py` compares the ranges with those of all values, in decibels of
quantization noise.

An activation that joins others (Concat) has the values of those, and is not looked at itself.

Of the first inputs the extremes of each are kept, too: whether a range cuts off a little of all or
much of a few (`uneven_clipping.py`).

The result is stored on disk under a fingerprint of the model, the inputs and the options, and
found again by the next run. The store is also written from time to time during the pass, and a
pass that was interrupted goes on where it was written last, with the very same result.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Set
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
from optuna_quantune.quantization.observation import Bounds
from optuna_quantune.quantization.observation import never_negative
from optuna_quantune.quantization.observation import Observation
from optuna_quantune.quantization.observation import Observer
from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import Counts
from optuna_quantune.quantization.statistics import Histogram


# Raised when the meaning of a stored file changes; files of another version are not used.
STORE_VERSION: Final = 5
# Inputs after which it is looked anew where the tails of an activation begin (all values of the
# first ones are counted), and the share of the values on either side of zero that are its tail:
# the lowest percentile that clips has 0.1 % beyond.
_LOOKS: Final = (4, 32)
_TAIL: Final = 0.003
# Values between the tails of each activation that are counted from one look, or set size, to the
# next, about.
_SAMPLE: Final = 1 << 17
# Inputs that are run at a time after the first, at least and at most, and about how many values of
# all activations together: small models want larger batches to spread the cost of a call.
_BATCH: Final = (4, 32)
_BATCH_VALUES: Final = 1 << 22
# Inputs of which the extremes are kept: one in as many may have most of what is cut off.
_INPUTS_WITH_EXTREMES: Final = 512
# Seconds between two writings of an incomplete store; a writing takes about 0.1 s.
_SAVE_SECONDS: Final = 10.0

_logger = logging.getLogger(__name__)


class NotFiniteError(InputError):
    """Activations are not finite for some calibration input.

    Attributes:
        tensors: Their names.
        not_numbers: Those of them that are not infinite, as behind a mask, but no numbers.
    """

    def __init__(self, tensors: Sequence[str], *, not_numbers: Sequence[str] = ()) -> None:
        super().__init__(
            f"activation {tensors[0]!r}: not finite for some calibration input; "
            "check the preprocessing and the float model"
        )
        self.tensors, self.not_numbers = tuple(tensors), tuple(not_numbers)


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
        extremes: For each activation its smallest and its largest value in each of the first
            inputs, float32, shape (inputs, 2). An input that does not reach the tails counts as
            reaching to where they begin.
        fingerprint: Of the model, the inputs and the options that these statistics belong to.
    """

    sizes: tuple[int, ...]
    segments: Mapping[str, tuple[Counts, ...]]
    extremes: Mapping[str, NDArray[np.float32]]
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
        cache: Folder of the store; None stores nothing. Where it cannot be written a warning is
            logged, and nothing is lost but the store.
        workers: Batches that are run side by side; None is one for each core.
        progress: Called after every batch with the inputs done and the inputs in all.

    Raises:
        NotFiniteError: If an activation is not finite for some input.
        InputError: If the model cannot be run.
    """
    total = len(inputs)
    bounds = tuple(sorted({total if s == "all" else min(int(s), total) for s in sizes} | {total}))
    joined = _joined(model, tensors)
    observed = [tensor for tensor in tensors if tensor not in joined]
    fingerprint = _fingerprint(model, inputs, tensors, bounds)
    path = None if cache is None else cache / f"calibration-{fingerprint[:32]}.npz"
    stored = None if path is None else calibration_store.load(path, fingerprint, observed, bounds)
    counting = _Counting(observed, bounds, stored)
    if progress is not None and counting.done > 0:
        progress(counting.done, total)
    if counting.done < total:
        saved = time.monotonic()
        for _ in counting.go_on(model, inputs, workers or available_cores()):
            if progress is not None:
                progress(counting.done, total)
            due = time.monotonic() - saved >= _SAVE_SECONDS or counting.done == total
            if path is not None and due:
                try:
                    calibration_store.save(path, fingerprint, bounds, counting.state())
                except OSError as error:
                    _logger.warning(
                        f"Calibration statistics are not kept for the next run: {path.parent} "
                        f"cannot be written ({error.strerror}); name another folder (--cache, or "
                        "cache=)."
                    )
                    path = None
                saved = time.monotonic()
    counted = counting.state()
    segments, extremes = dict(counted.segments), dict(counted.extremes)
    for tensor, parts in joined.items():  # in the order of computation
        segments[tensor] = tuple(
            reduce(add, counts) for counts in zip(*(segments[p] for p in parts), strict=True)
        )
        of_parts = np.stack([extremes[part] for part in parts])
        extremes[tensor] = np.stack([of_parts[..., 0].min(0), of_parts[..., 1].max(0)], axis=1)
    return CalibrationStatistics(
        bounds,
        {tensor: segments[tensor] for tensor in tensors},
        {tensor: extremes[tensor] for tensor in tensors},
        fingerprint,
    )


class _Counting:
    """The pass over the inputs, from the first input or from where another process stopped."""

    def __init__(
        self,
        observed: Sequence[str],
        bounds: tuple[int, ...],
        stored: calibration_store.StoredCounts | None,
    ) -> None:
        self.done = 0
        self._observed = observed
        self._bounds = bounds
        self._tails: Mapping[str, Bounds] = {}
        self._finished: list[dict[str, Counts]] = []
        self._current: dict[str, Accumulator] = {t: Accumulator() for t in observed}
        self._extremes: dict[str, list[NDArray[np.float32]]] = {t: [] for t in observed}
        if stored is not None:
            self.done, self._tails = stored.done, stored.tails
            self._extremes = {t: [stored.extremes[t]] for t in observed}
            *finished, current = zip(*stored.segments.values(), strict=True)
            self._finished = [dict(zip(observed, part, strict=True)) for part in finished]
            self._current = {
                t: Accumulator(counts) for t, counts in zip(observed, current, strict=True)
            }

    def go_on(self, model: FloatModel, inputs: CalibrationInputs, workers: int) -> Iterator[None]:
        """Counts what is not counted yet; yields after each batch."""
        observer = Observer(model, self._observed)
        # Run again where a store goes on: it says how large activations are.
        (first,) = inputs.batches(1, np.arange(1))
        values = observer.values(first)
        if self.done == 0:
            self._add(observer.observe(first, steps=dict.fromkeys(values, 1), bounds={}), 1)
            yield
        batch_size = 1
        if model.batches_any:
            batch_size = int(np.clip(_BATCH_VALUES // sum(values.values()), *_BATCH))
        looks = [look for look in _LOOKS if look < self._bounds[-1]]
        stops = sorted({*self._bounds, *looks})
        for start, stop in zip((0, *stops), stops, strict=False):
            if stop <= self.done:
                continue
            if self.done in self._bounds:
                self._begin_segment()
            if self.done in looks:
                self._tails = self._find_tails(never_negative(model.proto.graph))
            # Widths and channel counts are mostly even: an odd step visits all places.
            steps = {
                tensor: size * (stop - start) // _SAMPLE | 1 if self._tails else 1
                for tensor, size in values.items()
            }
            yield from self._count(observer, inputs, stop, batch_size, steps, workers)

    def _count(
        self,
        observer: Observer,
        inputs: CalibrationInputs,
        stop: int,
        batch_size: int,
        steps: Mapping[str, int],
        workers: int,
    ) -> Iterator[None]:
        """Counts the inputs up to `stop`; yields after each batch."""

        def observe(numbered: tuple[int, int, dict[str, NDArray[Any]]]) -> list[Observation]:
            offset, size, batch = numbered
            return observer.observe(
                batch, steps=steps, bounds=self._tails, offset=offset, inputs=size
            )

        indices = np.arange(self.done, stop)
        offsets = range(self.done, stop, batch_size)
        sizes = [min(batch_size, stop - offset) for offset in offsets]
        batches = zip(offsets, sizes, inputs.batches(batch_size, indices), strict=True)
        observed = ordered_map(observe, batches, workers=workers)
        for observations, size in zip(observed, sizes, strict=True):
            self._add(observations, size)
            yield

    def state(self) -> calibration_store.StoredCounts:
        """What is counted so far."""
        segments = [*self._finished, self._segment()]
        return calibration_store.StoredCounts(
            self.done,
            {t: tuple(part[t] for part in segments) for t in self._observed},
            {t: np.concatenate(self._extremes[t]) for t in self._observed},
            self._tails,
        )

    def _begin_segment(self) -> None:
        self._finished.append(self._segment())
        self._current = {tensor: Accumulator() for tensor in self._observed}

    def _segment(self) -> dict[str, Counts]:
        return {tensor: self._current[tensor].counts() for tensor in self._observed}

    def _find_tails(self, one_sided: Set[str]) -> dict[str, Bounds]:
        parts = [*self._finished, self._segment()]
        return {
            tensor: _bounds(reduce(add, [part[tensor] for part in parts]), tensor in one_sided)
            for tensor in self._observed
        }

    def _add(self, observations: Sequence[Observation], inputs: int) -> None:
        if lost := [seen for seen in observations if not seen.finite]:
            raise NotFiniteError(
                [seen.tensor for seen in lost],
                not_numbers=[seen.tensor for seen in lost if not seen.is_number],
            )
        for seen in observations:
            counter = self._current[seen.tensor]
            counter.add(seen.sample, weight=seen.weight)
            counter.add(seen.tails)
            if self.done < _INPUTS_WITH_EXTREMES:
                left = _INPUTS_WITH_EXTREMES - self.done
                self._extremes[seen.tensor].append(seen.extremes[:left])
        self.done += inputs


def _fingerprint(
    model: FloatModel, inputs: CalibrationInputs, tensors: Sequence[str], sizes: tuple[int, ...]
) -> str:
    parts = [STORE_VERSION, model.fingerprint, inputs.fingerprint(), list(tensors), list(sizes)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _bounds(counts: Counts, one_sided: bool) -> Bounds:
    """Where the tails of an activation begin; never beyond its extremes, which stay exact so."""
    histogram = counts.histogram()
    lower, upper = histogram.minimum, histogram.maximum
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    if below[-1] > 0.0:
        negative = float(np.interp(0.0, histogram.edges, below))
        ends = _TAIL * negative, below[-1] - _TAIL * (below[-1] - negative)
        inner = np.interp(ends, below, histogram.edges).astype(np.float32).tolist()
        lower = inner[0] if lower < 0.0 else lower
        upper = inner[1] if upper > 0.0 else upper
    return Bounds(None if one_sided else lower, upper)


def _joined(model: FloatModel, tensors: Sequence[str]) -> dict[str, list[str]]:
    """For each activation that joins other wanted ones, whose values it has."""
    wanted = set(tensors)
    return {
        node.output[0]: list(node.input)
        for node in model.proto.graph.node
        if node.op_type == "Concat" and wanted.issuperset([*node.output, *node.input])
    }
