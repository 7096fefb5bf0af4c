from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from optuna.trial import create_trial
from optuna.trial import TrialState

from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.history import is_taken
from optuna_quantune.search.history import publish_plan
from optuna_quantune.search.history import published_features
from optuna_quantune.search.history import read_history


optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE: dict[str, BaseDistribution] = {
    "n": IntDistribution(0, 9),
    "c": CategoricalDistribution(["a", "b"]),
}
ENCODING = SpaceEncoding(SPACE)  # Columns: c, n.


def add(study: optuna.Study, n: int, **kwargs: Any) -> None:
    study.add_trial(create_trial(params={"n": n, "c": "b"}, distributions=SPACE, **kwargs))


def test_values_are_read_as_to_be_minimised() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    add(study, 3, values=[0.7, 12.0])
    history = read_history(study, ENCODING, None)
    np.testing.assert_array_equal(history.codes, [[1.0, 3.0]])
    np.testing.assert_array_equal(history.values, [[-0.7, 12.0]])


def test_a_pruned_trial_is_no_better_than_the_median() -> None:
    study = optuna.create_study(direction="maximize")
    for n, value in enumerate([0.5, 0.6, 0.9]):
        add(study, n, value=value)
    for n, last in ((3, 0.8), (4, 0.1), (5, float("nan"))):
        add(study, n, state=TrialState.PRUNED, intermediate_values={0: 0.95, 7: last})
    add(study, 6, state=TrialState.PRUNED)
    history = read_history(study, ENCODING, None)
    np.testing.assert_array_equal(history.values[:, 0], [-0.5, -0.6, -0.9, -0.6, -0.1, np.inf])
    assert len(history.seen) == 7


def test_the_median_is_that_of_the_finite_values() -> None:
    study = optuna.create_study()
    for n, value in enumerate([np.inf, np.inf, 0.4]):
        add(study, n, value=value)
    add(study, 3, state=TrialState.PRUNED, intermediate_values={0: 0.1})
    assert read_history(study, ENCODING, None).values[-1, 0] == 0.4


def test_a_pruned_trial_that_lies_beside_infinite_values_only_is_taken_at_its_word() -> None:
    study = optuna.create_study()
    for n, value in enumerate([np.inf, -np.inf]):
        add(study, n, value=value)
    add(study, 2, state=TrialState.PRUNED, intermediate_values={0: 0.1})
    assert read_history(study, ENCODING, None).values[-1, 0] == 0.1


def test_a_trial_that_was_pruned_before_any_report_has_failed() -> None:
    study = optuna.create_study()
    add(study, 1, state=TrialState.PRUNED)
    np.testing.assert_array_equal(read_history(study, ENCODING, None).failed[:, 1], [1])


def test_a_trial_that_was_pruned_before_it_began_has_not_failed() -> None:
    """As one that was enqueued although its configuration was measured before."""
    study = optuna.create_study()
    study.enqueue_trial({"n": 3, "c": "b"})
    study.tell(study.ask(), state=TrialState.PRUNED)
    assert len(read_history(study, ENCODING, None).failed) == 0


def test_failed_running_and_enqueued_trials_are_told_apart() -> None:
    study = optuna.create_study()
    add(study, 1, state=TrialState.FAIL)
    running = study.ask()
    publish_plan(study, running._cached_frozen_trial, {"n": 2, "c": "b"})
    study.enqueue_trial({"n": 3, "c": "b"})
    study.enqueue_trial({"n": 4})
    history = read_history(study, ENCODING, None)
    np.testing.assert_array_equal(history.failed[:, 1], [1])
    np.testing.assert_array_equal(history.pending[:, 1], [2, 3])
    np.testing.assert_array_equal(history.seen[:, 1], [1, 2, 3])
    assert history.finished == {0}
    assert len(read_history(study, ENCODING, running.number).pending) == 1


def test_a_shorter_plan_replaces_a_longer_one() -> None:
    study = optuna.create_study()
    frozen = study.ask()._cached_frozen_trial
    long = {f"layer{i:04d}": "int8" for i in range(400)}
    publish_plan(study, frozen, {**long, "n": 1, "c": "a"})
    publish_plan(study, frozen, {"n": 5, "c": "b"})
    np.testing.assert_array_equal(read_history(study, ENCODING, None).pending, [[1.0, 5.0]])


def test_a_plan_that_is_just_being_written_is_passed_over() -> None:
    study = optuna.create_study()
    frozen = study.ask()._cached_frozen_trial
    study._storage.set_trial_system_attr(frozen._trial_id, "quantune:plan:0", '{"params": {"n"')
    assert len(read_history(study, ENCODING, None).pending) == 0


def test_a_trial_with_further_parameters_is_not_a_whole_configuration() -> None:
    study = optuna.create_study()
    study.add_trial(
        create_trial(
            params={"n": 1, "c": "a", "more": 2, "single": 5},
            distributions={
                **SPACE,
                "more": IntDistribution(0, 3),
                "single": IntDistribution(5, 5),
            },
            value=0.0,
        )
    )
    history = read_history(study, ENCODING, None)
    assert len(history.codes) == 1
    assert len(history.seen) == 0


@pytest.mark.parametrize(("n", "is_seen"), [(2, True), (1, False)])
def test_a_further_parameter_that_is_fixed_does_not_make_another_configuration(
    n: int, is_seen: bool
) -> None:
    study = optuna.create_study()
    add(study, 2, value=0.0)
    only = SpaceEncoding({"c": SPACE["c"]})
    history = read_history(study, only, None, {"n": n})
    assert len(history.seen) == is_seen
    assert is_taken(study, only, np.array([1.0]), 1, frozenset(), {"n": n}) is is_seen


def test_constraints_of_trials_without_them_are_unknown() -> None:
    study = optuna.create_study()
    study.optimize(_constrained, n_trials=2)
    history = read_history(study, ENCODING, None)
    np.testing.assert_array_equal(history.constraints["size"], [1.0, np.nan])
    np.testing.assert_array_equal(history.feasible, [False, True])


def _constrained(trial: optuna.Trial) -> float:
    if trial.number == 0:
        trial.set_constraint("size", 1.0)
    trial.suggest_categorical("c", ["a", "b"])
    return float(trial.suggest_int("n", 0, 9))


@pytest.mark.parametrize(("planned", "taken"), [(5, True), (6, False)])
def test_a_plan_of_another_trial_takes_its_configuration(planned: int, taken: bool) -> None:
    study = optuna.create_study()
    mine, other = study.ask(), study.ask()
    publish_plan(study, mine._cached_frozen_trial, {"n": 5, "c": "b"})
    publish_plan(study, other._cached_frozen_trial, {"n": planned, "c": "b"})
    codes = np.array([1.0, 5.0])
    assert is_taken(study, ENCODING, codes, mine.number, frozenset()) is taken
    assert not is_taken(study, ENCODING, codes, mine.number, frozenset({other.number}))


def _stopped(study: optuna.Study, n: int, **attributes: object) -> None:
    study.add_trial(
        create_trial(
            state=optuna.trial.TrialState.PRUNED,
            params={"n": n, "c": "a"},
            distributions=SPACE,
            intermediate_values={1: 0.9, 2: 0.4},
            user_attrs=attributes,
        )
    )


def test_a_stopped_trial_counts_as_its_latest_estimate_and_as_that_uncertain() -> None:
    study = optuna.create_study(direction="maximize")
    _stopped(study, 1, rungs=[[10, 0.5, 0.1, 0.9], [20, 0.6, 0.404, 0.796]])
    _stopped(study, 2)
    history = read_history(study, ENCODING, None)
    np.testing.assert_allclose(history.values, [[-0.6], [-0.4]])
    np.testing.assert_allclose(history.noise, [0.1, np.inf])


@pytest.mark.parametrize("rungs", [[1, 3, 9], [[10, float("nan"), 0.1, 0.9]], 5])
def test_a_stopped_trial_without_an_estimate_counts_as_its_last_value(rungs: object) -> None:
    study = optuna.create_study(direction="maximize")
    _stopped(study, 1, rungs=rungs)
    history = read_history(study, ENCODING, None)
    np.testing.assert_allclose(history.values, [[-0.4]])
    np.testing.assert_allclose(history.noise, [np.inf])


def test_a_running_trial_counts_as_its_estimate_as_soon_as_it_has_one() -> None:
    study = optuna.create_study()
    trial = study.ask(dict(SPACE))
    assert len(read_history(study, ENCODING, None).pending) == 1
    trial.set_user_attr("rungs", [[10, 0.5, 0.3, 0.7]])
    history = read_history(study, ENCODING, None)
    assert len(history.pending) == 0
    np.testing.assert_array_equal(history.values, [[0.5]])
    assert len(history.seen) == 1


def test_features_stay_with_the_trial() -> None:
    study = optuna.create_study()
    frozen = study.ask()._cached_frozen_trial
    features = {f"layer{i:03d}": i / 7 for i in range(300)}
    publish_plan(study, frozen, {"n": 5, "c": "b"}, {**features, "unknown": float("nan")})
    assert published_features(study.trials[0]) == features


def test_what_was_interrupted_and_run_again_has_not_failed() -> None:
    study = optuna.create_study()
    add(study, 1, state=TrialState.FAIL)
    add(study, 2, state=TrialState.FAIL)
    add(study, 1, value=0.5)
    np.testing.assert_array_equal(read_history(study, ENCODING, None).failed[:, 1], [2])
