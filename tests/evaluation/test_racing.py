from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.racing import half_width
from optuna_quantune.evaluation.racing import looks
from optuna_quantune.evaluation.racing import order
from optuna_quantune.evaluation.racing import PILOT
from optuna_quantune.evaluation.racing import Race
from optuna_quantune.evaluation.racing import SMALLEST_RACE
from optuna_quantune.evaluation.racing import weights


N = 800
PRECISION = 0.005


def simulate(
    seed: int, *, kept: float = 0.9, floor: float = 0.3, slope: float = 0.05
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Float margins, margins left, and who is right: noise grows with the margin, tails are heavy.

    A flip mends a third of the float model's mistakes.
    """
    rng = np.random.default_rng(seed)
    margins = rng.exponential(3.0, N)
    noise = rng.standard_t(5, N) * (floor + slope * margins)
    left = kept * margins + noise
    float_right = rng.random(N) < 0.5 + 0.4 * margins / margins.max()
    mended = rng.random(N) < 1 / 3
    right = np.where(left > 0, float_right, ~float_right & mended)
    return margins, left, float_right, right


def run_race(
    margins: NDArray[np.float64],
    left: NDArray[np.float64],
    float_right: NDArray[np.bool_],
    right: NDArray[np.bool_],
    *,
    seed: int,
    precision: float = PRECISION,
) -> tuple[int, Interval]:
    """The number of inputs at which a race ends, and what it says then."""
    indices = order(margins, seed=seed)
    race = Race(margins)
    for start, stop in pairwise([0, *looks(len(margins))]):
        race.add(indices[start:stop], left[indices[start:stop]])
        # Nothing that was not run may be used: it is turned around.
        interval = race.estimate(np.where(race.seen, right, ~right), float_right)
        if stop >= PILOT and half_width(interval) <= precision:
            break
    return stop, interval


def test_a_race_begins_with_all_margins_and_goes_on_with_the_smallest_and_random_ones() -> None:
    margins = np.random.default_rng(0).permutation(np.arange(640.0))
    indices = order(margins, seed=1)
    assert sorted(indices) == list(range(640))
    assert sorted(margins[indices[:PILOT]] // 10) == list(range(64))  # one of each ten
    assert sorted(margins[indices[:16]] // 40) == list(range(16))
    after = margins[indices[PILOT:]].reshape(-1, 4)[:60]
    assert (np.diff(after[:, :3].ravel()) > 0).all()
    assert after[:, 2].max() < 300
    assert 250 < after[:, 3].mean() < 450  # every fourth is drawn from all that are left
    assert (order(margins, seed=1) == indices).all()
    assert (order(margins, seed=2)[:PILOT] != indices[:PILOT]).any()


def test_few_inputs_are_not_raced() -> None:
    assert looks(SMALLEST_RACE - 1) == [SMALLEST_RACE - 1]
    steps = looks(1000)
    assert steps[:2] == [16, 64]
    assert steps[-1] == 1000
    assert all(step % 16 == 0 for step in steps[:-1])


def test_intervals_hold_the_truth_as_often_as_they_say_and_few_inputs_are_run() -> None:
    ended, held, errors = [], [], []
    for seed in range(60):
        margins, left, float_right, right = simulate(seed)
        stop, interval = run_race(margins, left, float_right, right, seed=seed)
        ended.append(stop)
        held.append(interval.low <= right.mean() <= interval.high)
        errors.append(interval.estimate - right.mean())
        assert half_width(interval) <= PRECISION
    assert np.mean(held) >= 0.92
    assert np.mean(ended) < 0.45 * N
    assert abs(np.mean(errors)) < 0.0006


def test_intervals_hold_the_truth_at_every_look_also_of_a_collapsed_model() -> None:
    held = []
    for seed in range(20):
        margins, _, float_right, _ = simulate(seed)
        rng = np.random.default_rng(seed)
        left = rng.normal(-2.0, 3.0, N)  # another class, whatever the margin was
        right = float_right & (left > 0)
        indices, race = order(margins, seed=seed), Race(margins)
        for start, stop in pairwise([0, *looks(N)][:6]):
            race.add(indices[start:stop], left[indices[start:stop]])
            interval = race.estimate(right, float_right)
            held.append(interval.low <= right.mean() <= interval.high)
            assert interval.high < 0.6
    assert np.mean(held) >= 0.92


def test_failures_on_a_few_inputs_of_any_margin_are_in_the_intervals_and_delay_the_end() -> None:
    healthy, failed, held = [], [], []
    for seed in range(20):
        margins, left, float_right, right = simulate(seed)
        failing = np.random.default_rng(seed + 100).random(N) < 0.05
        left = np.where(failing, -margins, left)
        right = np.where(failing, False, right)
        stop, interval = run_race(margins, left, float_right, right, seed=seed)
        failed.append(stop)
        held.append(interval.low <= right.mean() <= interval.high)
        healthy.append(run_race(*simulate(seed), seed=seed)[0])
    assert np.mean(failed) > 1.5 * np.mean(healthy)
    assert np.mean(held) >= 0.9


def test_the_pilot_corrects_a_fit_that_does_not_fit() -> None:
    errors, held = [], []
    for seed in range(30):
        margins, _, _, _ = simulate(seed)
        # Most outcomes turn into their contrary, the others become far safer than they were: a
        # line with symmetric noise says that half of them flip.
        flips = np.random.default_rng(seed).random(N) < 0.7
        left = np.where(flips, -margins, 3 * margins)
        indices, race = order(margins, seed=seed), Race(margins)
        race.add(indices[:PILOT], left[indices[:PILOT]])
        interval = race.estimate(~flips, np.ones(N, np.bool_))
        errors.append(interval.estimate - 0.3)
        held.append(interval.low <= (~flips).mean() <= interval.high)
    assert abs(np.mean(errors)) < 0.05
    assert np.mean(held) >= 0.9


def test_early_intervals_hold_what_the_fit_does_not_know_yet() -> None:
    held = []
    for seed in range(60):
        margins, left, float_right, right = simulate(seed, kept=0.8, floor=0.8)
        indices, race = order(margins, seed=seed), Race(margins)
        for start, stop in pairwise([0, 16, 64, 128]):
            race.add(indices[start:stop], left[indices[start:stop]])
            interval = race.estimate(right, float_right)
            held.append(interval.low <= right.mean() <= interval.high)
    assert np.mean(held) >= 0.92


def test_flips_mend_as_many_mistakes_as_they_did_on_the_inputs_that_were_run() -> None:
    errors = []
    for seed in range(30):
        margins, left, _, _ = simulate(seed, kept=0.6, floor=2.0)
        rng = np.random.default_rng(seed)
        float_right = rng.random(N) < 0.3
        right = np.where(left > 0, float_right, ~float_right & (rng.random(N) < 0.8))
        indices, race = order(margins, seed=seed), Race(margins)
        race.add(indices[:300], left[indices[:300]])
        errors.append(race.estimate(right, float_right).estimate - right.mean())
    assert abs(np.mean(errors)) < 0.01


@pytest.mark.parametrize("few_levels", [False, True])
def test_a_model_with_the_same_output_for_every_input_is_not_taken_for_a_perfect_one(
    few_levels: bool,
) -> None:
    margins, _, _, _ = simulate(0)
    rng = np.random.default_rng(0)
    # All scores are equal: no margin is left, and one of ten predictions stays by chance.
    left = np.where(rng.random(N) < 0.05, rng.normal(size=N), 0.0) if few_levels else np.zeros(N)
    right = (left > 0) | (rng.random(N) < 0.1)
    indices, race = order(margins, seed=0), Race(margins)
    for start, stop in pairwise([0, *looks(N)][:6]):
        race.add(indices[start:stop], left[indices[start:stop]])
        interval = race.estimate(right, np.ones(N, np.bool_))
        assert interval.estimate < 0.5
        assert interval.low <= right.mean() <= interval.high


def test_a_race_that_ran_everything_is_exact() -> None:
    margins, left, float_right, right = simulate(0)
    stop, interval = run_race(margins, left, float_right, right, seed=0, precision=-1.0)
    assert stop == N
    assert interval == Interval(right.mean(), right.mean(), right.mean())


def test_a_model_without_noise_is_certain_after_the_pilot() -> None:
    margins, _, float_right, _ = simulate(0)
    stop, interval = run_race(margins, margins, float_right, float_right, seed=0)
    assert stop == PILOT
    # Not a single trace of wild failures, but they cannot be ruled out from the pilot alone.
    assert interval.estimate == pytest.approx(float_right.mean(), abs=1e-3)


def test_what_is_not_a_number_has_flipped() -> None:
    margins, _, _, _ = simulate(0)
    race = Race(margins)
    indices = order(margins, seed=0)[:PILOT]
    race.add(indices, np.full(PILOT, np.nan))
    interval = race.estimate(np.zeros(N, np.bool_), np.ones(N, np.bool_))
    assert interval.estimate < 0.1


def test_weights_give_the_pilot_the_place_of_what_was_not_run() -> None:
    margins = np.random.default_rng(0).permutation(np.arange(640.0))
    indices = order(margins, seed=0)
    seen = np.zeros(640, np.bool_)
    seen[indices[:200]] = True
    result = weights(margins, seen)
    assert result.sum() == pytest.approx(640.0)
    assert (result[~seen] == 0).all()
    # Margins themselves are nearly uniform, so that their mean is nearly met.
    assert result @ margins / 640 == pytest.approx(margins.mean(), rel=0.05)
    assert (weights(margins, np.ones(640, np.bool_)) == 1).all()
