from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from optuna_quantune.search.knapsack import knapsack_front


CHOICES = ("int8", "int16", "float")


def random_task(seed: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Six layers; costs rise from int8 to float, errors are any."""
    rng = np.random.default_rng(seed)
    names = [f"layer{i}" for i in range(6)]
    errors = {n: dict(zip(CHOICES, rng.exponential(size=3), strict=True)) for n in names}
    costs = {n: dict(zip(CHOICES, np.cumsum(rng.uniform(size=3)), strict=True)) for n in names}
    return errors, costs


def total(numbers: Mapping[str, Mapping[str, float]], params: Mapping[str, Any]) -> float:
    return sum(numbers[name][choice] for name, choice in params.items())


@pytest.mark.parametrize("seed", range(5))
def test_no_configuration_is_as_cheap_and_better(seed: int) -> None:
    """Against all 729 configurations."""
    errors, costs = random_task(seed)
    everything = [
        dict(zip(errors, choices, strict=True)) for choices in itertools.product(CHOICES, repeat=6)
    ]
    for params in knapsack_front(errors, costs):
        affordable = [p for p in everything if total(costs, p) <= total(costs, params) + 1e-12]
        best = min(total(errors, p) for p in affordable)
        assert total(errors, params) == pytest.approx(best)


def test_it_goes_from_the_cheapest_to_the_most_exact() -> None:
    errors, costs = random_task(0)
    front = knapsack_front(errors, costs)
    assert set(front[0].values()) == {"int8"}
    assert total(errors, front[-1]) == pytest.approx(sum(min(e.values()) for e in errors.values()))
    assert all(
        total(costs, a) < total(costs, b) and total(errors, a) > total(errors, b)
        for a, b in itertools.pairwise(front)
    )


def test_a_thousand_layers_are_no_trouble() -> None:
    names = [f"layer{i:04d}" for i in range(1000)]
    errors = {name: {"int8": 1.0 + i, "float": 0.0} for i, name in enumerate(names)}
    costs = {name: {"int8": 1.0, "float": 4.0} for name in names}
    front = knapsack_front(errors, costs)
    assert len(front) == 1001
    assert {n for n, choice in front[10].items() if choice == "float"} == set(names[-10:])
