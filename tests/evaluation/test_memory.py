from __future__ import annotations

from pathlib import Path

import pytest

from optuna_quantune.evaluation import memory
from optuna_quantune.evaluation.memory import cache_size


MEMINFO = "MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\n"


def test_the_default_is_a_quarter_of_what_is_free_in_the_smallest_of_all_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": "max\n"}

    def read(self: Path) -> str:
        if str(self) not in files:
            raise FileNotFoundError(str(self))
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read)
    assert cache_size() == 1000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "400\n"
    assert cache_size() == 100


def test_a_system_that_tells_nothing_gets_a_modest_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_system_free", lambda: None)
    monkeypatch.setattr(memory, "_container_limit", lambda: None)
    assert cache_size() == 1 << 28
