"""The flips that the model of the noise expects, beside simulated ones with a known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from optuna_quantune.evaluation.margin_noise import MarginNoise


if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Noise = Callable[[np.random.Generator, int], NDArray[np.float64]]

SEEN = 300
UNSEEN = 4000


def draw(
    rng: np.random.Generator, n: int, noise: Noise, *, wild: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Margins from 0 to 20 and what is left of them: a line, noise, and failures of any margin."""
    margins = rng.uniform(0.0, 20.0, n)
    left = 0.2 + 0.9 * margins + (0.5 + 0.05 * margins) * noise(rng, n)
    fails = rng.random(n) < wild
    return margins, np.where(fails, rng.uniform(-margins, margins), left)


def predictions(
    noise: Noise, *, wild: float = 0.0, seeds: int = 30, seen: int = SEEN
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Expected flips of unseen inputs of wide margins, their variance, and the flips there are."""
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        model = MarginNoise.fit(*draw(rng, seen, noise, wild=wild))
        margins, left = draw(rng, UNSEEN, noise, wild=wild)
        wide = margins > 6.0
        rows.append((*model.flips(margins[wide], np.zeros(0), 0), int((left[wide] <= 0).sum())))
    expected, variance, flips = np.array(rows).T
    return expected, variance, flips


def gauss(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.standard_normal(n)


def heavy(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.standard_t(2.0, n)


def heavy_below(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """As margins are: they can lose far more than they can win."""
    noise = heavy(rng, n)
    return np.where(noise < 0, noise, 0.3 * np.abs(rng.standard_normal(n)))


@pytest.mark.parametrize("noise", [heavy, heavy_below])
def test_a_heavy_tail_is_learned_from_the_residuals(noise: Noise) -> None:
    expected, _, flips = predictions(noise)
    assert flips.mean() > 10
    assert 0.6 < expected.mean() / flips.mean() < 1.7


def test_a_heavy_tail_is_not_taken_for_failures_of_any_margin() -> None:
    rows = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        seen, unseen = rng.uniform(0.0, 20.0, SEEN), rng.uniform(2.0, 4.0, 400)
        model = MarginNoise.fit(seen, seen + 0.5 * heavy(rng, SEEN))
        flips = int((unseen + 0.5 * heavy(rng, 400) <= 0).sum())
        rows.append((model.flips(unseen, np.zeros(0), 0)[0], flips))
    expected, true = np.mean(rows, axis=0)
    assert 0.6 < expected / true < 1.5  # twice as many without heavy tails


def test_a_light_tail_is_not_taken_for_a_heavy_one() -> None:
    expected, _, flips = predictions(gauss)
    assert flips.mean() < 1
    assert expected.mean() < 0.003 * UNSEEN


def test_failures_of_any_margin_are_learned_as_such() -> None:
    expected, _, flips = predictions(gauss, wild=0.03)
    assert flips.mean() > 30
    assert 0.6 < expected.mean() / flips.mean() < 1.7


def test_a_few_wild_failures_do_not_move_the_line_and_the_scale() -> None:
    with_failures, without = (
        MarginNoise.fit(*draw(np.random.default_rng(0), 2000, gauss, wild=wild))
        for wild in (0.03, 0.0)
    )
    assert with_failures.line == pytest.approx([0.2, 0.9], abs=0.1)
    assert with_failures.scale.sum() == pytest.approx(without.scale.sum(), rel=0.25)


@pytest.mark.parametrize(("noise", "wild"), [(gauss, 0.0), (heavy_below, 0.0), (gauss, 0.02)])
def test_flips_lie_within_what_the_variance_says(noise: Noise, wild: float) -> None:
    expected, variance, flips = predictions(noise, wild=wild)
    standard = (flips - expected) / np.sqrt(variance + expected)
    assert (np.abs(standard) < 2.0).mean() >= 0.9


def test_the_covariance_of_the_line_is_how_much_fits_to_other_inputs_differ() -> None:
    models = [
        MarginNoise.fit(*draw(np.random.default_rng(seed), SEEN, gauss)) for seed in range(200)
    ]
    spread = np.cov(np.array([model.line for model in models]).T)
    claimed = np.mean([model.covariance for model in models], axis=0)
    assert np.diag(claimed) == pytest.approx(np.diag(spread), rel=0.5)


@pytest.mark.parametrize("seen", [24, 100])
def test_the_variance_is_how_much_fits_to_other_inputs_differ_in_what_they_expect(
    seen: int,
) -> None:
    margins = np.linspace(0.5, 3.0, 1000)
    rows = []
    for seed in range(60):
        model = MarginNoise.fit(*draw(np.random.default_rng(seed), seen, gauss))
        # A huge sample that flips as expected leaves no doubt but that of the fit's parameters.
        alone = model.flips(margins, np.zeros(0), 0)[0]
        rows.append(model.flips(margins, margins.repeat(100), round(100 * alone)))
    expected, variance = np.array(rows).T
    assert np.sqrt(variance.mean()) == pytest.approx(expected.std(), rel=0.3)


def test_fewer_inputs_leave_more_doubt() -> None:
    doubt = [
        np.mean(np.sqrt(variance))
        for _, variance, _ in (predictions(gauss, seeds=10, seen=n) for n in (32, 1000))
    ]
    assert doubt[0] > 2 * doubt[1]


def test_a_random_sample_corrects_what_the_fit_expects_and_makes_it_surer() -> None:
    rng = np.random.default_rng(0)
    model = MarginNoise.fit(*draw(rng, SEEN, heavy))
    margins = rng.uniform(0.0, 20.0, 1000)
    sample = margins[::2]
    alone, doubt = model.flips(margins, np.zeros(0), 0)
    as_expected, surer = model.flips(margins, sample, round(alone / 2))
    twice, _ = model.flips(margins, sample, round(alone))
    assert as_expected == pytest.approx(alone, rel=0.2)
    assert surer < 0.7 * doubt
    assert 1.3 * alone < twice < 2.0 * alone


@pytest.mark.parametrize("margin", [0.0, 1.0, 1e-3, 1e6])
def test_margins_that_are_all_the_same_leave_doubt_and_no_error(margin: float) -> None:
    margins = np.full(16, margin)
    for left in (margins, margins * np.linspace(0.5, 1.5, 16), -margins):
        model = MarginNoise.fit(margins, left)
        expected, variance = model.flips(np.full(50, margin), margins[:4], int(left[0] <= 0))
        assert 0.0 <= expected <= 50.0
        assert 0.0 <= variance < np.inf
        nearly = MarginNoise.fit(margins * (1 + 1e-9 * np.arange(16)), left)
        assert min(nearly.flips(np.full(50, margin), np.zeros(0), 0)) >= 0.0
