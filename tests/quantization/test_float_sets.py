"""The minimum cut, beside every other set of float nodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from optuna_quantune.quantization.float_sets import best_set
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.placed_graph import PlacedNode
from optuna_quantune.quantization.placed_graph import PlacedTensor


PRICES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)


def random_graph(rng: np.random.Generator) -> PlacedGraph:
    """Up to seven nodes, and tensors with several writers and readers, some always in float."""
    names = [f"n{i}" for i in range(rng.integers(2, 8))]
    everyone = [*names, "a0", "a1"]
    tensors = {}
    for key in [f"t{i}" for i in range(rng.integers(1, 8))]:
        writers = set(rng.choice(everyone, rng.integers(0, 3), replace=False).tolist())
        readers = set(rng.choice(everyone, rng.integers(0, 4), replace=False).tolist()) - writers
        tensors[key] = PlacedTensor(rng.uniform(0.0, 1e5), rng.exponential(), writers, readers)
    nodes = {
        name: PlacedNode(
            rng.exponential(),
            rng.uniform(1e3, 1e5),
            rng.uniform(1e3, 2e5),
            frozenset(key for key, t in tensors.items() if name in t.writers | t.readers),
        )
        for name in names
    }
    if rng.random() < 0.4:
        tensors["t0"].output = "t0"
        nodes["t0"] = PlacedNode(0.0, 0.0, 0.0, frozenset({"t0"}))
    return PlacedGraph(
        nodes, frozenset(names), tensors, frozenset({"a0", "a1"}), rest=0.0, rest_in_float=0.0
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_other_set_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    chosen = frozenset(name for name in graph.layers if rng.random() < 0.2)
    free = sorted(graph.nodes.keys() - chosen)
    others = [
        chosen.union(names)
        for size in range(len(free) + 1)
        for names in itertools.combinations(free, size)
    ]
    for price in PRICES:
        found = best_set(graph, chosen, price)
        assert not found & chosen

        costs = [graph.noise(names) + price * graph.time(names) for names in others]
        cost = graph.noise(chosen | found) + price * graph.time(chosen | found)
        assert cost == pytest.approx(min(costs), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("price", [0.0, 1.0])
def test_where_nothing_is_gained_nothing_is_left_in_float(price: float) -> None:
    node = PlacedNode(0.0, 1e4, 2e4, frozenset({"t"}))
    graph = PlacedGraph(
        {"n": node}, frozenset({"n"}), {"t": PlacedTensor(1.0, 0.0, {"n"})}, frozenset(), 0.0, 0.0
    )
    assert best_set(graph, frozenset(), price) == frozenset()
