from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.history import History
from optuna_quantune.search.scoring import Scorer


CONFIGURATIONS = Configurations(
    {name: CategoricalDistribution(range(4)) for name in "abc"}, None, None, {}
)
SPACE = CONFIGURATIONS.all
NOTHING = np.empty((0, 3))


def history(rows: list[int], values: list[float]) -> History:
    return History(
        codes=SPACE.codes[rows],
        values=np.array(values)[:, None],
        constraints={},
        failed=NOTHING,
        pending=NOTHING,
        seen=SPACE.codes[rows],
        finished=frozenset(),
    )


def scores(trials: History) -> NDArray[np.float64]:
    return Scorer(CONFIGURATIONS, SPACE, trials, 1.0, np.ones(1)).score(SPACE)


def test_running_trials_lower_the_scores_around_them() -> None:
    trials = history([0, 21, 42, 63], [0.0, 1.0, 2.0, 3.0])
    pending = SPACE.codes[[5]]
    change = scores(dataclasses.replace(trials, pending=pending)) - scores(trials)
    agreement = (SPACE.codes == pending).sum(axis=1)
    assert change[agreement == 3].mean() < change[agreement == 2].mean()
    assert change[agreement == 2].mean() < change[agreement == 0].mean()


def test_an_infeasible_neighbourhood_is_scored_down() -> None:
    trials = history([0, 21, 42, 63], [0.0, 1.0, 2.0, 3.0])
    limited = dataclasses.replace(trials, constraints={"size": np.array([2.0, -1.0, -1.0, -1.0])})
    change = scores(limited) - scores(trials)
    near = (SPACE.codes == SPACE.codes[0]).sum(axis=1)
    assert change[near == 2].mean() < change[near == 0].mean() - 0.5


def test_without_a_feasible_trial_the_likeliest_feasible_candidate_is_best() -> None:
    trials = dataclasses.replace(
        history([0, 21], [0.0, 1.0]), constraints={"size": np.array([9.0, 1.0])}
    )
    best = SPACE.codes[scores(trials).argmax()]
    assert (best == SPACE.codes[0]).sum() == 0


def test_a_long_history_keeps_its_best_and_its_latest_trials() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(64, size=700).tolist()
    trials = history(rows, (SPACE.codes[rows].sum(axis=1) + rng.normal(size=700)).tolist())
    assert SPACE.codes[scores(trials).argmax()].sum() <= 2
