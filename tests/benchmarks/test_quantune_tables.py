"""The OptunaHub benchmark package: loaded, run and checked as the registry and its users do."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import yaml  # type: ignore[import-untyped]  # Comes with Optuna, without types.

from benchmarks import build_package
from benchmarks import tables
from optuna_quantune.space import SearchSpace


if shutil.which("git") is None:
    pytest.skip("optunahub needs the git command", allow_module_level=True)
optunahub = pytest.importorskip("optunahub", reason="optunahub is not installed")


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "benchmarks" / "quantune_tables"
REFRESHED = ("latency_ratio", "predicted_sqnr_db", "expected_agreement", "prior", "seconds")
REGISTRY_SETTINGS = str(ROOT / "samplers" / "pyproject.toml")

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def package() -> Any:
    return optunahub.load_local_module("benchmarks/quantune_tables", registry_root=str(ROOT))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build_package.copy(folder)
    return folder


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_configuration_of_every_model_has_the_values_of_its_row(package: Any) -> None:
    with (PACKAGE / "tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(Counter(row["model"] for row in rows).values()) == {96}
    assert {row["model"] for row in rows} == set(package.Problem.available_models())
    metrics = [name for name in package.Problem.available_metrics if name != "latency_ratio"]
    problems = {m: package.Problem(m, metric=metrics) for m in package.Problem.available_models()}
    for row in rows:
        params = {
            name: next(choice for choice in knob.choices if str(choice) == row[name])
            for name, knob in problems[row["model"]].search_space.items()
        }
        expected = [float(row[metric]) for metric in metrics]
        assert problems[row["model"]].evaluate(params) == expected


def test_the_accuracies_are_the_recorded_ones(package: Any) -> None:
    """Fails when a table was recorded anew: run ``python -m benchmarks.build_package``.

    Predictions and latencies can be refreshed without that; a release has them all.
    """
    recorded = [tables.load(name) for name in package.Problem.available_models()]
    made = build_package.configurations(recorded)
    shipped = pd.read_csv(PACKAGE / "tables.csv", dtype={"calibration_images": str})
    assert list(made) == list(shipped)
    columns = [name for name in made if name not in REFRESHED]
    pd.testing.assert_frame_equal(made[columns], shipped[columns])
    assert (
        build_package.models(recorded).to_csv(index=False) == (PACKAGE / "models.csv").read_text()
    )


def test_its_search_space_is_the_preset(package: Any) -> None:
    assert package.Problem().search_space == dict(SearchSpace.preset("quantune"))


def test_a_study_optimizes_it(package: Any) -> None:
    problem = package.Problem("demo")
    choices = {name: list(d.choices) for name, d in problem.search_space.items()}
    study = optuna.create_study(
        directions=problem.directions, sampler=optuna.samplers.GridSampler(choices)
    )
    study.optimize(problem)
    assert len(study.trials) == 96
    assert study.best_value == problem.best_value()
    assert problem.evaluate(study.best_params) == problem.best_value()


def test_several_metrics_are_several_objectives(package: Any) -> None:
    problem = package.Problem("demo", metric=("top1", "size_bytes"))
    study = optuna.create_study(directions=problem.directions)
    study.optimize(problem, n_trials=5)
    assert study.directions == [
        optuna.study.StudyDirection.MAXIMIZE,
        optuna.study.StudyDirection.MINIMIZE,
    ]
    for trial in study.trials:
        single = [package.Problem("demo", metric=m) for m in problem.metric_names]
        assert trial.values == [each.evaluate(trial.params) for each in single]
    with pytest.raises(ValueError, match="no single best"):
        problem.best_value()


def test_the_constraint_holds_where_accuracy_stays(package: Any) -> None:
    problem = package.Problem("mobilenetv2_1.0", max_accuracy_drop=0.01)
    study = optuna.create_study(directions=problem.directions)
    for granularity in ("tensor", "channel"):
        study.enqueue_trial(
            {
                "calibration_images": 32,
                "scheme": "asymmetric",
                "clipping": "max",
                "granularity": granularity,
                "mixed_precision": "none",
            }
        )
    study.optimize(problem, n_trials=2)
    # One scale for a whole weight ruins MobileNetV2, one for each channel does not.
    assert study.trials[0].constraints["accuracy_drop"] > 0.5
    assert study.trials[1].constraints["accuracy_drop"] <= 0
    drop = problem.float_value("top1") - study.trials[0].value
    assert study.trials[0].constraints["accuracy_drop"] == pytest.approx(drop - 0.01)


def test_latencies_are_there_or_said_to_be_missing(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(name: str) -> list[dict[str, str]]:
        with (PACKAGE / name).open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] in ("demo", "other")]
        for n, row in enumerate(rows):
            row["latency_ratio"] = "" if n == 7 and is_missing else "0.5"
        return rows

    monkeypatch.setattr(sys.modules[package.Problem.__module__], "_read", read)
    is_missing = False
    assert package.Problem("demo", metric="latency_ratio").best_value() == 0.5
    is_missing = True
    with pytest.raises(ValueError, match="'latency_ratio': it was not recorded for demo"):
        package.Problem("demo", metric="latency_ratio")


def test_features_and_seconds_are_there_for_every_configuration(package: Any) -> None:
    problem = package.Problem("demo")
    for params in SearchSpace.preset("quantune").grid():
        assert 0 <= problem.features(params)["prior"] <= 1
        assert problem.seconds(params) > 0


@pytest.mark.parametrize(
    ("arguments", "named"), [({"model": "vgg"}, "vgg"), ({"metric": "loss"}, "loss")]
)
def test_unknown_names_are_said_with_those_there_are(
    package: Any, arguments: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=f"'{named}': use .*(demo|top1)"):
        package.Problem(**arguments)


def test_example_runs_in_the_registry(registry: Path) -> None:
    example = registry / "package" / "benchmarks" / "quantune_tables" / "example.py"
    printed = run(sys.executable, str(example), cwd=registry)
    assert re.search(r"mobilenetv2_1.0, TPE: \d\.\d\d points below the best", printed)


def test_readme_has_the_header_and_the_sections_of_the_registry() -> None:
    _, header, text = (PACKAGE / "README.md").read_text("utf-8").split("---\n", 2)
    front_matter = yaml.safe_load(header)
    keys = ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert list(front_matter) == keys
    assert all(front_matter.values())
    assert "benchmark" in front_matter["tags"]
    sections = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert sections == ["Abstract", "APIs", "Installation", "Example", "Others"]


def test_readme_names_every_public_member(package: Any) -> None:
    text = (PACKAGE / "README.md").read_text("utf-8")
    documented = set(re.findall(r"^- `(\w+)", text, re.MULTILINE))
    inherited = {"constraints_func"}
    members = {name for name in dir(package.Problem) if not name.startswith("_")} - inherited
    assert members <= documented


def test_it_is_small_enough_for_the_registry() -> None:
    assert sum(file.stat().st_size for file in PACKAGE.glob("*.*")) < 200_000


def test_passes_the_checks_of_the_registry(registry: Path, tmp_path: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--no-cache", "--config", REGISTRY_SETTINGS, "package"]
    run(*ruff, "check", *options, cwd=registry)
    run(*ruff, "format", "--check", *options, cwd=registry)
    types = ["--no-site-packages", "--cache-dir", str(tmp_path), "--config-file"]
    run(sys.executable, "-m", "mypy", *types, REGISTRY_SETTINGS, "package", cwd=registry)
