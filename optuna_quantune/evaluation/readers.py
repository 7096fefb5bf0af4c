"""ONNX Runtime calibration data readers as model inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import cast
from typing import Protocol
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.labels import label_array
from optuna_quantune.evaluation.memory import cache_size
from optuna_quantune.evaluation.source import chunks
from optuna_quantune.evaluation.source import describe_inputs
from optuna_quantune.evaluation.source import digest_arrays
from optuna_quantune.evaluation.source import InputSource
from optuna_quantune.evaluation.source import InputSpec


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray


# One answer of a reader: arrays by input name, batch axis first.
Feed: TypeAlias = "Mapping[str, NDArray[Any]]"


class DataReader(Protocol):
    """What ONNX Runtime's ``CalibrationDataReader`` has: the next inputs by name, at last None."""

    def get_next(self) -> Feed | None:
        """Give the next inputs by name, batch axis first, or None after the last."""


class ReaderInputs(InputSource):
    """Inputs from ONNX Runtime calibration data readers.

    The first pass is made at once: it counts the inputs, takes their shapes and digests, and keeps
    the first ones in memory. What finds no room is read anew at every pass that needs it.

    Args:
        reader: Something that gives a fresh reader when called (a class, a function), or a
            reader. A reader with ``rewind()`` is rewound for every pass, so that only one pass
            can be under way; all inputs of one without are kept.
        labels: Class indices of shape (n,), or None; for a metric of one's own any numbers of
            shape (n, ...). Where the reader gives batches, there is one for each input of a batch.
        cache_bytes: Inputs kept in memory, in bytes; None is a quarter of the memory that is free
            now.

    Raises:
        InputError: The reader gives nothing, something else than arrays by name with one batch
            axis, or, at a later pass, other inputs than at first.
    """

    def __init__(
        self,
        reader: DataReader | Callable[[], DataReader],
        labels: ArrayLike | None = None,
        *,
        cache_bytes: int | None = None,
    ) -> None:
        self._name = getattr(reader, "__name__", type(reader).__name__)
        self._feeds, self._passes_share = _feeds(reader)
        room: float = cache_size() if cache_bytes is None else cache_bytes
        if self._passes_share and not hasattr(reader, "rewind"):
            room = math.inf
        self._passes = 0
        self._digests: list[bytes] = []
        self._kept: list[dict[str, NDArray[Any]]] = []
        first: dict[str, NDArray[Any]] | None = None
        shapes: dict[str, list[int | None]] = {}
        for row in self._rows():
            if first is None:
                first = row
                shapes = {name: list(array.shape) for name, array in row.items()}
            self._merge_shapes(shapes, first, row)
            self._digests.append(digest_arrays(row.values()))
            room -= sum(array.nbytes for array in row.values())
            if room >= 0:
                self._kept.append(row)
        if first is None:
            raise InputError(f"{self}: gives no inputs (get_next() returned None at once)")
        self._specs = tuple(
            InputSpec(name, (None, *shapes[name]), array.dtype) for name, array in first.items()
        )
        self._labels = None if labels is None else label_array(labels, inputs=len(self))

    def __str__(self) -> str:
        return f"calibration data reader {self._name}"

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def labels(self) -> NDArray[Any] | None:
        """See :attr:`InputSource.labels`."""
        return self._labels

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """One for each input; an axis on which the inputs differ is free."""
        return self._specs

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Give the reader's inputs in batches, see :meth:`InputSource.batches`.

        An order of ``indices`` that is not ascending holds inputs in memory until their turn.
        """
        order = self._order(batch_size, indices)
        for rows in chunks(self._in_order(order.tolist()), batch_size):
            try:
                batch = {
                    spec.name: np.stack([row[spec.name] for row in rows]) for spec in self.specs
                }
            except ValueError as error:
                raise InputError(
                    f"{self}: inputs of different shapes cannot share a batch; use batch_size=1"
                ) from error
            yield batch

    def item_digests(self) -> Sequence[bytes]:
        """SHA-256 of the bytes of each input."""
        return self._digests

    def recipe(self) -> str:
        """The inputs' names, types and shapes."""
        return describe_inputs(self.specs, None)

    def _merge_shapes(
        self,
        shapes: dict[str, list[int | None]],
        first: dict[str, NDArray[Any]],
        row: dict[str, NDArray[Any]],
    ) -> None:
        if set(row) != set(first):
            raise InputError(
                f"{self}: gives the inputs {', '.join(sorted(row))} after "
                f"{', '.join(sorted(first))}; all must have the same names"
            )
        for name, array in row.items():
            if array.ndim != len(shapes[name]) or array.dtype != first[name].dtype:
                raise InputError(
                    f"{self}: input {name!r} is {array.dtype} with {array.ndim} axes after "
                    f"{first[name].dtype} with {len(shapes[name])} (batch axis not counted)"
                )
            for axis, size in enumerate(array.shape):
                if shapes[name][axis] != size:
                    shapes[name][axis] = None

    def _rows(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Make one pass, an input at a time."""
        self._passes += 1
        this_pass = self._passes
        for feed in self._feeds():
            if self._passes_share and this_pass != self._passes:
                raise InputError(
                    f"{self}: two passes at the same time through one reader; give a function "
                    "that makes a fresh reader"
                )
            arrays = {name: np.asarray(array) for name, array in feed.items()}
            lengths = {array.shape[0] if array.ndim else None for array in arrays.values()}
            if len(lengths) != 1 or None in lengths:
                raise InputError(
                    f"{self}: every array needs the same batch axis first, not the shapes "
                    + ", ".join(f"{name!r}: {array.shape}" for name, array in arrays.items())
                )
            for index in range(len(next(iter(arrays.values())))):
                # Copied, as a reader may fill the same array again and again.
                yield {name: array[index].copy() for name, array in arrays.items()}

    def _in_order(self, order: Sequence[int]) -> Iterator[dict[str, NDArray[Any]]]:
        uses = Counter(index for index in order if index >= len(self._kept))
        held: dict[int, dict[str, NDArray[Any]]] = {}
        rows = enumerate(self._rows())
        for index in order:
            if index < len(self._kept):
                yield self._kept[index]
                continue
            while index not in held:
                position, row = next(rows, (None, None))
                if position is None or row is None:
                    raise InputError(
                        f"{self}: gave {len(self)} inputs at first and fewer now; every pass must "
                        "give the same"
                    )
                if position in uses:
                    self._check_same(position, row)
                    held[position] = row
            uses[index] -= 1
            yield held[index] if uses[index] else held.pop(index)

    def _check_same(self, position: int, row: dict[str, NDArray[Any]]) -> None:
        if digest_arrays(row.values()) != self._digests[position]:
            raise InputError(
                f"{self}: input {position} is another than at first; every pass must give the "
                "same inputs in the same order, without shuffling or augmentation"
            )


def _feeds(
    reader: DataReader | Callable[[], DataReader],
) -> tuple[Callable[[], Iterable[Feed]], bool]:
    """Give a function that begins a pass, and whether passes share a reader and its position."""
    # A reader class has get_next too, and is a factory; an instance that has it is a reader.
    if isinstance(reader, type) or not hasattr(reader, "get_next"):
        fresh = cast("Callable[[], DataReader]", reader)
        return lambda: _drained(fresh()), False
    if rewind := getattr(reader, "rewind", None):

        def rewound() -> Iterable[Feed]:
            rewind()
            return _drained(reader)

        return rewound, True
    return lambda: _drained(reader), True


def _drained(reader: object) -> Iterator[Feed]:
    if not hasattr(reader, "get_next"):
        raise InputError(
            f"cannot take inputs from a {type(reader).__name__}: it has no get_next(), as "
            "calibration data readers have"
        )
    while (feed := reader.get_next()) is not None:
        if not isinstance(feed, Mapping):
            raise InputError(
                f"calibration data reader {type(reader).__name__}: get_next() gave a "
                f"{type(feed).__name__}, not arrays by input name"
            )
        if not feed:  # the end, as ONNX Runtime takes it
            return
        yield feed
