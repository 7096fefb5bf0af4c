from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from scipy.stats import spearmanr

from optuna_quantune.search import scoring
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.history import History
from optuna_quantune.search.scoring import Scorer
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.search.surrogate import ModelInputs
from optuna_quantune.search.surrogate import Surrogate


CONFIGURATIONS = Configurations(
    {name: CategoricalDistribution(range(4)) for name in "abc"}, None, None, {}
)
SPACE = CONFIGURATIONS.all
NOTHING = np.empty((0, 3))


def history(rows: list[int], values: list[float]) -> History:
    return History(
        codes=SPACE.codes[rows],
        values=np.array(values)[:, None],
        noise=np.zeros(len(values)),
        constraints={},
        asked=NOTHING,
        failed=NOTHING,
        pending=NOTHING,
        seen=SPACE.codes[rows],
        finished=frozenset(),
    )


def scores(trials: History) -> NDArray[np.float64]:
    return Scorer(CONFIGURATIONS, trials, np.ones(1)).score(CONFIGURATIONS.reference)


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


def test_without_a_feasible_trial_both_feasibility_and_value_count() -> None:
    limits = {"size": np.array([9.0, 1.0])}
    alike = dataclasses.replace(history([0, 21], [1.0, 1.0]), constraints=limits)
    best = SPACE.codes[scores(alike).argmax()]
    assert (best == SPACE.codes[0]).sum() == 0
    differing = dataclasses.replace(history([0, 21], [0.0, 5.0]), constraints=limits)
    change = scores(differing) - scores(alike)
    near = (SPACE.codes == SPACE.codes[21]).sum(axis=1)
    assert change[near == 2].mean() < change[near == 0].mean()


def test_a_long_history_keeps_its_best_and_its_latest_trials() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(64, size=700).tolist()
    trials = history(rows, (SPACE.codes[rows].sum(axis=1) + rng.normal(size=700)).tolist())
    assert SPACE.codes[scores(trials).argmax()].sum() <= 2


def test_no_surrogate_is_fitted_to_more_than_some_hundreds_of_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []

    class Counting(Surrogate):
        def __init__(self, inputs: ModelInputs, *args: Any, pending: ModelInputs, **kw: Any):
            sizes.append((len(inputs), len(pending)))
            super().__init__(inputs, *args, pending=pending, **kw)

    monkeypatch.setattr(scoring, "Surrogate", Counting)
    rng = np.random.default_rng(0)
    rows = rng.integers(64, size=400).tolist()
    limits = {"size": 40.0 - np.array(rows, dtype=np.float64)}
    long = dataclasses.replace(history(rows, rng.normal(size=400).tolist()), constraints=limits)
    scores(dataclasses.replace(long, failed=SPACE.codes[rows[:310]], pending=SPACE.codes[rows]))
    assert sizes == [(300, 300)] * 3


def test_failures_and_successes_that_are_few_all_count() -> None:
    """Of 290 trials, and 20 that failed, no failure is dropped: the first one is avoided."""
    trials = history([63 - n % 40 for n in range(290)], np.zeros(290).tolist())
    failed = SPACE.codes[[0, *[63 - n % 3 for n in range(19)]]]
    change = scores(dataclasses.replace(trials, failed=failed)) - scores(
        dataclasses.replace(trials, failed=failed[1:])
    )
    assert change[0] < -0.1


def test_an_uncertain_value_moves_the_scores_less_than_a_certain_one() -> None:
    trials = history([0, 21, 42, 63], [0.0, 1.0, 2.0, 3.0])
    bad = history([0, 21, 42, 63, 5], [0.0, 1.0, 2.0, 3.0, 9.0])
    vague = dataclasses.replace(bad, noise=np.array([0.0, 0.0, 0.0, 0.0, 9.0]))
    near = (SPACE.codes == SPACE.codes[5]).sum(axis=1) == 2
    certain, uncertain = scores(bad) - scores(trials), scores(vague) - scores(trials)
    assert certain[near].mean() < min(uncertain[near].mean(), 0.0)


def test_an_estimate_is_nothing_to_be_improved_on() -> None:
    """A pruned trial that looked far better than the best complete one, and is not believed."""
    trials = history([0, 21, 42, 63], [0.0, 1.0, 2.0, 3.0])
    vague = dataclasses.replace(
        history([0, 21, 42, 63, 5], [0.0, 1.0, 2.0, 3.0, -9.0]),
        noise=np.array([0.0, 0.0, 0.0, 0.0, np.inf]),
    )
    assert scores(vague).max() > scores(trials).max()


def source(sign: float) -> SourceStudy:
    """All configurations with the sum of their codes, or minus that."""
    return SourceStudy(
        name="source",
        direction="minimize",
        params=tuple(CONFIGURATIONS.encoding.decode(codes) for codes in SPACE.codes),
        values=tuple(sign * SPACE.codes.sum(axis=1)),
        features=({},) * len(SPACE),
    )


def agreement_with_cold_scores(sign: float, rows: list[int]) -> float:
    """Rank correlation of the scores with a source and of those without."""
    configurations = Configurations(
        {name: CategoricalDistribution(range(4)) for name in "abc"},
        None,
        None,
        {},
        sources=[source(sign)],
    )
    trials = history(rows, SPACE.codes[rows].sum(axis=1).tolist())
    scorer = Scorer(configurations, trials, np.ones(1))
    return float(spearmanr(scorer.score(configurations.reference), scores(trials)).statistic)


def test_a_source_that_the_trials_contradict_loses_its_say() -> None:
    few, many = [21], [0, 21, 38, 5, 57, 63, 14, 30, 44]
    assert agreement_with_cold_scores(-1.0, many) > 0.95
    assert agreement_with_cold_scores(-1.0, few) < agreement_with_cold_scores(-1.0, many)


def test_a_source_that_the_trials_bear_out_decides() -> None:
    configurations = Configurations(
        {name: CategoricalDistribution(range(4)) for name in "abc"},
        None,
        None,
        {},
        sources=[source(1.0)],
    )
    rows = [21, 38, 57, 63, 30]
    trials = history(rows, SPACE.codes[rows].sum(axis=1).tolist())
    scorer = Scorer(configurations, trials, np.ones(1))
    informed = scorer.score(configurations.reference)
    assert SPACE.codes[informed.argmax()].sum() <= 1.0


def test_before_any_value_running_trials_count_as_guessed() -> None:
    """Or all workers would begin with neighbours of what is guessed best."""
    configurations = Configurations(
        {name: CategoricalDistribution(range(4)) for name in "abc"},
        lambda params: {"prior": params["a"] + 0.01 * params["b"] + 0.001 * params["c"]},
        None,
        {},
    )
    reference, unknown = configurations.reference, history([], [])
    order = np.argsort(-Scorer(configurations, unknown, np.ones(1)).score(reference))
    assert order[:4].tolist() == [0, 1, 2, 3]
    running = dataclasses.replace(unknown, pending=SPACE.codes[order[:1]])
    scorer = Scorer(configurations, running, np.ones(1))
    rest = order[1:]
    best = SPACE.codes[rest[scorer.score(reference[rest]).argmax()]]
    assert (best == SPACE.codes[0]).tolist() == [True, False, False]
