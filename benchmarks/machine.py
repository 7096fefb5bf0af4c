"""What a measurement was made on: processor, cores, versions; every result file says it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna_quantune.quantization.processor import detect_vnni


PACKAGES = ("onnxruntime", "onnx", "optuna", "xgboost-cpu", "numpy", "optuna-quantune")


def describe() -> dict[str, str]:
    """The machine and the versions, by name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "VNNI": "yes" if "vnni" in _cpu_flags() else "no",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **versions,
    }


def results_of(benchmark: str) -> str:
    """The folder of a benchmark's results: processors without VNNI have one of their own."""
    return benchmark if detect_vnni() is not False else f"{benchmark}_without_vnni"


def as_markdown(description: dict[str, str]) -> str:
    """One line for the head of a result."""
    return ", ".join(f"{name} {value}" for name, value in description.items())


def of_all(records: Iterable[Mapping[str, Any]]) -> str:
    """The machines that measurements were made on, each once, for the head of a result.

    Args:
        records: Each with what `describe` gave under ``machine``.
    """
    return "; ".join(dict.fromkeys(as_markdown(record["machine"]) for record in records))


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _processor() -> str:
    for line in _cpu_info().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _cpu_flags() -> str:
    return next((line for line in _cpu_info().splitlines() if line.startswith("flags")), "")
