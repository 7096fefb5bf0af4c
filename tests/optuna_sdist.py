"""Runs the sampler tests that only Optuna's source distribution has on QuantuneSampler.

    python tests/optuna_sdist.py [PYTEST_OPTION ...]

The conformance cases that every sampler has to pass come with Optuna and are among the tests here.
Its own repository has more: that a seed gives the same trials again, in another process with other
string hashes too, and that `reseed_rng` gives others. They run over tables of Optuna's samplers;
this fetches the source distribution of the installed version and adds a line to those tables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
_TABLE = "sampler_class_with_seed: dict[str, Callable[[int], BaseSampler]] = {\n"
_ENTRY = '    "QuantuneSampler": lambda seed: QuantuneSampler(seed=seed),\n'
# Optuna checks here that a sampler reseeds its random numbers and those of its inner sampler.
_RESEEDED = "        (optuna.samplers.RandomSampler, True, False),\n"
_RESEEDED_ENTRY = "        (QuantuneSampler, True, True),\n"
_IMPORT = "from optuna_quantune.search.sampler import QuantuneSampler\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        sources = fetch(Path(folder))
        tests = sources / "tests" / "samplers_tests" / "test_samplers.py"
        code = tests.read_text(encoding="utf-8")
        for line, entry in ((_TABLE, _ENTRY), (_RESEEDED, _RESEEDED_ENTRY)):
            if code.count(line) != 1:
                sys.exit(f"{tests.name}: its tables of samplers have another form in this version")
            code = code.replace(line, line + entry)
        tests.write_text(code.replace("import optuna\n", f"import optuna\n{_IMPORT}", 1))
        # What is under test is what is installed, not the sources beside the tests.
        (sources / "optuna").rename(sources / "optuna_sources")
        options = ["-p", "no:cacheprovider", "-W", "ignore", "-k", "QuantuneSampler"]
        command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:], str(tests)]
        environment = {**_environment(), "PYTHONPATH": f"{sources}:{ROOT}"}
        return subprocess.run(command, cwd=sources, env=environment).returncode


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the source distribution of the installed Optuna."""
    name = f"optuna-{version('optuna')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    requirement = name.replace("-", "==")
    subprocess.run([*pip, "--dest", str(folder), requirement], check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def _environment() -> dict[str, str]:
    # The tests start processes whose string hashes must differ.
    return {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}


if __name__ == "__main__":
    sys.exit(main())
