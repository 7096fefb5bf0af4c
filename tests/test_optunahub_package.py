"""The OptunaHub package: loaded, downloaded, run and checked as the registry and its users do."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml  # type: ignore[import-untyped]  # Comes with Optuna, without types.
from optuna.distributions import CategoricalDistribution

from optuna_quantune import QuantuneSampler
from samplers.build import build


if shutil.which("git") is None:
    pytest.skip("optunahub needs the git command", allow_module_level=True)
optunahub = pytest.importorskip("optunahub", reason="optunahub is not installed")

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "samplers" / "quantune"
REGISTRY_SETTINGS = str(ROOT / "samplers" / "pyproject.toml")

# Runs code in which, as for a user of OptunaHub, there is no optuna_quantune.
ALONE = "import sys; sys.modules['optuna_quantune'] = None\n"

# Downloads the package from a registry, and prints which configurations it proposes.
PROPOSE = """
import json, sys
import optuna, optunahub
from optuna.distributions import CategoricalDistribution
owner, base_url = sys.argv[1:]
module = optunahub.load_module(
    "samplers/quantune", repo_owner=owner, repo_name="registry", base_url=base_url
)
space = {name: CategoricalDistribution(range(4)) for name in "abc"}
study = optuna.create_study(sampler=module.QuantuneSampler(space, seed=3))
study.optimize(lambda t: sum(i * t.suggest_categorical(k, range(4)) for i, k in enumerate("abc")),
               n_trials=12)
print(json.dumps([trial.params for trial in study.trials]))
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of a registry that holds nothing but the package."""
    folder = tmp_path_factory.mktemp("hub") / "registry"
    build(folder)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_alone(code: str, *arguments: str, cwd: Path, **environment: str) -> str:
    return run(sys.executable, "-c", ALONE + code, *arguments, cwd=cwd, **environment)


def front_matter_and_text() -> tuple[dict[str, Any], str]:
    _, front_matter, text = (PACKAGE / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front_matter), text


def test_loads_from_the_checkout_as_a_local_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = optunahub.load_local_module("samplers/quantune", registry_root=".")
    assert module.QuantuneSampler is QuantuneSampler
    assert sorted(module.__all__) == [
        "QuantuneSampler",
        "SearchSpaceExhausted",
        "SourceStudy",
        "knapsack_front",
    ]


def test_downloaded_package_needs_no_other_and_proposes_the_same(
    registry: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "owner" / "registry"
    shutil.copytree(registry, clone)
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
    run("git", "init", "--quiet", "--initial-branch=main", cwd=clone)
    run("git", "add", ".", cwd=clone)
    run("git", *author, "commit", "--quiet", "--no-gpg-sign", "--message=Add it", cwd=clone)

    proposed = run_alone(
        PROPOSE,
        "owner",
        f"file://localhost{tmp_path.as_posix()}",
        cwd=tmp_path,
        OPTUNAHUB_CACHE_HOME=str(tmp_path / "cache"),
    )

    assert list((tmp_path / "cache").rglob("samplers/quantune/sampler.py"))
    space = {name: CategoricalDistribution(range(4)) for name in "abc"}
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=3))
    study.optimize(
        lambda t: sum(i * t.suggest_categorical(k, range(4)) for i, k in enumerate("abc")),
        n_trials=12,
    )
    assert json.loads(proposed) == [trial.params for trial in study.trials]


def test_its_conformance_tests_pass_in_the_registry(registry: Path) -> None:
    cases = "test_study_ends or test_float or test_combination or mixed or conditional"
    options = ["-q", "-p", "no:cacheprovider", "-k", cases]
    tests = str(registry / "package" / "samplers" / "quantune" / "tests")
    code = f"import pytest; sys.exit(pytest.main({[*options, tests]!r}))"
    assert re.search(r"\b\d\d+ passed", run_alone(code, cwd=registry))


def test_example_finds_the_best_configuration(registry: Path) -> None:
    # 72 % less the smallest drop of its table: 256 images, asymmetric, kl by channel, mixed.
    best = "71.50 % top-1"
    assert best in run(sys.executable, str(PACKAGE / "example.py"), cwd=ROOT)
    code = "import runpy; runpy.run_path('samplers/quantune/example.py', run_name='__main__')"
    assert best in run_alone(code, cwd=registry / "package")


def test_example_of_the_readme_runs(registry: Path, tmp_path: Path) -> None:
    # Where load_module keeps what it has downloaded from the official registry.
    cached = tmp_path / "github.com" / "optuna" / "optunahub-registry" / "main"
    shutil.copytree(registry, cached)
    _, text = front_matter_and_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = run_alone(example, cwd=tmp_path, OPTUNAHUB_CACHE_HOME=str(tmp_path))
    assert "'clipping': 'percentile', 'granularity': 'channel'" in printed


def test_readme_has_the_header_and_the_sections_of_the_registry() -> None:
    front_matter, text = front_matter_and_text()
    keys = ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert list(front_matter) == keys
    assert all(front_matter.values())
    assert "sampler" in front_matter["tags"]
    assert front_matter["optuna_versions"] == ["5.0.0"]
    assert front_matter["license"] == "MIT License"
    assert re.findall(r"^##+ .*", text, re.MULTILINE) == [
        "## Abstract",
        "## APIs",
        "## Installation",
        "## Example",
        "## Others",
        "### Reference",
        "### Bibtex",
    ]


def test_readme_documents_every_argument() -> None:
    _, text = front_matter_and_text()
    documented = re.findall(r"^  - `(\w+)`: ", text, re.MULTILINE)
    assert documented == list(inspect.signature(QuantuneSampler).parameters)


def test_requirements_are_those_of_the_sampler_in_this_repository() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dependencies = {dependency.split(";")[0] for dependency in project["dependencies"]}
    assert set((PACKAGE / "requirements.txt").read_text("utf-8").split()) <= dependencies


def test_passes_the_style_checks_of_the_registry(registry: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--no-cache", "--config", REGISTRY_SETTINGS, "package"]
    run(*ruff, "check", *options, cwd=registry)
    run(*ruff, "format", "--check", *options, cwd=registry)


def test_passes_the_type_checks_of_the_registry(registry: Path, tmp_path: Path) -> None:
    # The registry checks types where neither Optuna nor NumPy is installed.
    options = ["--no-site-packages", "--cache-dir", str(tmp_path), "--config-file"]
    run(sys.executable, "-m", "mypy", *options, REGISTRY_SETTINGS, "package", cwd=registry)
