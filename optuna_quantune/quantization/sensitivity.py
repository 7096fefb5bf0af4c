"""Which nodes to leave in float first: most noise taken away for the least time added.

Which of the 2^n sets of float layers is best cannot be searched, but how good one is can be
estimated without building it: the noise that its tensors and weights would make is known
(`noise.py`), and so is roughly how long a node takes with integers and in float. Nodes are taken
one after the other, each time those that take most noise away for the time they add, so that one
number, how many of them to take, is all that is left to search (the order that layer-wise tools
search along: AIMET's automatic mixed precision, NNCF's accuracy-aware quantization).

Taking a node alone may change nothing (`placed_graph.py`); so the two ends of an edge are
candidates, too, and so are the outputs that a last layer need not round.
"""

from __future__ import annotations

from typing import Final

from optuna_quantune.quantization.placed_graph import PlacedGraph


# Steps of the order; with more than that in float little is left to gain.
LONGEST_ORDER: Final = 12
# A node has to take away this share of the whole noise, or of the whole time, to be listed.
_NEGLIGIBLE: Final = 0.002


def float_order(graph: PlacedGraph) -> tuple[tuple[str, ...], ...]:
    """Steps of nodes (and outputs) to leave in float, the most worthwhile first.

    Args:
        graph: The model with all of it quantized.

    Returns:
        At most `LONGEST_ORDER` steps of one or a few names that `placement.keep_float` takes.
    """
    total_noise, total_time = graph.noise(frozenset()), graph.time(frozenset())
    if total_noise == 0.0:  # no output ever changes
        return ()
    steps: list[tuple[str, ...]] = []
    chosen: frozenset[str] = frozenset()
    moves = graph.moves()
    while len(steps) < LONGEST_ORDER:
        best, best_score = None, (0.0, 0.0)
        for move in moves:
            added = tuple(name for name in move if name not in chosen)
            if not added:
                continue
            quieter, slower = graph.change(chosen, frozenset(added))
            quieter, slower = quieter / total_noise, slower / total_time
            if quieter < -1e-9 or quieter - min(slower, 0.0) < _NEGLIGIBLE:
                continue
            # What takes less time in float is a gain of its own.
            score = (quieter - min(slower, 0.0)) / max(slower, _NEGLIGIBLE), -slower
            if score > best_score:
                best, best_score = added, score
        if best is None:
            break
        steps.append(best)
        chosen |= set(best)
    return tuple(steps)
