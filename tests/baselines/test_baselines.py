"""Every baseline on the space of the `quantune` preset, and against random search."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from baselines import quantune_published
from baselines import random


optuna.logging.set_verbosity(optuna.logging.ERROR)

QUANTUNE: dict[str, BaseDistribution] = {
    "calibration_images": CategoricalDistribution([1, 32, "all"]),
    "scheme": CategoricalDistribution(["asymmetric", "symmetric", "symmetric_uint8", "power2"]),
    "clipping": CategoricalDistribution(["max", "kl"]),
    "granularity": CategoricalDistribution(["tensor", "channel"]),
    "mixed_precision": CategoricalDistribution(["none", "first_last"]),
}
NAMES = [
    "random",
    "random_without_replacement",
    "grid",
    "brute_force",
    "qmc",
    "cma",
    "genetic",
    "genetic_50",
    "tpe",
    "gp",
    "smac",
    "quantune_published",
]


def create(name: str, search_space: dict[str, BaseDistribution], seed: int) -> Any:
    if name == "gp":
        pytest.importorskip("torch")
    if name == "cma":
        pytest.importorskip("cmaes")
    if name == "smac":
        pytest.importorskip("smac")
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


def configurations(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(trial.params[name] for name in QUANTUNE) for trial in study.trials]


def regret(study: optuna.Study, seed: int) -> float:
    effects = table(seed).values()
    best, worst = sum(e.min() for e in effects), sum(e.max() for e in effects)
    return float((study.best_value - best) / (worst - best))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_trials(name: str) -> None:
    n_trials = {"gp": 13, "smac": 11}.get(name, 25)
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


@pytest.mark.parametrize("name", ["random_without_replacement", "grid", "brute_force"])
def test_visits_all_configurations_once_in_a_random_order(name: str) -> None:
    study = run(create(name, QUANTUNE, 0), 200, seed=0)
    visited = configurations(study)
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


def test_lexicographic_grid_is_nested_loops_and_ends() -> None:
    study = run(create("grid_lexicographic", QUANTUNE, 0), 200, seed=0)
    choices = [d.choices for d in QUANTUNE.values() if isinstance(d, CategoricalDistribution)]
    assert configurations(study) == [
        (a, b, c, d, e)
        for a in choices[0]
        for b in choices[1]
        for c in choices[2]
        for d in choices[3]
        for e in choices[4]
    ]


def test_genetic_50_is_random_search_for_fifty_trials() -> None:
    genetic = run(create("genetic_50", QUANTUNE, 4), 50, seed=0)
    assert configurations(genetic) == configurations(run(random.create(QUANTUNE, seed=4), 50, 0))


def test_published_quantune_repeats_nothing_and_ends() -> None:
    visited = configurations(run(create("quantune_published", QUANTUNE, 0), 200, seed=0))
    assert len(visited) == len(set(visited)) == 96


def test_published_quantune_is_greedy_by_batches_after_random_trials() -> None:
    """A study whose values are told as noise proposes the same until the batch is over."""
    startup, batch = quantune_published.STARTUP_TRIALS, quantune_published.BATCH_SIZE
    honest = run(create("quantune_published", QUANTUNE, 2), startup + 2 * batch, seed=2)
    sampler = create("quantune_published", QUANTUNE, 2)
    study = optuna.create_study(sampler=sampler)
    for number, expected in enumerate(configurations(honest)):
        trial = study.ask(QUANTUNE)
        is_same = tuple(trial.params[name] for name in QUANTUNE) == expected
        assert is_same or number >= startup + batch
        value = honest.trials[number].value
        assert value is not None
        study.tell(trial, value if number < startup else 100.0 + number)
    assert not is_same


def test_published_quantune_beats_random_search_without_repeats() -> None:
    differences = [
        regret(run(create("quantune_published", QUANTUNE, seed), 22, seed), seed)
        - regret(run(create("grid", QUANTUNE, seed), 22, seed), seed)
        for seed in range(16)
    ]
    assert np.mean(differences) < -np.std(differences, ddof=1) / 4


def test_published_quantune_begins_with_what_was_best_on_other_models() -> None:
    effects = table(0)
    grid = run(create("grid", QUANTUNE, 0), 96, seed=0)
    record = quantune_published.ModelRecord(
        architecture={"layers": 20.0},
        float_value=1.0,
        params=[trial.params for trial in grid.trials],
        values=[-trial.value for trial in grid.trials if trial.value is not None],
    )
    model = quantune_published.ModelRecord(architecture={"layers": 40.0}, float_value=2.0)
    sampler = quantune_published.create_with_transfer(
        QUANTUNE, seed=5, model=model, sources=[record]
    )
    first = run(sampler, 1, seed=0).trials[0].value
    best = sum(effect.min() for effect in effects.values())
    worst = sum(effect.max() for effect in effects.values())
    assert first is not None
    assert (first - best) / (worst - best) < 0.1


def test_auto_says_what_it_needs_when_it_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optunahub = pytest.importorskip("optunahub")

    def offline(package: str) -> None:
        raise OSError(f"{package}: no network")

    monkeypatch.setattr(optunahub, "load_module", offline)
    with pytest.raises(ImportError, match=r"no network.*pip install optunahub cmaes scipy torch"):
        create("auto", QUANTUNE, 0)


def test_smac_says_what_it_needs_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "smac", None)
    with pytest.raises(ImportError, match="pip install smac"):
        importlib.import_module("baselines.smac").create(QUANTUNE, seed=0)
