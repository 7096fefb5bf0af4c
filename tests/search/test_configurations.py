"""What is known of configurations before any trial: described, sketched, guessed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna._hypervolume import compute_hypervolume
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from scipy.stats import spearmanr

from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.configurations import CONSTRAINT_PRIOR
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


def test_a_space_whose_features_would_fill_the_memory_is_not_listed() -> None:
    many = CategoricalDistribution(range(1000))
    few = {"many": many, "few": CategoricalDistribution(range(10))}
    assert Configurations(few, None, None, {}).is_enumerable
    assert not Configurations({**few, "n": IntDistribution(0, 9)}, None, None, {}).is_enumerable


def test_the_guesses_of_a_large_space_are_sketched_from_a_few_hundred_of_them() -> None:
    features = CountingFeatures()
    configurations = Configurations(LARGE, features, None, {})
    guesses = configurations.guesses(configurations.all).values[:, 0]
    truth = [cost(configurations.encoding.decode(codes)) for codes in configurations.all.codes]
    assert features.calls < 600
    assert spearmanr(guesses, truth).statistic > 0.95


def test_no_configurations_have_no_guesses(xgboost_34: None) -> None:
    configurations = Configurations(LARGE, CountingFeatures(), None, {})
    nothing = configurations.candidates(configurations.all.codes[:0])
    assert configurations.guesses(nothing).values.shape == (0, 1)


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


def limited(
    space: Mapping[str, BaseDistribution], bound: float, error: float
) -> Callable[..., optuna.Study]:
    """Runs trials of a value that grows with the knobs, under a bound on their sum.

    How far the sum is beyond the bound is guessed with the given error.
    """

    def weight(params: Mapping[str, Any]) -> float:
        return sum(params.values()) - bound

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        return {"prior": -cost(params), CONSTRAINT_PRIOR + "weight": weight(params) + error}

    def run(n_trials: int) -> optuna.Study:
        study = optuna.create_study(sampler=QuantuneSampler(space, features=features, seed=0))
        for _ in range(n_trials):
            trial = study.ask(dict(space))
            trial.set_constraint("weight", weight(trial.params))
            study.tell(trial, -cost(trial.params))
        return study

    return run


SMALL = {f"knob{i}": CategoricalDistribution(range(4)) for i in range(4)}


@pytest.mark.parametrize(("space", "bound"), [(SMALL, 5.0), (LARGE, 7.0), (HUGE, 36.0)])
def test_the_first_trial_keeps_a_bound_that_is_guessed_right(
    space: dict[str, BaseDistribution], bound: float
) -> None:
    (first,) = limited(space, bound, 0.0)(1).trials
    assert first.constraints["weight"] <= 0.0
    assert first.constraints["weight"] >= -3.0  # and does not stay far below it


def test_the_trials_correct_a_constraint_that_is_guessed_too_low_or_too_high() -> None:
    candidates = [dict(zip(SMALL, codes, strict=True)) for codes in np.ndindex(4, 4, 4, 4)]
    best = max(cost(params) for params in candidates if sum(params.values()) <= 5)
    for error in (-1.5, 1.5):
        study = limited(SMALL, 5.0, error)(8)
        kept = [t for t in study.trials if t.constraints["weight"] <= 0.0]
        assert max(cost(trial.params) for trial in kept) > 0.95 * best


def test_a_constraint_may_be_guessed_for_some_configurations_or_all_alike() -> None:
    """An unknown guess counts as the mean, and one that tells nothing apart decides nothing."""
    configurations = Configurations(
        SMALL,
        lambda p: {"prior": 1.0, "prior:a": p["knob0"] if p["knob1"] else np.nan, "prior:b": 7.0},
        None,
        {},
    )
    limits = configurations.reference.guesses.limits
    assert configurations.limit_names == ("a", "b")
    assert np.isfinite(limits).all()
    unknown = configurations.all.codes[:, 1] == 0
    np.testing.assert_allclose(limits[unknown, 0], 1.5)
    study = optuna.create_study(
        sampler=QuantuneSampler(SMALL, features=configurations._features, seed=0)
    )
    for _ in range(3):
        trial = study.ask(dict(SMALL))
        trial.set_constraint("a", 0.0)
        trial.set_constraint("b", 0.0)
        study.tell(trial, cost(trial.params))
    assert len({tuple(t.params.values()) for t in study.trials}) == 3


@pytest.mark.parametrize("space", [SMALL, LARGE], ids=["small", "large"])
def test_with_priors_of_two_objectives_the_first_trials_lie_on_the_front(
    space: dict[str, BaseDistribution],
) -> None:
    """One value falls as knobs grow, the other rises; some knobs are worth more than others."""

    def values(params: Mapping[str, Any]) -> tuple[float, float]:
        return cost(params), -float(sum(params.values()))

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        first, second = values(params)
        return {"prior": first, "prior_2": second}

    def volume(sampler: QuantuneSampler) -> float:
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for _ in range(8):
            trial = study.ask(dict(space))
            study.tell(trial, values(trial.params))
        worst = np.array([cost(dict.fromkeys(space, 3)), 0.0])
        return float(compute_hypervolume(np.array([t.values for t in study.trials]), worst))

    informed, cold = (
        np.mean([volume(QuantuneSampler(space, features=f, seed=seed)) for seed in range(3)])
        for f in (features, None)
    )
    assert informed > 1.05 * cold
