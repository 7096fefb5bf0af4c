"""What is known of configurations before any trial: described, sketched, guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from scipy.stats import spearmanr

from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.configurations import MAX_DESCRIBED
from optuna_quantune.search.sampler import QuantuneSampler


optuna.logging.set_verbosity(optuna.logging.ERROR)

LARGE: dict[str, BaseDistribution] = {
    f"knob{i}": CategoricalDistribution(range(4)) for i in range(6)
}
HUGE: dict[str, BaseDistribution] = {
    f"layer{i:02d}": CategoricalDistribution(range(3)) for i in range(40)
}
WEIGHTS = np.random.default_rng(0).uniform(0.2, 1.0, size=40)


class CountingFeatures:
    """A prior that is right, and counts how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        self.calls += 1
        return {"prior": cost(params), "other": 1.0}


def cost(params: Mapping[str, Any]) -> float:
    return float(sum(WEIGHTS[i] * params[name] for i, name in enumerate(sorted(params))))


def test_a_small_space_is_described_as_a_whole() -> None:
    features = CountingFeatures()
    space = {f"knob{i}": CategoricalDistribution(range(4)) for i in range(4)}
    configurations = Configurations(space, features, None, {})
    assert len(configurations.reference) == features.calls == 256 <= MAX_DESCRIBED


def test_the_guesses_of_a_large_space_are_sketched_from_a_few_hundred_of_them() -> None:
    features = CountingFeatures()
    configurations = Configurations(LARGE, features, None, {})
    guesses = configurations.guesses(configurations.all)[:, 0]
    truth = [cost(configurations.encoding.decode(codes)) for codes in configurations.all.codes]
    assert features.calls < 600
    assert spearmanr(guesses, truth).statistic > 0.95


def test_a_proposal_in_a_large_space_describes_about_a_hundred_configurations() -> None:
    for space in (LARGE, HUGE):
        features = CountingFeatures()
        sampler = QuantuneSampler(space, features=features, seed=0)
        study = optuna.create_study(sampler=sampler)
        calls = []
        for _ in range(4):
            before = features.calls
            trial = study.ask(space)
            study.tell(trial, cost(trial.params))
            calls.append(features.calls - before)
        assert max(calls[1:]) <= 130


def test_a_right_prior_finds_the_best_of_a_large_space_in_a_few_trials() -> None:
    sampler = QuantuneSampler(LARGE, features=CountingFeatures(), seed=0)
    study = optuna.create_study(sampler=sampler)
    for _ in range(4):
        trial = study.ask(LARGE)
        study.tell(trial, cost(trial.params))
    assert study.best_value < 0.4


@pytest.mark.parametrize("levels", [None, 3])
def test_what_features_call_the_same_is_not_tried_twice(levels: int | None) -> None:
    """Two of the six knobs have no effect; coarse features say nothing of being the same."""

    def without_effect(params: Mapping[str, Any]) -> dict[str, float]:
        value = cost({**params, "knob4": 0, "knob5": 0})
        return {"prior": value if levels is None else float(round(value / 3.0))}

    study = optuna.create_study(
        sampler=QuantuneSampler(LARGE, features=without_effect, seed=0), direction="minimize"
    )
    tried = []
    for _ in range(10):
        trial = study.ask(LARGE)
        tried.append(tuple(trial.params[f"knob{i}"] for i in range(4)))
        study.tell(trial, without_effect(trial.params)["prior"])
    if levels is None:
        assert len(set(tried)) == len(tried)
    else:
        assert len({without_effect(t.params)["prior"] for t in study.trials}) < len(tried)


def test_two_samplers_sketch_alike() -> None:
    first, second = (Configurations(HUGE, CountingFeatures(), None, {}) for _ in range(2))
    np.testing.assert_array_equal(
        first.reference.candidates.codes, second.reference.candidates.codes
    )


def test_named_configurations_of_a_huge_space_are_looked_at() -> None:
    """The best is one of three that are named; one is outside the space, one not whole."""
    best = dict.fromkeys(HUGE, 0)
    named = [best, dict.fromkeys(HUGE, 2), dict.fromkeys(HUGE, 7), {"layer00": 1}]
    sampler = QuantuneSampler(HUGE, features=CountingFeatures(), candidates=lambda: named, seed=0)
    assert optuna.create_study(sampler=sampler).ask(HUGE).params == best
