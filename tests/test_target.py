from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution

from optuna_quantune import target as target_module
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.integer_only import float_nodes
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target
from optuna_quantune.target import Target


NAMES = ("cpu", "arm64", "tensorrt", "qnn", "vta")


def choices(space: SearchSpace) -> dict[str, tuple[Any, ...]]:
    return {
        name: distribution.choices
        for name, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution)
    }


@pytest.mark.parametrize("preset", ["quantune", "extended"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_a_target_cannot_run_is_left_in_a_space(name: str, preset: str) -> None:
    target = get_target(name)
    space = SearchSpace.preset(preset)
    restricted = target.restrict(space)
    for params in restricted.grid():
        target.check(restricted.config(params))
    # All that is left out is refused.
    left = {restricted.config(params) for params in restricted.grid()}
    for params in itertools.islice(space.grid(), 300):
        config = space.config(params)
        if config not in left:
            with pytest.raises(InputError, match=f"target '{name}' runs"):
                target.check(config)


def test_the_spaces_of_the_targets() -> None:
    quantune = SearchSpace.preset("quantune")
    assert get_target("cpu").restrict(quantune) == quantune
    assert get_target("arm64").restrict(quantune) == quantune
    assert get_target("qnn").restrict(quantune) == quantune
    vta = get_target("vta").restrict(SearchSpace.preset("vta"))
    assert vta == SearchSpace.preset("vta")
    tensorrt = choices(get_target("tensorrt").restrict(quantune))
    assert tensorrt["scheme"] == ("symmetric", "symmetric_power2")
    # The default of a knob that the space leaves out may be one that the target cannot run.
    assert tensorrt["fusion"] == ("on",)
    assert choices(get_target("vta").restrict(SearchSpace({"clipping": ["kl"]}))) == {
        "clipping": ("kl",),
        "scheme": ("symmetric_power2",),
        "granularity": ("tensor",),
        "fusion": ("off", "on"),
    }


def test_a_fixed_knob_that_a_target_cannot_run_is_one_clear_error() -> None:
    message = (
        "knob 'scheme': target 'vta' runs 'symmetric_power2', nothing that the search space holds"
    )
    with pytest.raises(InputError, match=message):
        get_target("vta").restrict(SearchSpace({"scheme": ["asymmetric", "symmetric"]}))
    with pytest.raises(InputError, match="knob 'fusion': target 'cpu' runs 'runtime', nothing"):
        get_target("cpu").restrict(SearchSpace.preset("vta"))
    with pytest.raises(InputError, match="target 'tensorrt' runs .*, not 'asymmetric'"):
        get_target("tensorrt").check(QuantizationConfig())


def test_numerical_knobs_are_restricted_to_what_is_allowed() -> None:
    target = dataclasses.replace(get_target("cpu"), knobs={"calibration_images": (2, 8, 64)})
    restricted = target.restrict(SearchSpace({"calibration_images": IntDistribution(1, 32)}))
    assert choices(restricted) == {"calibration_images": (2, 8)}


def test_unknown_targets_name_the_known_ones() -> None:
    with pytest.raises(InputError, match="'gpu': unknown; use one of cpu, arm64, tensorrt"):
        get_target("gpu")


@pytest.mark.parametrize(
    ("arm", "vnni", "activations", "pairs"),
    [
        (False, True, "uint8", False),
        (False, False, "uint8", True),
        (False, None, "uint8", False),
        (True, None, "int8", False),
    ],
)
def test_the_processor_decides_the_representation(
    monkeypatch: pytest.MonkeyPatch, arm: bool, vnni: bool | None, activations: str, pairs: bool
) -> None:
    monkeypatch.setattr(target_module, "is_arm", lambda: arm)
    monkeypatch.setattr(target_module, "detect_vnni", lambda: vnni)
    representation = get_target("cpu").representation
    assert (representation.activations, representation.adds_in_pairs) == (activations, pairs)
    assert get_target("arm64").measures_latency == arm


@pytest.mark.parametrize(
    ("name", "provider"),
    [("tensorrt", "TensorrtExecutionProvider"), ("qnn", "QNNExecutionProvider")],
)
def test_the_devices_own_provider_is_used_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, provider: str
) -> None:
    there = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    target = get_target(name)
    assert target.providers == ("CPUExecutionProvider",)
    assert not target.measures_latency
    there.insert(0, provider)
    target = get_target(name)
    first = target.providers[0]
    assert (first if isinstance(first, str) else first[0]) == provider
    assert target.providers[-1] == "CPUExecutionProvider"
    assert target.measures_latency


def objective_for(
    target: str | Target, toy_model: Path, toy_inputs: NDArray[np.float32], preset: str
) -> QuantizationObjective:
    inputs = ArrayInputs(toy_inputs)
    return QuantizationObjective(
        toy_model,
        calibration=inputs,
        evaluation=inputs,
        space=SearchSpace.preset(preset),
        target=target,
        cache=None,
    )


def test_an_objective_for_vta_builds_integer_only_models(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    objective = objective_for("vta", toy_model, toy_inputs, "vta")
    assert objective.space.size == 12
    for params in objective.space.grid():
        quantized = objective.quantize(objective.space.config(params))
        assert float_nodes(quantized.proto) == ()
        assert "expected_agreement" in objective.features(params)
    with pytest.raises(InputError, match="knob 'scheme': target 'vta'"):
        objective.quantize(QuantizationConfig())


def test_models_of_other_devices_do_not_saturate_on_this_processor(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    key = "session.x64quantprecision"
    for target, exact in (("qnn", "1"), ("vta", "1"), ("cpu", "0")):
        preset = "vta" if target == "vta" else "quantune"
        evaluator = objective_for(target, toy_model, toy_inputs, preset)._evaluator
        options = evaluator._session(toy_model).get_session_options()
        assert options.get_session_config_entry(key) == exact


def test_a_bound_on_latency_needs_a_device_that_can_be_timed(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    inputs = ArrayInputs(toy_inputs)
    for options in ({"max_latency": 0.5}, {"objectives": ("accuracy", "latency")}):
        with pytest.raises(InputError, match="latency: target 'vta' cannot be timed"):
            QuantizationObjective(
                toy_model,
                calibration=inputs,
                evaluation=inputs,
                target="vta",
                cache=None,
                **options,
            )


def test_an_objective_for_tensorrt_keeps_to_its_rules(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    objective = objective_for("tensorrt", toy_model, toy_inputs, "quantune")
    assert objective.space.size == 48
    for params in itertools.islice(objective.space.grid(), 0, None, 5):
        proto = objective.quantize(objective.space.config(params)).proto
        constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
        integers = [values for values in constants.values() if values.dtype.kind in "iu"]
        assert {values.dtype for values in integers} == {np.dtype(np.int8)}
        for node in proto.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert not constants[node.input[2]].any()
            if node.op_type == "DequantizeLinear" and node.input[0] in constants:
                assert constants[node.input[0]].min() >= -127
        readers = {name: node.op_type for node in proto.graph.node for name in node.input}
        assert readers["depthwise.out"] == "Clip"
        assert readers["project.out"] == "Add"
        onnx.checker.check_model(proto, full_check=True)
