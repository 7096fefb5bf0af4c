"""Files that are never left half written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file beside the final name, which gets that name when all of it is written.

    What is interrupted leaves the old file, and nothing else. A link stays one: what it points to
    is replaced.

    Args:
        path: The file to write; its folder must exist.

    Raises:
        OSError: If it cannot be written.
    """
    path = path.resolve()
    half: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp", delete=False
        ) as file:
            half = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the name without content
        half.chmod(0o666 & ~_umask())  # others may read it as any file
        half.replace(path)
    finally:
        if half is not None:
            half.unlink(missing_ok=True)  # there only if something went wrong


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
