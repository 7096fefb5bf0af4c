"""The order of float layers, beside the noise model and measured noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.placed_graph import PlacedNode
from optuna_quantune.quantization.placed_graph import PlacedTensor
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
    assert len(order) >= 2
    assert predicted == sorted(predicted, reverse=True)
    assert measured[-1] < 0.3 * measured[0]


def test_no_name_stands_in_two_steps_and_all_can_be_kept_in_float(
    quantizer: Quantizer, order: Order
) -> None:
    names = [name for step in order for name in step]
    assert len(set(names)) == len(names)
    place(quantizer.model, float_nodes=names)


def chain(
    nodes: Sequence[tuple[float, float, float]],
    tensors: Sequence[float],
    values: float = 1000.0,
) -> PlacedGraph:
    """Nodes in a row, by noise of the weight and time in integers and in float.

    Before, between and behind them are tensors, by their noise.
    """
    return PlacedGraph(
        {
            f"n{i}": PlacedNode(*node, frozenset({f"t{i}", f"t{i + 1}"}))
            for i, node in enumerate(nodes)
        },
        frozenset(f"n{i}" for i in range(len(nodes))),
        {
            f"t{i}": PlacedTensor(
                values,
                noise,
                {f"n{i - 1}"} if i > 0 else set(),
                {f"n{i}"} if i < len(nodes) else set(),
            )
            for i, noise in enumerate(tensors)
        },
        always_float=frozenset(),
        rest=0.0,
        rest_in_float=0.0,
    )


def lower_hull(points: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lowest of all lines between two points, or the lowest point to the left."""
    lowest = np.array([points[points[:, 0] <= value, 1].min(initial=np.inf) for value in x])
    for left, right in itertools.permutations(points, 2):
        between = (x >= left[0]) & (x <= right[0]) & (left[0] < right[0])
        share = (x[between] - left[0]) / (right[0] - left[0])
        lowest[between] = np.minimum(lowest[between], left[1] + share * (right[1] - left[1]))
    return lowest


def prefixes(order: Order) -> list[frozenset[str]]:
    """What is left in float with 1, 2 and more steps."""
    return [frozenset().union(*order[: n + 1]) for n in range(len(order))]


def test_noise_that_two_nodes_share_is_taken_away_by_both() -> None:
    graph = chain([(0.0, 1e4, 1e5)] * 4, [0.1, 0.1, 1.0, 0.1, 0.1])
    assert float_order(graph)[0] == ("n1", "n2")


def test_a_block_pays_where_no_node_or_edge_of_it_does() -> None:
    """Two conversions are dear, and what stands between them is not."""
    noise = [0.0, 0.0, 0.0, *[1.0] * 6, 0.0, 0.0, 0.0]
    ends = [(0.0, 1e4, 1e7)] * 2
    graph = chain([*ends, *[(0.0, 1e4, 1.1e4)] * 7, *ends], noise, values=1e5)
    block = tuple(f"n{i}" for i in range(2, 9))
    assert frozenset(block) in prefixes(float_order(graph))


def test_what_takes_less_time_in_float_comes_first() -> None:
    """An integer stem of few channels, which copies its input together tap by tap."""
    graph = chain([(0.0, 9e4, 1e4), (1.0, 1e4, 5e4), (1.0, 1e4, 9e4)], [0.0] * 4)
    assert float_order(graph)[0] == ("n0",)


def test_of_equal_noise_the_cheaper_node_comes_first() -> None:
    graph = chain([(1.0, 1e4, 4e4), (0.0, 1e4, 4e6), (1.0, 1e4, 2e4)], [0.0] * 4, values=0.0)
    assert float_order(graph)[:2] == (("n2",), ("n0",))


def test_an_output_that_need_not_be_rounded_costs_no_layer(quantizer: Quantizer) -> None:
    prediction = only(quantizer, logits=1.0)
    order = order_of(quantizer, prediction)
    assert "logits" in order[0]
    graph = PlacedGraph.of(quantizer.model, quantizer.placement(()), prediction)
    assert graph.noise(frozenset({"logits"})) == 0.0


def test_a_large_step_is_taken_in_parts() -> None:
    """Each node takes the same noise away, and the same time."""
    graph = chain([(1.0, 1e4, 1e6)] * 6, [0.0] * 7, values=0.0)
    assert [len(step) for step in float_order(graph)] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_hardly_any_other_set_is_as_quiet_in_less_time(seed: int) -> None:
    """Of eight nodes in a row, all 256 sets are looked at."""
    rng = np.random.default_rng(seed)
    int8 = rng.uniform(1e4, 5e4, 8)
    noise, longer = rng.exponential(size=8), rng.uniform(0.8, 4.0, 8)
    nodes = list(zip(noise, int8, longer * int8, strict=True))
    graph = chain(nodes, rng.exponential(size=9).tolist(), values=2e4)
    every = [frozenset(f"n{i}" for i in range(8) if number >> i & 1) for number in range(256)]
    points = np.array([(graph.time(nodes), graph.noise(nodes)) for nodes in every])
    points /= points[0]
    reached = np.array([(graph.time(s), graph.noise(s)) for s in prefixes(float_order(graph))])
    reached /= (graph.time(frozenset()), graph.noise(frozenset()))
    # Between its steps the order stands for the line from one to another.
    in_float = graph.time(frozenset(graph.nodes)) / graph.time(frozenset())
    steps = np.concatenate([[[1.0, 1.0]], reached, [[in_float, 0.0]]])
    quietest = lower_hull(steps, points[:, 0])
    assert np.max(quietest - points[:, 1], where=np.isfinite(quietest), initial=0.0) < 0.05
    assert steps[:, 0].min() <= 0.01 + points[:, 0].min()


def test_what_a_quantized_model_does_in_less_time_in_float_counts() -> None:
    """LRN, whose power becomes square roots."""
    graph = replace(chain([(1.0, 1e4, 4e4)], [0.0] * 2), rest=1e4, rest_in_float=1e5)
    assert graph.latency_ratio(frozenset({"n0"})) == pytest.approx((1e4 + 4e4) / (1e5 + 4e4))


def test_where_there_is_no_noise_nothing_is_left_in_float(quantizer: Quantizer) -> None:
    """Of a model whose outputs never change, as behind dead units."""
    assert order_of(quantizer, only(quantizer)) == ()


def test_the_knob_counts_steps(quantizer: Quantizer, order: Order) -> None:
    with pytest.raises(InputError, match="knob 'float_layers': this quantizer knows no order"):
        quantizer.float_layers(QuantizationConfig(float_layers=1))
    quantizer.float_order = order
    try:
        assert quantizer.float_layers(QuantizationConfig()) == ()
        assert quantizer.float_layers(QuantizationConfig(float_layers=1)) == order[0]
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
