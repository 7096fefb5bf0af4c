"""The choices of many knobs that cost the least error for each budget, if both add up.

Precision per layer is the case in mind: each layer adds its noise to the output and its bytes to
the model. Choosing one precision a layer under a bound is a multiple-choice knapsack. There are
2^layers configurations and more; the best for every bound are found by looking at each knob alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def knapsack_front(
    errors: Mapping[str, Mapping[Any, float]], costs: Mapping[str, Mapping[Any, float]]
) -> list[dict[str, Any]]:
    """Configurations of least total error for their total cost, from the cheapest on.

    From the cheapest choice of every knob, the change that saves the most error per cost is made
    again and again; of a knob's choices, only those on the convex hull of cost and error take
    part. Each configuration on the way is optimal for its own cost, and the bound of the linear
    relaxation for all others (Sinha and Zoltners, *The multiple-choice knapsack problem*,
    Operations Research 27(3), 1979).

    Args:
        errors: The error of each choice of each knob, in any unit that adds up.
        costs: Its cost (bytes, milliseconds), likewise; the same knobs and choices.

    Returns:
        One choice for every knob, each configuration one change away from the one before.
    """
    current: dict[str, Any] = {}
    steps: list[tuple[float, int, str, Any]] = []
    for knob, choices in errors.items():
        hull = _lower_hull([(costs[knob][c], error, c) for c, error in choices.items()])
        current[knob] = hull[0][2]
        for (cost, error, _), (next_cost, next_error, choice) in pairwise(hull):
            saved_per_cost = (error - next_error) / (next_cost - cost)
            # Along a hull the savings fall, so a knob's steps are made in their order.
            steps.append((-saved_per_cost, len(steps), knob, choice))
    front = [dict(current)]
    for _, _, knob, choice in sorted(steps, key=lambda step: step[:2]):
        current[knob] = choice
        front.append(dict(current))
    return front


def _lower_hull(points: Sequence[tuple[float, float, Any]]) -> list[tuple[float, float, Any]]:
    """The points (cost, error, choice) on the falling part of the lower convex hull."""
    hull: list[tuple[float, float, Any]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if hull and (point[1] >= hull[-1][1] or point[0] == hull[-1][0]):
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, Any], b: tuple[float, float, Any]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
