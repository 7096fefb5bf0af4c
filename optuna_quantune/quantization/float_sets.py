"""The set of nodes to leave in float that is best when time has a price.

What is left of the noise, plus the price of the time, is a sum over nodes and over tensors between
them: each node has its own noise and time, each tensor costs a conversion where what writes it and
what reads it differ, and is rounded unless both are in float. All these terms favour neighbours
that are alike, so that the best of the 2^n sets is a minimum cut (Kolmogorov and Zabih, *What
energy functions can be minimized via graph cuts?*, IEEE TPAMI 26(2), 2004, theorem 4.1). No other
set is better, and it takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Iterable
from collections.abc import Set
from typing import Final

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from scipy.sparse.csgraph import maximum_flow

from optuna_quantune.quantization.node_time import conversion_time
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.placed_graph import PlacedTensor


# Capacities are integers: the whole sum is about so large.
_RESOLUTION: Final = 1 << 29
_NO_CUT: Final = 1 << 30
_FLOAT, _INTEGER = 0, 1  # source and sink


def best_set(graph: PlacedGraph, chosen: Set[str], price: float) -> frozenset[str]:
    """The nodes and outputs to leave in float beside those that are.

    Args:
        graph: The model with all of it quantized.
        chosen: Names of the nodes and outputs that stay in float in any case.
        price: What a nanosecond is worth, in units of the noise, not negative.

    Returns:
        Names that are not in `chosen`.
    """
    cut = _Cut()
    # An output that need not be rounded costs nothing.
    outputs = {t.output for t in graph.tensors.values() if t.output is not None}
    for name, node in graph.nodes.items():
        if name in outputs:
            continue
        if name in chosen:
            cut.forbid_integer(name)
            continue
        cut.add(_FLOAT, name, node.noise + price * node.int8_time)
        cut.add(name, _INTEGER, price * node.float_time)
    for key, tensor in graph.tensors.items():
        _add_tensor(cut, graph, key, tensor, price)
    return (cut.float_side() & graph.nodes.keys() | outputs) - chosen


def _add_tensor(
    cut: _Cut, graph: PlacedGraph, key: str, tensor: PlacedTensor, price: float
) -> None:
    def ends(names: Iterable[str]) -> list[Hashable]:
        return [_FLOAT if name in graph.always_float else name for name in sorted(names)]

    writers, readers = ends(tensor.writers), ends(tensor.readers)
    all_float, some_float = _joined(cut, (key, "written"), writers)
    if tensor.output is None:
        cut.add(_FLOAT, all_float, tensor.noise)
        for reader in readers:
            cut.add(all_float, reader, tensor.noise / len(readers))
    if readers:
        all_read, some_read = _joined(cut, (key, "read"), readers)
        conversion = price * conversion_time(tensor.values)
        cut.add(some_read, all_float, conversion)
        cut.add(some_float, all_read, conversion)


def _joined(cut: _Cut, name: tuple[str, str], ends: list[Hashable]) -> tuple[Hashable, Hashable]:
    """What is in float if all of some nodes are, and what is if one is."""
    if not ends:
        return _FLOAT, _FLOAT
    if len(ends) == 1:
        return ends[0], ends[0]
    every, some = (*name, "in float only"), (*name, "in float")
    for end in ends:
        cut.add_whole(every, end)
        cut.add_whole(end, some)
    return every, some


class _Cut:
    """A flow network from what is in float to what has integers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {_FLOAT: _FLOAT, _INTEGER: _INTEGER}
        self._edges: dict[tuple[int, int], float] = {}
        self._whole: set[tuple[int, int]] = set()

    def add(self, in_float: Hashable, with_integers: Hashable, cost: float) -> None:
        """What it costs that the one is in float, and the other is not."""
        edge = self._number(in_float), self._number(with_integers)
        if edge[0] != edge[1] and cost > 0.0:
            self._edges[edge] = self._edges.get(edge, 0.0) + cost

    def add_whole(self, in_float: Hashable, with_integers: Hashable) -> None:
        """That cannot be."""
        edge = self._number(in_float), self._number(with_integers)
        if edge[0] != edge[1]:
            self._whole.add(edge)

    def forbid_integer(self, name: str) -> None:
        """It stays in float."""
        self.add_whole(_FLOAT, name)

    def float_side(self) -> frozenset[str]:
        """The names in float in the cheapest of all cuts, as few as possible."""
        if not self._edges:
            return frozenset()
        total = sum(self._edges.values())
        edges = dict.fromkeys(self._whole, _NO_CUT)
        for edge, cost in self._edges.items():
            if edge not in edges:
                edges[edge] = round(cost / total * _RESOLUTION)
        rows, columns = np.array(list(edges), np.int32).T  # scipy 1.13 takes no others
        shape = len(self._numbers), len(self._numbers)
        capacity = csr_array((np.array(list(edges.values()), np.int32), (rows, columns)), shape)
        flow = maximum_flow(capacity, _FLOAT, _INTEGER).flow
        left = capacity - flow
        left.eliminate_zeros()
        reached = set(breadth_first_order(left, _FLOAT, return_predecessors=False).tolist())
        return frozenset(
            name
            for name, number in self._numbers.items()
            if number in reached and isinstance(name, str)
        )

    def _number(self, name: Hashable) -> int:
        return self._numbers.setdefault(name, len(self._numbers))
