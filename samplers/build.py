"""Lays out samplers/quantune as the OptunaHub registry wants it: self-contained, in one folder.

``python samplers/build.py REGISTRY`` writes ``REGISTRY/package/samplers/quantune``, which is ready
to be committed in a clone of optuna/optunahub-registry.

OptunaHub fetches that folder and nothing else. There, a wrapper over the PyPI package would need
its release, and would bring ONNX Runtime to whoever only wants a sampler; a second copy of the
sampler in this repository would drift. So the folder that is committed here imports the sampler
from ``optuna_quantune``, and this script puts the modules of ``optuna_quantune/search`` beside it
and makes the imports relative.
"""

from __future__ import annotations

from pathlib import Path
import re
import shutil
import subprocess
import sys


_SAMPLERS = Path(__file__).resolve().parent
_SOURCE = _SAMPLERS.parent / "optuna_quantune"

_INTERNAL_IMPORT = re.compile(r"from optuna_quantune(?:\.search)?\.(\w+) import")
# As the examples in docstrings have it.
_PUBLIC_IMPORT = re.compile(r"( *)from optuna_quantune import QuantuneSampler\n")


def build(registry: Path) -> Path:
    """Writes the package into a registry, in place of an earlier version of it.

    Args:
        registry: Folder of the registry, with the folder ``package`` or to get one.

    Returns:
        The folder of the package.

    Raises:
        subprocess.CalledProcessError: If ruff finds something to complain of.
    """
    package = registry / "package" / "samplers" / "quantune"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        _SAMPLERS / "quantune", package, ignore=shutil.ignore_patterns("__pycache__", ".*")
    )
    for module in [_SOURCE / "errors.py", *(_SOURCE / "search").glob("[!_]*.py")]:
        shutil.copy(module, package)
    for file in package.glob("*.py"):
        file.write_text(_self_contained(file.read_text(encoding="utf-8")), encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--quiet", "--no-cache", "--config", str(_SAMPLERS / "pyproject.toml"), str(package)]
    subprocess.run([*ruff, "check", "--fix", *config], check=True)
    subprocess.run([*ruff, "format", *config], check=True)
    return package


def _self_contained(code: str) -> str:
    code = _INTERNAL_IMPORT.sub(r"from .\1 import", code)
    return _PUBLIC_IMPORT.sub(
        r"\1import optunahub"
        "\n\n"
        r'\1QuantuneSampler = optunahub.load_module("samplers/quantune").QuantuneSampler'
        "\n",
        code,
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python samplers/build.py REGISTRY")
    print(build(Path(sys.argv[1])))
