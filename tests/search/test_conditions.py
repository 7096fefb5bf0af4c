from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import RandomSampler

from optuna_quantune.search.conditions import Conditions
from optuna_quantune.search.conditions import inferred_space
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.history import read_history
from optuna_quantune.search.sampler import QuantuneSampler


SPACE: dict[str, BaseDistribution] = {
    "model": CategoricalDistribution(["network", "forest", "linear"]),
    "layers": IntDistribution(1, 3),
    "units_1": IntDistribution(8, 512, log=True),
    "units_2": IntDistribution(8, 512, log=True),
    "depth": IntDistribution(2, 32),
    "share": FloatDistribution(0.0, 1.0),
}


def fit(trial: optuna.Trial) -> float:
    """Worse models can be had sooner: the best is a network of two layers of 64 units, 0."""
    loss = (trial.suggest_float("share", 0.0, 1.0) - 0.3) ** 2
    model = trial.suggest_categorical("model", ["network", "forest", "linear"])
    if model == "linear":
        return 0.6 + loss
    if model == "forest":
        return 0.3 + 0.002 * (trial.suggest_int("depth", 2, 32) - 12) ** 2 + loss
    layers = trial.suggest_int("layers", 1, 3)
    loss += 0.2 * abs(layers - 2)
    for layer in range(1, layers):
        loss += 0.05 * np.log2(trial.suggest_int(f"units_{layer}", 8, 512, log=True) / 64) ** 2
    return float(loss)


@pytest.fixture(scope="module")
def trials() -> list[optuna.trial.FrozenTrial]:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(fit, n_trials=40)
    return study.trials


def asked(trials: list[optuna.trial.FrozenTrial], encoding: SpaceEncoding) -> NDArray[np.float64]:
    return encoding.encode_known([trial.params for trial in trials])


def test_trials_show_which_parameters_a_configuration_has(
    trials: list[optuna.trial.FrozenTrial],
) -> None:
    encoding = SpaceEncoding(SPACE)
    conditions = Conditions(encoding, asked(trials, encoding))
    lacking = {
        ("linear", 2): {"depth", "layers", "units_1", "units_2"},
        ("forest", 2): {"layers", "units_1", "units_2"},
        ("network", 1): {"depth", "units_1", "units_2"},
        ("network", 2): {"depth", "units_2"},
        ("network", 3): {"depth"},
    }
    for (model, layers), names in lacking.items():
        params = {"units_1": 8, "units_2": 9, "depth": 5, "share": 0.0}
        codes = encoding.encode({**params, "model": model, "layers": layers})
        assert codes is not None
        (inactive,) = conditions.inactive(codes[None])
        assert {encoding.names[column] for column in np.flatnonzero(inactive)} == names


def test_what_a_configuration_lacks_tells_it_from_no_other(
    trials: list[optuna.trial.FrozenTrial],
) -> None:
    encoding = SpaceEncoding(SPACE)
    conditions = Conditions(encoding, asked(trials, encoding))
    base: dict[str, Any] = {"model": "network", "layers": 2, "units_1": 64, "units_2": 64}
    base |= {"depth": 5, "share": 0.0}
    others = [{}, {"units_2": 8}, {"depth": 20}, {"units_1": 8}]
    codes = np.stack([c for o in others if (c := encoding.encode(base | o)) is not None])
    for features in (
        conditions.kernel_features(codes, encoding.kernel_features(codes)),
        conditions.tree_features(codes, encoding.tree_features(codes)),
    ):
        alike = [np.array_equal(row, features[0], equal_nan=True) for row in features]
        assert alike == [True, True, True, False]


def test_of_what_few_trials_show_nothing_is_concluded(
    trials: list[optuna.trial.FrozenTrial],
) -> None:
    encoding = SpaceEncoding(SPACE)
    few = [trials[i] for i in (0, 1, 2, 3)]
    assert not Conditions(encoding, asked(few, encoding))
    assert not Conditions(encoding, np.empty((0, encoding.n_params)))


def test_what_no_other_parameter_explains_is_no_condition() -> None:
    encoding = SpaceEncoding({"a": CategoricalDistribution("xy"), "b": FloatDistribution(0, 1)})
    codes = np.array([[0.0, 0.5], [0.0, np.nan], [1.0, 0.5], [1.0, np.nan]] * 5)
    conditions = Conditions(encoding, codes)
    assert not conditions
    assert conditions.known == [0]


def test_an_inferred_space_has_what_is_asked_for_now_and_then(
    trials: list[optuna.trial.FrozenTrial],
) -> None:
    assert inferred_space(trials) == SPACE
    assert inferred_space(trials[:1]).keys() == trials[0].params.keys()
    other = optuna.create_trial(
        value=0.0,
        params={**trials[0].params, "share": 0.5},
        distributions={**trials[0].distributions, "share": FloatDistribution(0.0, 2.0)},
    )
    assert inferred_space([*trials, other]).keys() == SPACE.keys() - {"share"}


@pytest.mark.parametrize("space", [SPACE, None])
def test_branches_of_a_conditional_space_are_searched(
    space: dict[str, BaseDistribution] | None,
) -> None:
    """Forests are good at once; values of what they lack used to stand for evidence."""

    def best(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> list[float]:
        values = []
        for seed in range(5):
            study = optuna.create_study(sampler=sampler(seed))
            study.optimize(fit, n_trials=40)
            values.append(study.best_value)
        return values

    ours = best(lambda seed: QuantuneSampler(space, seed=seed, warn_independent_sampling=False))
    theirs = best(lambda seed: RandomSampler(seed=seed))
    assert np.mean(ours) < 0.5 * np.mean(theirs)
    assert np.median(ours) < 0.01


def test_trials_of_other_samplers_count_where_they_lack_parameters() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(fit, n_trials=40)
    encoding = SpaceEncoding(inferred_space(study.trials))
    history = read_history(study, encoding, None, is_inferred=True)
    lacking = [encoding.n_params - len(trial.params) for trial in study.trials]
    assert np.isnan(history.asked).sum(axis=1).tolist() == lacking
    # What stands for no value is in the middle of a range: an end would be told from all others.
    for trial, codes in zip(study.trials, history.codes, strict=True):
        whole = encoding.decode(codes)
        assert trial.params.items() <= whole.items()
        stand_ins = {"layers": 2, "units_1": 64, "units_2": 64, "depth": 17}
        assert whole == stand_ins | trial.params


def test_a_conditional_space_of_more_configurations_than_are_scored_is_searched() -> None:
    space = {
        "kind": CategoricalDistribution(["a", "b"]),
        "x": IntDistribution(1, 40),
        "y": IntDistribution(1, 40),
    }

    def value(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["a", "b"]) == "a":
            return 10.0 + abs(trial.suggest_int("x", 1, 40) - 30)
        return float(abs(trial.suggest_int("y", 1, 40) - 12))

    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(value, n_trials=25)
    assert study.best_value <= 1.0


def test_a_large_conditional_space_is_searched_when_a_trial_has_lacked_a_parameter() -> None:
    space = {
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
        "rate": FloatDistribution(1e-5, 1.0, log=True),
        "momentum": FloatDistribution(0.0, 1.0),
    }

    def train(trial: optuna.Trial) -> float:
        loss = abs(np.log10(trial.suggest_float("rate", 1e-5, 1.0, log=True)) + 3.0)
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
            loss += abs(trial.suggest_float("momentum", 0.0, 1.0) - 0.9)
        return float(loss)

    study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
    study.optimize(train, n_trials=20)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 20
    assert study.best_value < 0.1
