from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate
from scipy import stats

from optuna_quantune.search.acquisition import log_expected_improvement
from optuna_quantune.search.acquisition import log_probability_below
from optuna_quantune.search.acquisition import Tchebycheff


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-2.0, 0.5), (3.0, 1.0), (8.0, 2.0)])
def test_expected_improvement_is_its_integral(mean: float, std: float) -> None:
    best = 0.3
    integral, _ = integrate.quad(
        lambda y: (best - y) * stats.norm.pdf(y, mean, std), mean - 30 * std, best, epsabs=1e-14
    )
    score = log_expected_improvement(np.array([mean]), np.array([std]), best)
    assert score[0] == pytest.approx(np.log(integral), rel=1e-6)


def test_expected_improvement_orders_candidates_where_it_underflows() -> None:
    mean = np.array([30.0, 40.0, 50.0, 1e5, 2e5])
    scores = log_expected_improvement(mean, np.ones(5), 0.0)
    assert np.isfinite(scores).all()
    assert (np.diff(scores) < 0.0).all()
    # Mills' ratio: h(z) -> phi(z) / z^2, here to one part in a thousand.
    assert scores[2] == pytest.approx(stats.norm.logpdf(50.0) - 2 * np.log(50.0), abs=2e-3)


def test_of_two_equal_means_the_uncertain_one_is_worth_more() -> None:
    scores = log_expected_improvement(np.zeros(2), np.array([0.1, 1.0]), 0.0)
    assert scores[1] > scores[0]


def test_probability_below_is_that_of_the_normal_distribution() -> None:
    score = log_probability_below(np.array([1.0]), np.array([2.0]), 0.5)
    assert score[0] == pytest.approx(stats.norm.logcdf(0.5, 1.0, 2.0))


def test_tchebycheff_reaches_every_point_of_a_concave_front() -> None:
    angle = np.linspace(0.0, np.pi / 2, 6)
    front = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    chosen = {
        int(Tchebycheff.fit(front, np.array([w, 1.0 - w]))(front).argmin())
        for w in np.linspace(0.001, 0.999, 2001)
    }
    assert chosen == set(range(6))


def test_tchebycheff_prefers_a_dominating_point() -> None:
    targets = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.6]])
    # 0.5 * 0.5 is the larger term of both; the sum decides.
    scores = Tchebycheff.fit(targets, np.array([0.6, 0.4]))(targets)
    assert scores[2] < scores[3]
