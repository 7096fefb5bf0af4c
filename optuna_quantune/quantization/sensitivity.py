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
adds, of whatever size. Such a set is found by Dinkelbach's method (On nonlinear fractional
programming, Management Science 13(7), 1967): a nanosecond gets a price, the set that is worth most
above its price is looked for, and the price is raised to what that set pays, until none is worth
more. The set for one price comes from a local search whose moves are single nodes, the ends of an
edge, and nodes in a row. The first step has what takes no longer in float than with integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set
from typing import Final

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
# Numbers of nodes in a row that are moves.
_ROWS: Final = (4, 8, 12)
# What a share of the time is worth, in shares of the noise, where time is all that counts.
_HIGHEST_PRICE: Final = 1.0 / _LEAST_TIME
# Differences of sums of floats.
_ROUNDING: Final = 1e-9


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
        names = list(graph.nodes)
        self._everything = frozenset(names)
        rows = [names[i : i + n] for n in _ROWS for i in range(len(names) - n + 1)]
        self._moves = [frozenset(move) for move in (*graph.moves(), *rows)]

    def steps(self) -> Iterator[frozenset[str]]:
        """Sets of nodes that follow each other; together they leave some layer quantized."""
        chosen: frozenset[str] = frozenset()
        step: frozenset[str] = frozenset()
        while not self._graph.layers <= chosen:
            found = self._densest(chosen | step, self._everything - chosen - step)
            step |= found
            if found and not self._is_worth_a_step(chosen, step):
                continue
            for part in self._parts(chosen, step):
                if self._graph.layers <= chosen | part:
                    return
                yield part
                chosen |= part
            step = frozenset()
            if not found:
                return

    def _change(self, chosen: Set[str], added: Set[str]) -> tuple[float, float]:
        """Noise taken away and time added, in shares of the whole."""
        quieter, slower = self._graph.change(chosen, added)
        return quieter / self._noise, slower / self._time

    def _is_worth_a_step(self, chosen: Set[str], step: Set[str]) -> bool:
        quieter, slower = self._change(chosen, step)
        left = self._graph.noise(chosen) / self._noise
        return quieter > _LEAST_STEP * left or slower < -_LEAST_TIME

    def _densest(self, chosen: frozenset[str], within: frozenset[str]) -> frozenset[str]:
        """The nodes that take most noise away for the time they add; none if none does."""
        best, price = frozenset[str](), 0.0
        for move in self._moves:
            paid = self._paid(*self._change(chosen, move & within))
            if paid > price:
                best, price = move & within, paid
        while best:
            found = self._worth_most(chosen, within, price, [best, within])
            if not found:
                break
            best, paid = found, self._paid(*self._change(chosen, found))
            if paid <= price:
                break
            price = paid
        return best

    @staticmethod
    def _paid(quieter: float, slower: float) -> float:
        """The highest price of time at which such a change is worth it."""
        if slower > 0.0:
            return min(quieter / slower, _HIGHEST_PRICE)
        return _HIGHEST_PRICE if quieter - _HIGHEST_PRICE * slower > _ROUNDING else 0.0

    def _worth_most(
        self,
        chosen: frozenset[str],
        within: frozenset[str],
        price: float,
        starts: list[frozenset[str]],
    ) -> frozenset[str]:
        """The set that takes most noise away above the price of the time it adds."""
        best, most = frozenset[str](), _ROUNDING
        for start in starts:
            found = self._improved(chosen, within, price, start)
            quieter, slower = self._change(chosen, found)
            if quieter - price * slower > most:
                best, most = found, quieter - price * slower
        return best

    def _improved(
        self,
        chosen: frozenset[str],
        within: frozenset[str],
        price: float,
        start: frozenset[str],
    ) -> frozenset[str]:
        """What a local search makes of a set."""
        found, before = start, None
        while found != before:
            before = found
            for move in self._moves:
                more = (move & within) - found
                if more:
                    quieter, slower = self._change(chosen | found, more)
                    if quieter - price * slower > _ROUNDING:
                        found |= more
                less = move & found
                if less:
                    quieter, slower = self._change(chosen | (found - less), less)
                    if quieter - price * slower < -_ROUNDING:
                        found -= less
        return found

    def _parts(self, chosen: frozenset[str], step: frozenset[str]) -> list[frozenset[str]]:
        """A step in parts that are about as worthwhile as all of it, if it is a large one.

        One that leaves no layer quantized is the float model: any part is better.
        """
        is_all = self._graph.layers <= chosen | step
        parts: list[frozenset[str]] = []
        done: frozenset[str] = frozenset()
        for way in self._way(chosen, step):
            if (
                self._is_large(chosen | done, way - done)
                and self._is_worth_a_step(chosen | way, step - way)
                and (is_all or self._pays(chosen, way, step))
            ):
                parts.append(way - done)
                done = way
        return [*parts, step - done]

    def _is_large(self, chosen: Set[str], part: Set[str]) -> bool:
        quieter, slower = self._change(chosen, part)
        left = self._graph.noise(chosen) / self._noise
        return quieter > _LARGE_PART * left or slower > _LONG_PART

    def _pays(self, chosen: Set[str], part: Set[str], step: Set[str]) -> bool:
        """Whether a part of a step takes nearly as much noise away for its time as all of it."""
        quieter, slower = self._change(chosen, part)
        most, longest = self._change(chosen, step)
        return slower <= _LEAST_TIME or quieter * longest >= _NEARLY * most * slower > 0.0

    def _way(self, chosen: frozenset[str], step: frozenset[str]) -> Iterator[frozenset[str]]:
        """Growing sets, one move after the other, from the first up to the whole of a step.

        Moves that add much time come when no others are left, and one that leaves no layer
        quantized comes last.
        """
        done: frozenset[str] = frozenset()
        while done != step:
            best, best_score = frozenset[str](), (False, False, -math.inf)
            for move in self._moves:
                added = (move & step) - done
                if not added:
                    continue
                quieter, slower = self._change(chosen | done, added)
                worth = (quieter - min(slower, 0.0)) / max(slower, _LEAST_TIME)
                is_last = self._graph.layers <= chosen | done | added
                score = not is_last, slower <= _LONG_PART, worth
                if score > best_score:
                    best, best_score = added, score
            done |= best
            yield done
