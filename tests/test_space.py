from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.space import SearchSpace


def test_the_quantune_preset_is_96_different_configurations() -> None:
    space = SearchSpace.preset("quantune")
    configs = {space.config(params) for params in space.grid()}
    assert len(configs) == space.size == 96


def test_the_extended_preset_holds_the_quantune_preset() -> None:
    space = SearchSpace.preset("extended")
    configs = {space.config(params) for params in space.grid()}
    assert len(configs) == space.size == 96 // 2 * 7 * 2 * 2 * 13 * 2 * 2 * 4
    quantune = SearchSpace.preset("quantune")
    assert {quantune.config(params) for params in quantune.grid()} < configs


def test_the_vta_preset_is_12_integer_only_configurations() -> None:
    space = SearchSpace.preset("vta")
    configs = {space.config(params) for params in space.grid()}
    assert len(configs) == space.size == 12
    assert {(c.scheme, c.granularity, c.mixed_precision) for c in configs} == {
        ("symmetric_power2", "tensor", "none")
    }


def test_a_space_is_a_mapping_that_grid_sampler_takes() -> None:
    space = SearchSpace({"scheme": ["symmetric", "asymmetric"], "clipping": ["max", "kl"]})
    grid = {name: list(d.choices) for name, d in space.items()}  # type: ignore[attr-defined]
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))
    seen = []
    study.optimize(lambda trial: seen.append(space.suggest(trial)) or 0.0, n_trials=10)
    assert set(seen) == {space.config(params) for params in space.grid()}
    assert len(seen) == 4


def test_knobs_left_out_keep_their_default() -> None:
    config = SearchSpace({"clipping": ["kl"]}).config({"clipping": "kl"})
    assert config == QuantizationConfig(clipping="kl")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"clippng": ["max"]}, "unknown knob 'clippng': use one of calibration_images, scheme"),
        ({"scheme": ["max"]}, "knob 'scheme': 'max' is not one of asymmetric, symmetric"),
        ({"calibration_images": [0]}, "neither a positive integer nor 'all'"),
        ({"bias_correction": ["yes"]}, "knob 'bias_correction': 'yes' is neither true nor false"),
        ({"equalization": [1]}, "knob 'equalization': 1 is neither true nor false"),
        ({"scheme": "symmetric"}, "give a list of choices"),
        ({"scheme": []}, "give a list of choices"),
        ({"speed": IntDistribution(0, 3)}, "unknown knob 'speed'"),
        ({}, "no knobs"),
    ],
)
def test_mistakes_in_a_space_are_named(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchSpace(knobs)  # type: ignore[arg-type]


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(InputError, match="'quantum': no such preset; use quantune"):
        SearchSpace.load("quantum")


def test_a_space_can_be_read_from_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    path.write_text(json.dumps({"scheme": ["symmetric"], "granularity": ["tensor", "channel"]}))
    space = SearchSpace.load(str(path))
    assert space.size == 2
    assert space["scheme"] == CategoricalDistribution(("symmetric",))


@pytest.mark.parametrize("content", ["not json", "[1, 2]"])
def test_broken_space_files_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "space.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"search space .*space\.json"):
        SearchSpace.load(str(path))
