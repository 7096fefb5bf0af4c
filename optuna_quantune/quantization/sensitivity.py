"""Which nodes to leave in float first: most noise taken away for the least time added.

Which of the 2^n sets of float layers is best cannot be searched, but how good one is can be
estimated without building it: the noise that its tensors and weights would make is known
(`noise.py`), and so is roughly how long a node takes with integers and in float. So the sets are
put in an order, each with all of the one before, and one number, how many steps to take, is all
that is left to search (the order that layer-wise tools search along: AIMET's automatic mixed
precision, NNCF's accuracy-aware quantization).

These tools take layers one by one. But a layer that is left in float between others costs two
conversions, and takes hardly any noise away as its input and output are still rounded; a whole
block pays. So a step is the set of nodes that takes most noise away for each nanosecond that it
adds, of whatever size: a nanosecond has a price, which falls little by little, and each time the
set that is worth most above its price is found (`float_sets.py`). The first step has what takes no
longer in float than with integers; large steps are taken in parts, block by block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Set
from typing import Final

from optuna_quantune.quantization.float_sets import best_set
from optuna_quantune.quantization.placed_graph import PlacedGraph


# Steps of the order.
LONGEST_ORDER: Final = 12
# A step has to take away this share of the noise that is left, or of the whole time.
_LEAST_STEP: Final = 0.05
_LEAST_TIME: Final = 0.002
# A large step is taken in parts: such that take this share of the noise that is left away, or add
# this share of the whole time, and are at least so worthwhile beside the whole step.
_LARGE_PART: Final = 0.2
_LONG_PART: Final = 0.03
_NEARLY: Final = 0.7
# What a share of the time is worth, in shares of the noise, where time is all that counts.
_HIGHEST_PRICE: Final = 1.0 / _LEAST_TIME
_LOWEST_PRICE: Final = 1e-3
_CHEAPER: Final = 0.85


def float_order(graph: PlacedGraph) -> tuple[tuple[str, ...], ...]:
    """Steps of nodes (and outputs) to leave in float, the most worthwhile first.

    Args:
        graph: The model with all of it quantized.

    Returns:
        At most `LONGEST_ORDER` steps of names that `placement.keep_float` takes, in the order of
        the graph.
    """
    if graph.noise(frozenset()) == 0.0:  # no output ever changes
        return ()
    position = {name: number for number, name in enumerate(graph.nodes)}
    steps: list[tuple[str, ...]] = []
    for step in _Order(graph).steps():
        steps.append(tuple(sorted(step, key=position.__getitem__)))
        if len(steps) == LONGEST_ORDER:
            break
    return tuple(steps)


class _Order:
    """The steps of one graph.

    Args:
        graph: The model with all of it quantized; it has some noise.
    """

    def __init__(self, graph: PlacedGraph) -> None:
        self._graph = graph
        self._noise, self._time = graph.noise(frozenset()), graph.time(frozenset())
        # Outputs come first, as they take no time.
        ahead = sorted(graph.nodes, key=lambda name: graph.nodes[name].float_time > 0.0)
        self._position = {name: number for number, name in enumerate(ahead)}

    def steps(self) -> Iterator[frozenset[str]]:
        """Sets of nodes that follow each other; together they leave some layer quantized."""
        chosen: frozenset[str] = frozenset()
        step: frozenset[str] = frozenset()
        price, unit = _HIGHEST_PRICE, self._noise / self._time
        while price > _LOWEST_PRICE and not self._graph.layers <= chosen | step:
            step |= best_set(self._graph, chosen | step, price * unit)
            if step and self._is_worth_a_step(chosen, step):
                for part in self._parts(chosen, step):
                    yield part
                    chosen |= part
                if self._graph.layers <= chosen | step:
                    return
                step = frozenset()
            price *= _CHEAPER

    def _change(self, chosen: Set[str], added: Set[str]) -> tuple[float, float]:
        """Noise taken away and time added, in shares of the whole."""
        quieter, slower = self._graph.change(chosen, added)
        return quieter / self._noise, slower / self._time

    def _gain(self, chosen: Set[str], added: Set[str]) -> tuple[float, float]:
        """The same with the noise in shares of what is left of it."""
        quieter, slower = self._graph.change(chosen, added)
        left = self._graph.noise(chosen)
        return quieter / left if left > 0.0 else 0.0, slower / self._time

    def _is_worth_a_step(self, chosen: Set[str], step: Set[str]) -> bool:
        quieter, slower = self._gain(chosen, step)
        return quieter > _LEAST_STEP or slower < -_LEAST_TIME

    def _parts(self, chosen: frozenset[str], step: frozenset[str]) -> list[frozenset[str]]:
        """A step in parts that are about as worthwhile as all of it, if it is a large one.

        One that leaves no layer quantized is the float model: any part is better, and the last one
        is left out.
        """
        layers = self._graph.layers
        is_all = layers <= chosen | step
        parts: list[frozenset[str]] = []
        before = part = frozenset[str]()
        names = self._in_order(chosen, step)
        for name, following in itertools.zip_longest(names, names[1:], fillvalue=names[-1]):
            if layers <= chosen | before | part | {name}:
                break
            part |= {name}
            done = before | part
            if (
                self._is_large(chosen | before, part)
                and self._is_worth_a_step(chosen | done, step - done)
                and (is_all or self._pays(chosen, done, step))
                # No block is cut where the next node takes a conversion away.
                and self._change(chosen | done, {following} - done)[1] >= 0.0
            ):
                parts.append(part)
                before, part = done, frozenset()
        rest = part if is_all else step - before
        return [*parts, rest] if self._is_worth_a_step(chosen | before, rest) else parts

    def _in_order(self, chosen: frozenset[str], step: frozenset[str]) -> list[str]:
        """Its blocks, those that pay most first, each in the order of the graph.

        Blocks have no tensor in common.
        """
        blocks: list[set[str]] = []
        for name in sorted(step, key=self._position.__getitem__):
            tensors = self._graph.nodes[name].tensors
            joined = {name}
            for block in list(blocks):
                if any(tensors & self._graph.nodes[other].tensors for other in block):
                    joined |= block
                    blocks.remove(block)
            blocks.append(joined)

        def worth(block: Set[str]) -> float:
            quieter, slower = self._change(chosen, block)
            return (quieter - min(slower, 0.0)) / max(slower, _LEAST_TIME)

        blocks.sort(key=worth, reverse=True)
        return [n for block in blocks for n in sorted(block, key=self._position.__getitem__)]

    def _is_large(self, chosen: Set[str], part: Set[str]) -> bool:
        quieter, slower = self._gain(chosen, part)
        return quieter > _LARGE_PART or slower > _LONG_PART

    def _pays(self, chosen: Set[str], part: Set[str], step: Set[str]) -> bool:
        """Whether a part of a step takes nearly as much noise away for its time as all of it."""
        quieter, slower = self._change(chosen, part)
        most, longest = self._change(chosen, step)
        return slower <= _LEAST_TIME or quieter * longest >= _NEARLY * most * slower > 0.0
