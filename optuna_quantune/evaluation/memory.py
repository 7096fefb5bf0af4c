"""How much memory decoded inputs may take."""

from __future__ import annotations

import os
from pathlib import Path


# Of the memory that is free when the inputs are opened; models and their activations need the
# rest. 1,000 images of 224 x 224 take 0.15 GB.
_SHARE = 0.25
# Where a system does not say how much is free.
_UNKNOWN = 1 << 30


def cache_size() -> int:
    """Bytes that decoded inputs may take by default: a quarter of the memory that is free."""
    free = [size for size in (_system_free(), _container_limit()) if size is not None]
    return int(_SHARE * min(free)) if free else int(_SHARE * _UNKNOWN)


def _system_free() -> int | None:
    """What the system can give without swapping, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: half of all memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None


def _container_limit() -> int | None:
    """The limit of this process's container (cgroup v2, then v1), in bytes.

    What it has used so far is no guide: that counts files that were read and can be dropped.
    """
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
    return None
