"""Files that are never left half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


# Characters of the final name in the name beside it, which may have 255 bytes.
_LONGEST_STEM = 50


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
    half = path.with_name(f"{path.stem[:_LONGEST_STEM]}.{secrets.token_hex(8)}.tmp")
    try:
        with half.open("xb") as file:  # others may read it as any file, unlike those of tempfile
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the name without content
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)  # there only if something went wrong
