"""What a study with QuantuneSampler does."""

from __future__ import annotations

import logging
import math
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Literal

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.history import read_history
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sampler import SearchSpaceExhausted


optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE: dict[str, BaseDistribution] = {
    "calibration_images": CategoricalDistribution([1, 32, "all"]),
    "scheme": CategoricalDistribution(["asymmetric", "symmetric", "power2"]),
    "granularity": CategoricalDistribution(["tensor", "channel"]),
}
SIZE = 18


def accuracy(params: Mapping[str, Any]) -> float:
    """A made-up accuracy; the best configuration is all, asymmetric, channel with 0.9."""
    drop = {1: 0.05, 32: 0.01, "all": 0.0}[params["calibration_images"]]
    drop += {"asymmetric": 0.0, "symmetric": 0.02, "power2": 0.1}[params["scheme"]]
    drop += 0.5 if params["granularity"] == "tensor" and params["scheme"] == "power2" else 0.0
    drop += 0.03 if params["granularity"] == "tensor" else 0.0
    return 0.9 - drop


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    return {
        name: trial.suggest_categorical(name, distribution.choices)
        for name, distribution in SPACE.items()
        if isinstance(distribution, CategoricalDistribution)
    }


def objective(trial: optuna.Trial) -> float:
    return accuracy(suggest(trial))


def maximize(sampler: optuna.samplers.BaseSampler, **kwargs: Any) -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=sampler, **kwargs)


def configurations(study: optuna.Study) -> list[tuple[Any, ...]]:
    """The configurations of the trials that were measured."""
    return [tuple(sorted(t.params.items())) for t in study.trials if t.params]


def test_every_configuration_is_measured_once_and_then_the_study_ends() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=50)
    assert len(study.trials) == SIZE
    assert len(set(configurations(study))) == SIZE


def test_a_resumed_exhausted_study_measures_nothing_more() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(objective)
    study.optimize(objective, n_trials=5)
    assert [t.state for t in study.trials[SIZE:]] == [TrialState.PRUNED]
    assert len(configurations(study)) == SIZE


def test_ask_says_when_the_space_is_exhausted() -> None:
    sampler = QuantuneSampler(SPACE, seed=0)
    study = maximize(sampler)
    for _ in range(SIZE):
        assert not sampler.is_exhausted(study)
        trial = study.ask(SPACE)
        study.tell(trial, accuracy(trial.params))
    assert sampler.is_exhausted(study)
    with pytest.raises(SearchSpaceExhausted):
        study.ask(SPACE)


def test_running_failed_and_pruned_trials_are_not_proposed_again() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    asked = []
    for i in range(SIZE):
        trial = study.ask(SPACE)
        asked.append(tuple(sorted(trial.params.items())))
        if i % 4 == 0:
            study.tell(trial, state=TrialState.FAIL)
        elif i % 4 == 1:
            study.tell(trial, state=TrialState.PRUNED)
        elif i % 4 == 2:
            study.tell(trial, accuracy(trial.params))
    assert len(set(asked)) == SIZE


def test_enqueued_configurations_are_not_proposed_by_others() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    queued = {"calibration_images": 32, "scheme": "symmetric", "granularity": "tensor"}
    study.enqueue_trial(queued)
    study.optimize(objective)
    assert study.trials[0].params == queued
    assert len(study.trials) == len(set(configurations(study))) == SIZE


def test_a_study_does_not_end_before_what_is_enqueued() -> None:
    space = {"n": IntDistribution(0, 3)}
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    for n in range(4):
        study.enqueue_trial({"n": n})
    study.optimize(lambda trial: trial.suggest_int("n", 0, 3))
    assert [(t.params["n"], t.state) for t in study.trials] == [
        (n, TrialState.COMPLETE) for n in range(4)
    ]


def test_what_a_trial_has_not_asked_for_makes_no_other_configuration() -> None:
    space: dict[str, BaseDistribution] = {
        "kind": CategoricalDistribution(["svm", "forest"]),
        "c": CategoricalDistribution([1, 2, 3]),
        "depth": CategoricalDistribution([1, 2, 3, 4]),
    }

    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["svm", "forest"]) == "svm":
            return float(trial.suggest_categorical("c", [1, 2, 3]))
        return float(trial.suggest_categorical("depth", [1, 2, 3, 4]))

    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(objective)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 7
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 7


def test_what_is_enqueued_beside_the_space_is_no_reason_to_ask_for_features_again() -> None:
    asked: list[Mapping[str, Any]] = []

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        asked.append(params)
        return {"granularity": float(params["granularity"] == "channel")}

    def objective(trial: optuna.Trial) -> float:
        return accuracy(suggest(trial)) + trial.suggest_float("beside", 0.0, 1.0)

    study = optuna.create_study(sampler=QuantuneSampler(SPACE, seed=0, features=features))
    for number in range(3):
        study.enqueue_trial({"granularity": "tensor", "beside": number / 4})
        study.optimize(objective, n_trials=2)
    assert len(asked) == SIZE
    assert all(params.keys() == SPACE.keys() for params in asked)


def test_a_partly_enqueued_trial_is_completed_to_an_unseen_configuration() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    for _ in range(6):
        study.enqueue_trial({"scheme": "power2"})
    study.optimize(objective, n_trials=6)
    assert {t.params["scheme"] for t in study.trials} == {"power2"}
    assert len(set(configurations(study))) == 6


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_partial_fixed_sampler_gets_unseen_configurations_with_the_fixed_value() -> None:
    inner = QuantuneSampler(SPACE, seed=0, valid=lambda p: p["calibration_images"] != 1)
    study = maximize(optuna.samplers.PartialFixedSampler({"scheme": "symmetric"}, inner))
    study.optimize(objective)
    assert {t.params.get("scheme", "symmetric") for t in study.trials} == {"symmetric"}
    assert len(configurations(study)) == len(set(configurations(study))) == 4


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_partial_fixed_sampler_gets_unseen_configurations_of_an_inferred_space() -> None:
    inner = QuantuneSampler(seed=0)
    study = maximize(optuna.samplers.PartialFixedSampler({"scheme": "symmetric"}, inner))
    study.optimize(objective, n_trials=6)
    assert len(set(configurations(study))) == 6


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_trials_with_another_value_of_what_is_fixed_tell_of_other_things() -> None:
    def value(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", ["near", "far"])
        x = trial.suggest_float("x", 0.0, 1.0)
        return (x - 0.2) ** 2 if kind == "near" else (x - 0.8) ** 2

    best = []
    for seed in range(5):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        study.optimize(value, n_trials=16)
        inner = QuantuneSampler(seed=seed)
        study.sampler = optuna.samplers.PartialFixedSampler({"kind": "near"}, inner)
        study.optimize(value, n_trials=5)
        best.append(min(trial.values[0] for trial in study.trials[16:]))
    assert np.mean(best) < 1e-3


def test_steps_that_are_small_beside_the_values_do_not_end_a_search() -> None:
    """Optuna takes most of these values for none of the distribution."""
    space: dict[str, BaseDistribution] = {"a": FloatDistribution(1e9, 1e9 + 10.0, step=0.1)}
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(lambda trial: trial.suggest_float("a", 1e9, 1e9 + 10.0, step=0.1), n_trials=5)
    assert len(study.trials) == 5


def test_what_is_improved_on_is_the_best_with_the_fixed_value() -> None:
    """Other values of it are out of reach, and the trials with them far better."""
    space: dict[str, BaseDistribution] = {
        "branch": CategoricalDistribution(["good", "bad"]),
        "x": FloatDistribution(0.0, 1.0),
        "y": FloatDistribution(0.0, 1.0),
    }

    def bowl(trial: optuna.Trial) -> float:
        x, y = (trial.suggest_float(name, 0.0, 1.0) for name in "xy")
        gap = 5.0 * (trial.suggest_categorical("branch", ["good", "bad"]) == "bad")
        return gap + (x - 0.3) ** 2 + (y - 0.6) ** 2

    regrets = []
    for seed in range(5):
        study = optuna.create_study(sampler=QuantuneSampler(space, seed=seed))
        for branch, n in (("good", 3), ("bad", 8)):
            base = QuantuneSampler(space, seed=seed)
            study.sampler = optuna.samplers.PartialFixedSampler({"branch": branch}, base)
            study.optimize(bowl, n_trials=n)
        regrets.append(min(t.values[0] for t in study.trials[3:]) - 5.0)
    assert np.mean(regrets) < 0.03


@pytest.mark.parametrize("choices", [[True, 1, "x"], [0, False, 0.0, "x"], ["y", "x", "y"]])
def test_choices_that_compare_equal_are_one_configuration(choices: list[Any]) -> None:
    study = maximize(QuantuneSampler({"a": CategoricalDistribution(choices)}, seed=0))
    study.optimize(lambda t: float(t.suggest_categorical("a", choices) == "x"), n_trials=20)
    assert len(study.trials) == 2


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
@pytest.mark.parametrize(
    "choices",
    [list(np.arange(3)), [(1, 2), [1, 2], "1"], [math.sin, len, None], [1.5, b"1.5", "1.5"]],
)
def test_choices_of_any_type_are_told_apart_while_they_run(choices: list[Any]) -> None:
    distribution = CategoricalDistribution(choices)
    sampler = QuantuneSampler({"x": distribution, "y": IntDistribution(0, 1)}, seed=0)
    study = optuna.create_study(sampler=sampler)
    asked = [study.ask().relative_params for _ in range(6)]
    found = {(choices.index(params["x"]), params["y"]) for params in asked}
    assert len(found) == 6


def test_the_space_of_a_study_stays_known_beside_many_others() -> None:
    """Every enqueued parameter beyond the space makes another space for its trial."""
    calls = Counter[str]()

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        calls[str(params.get("run", "own"))] += 1
        return {"prior": accuracy(params)}

    study = maximize(QuantuneSampler(SPACE, seed=0, features=features))
    for run in range(7):
        objective(study.ask())
        study.enqueue_trial({"run": run})
        objective(study.ask())
    assert calls["own"] == SIZE


def test_a_source_that_is_no_study_is_reported() -> None:
    with pytest.raises(InputError, match=r"source_studies.*'x'"):
        QuantuneSampler(SPACE, source_studies=["x"])  # type: ignore[list-item]


def test_a_space_of_many_parameters_with_few_configurations_is_exhausted() -> None:
    space: dict[str, BaseDistribution] = {f"p{i:02d}": IntDistribution(0, 0) for i in range(70)}
    space["last"] = IntDistribution(0, 3)
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(lambda t: sum(t.suggest_int(n, 0, 3 if n == "last" else 0) for n in space))
    assert len(study.trials) == 4


@pytest.mark.parametrize("constrained", [False, True])
def test_absurdly_large_numbers_do_not_stop_the_search(constrained: bool) -> None:
    def absurd(trial: optuna.Trial) -> float:
        params = suggest(trial)
        if constrained:
            trial.set_constraint("size", 1e300 * (accuracy(params) - 0.8))
            return accuracy(params)
        return -1e300 if params["scheme"] == "power2" else 1e200 * accuracy(params)

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        size = {"prior:size": accuracy(params)} if constrained else {}
        return {"prior": 1e200 * accuracy(params), "far": 1e300 * len(params["scheme"]), **size}

    study = maximize(QuantuneSampler(SPACE, seed=0, features=features))
    study.optimize(absurd)
    assert len(study.trials) == SIZE


def test_duplicates_can_be_allowed() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0, allow_duplicates=True))
    study.optimize(objective, n_trials=SIZE + 5)
    assert len(study.trials) == SIZE + 5
    best = max(Counter(configurations(study)).values())
    assert best > 1


def test_an_inferred_space_never_ends_a_study() -> None:
    study = maximize(QuantuneSampler(seed=0))
    study.optimize(objective, n_trials=SIZE + 3)
    assert len(study.trials) == SIZE + 3
    assert len(set(configurations(study))) == SIZE


def test_the_best_is_found_in_fewer_trials_than_by_chance() -> None:
    """The mean rank of the best in a random order of 18 is 9.5."""
    needed = []
    for seed in range(12):
        study = maximize(QuantuneSampler(SPACE, seed=seed))
        study.optimize(objective)
        needed.append(study.best_trial.number + 1)
    assert np.mean(needed) < 7.5


def test_invalid_configurations_are_never_proposed() -> None:
    def valid(params: Mapping[str, Any]) -> bool:
        return not (params["scheme"] == "power2" and params["granularity"] == "tensor")

    study = maximize(QuantuneSampler(SPACE, seed=0, valid=valid))
    study.optimize(objective)
    assert len(study.trials) == SIZE - 3
    assert all(valid(t.params) for t in study.trials)


def test_a_validity_that_rejects_everything_is_reported() -> None:
    study = maximize(QuantuneSampler(SPACE, valid=lambda params: False))
    with pytest.raises(InputError, match="valid"):
        study.optimize(objective, n_trials=1)


def test_a_search_space_of_plain_lists_is_reported() -> None:
    with pytest.raises(InputError, match="scheme"):
        QuantuneSampler({"scheme": ["a", "b"]})  # type: ignore[dict-item]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_configuration_with_the_best_prior_is_first(
    direction: Literal["maximize", "minimize"],
) -> None:
    sampler = QuantuneSampler(SPACE, seed=3, features=lambda p: {"prior": accuracy(p)})
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(objective, n_trials=1)
    best = study.trials[0].params
    pick = max if direction == "maximize" else min
    values = [accuracy(t.params) for t in _all_trials()]
    assert accuracy(best) == pick(values)


def _all_trials() -> list[optuna.trial.FrozenTrial]:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(objective)
    return study.trials


@pytest.mark.parametrize("scale", [lambda a: a, lambda a: 40.0 * a - 3.0], ids=["unit", "dB"])
def test_a_right_prior_puts_the_best_configurations_first(scale: Any) -> None:
    study = maximize(
        QuantuneSampler(SPACE, seed=0, features=lambda p: {"prior": scale(accuracy(p))})
    )
    study.optimize(objective, n_trials=4)
    top = sorted((t.value for t in _all_trials() if t.value is not None), reverse=True)
    assert study.trials[0].value == top[0]
    # Once the best is known to be the best, only what is less certain can be better.
    assert np.mean([t.value for t in study.trials]) >= np.mean(top[: SIZE // 2])


def test_a_misleading_prior_is_learned_away() -> None:
    """The prior points the other way; the best of 18 is found as by an uninformed search."""
    needed = []
    for seed in range(6):
        study = maximize(
            QuantuneSampler(SPACE, seed=seed, features=lambda p: {"prior": -accuracy(p)})
        )
        study.optimize(objective)
        needed.append(study.best_trial.number + 1)
    # Following the prior to the end would find it last.
    assert np.mean(needed) < 11


def test_features_explain_what_the_knobs_do_not() -> None:
    """The value depends on a feature that is a random function of the configuration."""
    space: dict[str, BaseDistribution] = {"id": CategoricalDistribution(list(range(60)))}
    noise = np.random.default_rng(0).normal(size=60)

    def regret(features: Any, seed: int) -> float:
        study = optuna.create_study(sampler=QuantuneSampler(space, seed=seed, features=features))
        study.optimize(
            lambda t: float((noise[t.suggest_categorical("id", range(60))] - 0.5) ** 2),
            n_trials=15,
        )
        return study.best_value

    informed = [regret(lambda p: {"noise": noise[p["id"]]}, seed) for seed in range(5)]
    blind = [regret(None, seed) for seed in range(5)]
    assert np.mean(informed) < 0.5 * np.mean(blind)


def test_features_that_change_their_names_are_reported() -> None:
    sampler = QuantuneSampler(SPACE, features=lambda p: {str(p["scheme"]): 1.0})
    with pytest.raises(InputError, match="features"):
        maximize(sampler).optimize(objective, n_trials=1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "None"),
        ({"a": "high"}, "'a' is 'high'"),
        ({"a": None}, "'a' is None"),
        ({1: 2.0}, "1"),
    ],
)
def test_features_that_are_no_named_numbers_are_reported(given: Any, named: str) -> None:
    study = maximize(QuantuneSampler(SPACE, features=lambda p: given))
    with pytest.raises(InputError, match=f"features: .*{named}"):
        study.optimize(objective, n_trials=1)


def test_a_guess_of_a_constraint_that_no_trial_sets_is_ignored() -> None:
    def features(params: Mapping[str, Any]) -> dict[str, float]:
        return {"prior": accuracy(params), "prior:latncy": 1e3 * accuracy(params)}

    study = maximize(QuantuneSampler(SPACE, seed=0, features=features))
    study.optimize(objective, n_trials=1)
    with pytest.warns(UserWarning, match="'prior:latncy'"):
        study.optimize(objective, n_trials=1)
    assert study.trials[0].values[0] < 0.5
    assert study.trials[1].values[0] > 0.87


def test_unknown_and_infinite_features_are_accepted() -> None:
    def features(params: Mapping[str, Any]) -> dict[str, float]:
        unknown = params["scheme"] == "symmetric"
        return {"prior": float("nan") if unknown else accuracy(params), "db": float("-inf")}

    study = maximize(QuantuneSampler(SPACE, seed=0, features=features))
    study.optimize(objective)
    assert len(study.trials) == SIZE


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_infinite_and_missing_values_do_not_stop_the_search(bad: float) -> None:
    def sometimes_bad(trial: optuna.Trial) -> float:
        params = suggest(trial)
        return bad if params["scheme"] == "power2" else accuracy(params)

    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(sometimes_bad)
    assert len(study.trials) == SIZE


def test_a_region_that_fails_is_left_alone() -> None:
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution([0, 1, 2, 3]) for name in "abc"
    }

    def failing(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_categorical(name, [0, 1, 2, 3]) for name in "abc"}
        if params["a"] >= 2:
            raise RuntimeError
        return float(params["b"] + params["c"])

    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(failing, n_trials=24, catch=RuntimeError)
    late = study.trials[12:]
    assert sum(t.state == TrialState.FAIL for t in late) <= 2


@pytest.mark.parametrize("bits", [2, 4])  # described whole, and sketched
def test_what_a_prior_promises_and_what_fails_is_left_alone_before_anything_succeeds(
    bits: int,
) -> None:
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(list(range(2**bits))) for name in "abc"
    }

    def failing(trial: optuna.Trial) -> float:
        params = {name: trial.suggest_categorical(name, list(range(2**bits))) for name in "abc"}
        if params["a"] >= 2 ** (bits - 1):
            raise RuntimeError
        return float(sum(params.values()))

    sampler = QuantuneSampler(space, features=lambda p: {"prior": sum(p.values())}, seed=0)
    study = maximize(sampler)
    study.optimize(failing, n_trials=15, catch=RuntimeError)
    first = [trial.state for trial in study.trials].index(TrialState.COMPLETE)
    assert first <= 8


def test_a_sampler_can_be_pickled_after_it_was_used() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=3)
    again = optuna.create_study(
        direction="maximize", sampler=pickle.loads(pickle.dumps(study.sampler))
    )
    again.add_trials(study.trials)
    for each in (study, again):
        each.optimize(objective, n_trials=3)
    assert configurations(study) == configurations(again)


def test_ends_of_logarithmic_integers_are_not_measured_twice() -> None:
    space: dict[str, BaseDistribution] = {n: IntDistribution(1, 1000, log=True) for n in "ab"}
    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(
        lambda t: (
            math.log(t.suggest_int("a", 1, 1000, log=True))
            + math.log(t.suggest_int("b", 1, 1000, log=True))
        ),
        n_trials=20,
    )
    assert len(set(configurations(study))) == 20
    assert study.best_value == 0.0


def test_a_region_that_is_pruned_before_any_report_is_left_alone() -> None:
    """It holds what would be best: the surrogate alone would not leave it.

    What is best of the rest lies on its border, so that some proposals fall beyond.
    """

    def rejecting(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0.0, 1.0), trial.suggest_float("y", 0.0, 1.0)
        if x < 0.5 and y < 0.5:
            raise optuna.TrialPruned
        return x + y

    unit = FloatDistribution(0.0, 1.0)
    study = optuna.create_study(sampler=QuantuneSampler({"x": unit, "y": unit}, seed=0))
    study.optimize(rejecting, n_trials=25)
    assert sum(t.state == TrialState.COMPLETE for t in study.trials) >= 8
    assert study.best_value < 0.6


@pytest.mark.parametrize("guessed", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_constraints_are_as_far_off_as_the_farthest(bad: float, guessed: bool) -> None:
    def constrained(trial: optuna.Trial) -> float:
        params = suggest(trial)
        limit = bad if params["granularity"] == "tensor" else -math.copysign(1.0, bad)
        trial.set_constraint("size", limit)
        return accuracy(params)

    def features(params: Mapping[str, Any]) -> dict[str, float]:
        return {"prior:size": float(len(params["scheme"]))}

    sampler = QuantuneSampler(SPACE, seed=0, features=features if guessed else None)
    study = maximize(sampler)
    study.optimize(constrained)
    assert len(study.trials) == SIZE


def test_constraints_are_respected() -> None:
    """Cheap configurations are best, but infeasible; half of the space is infeasible."""
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution([0, 1, 2, 3]) for name in "abc"
    }

    def constrained(trial: optuna.Trial) -> float:
        params = [trial.suggest_categorical(name, [0, 1, 2, 3]) for name in "abc"]
        trial.set_constraint("at least five", 5.0 - sum(params))
        return float(sum(params) + 0.1 * params[0])

    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(constrained, n_trials=25)
    feasible = [t for t in study.trials if t.constraints["at least five"] <= 0]
    assert len(feasible) >= 8
    assert study.best_value == 5.0


def test_pareto_front_of_two_objectives_is_found() -> None:
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(list(range(4))) for name in "abcd"
    }

    def two(trial: optuna.Trial) -> tuple[float, float]:
        a, b, c, d = (trial.suggest_categorical(name, list(range(4))) for name in "abcd")
        waste = c + d
        return a + 0.1 * b + waste, 3 - a + 0.1 * b + waste

    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=QuantuneSampler(space, seed=0)
    )
    study.optimize(two, n_trials=40)
    # The front is a in 0..3 with everything else 0.
    on_front = {t.params["a"] for t in study.best_trials if t.values[0] + t.values[1] == 3.0}
    assert len(on_front) >= 3


def test_continuous_parameters_converge() -> None:
    def sphere(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1.0, 1.0)
        y = trial.suggest_float("y", 1e-3, 1e3, log=True)
        return (x - 0.3) ** 2 + (math.log10(y) / 3 + 0.5) ** 2

    study = optuna.create_study(sampler=QuantuneSampler(seed=0))
    study.optimize(sphere, n_trials=25)
    assert study.best_value < 2e-3


def test_spaces_beyond_enumeration_are_searched_without_repeats() -> None:
    """Sixty layers with three precisions each: 3^60 configurations, additive costs."""
    layers = {
        f"layer{i:02d}": CategoricalDistribution(["int8", "int16", "float"]) for i in range(60)
    }
    weight = np.random.default_rng(0).uniform(size=60)

    def cost(trial: optuna.Trial) -> float:
        chosen = [trial.suggest_categorical(name, d.choices) for name, d in layers.items()]
        return float(sum(w for w, c in zip(weight, chosen, strict=True) if c == "int8"))

    study = optuna.create_study(sampler=QuantuneSampler(layers, seed=0))
    study.optimize(cost, n_trials=25)
    values = [float(t.values[0]) for t in study.trials]
    assert len(set(configurations(study))) == 25
    assert min(values) < 0.75 * np.mean(values[:4])


def test_valid_configurations_are_found_in_a_large_space_where_few_are() -> None:
    layers: dict[str, BaseDistribution] = {
        f"layer{i:02d}": CategoricalDistribution([0, 1]) for i in range(20)
    }

    def valid(params: Mapping[str, Any]) -> bool:
        return bool(sum(params.values()) <= 4)

    study = optuna.create_study(sampler=QuantuneSampler(layers, seed=0, valid=valid))
    study.optimize(lambda t: -sum(t.suggest_categorical(n, [0, 1]) for n in layers), n_trials=10)
    assert all(valid(t.params) for t in study.trials)
    assert study.best_value == -4


def test_named_configurations_are_found_where_hardly_any_is_valid() -> None:
    """No draw of 2^30 is valid; two configurations are named, and one neighbour is valid."""
    layers: dict[str, BaseDistribution] = {
        f"layer{i:02d}": CategoricalDistribution([0, 1]) for i in range(30)
    }
    named = [dict.fromkeys(layers, 0), dict.fromkeys(layers, 1)]

    def valid(params: Mapping[str, Any]) -> bool:
        return sum(params.values()) in {0, 30} or params == {**named[0], "layer07": 1}

    study = optuna.create_study(
        sampler=QuantuneSampler(layers, seed=0, valid=valid, candidates=lambda: named)
    )
    tried = []
    for _ in range(3):
        trial = study.ask(layers)
        tried.append(sum(trial.params.values()))
        study.tell(trial, float(tried[-1]))
    assert sorted(tried) == [0, 1, 30]


def test_a_validity_that_rejects_all_draws_of_a_large_space_is_reported() -> None:
    layers: dict[str, BaseDistribution] = {
        f"layer{i:02d}": CategoricalDistribution([0, 1]) for i in range(30)
    }
    study = optuna.create_study(sampler=QuantuneSampler(layers, valid=lambda params: False))
    with pytest.raises(InputError, match=r"valid.*candidates"):
        study.ask(layers)


def test_conditional_parameters_that_nothing_explains_are_sampled_independently() -> None:
    def conditional(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("clip", [True, False]):
            return trial.suggest_float("percentile", 0.9, 1.0)
        return float(trial.suggest_int("bits", 4, 8))

    study = optuna.create_study(sampler=QuantuneSampler(seed=0, warn_independent_sampling=False))
    study.optimize(conditional, n_trials=15)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert len(set(configurations(study))) > 8
    assert study.best_trial.params["clip"] is True


def test_an_inferred_space_does_without_integers_that_cannot_be_counted() -> None:
    study = optuna.create_study(sampler=QuantuneSampler(seed=0, warn_independent_sampling=False))
    study.optimize(
        lambda t: t.suggest_int("n", 0, 9) + t.suggest_int("seed", 0, 2**62) % 2, n_trials=10
    )
    assert study.best_trial.params["n"] <= 1


def test_independent_sampling_warns_once_it_was_avoidable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("optuna")
    logger.addHandler(caplog.handler)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = maximize(QuantuneSampler(SPACE, seed=0))
        for _ in range(2):
            study.optimize(lambda t: objective(t) + t.suggest_float("extra", 0, 1), n_trials=1)
    finally:
        logger.removeHandler(caplog.handler)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "`extra` in Trial#1" in messages[0]


def test_the_same_seed_gives_the_same_trials() -> None:
    def run(seed: int) -> list[tuple[Any, ...]]:
        study = maximize(QuantuneSampler(SPACE, seed=seed))
        study.optimize(objective, n_trials=10)
        return configurations(study)

    assert run(1) == run(1)
    assert run(1) != run(2)


_CHILD = """
import sys
sys.path.insert(0, {folder!r})
import test_sampler
study = test_sampler.maximize(test_sampler.QuantuneSampler(test_sampler.SPACE, seed=5))
study.optimize(test_sampler.objective, n_trials=10)
print(test_sampler.configurations(study))
"""


def test_the_same_seed_gives_the_same_trials_in_another_process() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=5))
    study.optimize(objective, n_trials=10)
    code = _CHILD.format(folder=str(Path(__file__).parent))
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)},
    )
    assert result.stdout.strip() == str(configurations(study))


def test_reseeding_changes_the_trials() -> None:
    def run(reseed: bool) -> list[tuple[Any, ...]]:
        sampler = QuantuneSampler(SPACE, seed=1)
        if reseed:
            sampler.reseed_rng()
        study = maximize(sampler)
        study.optimize(objective, n_trials=10)
        return configurations(study)

    assert run(reseed=False) != run(reseed=True)


def test_a_new_sampler_goes_on_where_another_stopped() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    study.optimize(objective, n_trials=9)
    study.sampler = QuantuneSampler(SPACE, seed=1)
    study.optimize(objective)
    assert len(study.trials) == len(set(configurations(study))) == SIZE


def test_one_sampler_serves_several_studies() -> None:
    sampler = QuantuneSampler(seed=0)
    first, second = maximize(sampler), optuna.create_study(sampler=sampler)
    for _ in range(4):
        first.optimize(objective, n_trials=2)
        second.optimize(lambda t: t.suggest_float("x", 0, 1), n_trials=2)
    assert len(first.trials) == len(second.trials) == 8


def test_four_threads_measure_nothing_twice() -> None:
    study = maximize(QuantuneSampler(SPACE, seed=0))
    barrier = threading.Barrier(4)

    def together(trial: optuna.Trial) -> float:
        if trial.number < 4:
            barrier.wait(timeout=30)
        return objective(trial)

    study.optimize(together, n_jobs=4)
    assert len(configurations(study)) == len(set(configurations(study))) == SIZE


def _work(path: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(path))
    study = optuna.load_study(
        study_name="shared", storage=storage, sampler=QuantuneSampler(SPACE, seed=0)
    )
    study.optimize(objective)


def test_four_processes_with_the_same_seed_measure_nothing_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.log")
    study = maximize(
        QuantuneSampler(SPACE),
        study_name="shared",
        storage=JournalStorage(JournalFileBackend(path)),
    )
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    assert len(configurations(study)) == len(set(configurations(study))) == SIZE


def test_plans_longer_than_a_storage_column_are_read_back(tmp_path: Path) -> None:
    names = [f"precision_of_a_layer_with_a_long_name_{i:03d}" for i in range(80)]
    space: dict[str, BaseDistribution] = {
        n: CategoricalDistribution(["int8", "f32"]) for n in names
    }
    study = maximize(QuantuneSampler(space, seed=0), storage=f"sqlite:///{tmp_path / 'study.db'}")
    first = study.ask()
    value = first.suggest_categorical(names[0], ["int8", "f32"])
    attributes = study.trials[0].system_attrs
    assert max(len(str(v)) for v in attributes.values()) < 2046
    assert sum(key.startswith("quantune:plan") for key in attributes) > 1
    # A second sampler sees the plan, not only the one parameter asked for.
    pending = read_history(study, SpaceEncoding(space), None).pending
    assert len(pending) == 1
    assert SpaceEncoding(space).decode(pending[0])[names[0]] == value


def test_trials_outside_a_changed_space_are_left_out() -> None:
    study = maximize(QuantuneSampler({"x": IntDistribution(0, 3)}, seed=0))
    study.optimize(lambda t: t.suggest_int("x", 0, 3), n_trials=3)
    wider: dict[str, BaseDistribution] = {"x": IntDistribution(2, 9), "y": FloatDistribution(0, 1)}
    study.sampler = QuantuneSampler(wider, seed=0)
    study.optimize(lambda t: t.suggest_int("x", 2, 9) + t.suggest_float("y", 0, 1), n_trials=10)
    assert study.best_value > 9.0
