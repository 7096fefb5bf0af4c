"""Random graphs (`random_graphs.py`), targets and configurations: what holds for all of them.

The seeds are fixed. Others show more; what they showed has a test of its own elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from optuna_quantune.builder import Builder
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import keep_float
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target
from tests.quantization.random_graphs import exact_session
from tests.quantization.random_graphs import random_graph
from tests.quantization.random_graphs import RandomGraph


Arrays = list[NDArray[Any]]
SEEDS = range(64)
TARGETS = ("cpu", "cpu", "arm64", "qnn", "cpu", "tensorrt", "cpu", "vta")
# Noise of float32 itself, over values of very different sizes.
ROUNDING = 85.0
# Noise of 8 bits that kernels may share out differently, and that integers are too small to show.
FAINT = 45.0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_graph_is_quantized_as_its_configuration_says(seed: int, tmp_path: Path) -> None:
    graph = random_graph(seed)
    path = tmp_path / "model.onnx"
    onnx.save(graph.model, path)
    expected = outputs(graph.model, graph)
    try:
        model = load_float_model(path)
        builder = builder_of(model, graph, TARGETS[seed % len(TARGETS)])
        builder.prepare()
    except InputError as error:
        if "nothing can be quantized" not in str(error):
            raise
        return
    assert decibels(outputs(model.proto, graph), expected) > ROUNDING
    for config in configurations(builder, seed):
        if config.equalization:
            equalized = builder.quantizer(equalized=True).model.proto
            assert decibels(outputs(equalized, graph), expected) > ROUNDING
        quantized = builder.quantize(config)
        proto = quantized.proto
        onnx.checker.check_model(proto)
        assert types(proto) == types(model.proto)
        assert builder.quantize(config).digest == quantized.digest
        exact = outputs(proto, graph)
        assert all(np.isfinite(output).all() for output in exact)
        assert [o.shape for o in exact] == [o.shape for o in expected]
        noise = decibels(exact, expected)
        assert np.isfinite(builder.predict(config).features()["predicted_sqnr_db"])
        if noise < FAINT:
            # The integer kernels that ONNX Runtime makes of pairs and nodes compute the same.
            other_device = TARGETS[seed % len(TARGETS)] != "cpu"
            session = make_session(proto.SerializeToString(), exact_products=other_device)
            fused = outputs(session, graph)
            assert decibels(fused, expected) == pytest.approx(noise, abs=3.0)


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_a_random_graph_with_all_nodes_in_float_has_no_integers(seed: int, tmp_path: Path) -> None:
    graph = random_graph(seed)
    path = tmp_path / "model.onnx"
    onnx.save(graph.model, path)
    model = load_float_model(path)
    whole = builder_of(model, graph, "arm64").quantizer(equalized=False).placement(())
    kept = keep_float(whole, model, [node.name for node in model.proto.graph.node])
    assert not kept.activations
    assert not kept.constants
    found = outputs(kept.template, graph)
    assert decibels(found, outputs(graph.model, graph)) > ROUNDING


@pytest.mark.parametrize("seed", SEEDS[::8])
def test_a_seed_gives_one_graph(seed: int) -> None:
    first, second = random_graph(seed), random_graph(seed)
    assert first.model.SerializeToString() == second.model.SerializeToString()


def builder_of(model: FloatModel, graph: RandomGraph, name: str) -> Builder:
    target = get_target(name)
    specs = [InputSpec(i.name, i.shape, i.dtype) for i in model.inputs]
    return Builder(
        model,
        ArrayInputs(graph.inputs).bind(specs),
        space=target.restrict(SearchSpace.preset("vta" if name == "vta" else "extended")),
        target=target,
        takes_batches=lambda: model.takes_batches,
        cache=None,
        progress=lambda stage, done, total: None,
    )


def configurations(builder: Builder, seed: int) -> list[QuantizationConfig]:
    """The plainest that the target can run, and one by chance."""
    rng = np.random.default_rng(seed)
    choices = {knob: getattr(d, "choices", ()) for knob, d in builder._space.items()}
    plain = {
        knob: default if (default := getattr(QuantizationConfig(), knob)) in values else values[0]
        for knob, values in choices.items()
    }
    chance = {knob: values[rng.integers(len(values))] for knob, values in choices.items()}
    return [QuantizationConfig(**knobs) for knobs in (plain, chance)]


def types(model: onnx.ModelProto) -> list[tuple[str, int]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    values = (*model.graph.input, *model.graph.output)
    return [(v.name, v.type.tensor_type.elem_type) for v in values if v.name not in constants]


def outputs(model: onnx.ModelProto | onnxruntime.InferenceSession, graph: RandomGraph) -> Arrays:
    """Every output for each input, one after the other."""
    session = exact_session(model) if isinstance(model, onnx.ModelProto) else model
    each = range(len(next(iter(graph.inputs.values()))))
    found = [session.run(None, {n: x[i : i + 1] for n, x in graph.inputs.items()}) for i in each]
    return [np.stack(output) for output in zip(*found, strict=True)]


def decibels(found: Arrays, expected: Arrays) -> float:
    ratios = [
        np.square(a - b, dtype=np.float64).mean() / np.square(b, dtype=np.float64).mean()
        for a, b in zip(found, expected, strict=True)
        if b.any()
    ]
    return float(-10.0 * np.log10(max(np.mean(ratios), 1e-20))) if ratios else np.inf
