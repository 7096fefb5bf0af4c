"""Labels as users give them: a labels.csv beside the images, or an array."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quantune.errors import InputError


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray


# The largest number that an array of labels holds.
_LARGEST_LABEL = 2**63 - 1


def read_labels(path: Path, *, images: Path) -> tuple[list[Path], NDArray[np.int64]]:
    """Read which files there are and what their classes are.

    Args:
        path: A CSV file with the columns ``file`` and ``label_index`` (others are ignored).
            ``file`` is relative to the CSV file's folder, or else to ``images``.
        images: The folder of the images.

    Returns:
        The files in the order of the CSV file, and their class indices of shape (n,).

    Raises:
        InputError: The CSV file cannot be read, has no such columns or no rows, a label is not a
            whole number from 0 on, or a file is missing or listed twice.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            columns = reader.fieldnames or ()
            for column in ("file", "label_index"):
                if column not in columns:
                    raise InputError(
                        f"{path}: no column {column!r}; the columns must be file,label_index"
                    )
            rows = [(reader.line_num, row["file"], row["label_index"]) for row in reader]
    except OSError as error:
        raise InputError(f"{path}: cannot read labels: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{path}: no rows; every image needs a line file,label_index")

    files: list[Path] = []
    labels: list[int] = []
    missing: list[str] = []
    for line, name, label in rows:
        if not name or label is None or not label.strip().isdecimal():
            raise InputError(
                f"{path}, line {line}: label_index must be a whole number from 0 on, "
                f"not {label!r} (file {name!r})"
            )
        if int(label) > _LARGEST_LABEL:
            raise InputError(f"{path}: {name} has the label {label}, which no class has")
        labels.append(int(label))
        file = path.parent / name
        if not file.is_file():
            file = images / name
            if not file.is_file():
                missing.append(name)
        files.append(file)
    if missing:
        count = "none of its" if len(missing) == len(rows) else f"{len(missing)} of its"
        found = "is there" if len(missing) == len(rows) else "are missing"
        raise InputError(
            f"{path}: {count} {len(rows)} files {found} (first: {missing[0]}); 'file' must be "
            f"relative to {path.parent} or {images}"
        )
    if len(set(files)) < len(files):
        twice = next(file for index, file in enumerate(files) if file in files[:index])
        raise InputError(f"{path}: {twice.name} is listed twice; keep one line a file")
    return files, np.array(labels, np.int64)


def label_array(labels: ArrayLike, *, inputs: int) -> NDArray[Any]:
    """Check an array of labels against the number of inputs.

    Args:
        labels: Numbers of shape (inputs, ...): class indices, or what a metric of one's own takes.
        inputs: How many inputs they belong to.

    Returns:
        Class indices as int64, others as they are.

    Raises:
        InputError: They are not numbers, or not one label for each input.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "biuf" or not array.ndim:
        raise InputError(
            "labels must be an array of numbers, one label for each input, not an array of "
            f"{array.dtype} of shape {array.shape}"
        )
    if len(array) != inputs:
        raise InputError(f"{len(array)} labels for {inputs} inputs; give one label for each input")
    return array.astype(np.int64) if are_class_indices(array) else array


def are_class_indices(labels: NDArray[Any]) -> bool:
    """Whether labels are whole numbers of shape (n,), of whatever classes."""
    return labels.ndim == 1 and labels.dtype.kind in "iu"


def check_label_range(
    labels: NDArray[Any], *, classes: int, positions: NDArray[np.int64] | None = None
) -> None:
    """Check that every label is a class of the model.

    Args:
        labels: Labels of shape (n, ...).
        classes: How many classes the model's output has.
        positions: Where the inputs stand in what the user gave, shape (n,); None if as here.

    Raises:
        InputError: They are no class indices, or a label is below 0 or not below ``classes``.
    """
    if not are_class_indices(labels):
        raise InputError(
            "labels must be a one-dimensional array of class indices, not an array of "
            f"{labels.dtype} of shape {labels.shape}; other labels go with a metric of your own"
        )
    outside = (labels < 0) | (labels >= classes)
    if not outside.any():
        return
    first = int(np.argmax(outside))
    hint = (
        "; the labels look shifted by one: does the model have no background class, or do the "
        "labels start from 1?"
        if labels.max() == classes and labels.min() >= 0
        else ""
    )
    number = first if positions is None else int(positions[first])
    raise InputError(
        f"label {labels[first]} of input {number} is not one of the model's {classes} classes "
        f"(0 to {classes - 1}), {int(outside.sum())} such labels in all{hint}"
    )
