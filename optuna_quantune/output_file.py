"""Writing a file that was asked for, checked before the work."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from optuna_quantune.errors import InputError
from optuna_quantune.whole_file import whole_file


def check_writable(path: str | Path, float_model: str | Path) -> None:
    """Finds out before any work whether an int8 model can be written to `path`.

    Raises:
        InputError: If the folder is missing or cannot be written to, `path` is a folder, or it is
            the float model itself, which would be lost.
    """
    path = Path(path)
    check_folder(path, "output")
    if path.exists() and Path(float_model).exists() and path.samefile(float_model):
        raise InputError(f"output {path}: is the float model, which would be lost; name another")


def check_folder(path: Path, what: str) -> None:
    """Finds out before any work whether a file can be written to `path`.

    Args:
        path: The file to write.
        what: What it is, for messages.

    Raises:
        InputError: If the folder is missing or cannot be written to, or `path` is something else
            than a file.
    """
    try:
        if path.is_dir():
            raise InputError(f"{what} {path}: is a folder; name the file to write")
        if path.exists() and not path.is_file():  # a device or a pipe would be replaced
            raise InputError(f"{what} {path}: is no file; name the file to write")
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({error.strerror})") from error


def check_cache(folder: Path) -> None:
    """Finds out before any work whether a folder can keep files; makes it if it is not there.

    Raises:
        InputError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(
            f"cache {folder}: cannot be written ({error.strerror}); name another folder"
        ) from error


def write_model(model: onnx.ModelProto, path: str | Path) -> Path:
    """Writes a model.

    Raises:
        InputError: If the file cannot be written.
    """
    return write_whole(model.SerializeToString(), Path(path), "output")


def write_whole(data: bytes, path: Path, what: str) -> Path:
    """Writes a file, so that no half of it is ever left.

    Args:
        data: All of it.
        path: The file to write.
        what: What it is, for messages.

    Raises:
        InputError: If the file cannot be written.
    """
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({error.strerror})") from error
    return path
