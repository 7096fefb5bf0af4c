from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import CORRECT_KEY
from optuna_quantune.selection import pack
from optuna_quantune.selection import select
from optuna_quantune.selection import unpack


def add(
    study: optuna.Study, wrong: range, *, latency: float, sqnr: float, drop: float | None = None
) -> None:
    """A finished trial on 500 inputs that is wrong, and disagrees with float, on `wrong`."""
    bits = np.ones(500, dtype=bool)
    bits[wrong] = False
    trial = study.ask()
    attributes = {"n": 500, "agreement": bits.mean(), "latency_ratio": latency, "sqnr_db": sqnr}
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    for key in (CORRECT_KEY, AGREES_KEY):
        trial.set_user_attr(key, pack(bits))
    if drop is not None:
        trial.set_constraint("accuracy_drop", drop)
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
    add(study, range(10), latency=0.8, sqnr=20.0, drop=-0.01)
    add(study, range(15), latency=0.5, sqnr=18.0, drop=-0.001)
    add(study, range(90), latency=0.3, sqnr=5.0, drop=0.19)
    trial, met = select(study)
    assert (trial.number, met) == (1, True)


def test_when_no_trial_is_within_the_bound_it_says_so(study: optuna.Study) -> None:
    add(study, range(90), latency=0.3, sqnr=5.0, drop=0.2)
    add(study, range(20), latency=0.9, sqnr=20.0, drop=0.1)
    trial, met = select(study)
    assert (trial.number, met) == (1, False)


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
