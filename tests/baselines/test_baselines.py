"""Every baseline on the space of the `quantune` preset, and against random search."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from baselines import random


optuna.logging.set_verbosity(optuna.logging.ERROR)

QUANTUNE: dict[str, BaseDistribution] = {
    "calibration_images": CategoricalDistribution([1, 32, "all"]),
    "scheme": CategoricalDistribution(["asymmetric", "symmetric", "symmetric_uint8", "power2"]),
    "clipping": CategoricalDistribution(["max", "kl"]),
    "granularity": CategoricalDistribution(["tensor", "channel"]),
    "mixed_precision": CategoricalDistribution(["none", "first_last"]),
}
NAMES = ["random", "grid", "cma", "genetic", "tpe", "gp"]


def create(name: str, search_space: dict[str, BaseDistribution], seed: int) -> Any:
    if name == "gp":
        pytest.importorskip("torch")
    if name == "cma":
        pytest.importorskip("cmaes")
    return importlib.import_module(f"baselines.{name}").create(search_space, seed=seed)


def table(seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Random effects of every choice; the value of a configuration is their sum."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=len(distribution.choices))
        for name, distribution in QUANTUNE.items()
        if isinstance(distribution, CategoricalDistribution)
    }


def run(sampler: optuna.samplers.BaseSampler, n_trials: int, seed: int) -> optuna.Study:
    effects = table(seed)

    def objective(trial: optuna.Trial) -> float:
        value = 0.0
        for name, distribution in QUANTUNE.items():
            assert isinstance(distribution, CategoricalDistribution)
            choice = trial.suggest_categorical(name, distribution.choices)
            value += float(effects[name][distribution.choices.index(choice)])
        return value

    study = optuna.create_study(sampler=sampler)
    study.optimize(objective, n_trials=n_trials)
    return study


def regret(study: optuna.Study, seed: int) -> float:
    effects = table(seed).values()
    best, worst = sum(e.min() for e in effects), sum(e.max() for e in effects)
    return float((study.best_value - best) / (worst - best))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_trials(name: str) -> None:
    n_trials = 13 if name == "gp" else 25
    params = [
        [t.params for t in run(create(name, QUANTUNE, seed), n_trials, seed=0).trials]
        for seed in (1, 1, 2)
    ]
    assert params[0] == params[1]
    assert params[0] != params[2]
    assert len(params[0]) == n_trials


@pytest.mark.parametrize("name", ["grid", "cma", "genetic", "tpe"])
def test_is_no_worse_than_random_search_after_forty_trials(name: str) -> None:
    """Paired over 24 tables; the mean difference is not significantly above zero."""
    differences = np.array(
        [
            regret(run(create(name, QUANTUNE, seed), 40, seed), seed)
            - regret(run(random.create(QUANTUNE, seed=seed), 40, seed), seed)
            for seed in range(24)
        ]
    )
    standard_error = differences.std(ddof=1) / np.sqrt(len(differences))
    assert differences.mean() < 2 * standard_error


def test_grid_visits_all_configurations_once_in_a_random_order() -> None:
    study = run(create("grid", QUANTUNE, 0), 200, seed=0)
    visited = [tuple(sorted(t.params.items(), key=str)) for t in study.trials]
    assert len(visited) == len(set(visited)) == 96
    first_knob = [t.params["calibration_images"] for t in study.trials[:32]]
    assert len(set(first_knob)) == 3


def test_cma_concentrates_on_good_choices_where_random_search_does_not() -> None:
    """The mean of the last twenty of sixty trials, not only the best, is better."""

    def late_mean(name: str) -> float:
        late = [
            t.value for s in range(8) for t in run(create(name, QUANTUNE, s), 60, s).trials[40:]
        ]
        return float(np.mean([value for value in late if value is not None]))

    assert late_mean("cma") < late_mean("random") - 1.0


def test_cma_resumes_from_the_trials_of_the_study() -> None:
    """Two samplers in turns propose what one would: nothing is kept outside the study."""
    pytest.importorskip("cmaes")

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", -1.0, 1.0)
        return x**2 + trial.suggest_int("n", 0, 9) + (trial.suggest_categorical("c", "ab") == "a")

    space: dict[str, BaseDistribution] = {
        "x": FloatDistribution(-1.0, 1.0),
        "n": IntDistribution(0, 9),
        "c": CategoricalDistribution("ab"),
    }
    whole = optuna.create_study(sampler=create("cma", space, 3))
    whole.optimize(objective, n_trials=30)
    parts = optuna.create_study(sampler=create("cma", space, 3))
    for _ in range(3):
        parts.optimize(objective, n_trials=10)
        parts.sampler = create("cma", space, 3)
    assert [t.params for t in whole.trials] == [t.params for t in parts.trials]


def test_a_grid_over_a_continuous_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="rate"):
        create("grid", {"rate": FloatDistribution(0.0, 1.0)}, 0)
