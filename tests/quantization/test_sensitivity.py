"""The order of float layers, beside the noise model and measured noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.sensitivity import float_order


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]
Order = tuple[tuple[str, ...], ...]

CONFIG = QuantizationConfig(bias_correction=True)


@pytest.fixture(scope="module")
def noise(quantizer: Quantizer, toy_probe: Probe) -> NoiseModel:
    return NoiseModel(quantizer, toy_probe)


@pytest.fixture(scope="module")
def order(quantizer: Quantizer, noise: NoiseModel) -> Order:
    return order_of(quantizer, noise.predict(CONFIG))


def order_of(quantizer: Quantizer, prediction: NoisePrediction) -> Order:
    return float_order(PlacedGraph.of(quantizer.model, quantizer.placement(()), prediction))


def only(quantizer: Quantizer, **contributions: float) -> NoisePrediction:
    """A prediction in which only the given tensors and weights are noisy."""
    sites = {site.statistics for site in quantizer.placement(()).activations}
    assert set(contributions) <= sites
    rounding = dict.fromkeys(sites, 0.0) | contributions
    return NoisePrediction(rounding, dict.fromkeys(sites, 0.0), {}, {})


def test_every_step_takes_noise_away(
    quantizer: Quantizer,
    noise: NoiseModel,
    order: Order,
    toy_inputs: NDArray[np.float32],
    run: Run,
) -> None:
    reference = run(quantizer.model.proto, toy_inputs)
    predicted, measured = [], []
    quantizer.float_order = order
    try:
        for steps in range(len(order) + 1):
            config = QuantizationConfig(bias_correction=True, float_layers=steps)
            predicted.append(noise.predict(config).total)
            outputs = run(quantizer.quantize(config).proto, toy_inputs)
            measured.append(float(np.mean(np.square(outputs - reference))))
    finally:
        quantizer.float_order = None
    assert len(order) >= 3
    assert predicted == sorted(predicted, reverse=True)
    assert measured[-1] < 0.3 * measured[0]


def test_no_name_stands_in_two_steps_and_all_can_be_kept_in_float(
    quantizer: Quantizer, order: Order
) -> None:
    names = [name for step in order for name in step]
    assert len(set(names)) == len(names)
    place(quantizer.model, float_nodes=names)


def test_noise_that_two_nodes_share_is_taken_away_by_both(quantizer: Quantizer) -> None:
    prediction = only(quantizer, **{"depthwise.relu6": 1.0})
    order = order_of(quantizer, prediction)
    assert ("depthwise", "project") in order
    # The stem takes less time in float: it comes first, noise or not.
    assert order[0] == ("stem",)


def test_an_output_that_need_not_be_rounded_costs_no_layer(quantizer: Quantizer) -> None:
    prediction = only(quantizer, logits=1.0)
    order = order_of(quantizer, prediction)
    assert set(order) == {("logits",), ("stem",)}


def test_of_equal_noise_the_cheaper_node_comes_first(quantizer: Quantizer) -> None:
    weights = {"depthwise.weight": 1.0, "stem.weight": 1.0, "project.weight": 1.0}
    silent = dict.fromkeys(only(quantizer).rounding, 0.0)
    prediction = NoisePrediction(silent, silent, weights, {})
    order = order_of(quantizer, prediction)
    ranks = {name: rank for rank, step in enumerate(order) for name in step}
    # The integer stem would copy three channels together tap by tap.
    assert ranks["stem"] < ranks["project"]


def test_where_there_is_no_noise_nothing_is_left_in_float(quantizer: Quantizer) -> None:
    """Of a model whose outputs never change, as behind dead units."""
    assert order_of(quantizer, only(quantizer)) == ()


def test_the_knob_counts_steps(quantizer: Quantizer, order: Order) -> None:
    with pytest.raises(InputError, match="knob 'float_layers': this quantizer knows no order"):
        quantizer.float_layers(QuantizationConfig(float_layers=1))
    quantizer.float_order = order
    try:
        assert quantizer.float_layers(QuantizationConfig()) == ()
        two = quantizer.float_layers(QuantizationConfig(float_layers=2))
        assert two == (*order[0], *order[1])
        both = QuantizationConfig(float_layers=99, mixed_precision="first_last")
        found = set(quantizer.float_layers(both))
        # The step that would leave no layer quantized is not taken, nor what comes behind it.
        names = [{"stem", "head"}.union(*order[:n]) for n in range(len(order) + 1)]
        layers = {layer.name for layer in quantizer.model.layers}
        assert layers <= names[-1]
        assert found == max((n for n in names if not layers <= n), key=len)
        proto = quantizer.quantize(both).proto
        assert "QuantizeLinear" in {node.op_type for node in proto.graph.node}
    finally:
        quantizer.float_order = None


@pytest.mark.parametrize("value", [-1, 1.0, True, "2"])
def test_other_values_of_the_knob_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="knob 'float_layers'"):
        QuantizationConfig(float_layers=value)  # type: ignore[arg-type]


def test_what_stays_in_float_decides_how_long_a_model_takes(
    quantizer: Quantizer, noise: NoiseModel
) -> None:
    graph = PlacedGraph.of(quantizer.model, quantizer.placement(()), noise.predict(CONFIG))
    everything = frozenset(graph.nodes)
    assert graph.latency_ratio(everything) == pytest.approx(1.0)
    # The toy's integer nodes are so small that what nodes take by themselves decides.
    float_stem = graph.latency_ratio(frozenset({"stem"}))
    assert float_stem < graph.latency_ratio(frozenset())
    # Sixteen bits: float nodes, and conversions around each.
    assert graph.latency_ratio(frozenset(), activation_bits=16) > 1.0
    some = graph.latency_ratio(frozenset({"stem", "depthwise"}), activation_bits=16)
    assert 1.0 < some < graph.latency_ratio(frozenset(), activation_bits=16)
