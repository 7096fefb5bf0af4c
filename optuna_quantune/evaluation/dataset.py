"""Whatever a user gives as inputs, as an input source: the one door for all kinds of inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.array_file import ARRAY_SUFFIXES
from optuna_quantune.evaluation.array_file import ArrayFile
from optuna_quantune.evaluation.arrays import ArrayInputs
from optuna_quantune.evaluation.image_folder import ImageFolder
from optuna_quantune.evaluation.readers import ReaderInputs
from optuna_quantune.evaluation.source import InputSource
from optuna_quantune.evaluation.source import InputSpec


if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from optuna_quantune.evaluation.preprocessing import Recipe

# What `as_input_source` makes a source of; readers, which differ from caller to caller, besides.
Inputs: TypeAlias = (
    InputSource | NDArray[Any] | Mapping[str, NDArray[Any]] | str | os.PathLike[str]
)

__all__ = [
    "ArrayFile",
    "ArrayInputs",
    "ImageFolder",
    "InputSource",
    "InputSpec",
    "Inputs",
    "ReaderInputs",
    "as_input_source",
]


def as_input_source(
    inputs: object,
    *,
    labels: ArrayLike | str | os.PathLike[str] | None = None,
    preprocessing: Recipe | None = None,
) -> InputSource:
    """Make an input source of whatever a user gave.

    Args:
        inputs: An :class:`InputSource`; the path of an image folder, or of an ``.npy`` or
            ``.npz`` file; an array or a mapping from input name to array; a calibration data
            reader, or something that makes a fresh one when called.
        labels: For a folder the path of a CSV file, otherwise class indices of shape (n,), for a
            file of arrays also the path of an ``.npy`` file of them.
        preprocessing: For a folder, or for uint8 images in an array.

    Raises:
        InputError: The inputs are of none of these kinds, cannot be used, or do not go with
            ``labels`` or ``preprocessing``.
    """
    if isinstance(inputs, InputSource):
        if labels is not None or preprocessing is not None:
            raise InputError(
                f"{inputs}: has its own labels and preprocessing; leave those arguments out"
            )
        return inputs
    if isinstance(inputs, str | os.PathLike):
        if Path(inputs).suffix in ARRAY_SUFFIXES:
            return ArrayFile(inputs, labels=labels, preprocessing=preprocessing)
        if Path(inputs).is_file():
            raise InputError(
                f"{os.fspath(inputs)}: is a file, not a folder; give a folder of images, or an "
                ".npy or .npz file"
            )
        if labels is not None and not isinstance(labels, str | os.PathLike):
            raise InputError(
                f"image folder {os.fspath(inputs)}: labels must be the path of a CSV file"
            )
        return ImageFolder(inputs, labels=labels, preprocessing=preprocessing)
    if isinstance(labels, str | os.PathLike):
        raise InputError(f"labels {os.fspath(labels)}: a CSV file goes with an image folder only")
    if isinstance(inputs, Mapping | np.ndarray):
        return ArrayInputs(inputs, labels, preprocessing)
    if hasattr(inputs, "get_next") or callable(inputs):
        if preprocessing is not None:
            raise InputError(
                "preprocessing does not go with a calibration data reader: the reader gives "
                "what the model takes"
            )
        return ReaderInputs(inputs, labels)
    raise InputError(
        f"cannot take inputs from a {type(inputs).__name__}; give an image folder, a file "
        "of arrays, an array, a mapping from input name to array, or a calibration data reader"
    )
