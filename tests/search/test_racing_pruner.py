from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from optuna_quantune.search.pruner import BAR_KEY
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.search.pruner import RUNGS_KEY
from optuna_quantune.search.pruner import SEEN_KEY
from optuna_quantune.search.sampler import QuantuneSampler


COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
N = 400
LOOKS = (40, 100, 200, 400)


def bits(values: NDArray[np.bool_]) -> str:
    return np.packbits(values).tobytes().hex()


def tell(
    study: optuna.Study,
    right: NDArray[np.bool_],
    *,
    width: float = 0.2,
    leave_out: Sequence[str] = (),
    bar: float | None = None,
    violation: float | None = None,
    seen: int = N,
) -> TrialState:
    """One trial that runs inputs in their order, `seen` at most; its interval shrinks."""
    trial = study.ask()
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0
    value = sign * float(right.mean())
    rungs = []
    if bar is not None:
        trial.set_user_attr(BAR_KEY, sign * bar)
    for step in LOOKS:
        half = width * (1 - step / N)
        rungs.append([step, value, value - half, value + half])
        attributes = {
            RUNGS_KEY: rungs,
            CORRECT_KEY: bits(right),
            SEEN_KEY: bits(np.arange(N) < min(step, seen)),
        }
        for name, attribute in attributes.items():
            if name not in leave_out:
                trial.set_user_attr(name, attribute)
        trial.report(value, step)
        if step < N and trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return TrialState.PRUNED
    if violation is not None:
        trial.set_constraint("size", violation)
    study.tell(trial, value)
    return TrialState.COMPLETE


@pytest.fixture(params=["maximize", "minimize"])
def study(request: pytest.FixtureRequest) -> optuna.Study:
    return optuna.create_study(direction=request.param, pruner=RacingPruner())


def table(seed: int) -> NDArray[np.bool_]:
    """Which of 400 inputs each of 30 configurations gets right; a third of them collapsed."""
    rng = np.random.default_rng(seed)
    common = rng.random(N) < 0.8
    flips = rng.random((30, N)) < rng.choice([0.01, 0.05, 0.6], 30)[:, None]
    return common ^ flips


def test_the_best_of_a_table_is_never_pruned_and_collapsed_ones_are_at_once(
    study: optuna.Study,
) -> None:
    for seed in range(5):
        rows = table(seed)
        study = optuna.create_study(direction=study.direction, pruner=RacingPruner())
        states = [tell(study, row) for row in rows]
        values = rows.mean(axis=1)
        assert states[int(np.argmax(values))] == TrialState.COMPLETE
        incumbent = np.maximum.accumulate(values)
        collapsed = [i for i in range(1, 30) if values[i] < 0.6 and incumbent[i - 1] > 0.7]
        assert collapsed
        for i in collapsed:
            assert states[i] == TrialState.PRUNED
            assert (study.trials[i].last_step or N) <= 200


def test_what_tells_nothing_is_never_pruned(study: optuna.Study) -> None:
    good, bad = np.ones(N, np.bool_), np.zeros(N, np.bool_)
    assert tell(study, bad, leave_out=[RUNGS_KEY]) == TrialState.COMPLETE
    assert tell(study, good, leave_out=[RUNGS_KEY]) == TrialState.COMPLETE
    # The incumbent has no interval, so that nothing can be compared with it.
    assert tell(study, bad) == TrialState.COMPLETE
    assert tell(study, good) == TrialState.COMPLETE


@pytest.mark.parametrize(
    "rungs",
    [
        [1, 3, 9],
        [[1, 0.5]],
        "1,3,9",
        {"1": 0.5},
        [[40, 0.5, None, None]],
        [[40, math.nan, math.nan, math.nan]],
        [[40, math.inf, math.inf, math.inf]],
    ],
)
@pytest.mark.parametrize("of", ["trial", "incumbent"])
def test_rungs_that_are_no_estimate_prune_nothing_and_stop_no_search(
    rungs: object, of: str
) -> None:
    sampler = QuantuneSampler({"n": IntDistribution(0, 9)}, seed=0, n_startup_trials=1)
    study = optuna.create_study(direction="minimize", pruner=RacingPruner(), sampler=sampler)
    known = [[40, 0.0, -0.1, 0.1]]
    for number in range(3):
        trial = study.ask()
        trial.suggest_int("n", 0, 9)
        is_incumbent = number == 0
        trial.set_user_attr(RUNGS_KEY, rungs if is_incumbent == (of == "incumbent") else known)
        trial.report(float(number), step=1)
        assert not trial.should_prune()
        study.tell(trial, float(number))


def test_a_study_of_another_objective_runs_undisturbed() -> None:
    study = optuna.create_study(pruner=RacingPruner())

    def objective(trial: optuna.Trial) -> float:
        for step in range(5):
            trial.report(float(trial.number), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return float(trial.number)

    study.optimize(objective, n_trials=4)
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


def test_with_a_confidence_a_difference_that_chance_explains_prunes_nothing(
    study: optuna.Study,
) -> None:
    study.pruner = RacingPruner(confidence=0.95)
    best = np.ones(N, np.bool_)
    worse = best.copy()
    worse[:4] = False  # four of four discordant inputs: a chance of 1 in 16
    tell(study, best, width=0.0)
    assert tell(study, worse, width=0.0) == TrialState.COMPLETE
    much_worse = best.copy()
    much_worse[:8] = False  # 1 in 256
    assert tell(study, much_worse, width=0.0) == TrialState.PRUNED
    study.pruner = RacingPruner()
    assert tell(study, worse, width=0.0) == TrialState.PRUNED


def test_only_inputs_that_both_have_run_count_in_the_test(study: optuna.Study) -> None:
    study.pruner = RacingPruner(confidence=0.95)
    best = np.ones(N, np.bool_)
    worse = best.copy()
    worse[150:] = False
    tell(study, best, width=0.0)
    assert tell(study, worse, width=0.0) == TrialState.PRUNED
    assert study.trials[-1].last_step == 200  # among the first 100 none differs
    raced = optuna.create_study(direction=study.direction, pruner=study.pruner)
    tell(raced, best, width=0.0, seen=100)
    assert tell(raced, worse, width=0.0) == TrialState.COMPLETE


def test_without_bits_the_intervals_decide(study: optuna.Study) -> None:
    study.pruner = RacingPruner(confidence=0.95)
    best = np.ones(N, np.bool_)
    worse = best.copy()
    worse[:8] = False
    leave_out = [CORRECT_KEY, SEEN_KEY]
    tell(study, best, leave_out=leave_out)
    assert tell(study, worse, leave_out=leave_out, width=0.2) == TrialState.COMPLETE
    assert tell(study, worse, leave_out=leave_out, width=0.01) == TrialState.PRUNED


def test_a_trial_above_the_bar_stays_and_one_below_goes() -> None:
    study = optuna.create_study(direction="maximize", pruner=RacingPruner())
    best = np.ones(N, np.bool_)
    enough, too_few = best.copy(), best.copy()
    enough[:20] = False
    too_few[:60] = False
    tell(study, best, bar=0.9)
    assert tell(study, enough, bar=0.9, width=0.0) == TrialState.COMPLETE
    assert tell(study, too_few, bar=0.9, width=0.0) == TrialState.PRUNED
    assert tell(study, enough, width=0.0) == TrialState.PRUNED  # no bar: only the best counts


def test_an_incumbent_that_violates_a_constraint_prunes_nothing(study: optuna.Study) -> None:
    best, worse = np.ones(N, np.bool_), np.zeros(N, np.bool_)
    tell(study, best, violation=0.1)
    assert tell(study, worse) == TrialState.COMPLETE
    tell(study, best, violation=-0.1)
    assert tell(study, worse) == TrialState.PRUNED


def test_a_confidence_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        RacingPruner(confidence=1.0)


def tell_once(
    study: optuna.Study, value: float, low: float, high: float, *, last: bool = False
) -> bool:
    """One trial with one interval, larger is better; whether it is pruned."""
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1.0
    trial = study.ask()
    trial.set_user_attr(RUNGS_KEY, [[64, sign * value, *sorted((sign * low, sign * high))]])
    trial.report(sign * value, 64)
    pruned = False if last else trial.should_prune()
    study.tell(trial, None if pruned else sign * value, state=PRUNED if pruned else COMPLETE)
    return pruned


def test_a_trial_is_pruned_unless_it_can_be_better_by_more_than_the_indifference(
    study: optuna.Study,
) -> None:
    study.pruner = RacingPruner(indifference=0.01)
    tell_once(study, 0.80, 0.80, 0.80, last=True)
    assert not tell_once(study, 0.79, 0.77, 0.811)
    assert tell_once(study, 0.79, 0.77, 0.809)
    study.pruner = RacingPruner(indifference=0.0)
    assert not tell_once(study, 0.79, 0.77, 0.801)
    assert tell_once(study, 0.79, 0.77, 0.799)


def test_the_doubts_of_both_trials_add_up_as_those_of_a_difference_do(
    study: optuna.Study,
) -> None:
    study.pruner = RacingPruner(indifference=0.0)
    tell_once(study, 0.80, 0.77, 0.805, last=True)  # its lower end counts, its upper one does not
    # 0.03 and 0.04 are 0.05 together.
    assert not tell_once(study, 0.751, 0.60, 0.791)
    assert tell_once(study, 0.749, 0.60, 0.789)


def test_a_trial_that_equals_the_incumbent_is_pruned_wrongly_in_2_percent_of_all_cases() -> None:
    rng = np.random.default_rng(0)
    pruned = 0
    for _ in range(300):
        study = optuna.create_study(direction="maximize", pruner=RacingPruner(indifference=0.0))
        first, second = rng.normal(0.8, 0.02, 2)
        tell_once(study, first, first - 0.0392, first + 0.0392, last=True)
        pruned += tell_once(study, second, second - 0.0392, second + 0.0392)
    # One side of a 95 % interval is 2.5 %, which is 7.5; the sum of the two would give 0.8.
    assert 3 <= pruned <= 13


def test_a_negative_indifference_is_refused() -> None:
    with pytest.raises(ValueError, match="indifference: -0.1 is negative"):
        RacingPruner(indifference=-0.1)
