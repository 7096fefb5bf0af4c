"""Image files as model inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.labels import read_labels
from optuna_quantune.evaluation.memory import cache_size
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.evaluation.source import chunks
from optuna_quantune.evaluation.source import InputSource
from optuna_quantune.evaluation.source import InputSpec
from optuna_quantune.evaluation.source import UNNAMED
from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import CORES
from optuna_quantune.pipeline import ordered_map


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optuna_quantune.evaluation.preprocessing import Recipe

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageFolder(InputSource):
    """Image files, decoded in a thread pool and kept as uint8 pixels in bounded memory.

    Args:
        folder: Where the images are; searched with its subfolders where there are no labels.
        labels: CSV file with the columns ``file`` and ``label_index``, which then says which
            files there are and in which order (:func:`~.labels.read_labels`); None takes
            ``labels.csv`` in ``folder`` where it exists, and otherwise all image files below
            ``folder``, without labels, in the sorted order of their paths; if they lie in several
            folders, one for each class perhaps, in an order mixed by a hash of their paths, so
            that the first ones are a fair sample.
        preprocessing: A :class:`Preprocessing`, a mapping or a JSON file with one.
        limit: Use the first so many; None uses all.
        cache_bytes: Pixels kept in memory, in bytes; None is a quarter of the memory that is free
            now. A later pass (every trial is one) does not decode what is kept; what finds no
            room is decoded again.

    Raises:
        InputError: The folder, its images, the labels or the preprocessing cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        labels: str | os.PathLike[str] | None = None,
        preprocessing: Recipe | None = None,
        limit: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            fault = "is a file, not a folder" if self._folder.exists() else "no such folder"
            raise InputError(f"{self._folder}: {fault}; give a folder of images")
        if preprocessing is None:
            raise InputError(
                f"{self}: images need a preprocessing (--preprocessing JSON): the model's mean, "
                "std, scale, channel_order, crop and resize_short_side"
            )
        self._preprocessing = Preprocessing.of(preprocessing)
        csv_path = self._folder / "labels.csv" if labels is None else Path(labels)
        self._labels: NDArray[np.int64] | None = None
        if labels is not None or csv_path.is_file():
            self._files, self._labels = read_labels(csv_path, images=self._folder)
        else:
            self._files = _image_files(self._folder)
        if not self._files:
            raise InputError(
                f"{self._folder}: no images (no file that ends in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        if limit is not None:
            if limit < 1:
                raise InputError(f"limit must be at least 1 image, not {limit}")
            self._files = self._files[:limit]
            self._labels = None if self._labels is None else self._labels[:limit]
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cache_room = cache_size() if cache_bytes is None else cache_bytes
        self._cache_lock = threading.Lock()

    def __str__(self) -> str:
        return f"image folder {self._folder}"

    def __len__(self) -> int:
        return len(self._files)

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files in order."""
        return tuple(self._files)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class indices of shape (n,), or None."""
        return self._labels

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """The one input, whose name the model gives."""
        return (InputSpec(UNNAMED, (None, *self._pixel_shape), np.dtype(np.float32)),)

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Give normalised images in batches, see :meth:`InputSource.batches`."""
        order = self._order(batch_size, indices)
        for pixels in chunks(self._pixels(order), batch_size):
            yield {UNNAMED: self._preprocessing.normalize(np.stack(pixels))}

    @property
    def shape_advice(self) -> str:
        """Which parts of the preprocessing decide the shape."""
        return "change crop, channel_order or layout of the preprocessing"

    def item_digests(self) -> Sequence[bytes]:
        """SHA-256 of each file."""
        return self._item_digests

    def recipe(self) -> str:
        """The preprocessing."""
        return json.dumps(dataclasses.asdict(self._preprocessing), sort_keys=True)

    @cached_property
    def _item_digests(self) -> list[bytes]:
        digests = []
        for path in self._files:
            try:
                with path.open("rb") as file:
                    digests.append(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"{path}: cannot read the image: {error.strerror}") from error
        return digests

    @cached_property
    def _pixel_shape(self) -> tuple[int, ...]:
        return self._preprocessing.pixel_shape or self._decode(0).shape

    def _pixels(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        cached = self._cache  # only ever grows, so what is in it now stays in it
        if all(index in cached for index in order.tolist()):
            return (cached[index] for index in order.tolist())
        return ordered_map(self._cached_pixels, order.tolist(), workers=available_cores())

    def _cached_pixels(self, index: int) -> NDArray[np.uint8]:
        if (pixels := self._cache.get(index)) is not None:
            return pixels
        with CORES.take(1):
            pixels = self._decode(index)
        if pixels.shape != self._pixel_shape:
            raise InputError(
                f"{self._files[index]}: gives an input of shape {pixels.shape}, the first image "
                f"one of {self._pixel_shape}; set crop of the preprocessing"
            )
        # What came first stays: passes go through the set in the same order again and again, and
        # dropping the oldest would leave nothing that the next pass can use.
        with self._cache_lock:
            if index not in self._cache and pixels.nbytes <= self._cache_room:
                self._cache[index] = pixels
                self._cache_room -= pixels.nbytes
        return pixels

    def _decode(self, index: int) -> NDArray[np.uint8]:
        path = self._files[index]
        try:
            with Image.open(path) as image:
                return self._preprocessing.pixels(image)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # Pillow raises many types for broken files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{path}: does not decode as an image ({reason}); replace or remove it"
            ) from error


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        path
        for parent, names in _folders(folder)
        for path in map(parent.joinpath, names)
        if path.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(path.name) and path.is_file()
    )
    if len({path.parent for path in files}) > 1:
        # Files that are added or removed later leave the others in their order.
        files.sort(key=lambda path: _mixing(path.relative_to(folder)))
    return files


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it with the names of their files, each once; links are followed."""
    walked = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        place = os.path.realpath(parent)
        if place in walked:  # a link leads back
            folders.clear()
            continue
        walked.add(place)
        yield Path(parent), names


def _is_hidden(name: str) -> bool:
    """Whether it is what file managers leave behind, also with image suffixes."""
    return name.startswith(".")


def _mixing(path: Path) -> bytes:
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()
