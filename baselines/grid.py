"""Grid search in random order: random search without repeats.

A grid in the order of its nested loops spends the first half of its trials on one choice of the
first knob, so its result depends on how the knobs happen to be listed. Shuffled, as GridSampler
does it, every prefix is a uniform sample of distinct configurations: the honest floor for a
sampler that never repeats itself.
"""

from __future__ import annotations

from collections.abc import Mapping

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import GridSampler


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """A shuffled grid over all values of the search space.

    Raises:
        ValueError: If a float parameter has no step.
    """
    values = {name: grid_values(name, knob) for name, knob in search_space.items()}
    # GridSampler takes the seed 0 for "no seed", and for None as well.
    return GridSampler(values, seed=None if seed is None else seed + 1)


def grid_values(
    name: str, distribution: BaseDistribution
) -> list[str | float | int | bool | None]:
    """All values of one parameter, in their order.

    Raises:
        ValueError: If it is a float without a step.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        n_steps = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + i * distribution.step for i in range(n_steps + 1)]
    raise ValueError(f"{name}: a grid needs a step, which {distribution!r} lacks")
