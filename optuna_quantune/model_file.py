"""Writing a model file: checked before the work, and never left half written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import onnx

from optuna_quantune.errors import InputError


def check_writable(path: str | Path, float_model: str | Path) -> None:
    """Finds out before any work whether an int8 model can be written to `path`.

    Raises:
        InputError: If the folder is missing or cannot be written to, `path` is a folder, or it is
            the float model itself, which would be lost.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output {path}: is a folder; name the .onnx file to write")
    if path.exists() and Path(float_model).exists() and path.samefile(float_model):
        raise InputError(f"output {path}: is the float model, which would be lost; name another")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(f"output {path}: cannot be written ({error.strerror})") from error


def write_model(model: onnx.ModelProto, path: str | Path) -> Path:
    """Writes a model beside its final name and renames it, so no half model is ever left.

    Raises:
        InputError: If the file cannot be written.
    """
    path = Path(path)
    half: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            half = Path(file.name)
            file.write(model.SerializeToString())
        half.chmod(0o666 & ~_umask())
        half.replace(path)
    except OSError as error:
        raise InputError(f"output {path}: cannot be written ({error.strerror})") from error
    finally:
        if half is not None:
            half.unlink(missing_ok=True)  # there only if something went wrong
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
