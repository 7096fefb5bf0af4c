from __future__ import annotations

import re
import tomllib
from pathlib import Path

import optuna_quantune


ROOT = Path(__file__).parents[1]


def test_the_lowest_versions_that_are_tested_are_those_that_are_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [*project["dependencies"], *extras["dashboard"], *extras["report"]]
    promised = dict(re.findall(r"^([a-z-]+)>=([\d.]+)", "\n".join(names), re.M))
    del promised["xgboost"]  # the name of xgboost-cpu on another platform
    tested = dict(
        re.findall(r"^([a-z-]+)==([\d.]+)", (ROOT / "tests/lowest.txt").read_text(), re.M)
    )
    assert set(tested) == set(promised)
    for name, version in promised.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", tested[name]), name


def test_public_names_are_sorted_and_there() -> None:
    assert optuna_quantune.__all__ == sorted(optuna_quantune.__all__)
    assert all(hasattr(optuna_quantune, name) for name in optuna_quantune.__all__)


def test_rooms_do_not_import_each_other() -> None:
    package = Path(optuna_quantune.__file__).parent
    rooms = ("quantization", "evaluation", "search")
    shared = {"errors", "pipeline", "whole_file"}
    for room in rooms:
        for file in (package / room).glob("*.py"):
            imported = set(re.findall(r"from optuna_quantune\.(\w+)", file.read_text()))
            assert imported <= {room, *shared}, f"{file.name} imports {imported}"


def test_quantization_and_evaluation_know_nothing_of_optuna_and_search_nothing_of_onnx() -> None:
    package = Path(optuna_quantune.__file__).parent
    for room, foreign in (
        ("quantization", "optuna"),
        ("evaluation", "optuna"),
        ("search", "onnx"),
    ):
        for file in (package / room).glob("*.py"):
            pattern = rf"^\s*(?:import|from) {foreign}(?:runtime)?(?:\.|\s)"
            assert not re.search(pattern, file.read_text(), re.M), f"{file.name}: {foreign}"
