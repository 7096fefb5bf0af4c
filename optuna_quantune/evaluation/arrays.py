"""Arrays as model inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.labels import label_array
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.evaluation.source import describe_inputs
from optuna_quantune.evaluation.source import digest_arrays
from optuna_quantune.evaluation.source import InputSource
from optuna_quantune.evaluation.source import InputSpec
from optuna_quantune.evaluation.source import UNNAMED


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray

    from optuna_quantune.evaluation.preprocessing import Recipe


class ArrayInputs(InputSource):
    """Inputs in memory (or memory-mapped), batch axis first.

    Args:
        inputs: One array, for a model with one input, or arrays by the model's input name.
        labels: Class indices of shape (n,), or None; for a metric of one's own any numbers of
            shape (n, ...).
        preprocessing: How to turn uint8 images of shape (n, height, width) or (n, height, width,
            channels) into inputs, as it is done for files; None takes the arrays as they are.

    Raises:
        InputError: The arrays are empty, have different lengths, or are not images although
            there is a preprocessing.
    """

    def __init__(
        self,
        inputs: NDArray[Any] | Mapping[str, NDArray[Any]],
        labels: ArrayLike | None = None,
        preprocessing: Recipe | None = None,
    ) -> None:
        named = inputs if isinstance(inputs, Mapping) else {UNNAMED: inputs}
        self._arrays = {name: np.asanyarray(array) for name, array in named.items()}
        lengths = {len(array) if array.ndim else 0 for array in self._arrays.values()}
        if not lengths or 0 in lengths:
            raise InputError(f"{self}: no inputs; the first axis must be the batch axis")
        if len(lengths) > 1:
            raise InputError(
                f"{self}: the first axis must be the same batch axis in all arrays, not "
                + ", ".join(f"{len(array)} in {name!r}" for name, array in self._arrays.items())
            )
        self._length = lengths.pop()
        self._labels = None if labels is None else label_array(labels, inputs=self._length)
        self._preprocessing = None if preprocessing is None else Preprocessing.of(preprocessing)
        if self._preprocessing is not None:
            if len(self._arrays) > 1:
                raise InputError(f"{self}: preprocessing needs a single array of images")
            ((name, images),) = self._arrays.items()
            self._arrays = {name: self._pixels(images, self._preprocessing)}

    def __str__(self) -> str:
        return "array inputs"

    def __len__(self) -> int:
        return self._length

    @property
    def labels(self) -> NDArray[Any] | None:
        """See :attr:`InputSource.labels`."""
        return self._labels

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """One for each array."""
        return tuple(
            InputSpec(
                name,
                (None, *array.shape[1:]),
                array.dtype if self._preprocessing is None else np.dtype(np.float32),
            )
            for name, array in self._arrays.items()
        )

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Give the arrays in batches, see :meth:`InputSource.batches`."""
        order = self._order(batch_size, indices)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            yield {
                name: np.asarray(array[rows])
                if self._preprocessing is None
                else self._preprocessing.normalize(array[rows])
                for name, array in self._arrays.items()
            }

    def item_digests(self) -> Sequence[bytes]:
        """SHA-256 of the bytes of each row of the arrays."""
        return self._item_digests

    def recipe(self) -> str:
        """The arrays' names, types and shapes, and the preprocessing."""
        recipe = self._preprocessing
        return describe_inputs(self.specs, None if recipe is None else dataclasses.asdict(recipe))

    @cached_property
    def _item_digests(self) -> list[bytes]:
        return [
            digest_arrays(array[row] for array in self._arrays.values())
            for row in range(self._length)
        ]

    def _pixels(self, images: NDArray[Any], preprocessing: Preprocessing) -> NDArray[np.uint8]:
        if images.dtype != np.uint8 or not (
            images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
        ):
            raise InputError(
                f"{self}: preprocessing takes uint8 images of shape (n, height, width) or (n, "
                f"height, width, channels), not {images.dtype} of shape {images.shape}"
            )
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[:, :, :, 0]
        try:
            return np.stack([preprocessing.pixels(Image.fromarray(image)) for image in images])
        except InputError as error:
            raise InputError(f"{self}: {error}") from None
