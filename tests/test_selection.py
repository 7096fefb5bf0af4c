from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import pack
from optuna_quantune.selection import select
from optuna_quantune.selection import unpack
from optuna_quantune.selection import VALUE_KEY


def add(
    study: optuna.Study,
    wrong: range,
    *,
    latency: float,
    sqnr: float,
    margin_sqnr: float = 0.0,
    size: int = 1000,
    bounds: dict[str, float] | None = None,
) -> None:
    """A finished trial on 500 inputs that is wrong, and disagrees with float, on `wrong`."""
    bits = np.ones(500, dtype=bool)
    bits[wrong] = False
    trial = study.ask()
    attributes = {"n": 500, "agreement": bits.mean(), "latency_ratio": latency, "sqnr_db": sqnr}
    attributes |= {"margin_sqnr_db": margin_sqnr, "size_bytes": size}
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for key in (CORRECT_KEY, AGREES_KEY):
        trial.set_user_attr(key, pack(bits))
    for name, violation in (bounds or {}).items():
        trial.set_constraint(name, violation)
    study.tell(trial, float(bits.mean()))


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(direction="maximize", study_name="study")


def test_bits_survive_packing() -> None:
    bits = np.random.default_rng(0).random(37) < 0.5
    np.testing.assert_array_equal(unpack(pack(bits), 37), bits)


def test_a_trial_no_worse_than_chance_explains_wins_by_speed(study: optuna.Study) -> None:
    add(study, range(20), latency=1.3, sqnr=20.0)  # the best value
    add(study, range(22), latency=0.5, sqnr=20.0)  # two inputs worse, far faster
    add(study, range(80), latency=0.4, sqnr=20.0)  # really worse
    trial, met = select(study)
    assert (trial.number, met) == (1, True)


def test_of_equally_fast_trials_the_least_noisy_wins(study: optuna.Study) -> None:
    add(study, range(20), latency=0.50, sqnr=12.0)
    add(study, range(22), latency=0.52, sqnr=16.0)
    assert select(study)[0].number == 1


def test_a_lucky_value_with_poor_agreement_does_not_win(study: optuna.Study) -> None:
    add(study, range(20), latency=0.5, sqnr=20.0)
    lucky = study.ask()
    correct, agrees = np.ones(500, dtype=bool), np.ones(500, dtype=bool)
    correct[:19], agrees[:60] = False, False
    lucky.set_user_attr(CORRECT_KEY, pack(correct))
    lucky.set_user_attr(AGREES_KEY, pack(agrees))
    attributes = {"n": 500, "agreement": agrees.mean(), "latency_ratio": 0.3, "sqnr_db": 5.0}
    for name, value in attributes.items():
        lucky.set_user_attr(name, value)
    study.tell(lucky, float(correct.mean()))
    assert select(study)[0].number == 0


def test_under_a_bound_the_fastest_trial_within_it_is_chosen(study: optuna.Study) -> None:
    add(study, range(10), latency=0.8, sqnr=20.0, bounds={"accuracy_drop": -0.01})
    add(study, range(15), latency=0.5, sqnr=18.0, bounds={"accuracy_drop": -0.001})
    add(study, range(90), latency=0.3, sqnr=5.0, bounds={"accuracy_drop": 0.19})
    trial, met = select(study)
    assert (trial.number, met) == (1, True)


def test_when_no_trial_is_within_the_bound_it_says_so(study: optuna.Study) -> None:
    add(study, range(90), latency=0.3, sqnr=5.0, bounds={"accuracy_drop": 0.2})
    add(study, range(20), latency=0.9, sqnr=20.0, bounds={"accuracy_drop": 0.1})
    trial, met = select(study)
    assert (trial.number, met) == (1, False)


def test_the_smallest_wins_where_that_is_preferred(study: optuna.Study) -> None:
    add(study, range(20), latency=0.5, sqnr=20.0, size=20_000)
    add(study, range(22), latency=0.9, sqnr=15.0, size=10_000)
    add(study, range(23), latency=0.9, sqnr=18.0, size=10_001)  # a byte more, less noise
    add(study, range(90), latency=0.3, sqnr=5.0, size=5_000)  # really worse
    assert select(study, prefer="size")[0].number == 2
    assert select(study)[0].number == 0


def test_the_least_noise_wins_where_accuracy_is_preferred(study: optuna.Study) -> None:
    add(study, range(22), latency=0.5, sqnr=18.0, size=10_000)
    add(study, range(20), latency=0.9, sqnr=18.0, size=20_000)  # the best value
    add(study, range(22), latency=0.9, sqnr=19.0, size=20_000)
    add(study, range(40), latency=0.9, sqnr=30.0)  # really worse
    assert select(study, prefer="accuracy")[0].number == 2
    assert select(study)[0].number == 0


def test_noise_of_margins_counts_more_than_that_of_scores(study: optuna.Study) -> None:
    add(study, range(20), latency=0.5, sqnr=30.0, margin_sqnr=10.0)  # scores that tie
    add(study, range(20), latency=0.5, sqnr=20.0, margin_sqnr=15.0)
    assert select(study, prefer="accuracy")[0].number == 1
    assert select(study)[0].number == 1


def test_accuracy_is_preferred_within_a_bound_on_it_too(study: optuna.Study) -> None:
    add(study, range(20), latency=0.9, sqnr=18.0, bounds={"accuracy_drop": -0.1})
    add(study, range(60), latency=0.9, sqnr=19.0, bounds={"accuracy_drop": -0.02})
    assert select(study, prefer="accuracy")[0].number == 0


def test_under_a_bound_on_latency_the_most_accurate_within_it_is_chosen(
    study: optuna.Study,
) -> None:
    add(study, range(5), latency=0.9, sqnr=30.0, bounds={"latency": 0.8})
    add(study, range(90), latency=0.3, sqnr=9.0, bounds={"latency": -0.4})
    add(study, range(20), latency=0.4, sqnr=20.0, bounds={"latency": -0.2})
    trial, met = select(study)
    assert (trial.number, met) == (2, True)


def test_when_size_and_accuracy_cannot_both_be_kept_the_size_is(study: optuna.Study) -> None:
    add(
        study,
        range(5),
        latency=0.9,
        sqnr=30.0,
        size=9,
        bounds={"size": 0.8, "accuracy_drop": -0.1},
    )
    add(study, range(60), latency=0.3, sqnr=9.0, bounds={"size": -0.1, "accuracy_drop": 0.05})
    add(study, range(90), latency=0.2, sqnr=9.0, bounds={"size": -0.1, "accuracy_drop": 0.11})
    trial, met = select(study)
    assert (trial.number, met) == (1, False)


def test_when_no_trial_is_small_enough_the_nearest_is_taken(study: optuna.Study) -> None:
    add(study, range(5), latency=0.9, sqnr=30.0, bounds={"latency": 0.8})
    add(study, range(60), latency=0.6, sqnr=9.0, bounds={"latency": 0.1})
    trial, met = select(study)
    assert (trial.number, met) == (1, False)


def test_of_those_that_are_as_little_too_slow_the_most_accurate_is_taken(
    study: optuna.Study,
) -> None:
    add(study, range(90), latency=0.82, sqnr=9.0, bounds={"latency": 0.02})
    add(study, range(20), latency=0.88, sqnr=20.0, bounds={"latency": 0.1})
    add(study, range(5), latency=0.95, sqnr=30.0, bounds={"latency": 0.19})
    trial, met = select(study)
    assert (trial.number, met) == (1, False)


def test_a_latency_whose_interval_holds_another_is_the_same(study: optuna.Study) -> None:
    add(study, range(20), latency=0.50, sqnr=12.0)
    add(study, range(20), latency=0.60, sqnr=16.0)
    assert select(study)[0].number == 0
    noisy = study.ask()
    for name, value in {**study.trials[0].user_attrs, "latency_high": 0.7}.items():
        noisy.set_user_attr(name, value)
    noisy.set_user_attr("latency_ratio", 0.49)
    study.tell(noisy, study.trials[0].value)
    assert select(study)[0].number == 1


def test_a_metric_of_the_users_that_is_minimized_is_chosen_at_its_minimum() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"])
    for error, latency in ((0.3, 0.2), (0.1, 0.9), (0.2, 0.5)):
        trial = study.ask()
        trial.set_user_attr(VALUE_KEY, error)
        study.tell(trial, [latency, error])  # whatever the order of the objectives
    assert select(study, direction="minimize")[0].number == 1


def test_without_bits_the_best_value_wins(study: optuna.Study) -> None:
    for value in (0.5, 0.7, 0.6):
        study.tell(study.ask(), value)
    assert select(study)[0].number == 1


def test_a_study_without_a_completed_trial_is_an_error_that_says_why(study: optuna.Study) -> None:
    trial = study.ask()
    trial.set_user_attr("error", "kernel not implemented")
    study.tell(trial, state=TrialState.FAIL)
    with pytest.raises(InputError, match="'study': no trial was completed.*not implemented"):
        select(study)
