"""Files of NumPy arrays as model inputs: what is neither images nor code."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any
from typing import Final
from typing import TYPE_CHECKING

import numpy as np

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.arrays import ArrayInputs


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray

    from optuna_quantune.evaluation.preprocessing import Recipe

ARRAY_SUFFIXES: Final = frozenset({".npy", ".npz"})
# The array of an .npz file that is no input.
_LABELS: Final = "labels"
# What numpy.savez calls an array that it is given without a name.
_NAMELESS: Final = "arr_0"


class ArrayFile(ArrayInputs):
    """Inputs in an ``.npy`` or ``.npz`` file, batch axis first.

    Args:
        path: An ``.npy`` file for a model with one input, which stays on disk (memory-mapped); or
            an ``.npz`` file of arrays by the model's input name, read into memory. A single array
            in it that was saved without a name is the one input, and an array ``labels`` are the
            class indices of shape (n,).
        labels: Labels as `ArrayInputs` takes them, or the path of an ``.npy`` file of them; None
            takes those in `path` if there are any.
        preprocessing: As in `ArrayInputs`.

    Raises:
        InputError: A file cannot be read, holds something else than arrays of numbers, or what
            `ArrayInputs` refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        labels: ArrayLike | str | os.PathLike[str] | None = None,
        preprocessing: Recipe | None = None,
    ) -> None:
        self._path = Path(path)
        arrays = _read(self._path)
        found = arrays.pop(_LABELS, None)
        if isinstance(labels, str | os.PathLike):
            labels = _read_labels(Path(labels))
        elif labels is None:
            labels = found
        inputs = arrays[_NAMELESS] if list(arrays) == [_NAMELESS] else arrays
        super().__init__(inputs, labels, preprocessing)

    def __str__(self) -> str:
        return f"array file {self._path}"


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name; `_NAMELESS` is that of an .npy file."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {_NAMELESS: found}
        with found:
            return {name: found[name] for name in found.files}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: cannot read arrays: {error.strerror}") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: is no file of numbers from numpy.save or numpy.savez ({error})"
        ) from error


def _read_labels(path: Path) -> NDArray[Any]:
    if path.suffix != ".npy":
        raise InputError(f"labels {path}: with arrays they are an .npy file of class indices")
    return _read(path)[_NAMELESS]
