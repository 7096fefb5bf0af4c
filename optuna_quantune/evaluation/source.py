"""What an input source is: a fixed, ordered set of model inputs that can be read again and again.

Calibration, evaluation and latency all read their inputs from an :class:`InputSource`, so that
each of them works wherever the inputs come from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC
from abc import abstractmethod
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from itertools import islice
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeVar

import numpy as np

from optuna_quantune.errors import InputError


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray

# Name of the only input of a source that does not know the model's name for it.
UNNAMED = ""

Element = TypeVar("Element")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What a model wants for one of its inputs, or what a source gives for it.

    Attributes:
        name: The input's name in the model.
        shape: Size of each axis, the batch axis first; None where it is free.
        dtype: Element type.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        axes = ["batch", *("any" if size is None else str(size) for size in self.shape[1:])]
        return f"{self.dtype} ({', '.join(axes)})"


class InputSource(ABC):
    """A fixed, ordered set of model inputs, with labels or without.

    An input is what a model makes one prediction from; it is known by its index, 0 to
    ``len(source) - 1``. A source can be read any number of times, and gives the same each time.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of inputs, at least 1."""

    @property
    @abstractmethod
    def labels(self) -> NDArray[Any] | None:
        """Class indices of shape (n,), or what else a metric of one's own takes, (n, ...)."""

    @property
    @abstractmethod
    def specs(self) -> tuple[InputSpec, ...]:
        """What the batches hold; the name of a single input may be :data:`UNNAMED`."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where each input stands in the source that the user made, shape (n,).

        For a subset of a source these are its indices there.
        """
        return np.arange(len(self))

    @abstractmethod
    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Give the inputs in batches; the last one may be smaller.

        Args:
            batch_size: Inputs in a batch, at least 1.
            indices: Which inputs, in which order, of shape (m,); None is all in the set's order.

        Yields:
            Arrays by input name, batch axis first.

        Raises:
            InputError: An input cannot be read; the message names it.
        """

    @property
    def shape_advice(self) -> str:
        """What a user can change when a model wants another shape, for the message."""
        return ""

    @abstractmethod
    def item_digests(self) -> Sequence[bytes]:
        """SHA-256 of the bytes of each input, computed once."""

    @abstractmethod
    def recipe(self) -> str:
        """What else than the bytes decides the inputs, as text: names, types, preprocessing."""

    def bind(self, specs: Sequence[InputSpec]) -> InputSource:
        """Check the source against a model, and take over the model's names and float type.

        Args:
            specs: What the model wants, in the model's order.

        Returns:
            A source whose batches can be fed to the model.

        Raises:
            InputError: Names, element types or shapes do not fit.
        """
        return _Bound(self, specs)

    def subset(self, indices: ArrayLike) -> InputSource:
        """Give a source of some of the inputs, in the order of ``indices`` of shape (m,).

        Raises:
            InputError: There are none, or one is outside 0 to ``len(self) - 1``.
        """
        return _Subset(self, np.asarray(indices))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the inputs' bytes in order and of what prepares them.

        Labels are not in it, and neither is the model: the same images with other labels, or
        bound to another model, have the same fingerprint.
        """
        digest = hashlib.sha256(self.recipe().encode())
        for item in self.item_digests():
            digest.update(item)
        return digest.hexdigest()

    def _order(self, batch_size: int, indices: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """Check the arguments of :meth:`batches`, and give the indices."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if indices is None:
            return np.arange(len(self), dtype=np.int64)
        return _checked_indices(indices, len(self), str(self))


class _Subset(InputSource):
    """Some inputs of a source."""

    def __init__(self, source: InputSource, indices: NDArray[Any]) -> None:
        self._source = source
        self._indices = _checked_indices(indices, len(source), str(source))

    def __str__(self) -> str:
        return f"{len(self)} inputs of {self._source}"

    @property
    def shape_advice(self) -> str:
        return self._source.shape_advice

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> NDArray[Any] | None:
        labels = self._source.labels
        return None if labels is None else labels[self._indices]

    @property
    def positions(self) -> NDArray[np.int64]:
        return self._source.positions[self._indices]

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        return self._source.specs

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        order = self._order(batch_size, indices)
        return self._source.batches(batch_size, self._indices[order])

    def item_digests(self) -> Sequence[bytes]:
        digests = self._source.item_digests()
        return [digests[index] for index in self._indices]

    def recipe(self) -> str:
        return self._source.recipe()


class _Bound(InputSource):
    """A source under a model's names and float type."""

    def __init__(self, source: InputSource, specs: Sequence[InputSpec]) -> None:
        self._source = source
        self._specs = tuple(specs)
        self._own_names = _match(source, self._specs)

    def __str__(self) -> str:
        return str(self._source)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def labels(self) -> NDArray[Any] | None:
        return self._source.labels

    @property
    def positions(self) -> NDArray[np.int64]:
        return self._source.positions

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        own = {spec.name: spec for spec in self._source.specs}
        return tuple(
            InputSpec(spec.name, own[own_name].shape, spec.dtype)
            for spec, own_name in zip(self._specs, self._own_names, strict=True)
        )

    def bind(self, specs: Sequence[InputSpec]) -> InputSource:
        return self._source.bind(specs)

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        for batch in self._source.batches(batch_size, indices):
            yield {
                spec.name: batch[own_name].astype(spec.dtype, copy=False)
                for spec, own_name in zip(self._specs, self._own_names, strict=True)
            }

    def item_digests(self) -> Sequence[bytes]:
        return self._source.item_digests()

    def recipe(self) -> str:
        return self._source.recipe()


def _match(source: InputSource, specs: Sequence[InputSpec]) -> list[str]:
    """Give the source's name for each input of the model, or raise what does not fit."""
    own = {spec.name: spec for spec in source.specs}
    wanted = ", ".join(f"{spec.name!r}" for spec in specs)
    if list(own) == [UNNAMED]:
        if len(specs) != 1:
            raise InputError(
                f"{source}: gives one input, the model wants {len(specs)}: {wanted}; give a "
                "mapping from input name to array"
            )
        names = [UNNAMED]
    elif set(own) != {spec.name for spec in specs}:
        given = ", ".join(f"{name!r}" for name in own)
        raise InputError(f"{source}: gives the inputs {given}, the model wants {wanted}")
    else:
        names = [spec.name for spec in specs]
    for spec, name in zip(specs, names, strict=True):
        if not spec.shape:
            raise InputError(
                f"{source}: the model's input {spec.name!r} is a single number without an axis "
                "for batches; make it a constant (an initializer) of the model"
            )
        if own[name].dtype != spec.dtype and not (
            own[name].dtype.kind == "f" and spec.dtype.kind == "f"
        ):
            advice = (
                "; uint8 images need a preprocessing"
                if own[name].dtype == np.uint8 and spec.dtype.kind == "f"
                else "; convert it"
            )
            raise InputError(
                f"{source}: wrong element type for the model's input {spec.name!r}: "
                f"{own[name].dtype}, the model wants {spec.dtype}{advice}"
            )
        if not _shape_fits(own[name].shape, spec.shape):
            raise InputError(
                f"{source}: wrong input shape for the model's input {spec.name!r}: {own[name]}, "
                f"the model wants {spec}{_shape_advice(source, own[name].shape, spec.shape)}"
            )
    return names


def _shape_fits(given: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(given) == len(wanted) and all(
        theirs is None or ours == theirs
        for ours, theirs in zip(given[1:], wanted[1:], strict=True)
    )


def _shape_advice(
    source: InputSource, given: tuple[int | None, ...], wanted: tuple[int | None, ...]
) -> str:
    if len(given) == len(wanted) == 4 and given[1:] in (
        (*wanted[2:], wanted[1]),
        (wanted[3], *wanted[1:3]),
    ):
        return "; the channel axis is in another place (NCHW or NHWC)"
    if _shape_fits(given, (1, *wanted)):
        return "; the model has no axis for batches: put a Squeeze of axis 0 behind its input"
    return f"; {source.shape_advice}" if source.shape_advice else ""


def _checked_indices(indices: NDArray[Any], length: int, source: str) -> NDArray[np.int64]:
    if indices.ndim != 1 or not len(indices) or indices.dtype.kind not in "iu":
        raise InputError(
            f"{source}: indices must be a one-dimensional, not empty array of whole numbers"
        )
    if indices.min() < 0 or indices.max() >= length:
        raise InputError(f"{source}: indices must be from 0 to {length - 1}")
    return indices.astype(np.int64)


def digest_arrays(arrays: Iterable[NDArray[Any]]) -> bytes:
    """SHA-256 of the shapes and bytes of the arrays that make one input."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    return digest.digest()


def describe_inputs(specs: Sequence[InputSpec], preprocessing: dict[str, Any] | None) -> str:
    """Write down what, beside their bytes, decides the inputs, for :meth:`InputSource.recipe`."""
    described = [[spec.name, spec.dtype.str, spec.shape] for spec in specs]
    return json.dumps({"inputs": described, "preprocessing": preprocessing}, sort_keys=True)


def chunks(items: Iterable[Element], size: int) -> Iterator[list[Element]]:
    """Give the items in lists of ``size``, the last one maybe shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
