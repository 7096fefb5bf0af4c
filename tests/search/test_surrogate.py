from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution

from optuna_quantune.search import surrogate as module
from optuna_quantune.search.candidates import enumerate_codes
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.surrogate import ModelInputs
from optuna_quantune.search.surrogate import Surrogate


ENCODING = SpaceEncoding({name: CategoricalDistribution(range(3)) for name in "abcd"})
CODES = enumerate_codes(ENCODING)
MAIN_EFFECTS = np.array([[1.0, 0.0, 0.0, 0.0]])


def model_inputs(codes: NDArray[np.float64]) -> ModelInputs:
    return ModelInputs(
        ENCODING.kernel_features(codes),
        ENCODING.tree_features(codes),
        np.empty((len(codes), 0), dtype=np.float32),
    )


SPACE = model_inputs(CODES)


def collapsing_values() -> NDArray[np.float64]:
    """Knob effects, and a region that collapses where two knobs meet."""
    values = 0.2 * CODES[:, 0] + 0.1 * CODES[:, 1] - 0.1 * CODES[:, 2]
    values[(CODES[:, 2] == 2) & (CODES[:, 3] == 0)] += 2.0
    return values


def test_posterior_is_that_of_a_gaussian_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting against the textbook formulas (Rasmussen and Williams 2006, eq. 2.23, 2.24)."""
    monkeypatch.setattr(module, "_NOISES", np.array([0.03, 0.03, 0.03]))
    rows = np.random.default_rng(0).choice(len(CODES), 12, replace=False)
    targets = np.random.default_rng(1).normal(size=12)
    mean, std = Surrogate(SPACE[rows], targets, 4, mixtures=MAIN_EFFECTS).predict(SPACE)

    kernel = (CODES[:, None, :] == CODES[None, :, :]).mean(axis=2) + 0.5
    inverse = np.linalg.inv(kernel[np.ix_(rows, rows)] + 0.03 * np.eye(12))
    cross = kernel[:, rows]
    amplitude = (targets @ inverse @ targets + 2.0) / (12 + 2.0)
    variance = amplitude * (1.5 - np.einsum("ij,jk,ik->i", cross, inverse, cross))
    np.testing.assert_allclose(mean, cross @ inverse @ targets, atol=1e-4)
    np.testing.assert_allclose(std, np.sqrt(variance), atol=1e-4)


def test_measured_configurations_are_nearly_certain() -> None:
    rows = np.arange(0, 81, 4)
    targets = collapsing_values()[rows]
    mean, std = Surrogate(SPACE[rows], targets, 4).predict(SPACE)
    others = np.setdiff1d(np.arange(81), rows)
    assert np.abs(mean[rows] - targets).mean() < 0.1
    assert std[rows].mean() < 0.5 * std[others].mean()


def test_trees_learn_a_collapse_that_main_effects_cannot() -> None:
    values = collapsing_values() - collapsing_values().mean()
    rows = np.random.default_rng(0).choice(len(CODES), 35, replace=False)
    others = np.setdiff1d(np.arange(81), rows)

    def error(mixtures: NDArray[np.float64]) -> float:
        mean, _ = Surrogate(SPACE[rows], values[rows], 4, mixtures=mixtures).predict(SPACE)
        return float(np.sqrt(np.mean((mean[others] - values[others]) ** 2)))

    trees_only = np.array([[0.0, 0.0, 0.0, 1.0]])
    assert error(trees_only) < 0.8 * error(MAIN_EFFECTS)


def weight_of_trees(fitted: Surrogate) -> float:
    """Posterior probability of the mixtures with trees."""
    pairs = zip(fitted._probabilities, fitted._posteriors, strict=True)
    return sum(float(p.sum()) for p, posterior in pairs if posterior.mixture[3] > 0.0)


@pytest.mark.parametrize("n_trials", [8, 20, 40])
def test_trees_that_explain_nothing_have_little_say(n_trials: int) -> None:
    weights, errors = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(CODES), n_trials, replace=False)
        fitted = Surrogate(SPACE[rows], rng.normal(size=n_trials), 4, of_numbers=True)
        mean, std = fitted.predict(SPACE)
        others = np.setdiff1d(np.arange(len(CODES)), rows)
        weights.append(weight_of_trees(fitted))
        errors.append(np.mean(((rng.normal(size=len(CODES)) - mean) / std)[others] ** 2))
    # Before the trials it is 3 / 7.
    assert np.mean(weights) < 0.45
    # Errors of twice the predicted deviation at most.
    assert np.mean(errors) < 4.0


def test_trees_that_explain_much_have_the_say() -> None:
    """Regions with values of their own, in which no knob has an effect by itself."""
    weights = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        regions = rng.normal(size=(2, 2, 2))
        is_last = (CODES[:, :3] == 2).astype(np.int64)
        values = regions[tuple(is_last.T)]
        rows = rng.choice(len(CODES), 40, replace=False)
        weights.append(weight_of_trees(Surrogate(SPACE[rows], values[rows], 4, of_numbers=True)))
    assert np.mean(weights) > 0.8


@pytest.mark.parametrize("n_trials", [12, 30])
def test_a_smooth_function_is_learned_from_few_trials(n_trials: int) -> None:
    encoding = SpaceEncoding({name: FloatDistribution(0.0, 1.0) for name in "abcd"})
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        codes = rng.uniform(size=(200, 4))
        values = 3.0 * ((codes - rng.uniform(size=4)) ** 2).sum(axis=1)
        values = (values - values.mean()) / values.std()
        inputs = ModelInputs(
            encoding.kernel_features(codes),
            encoding.tree_features(codes),
            np.empty((200, 0), dtype=np.float32),
        )
        few = np.arange(n_trials)
        mean, _ = Surrogate(inputs[few], values[few], 4, of_numbers=True).predict(inputs)
        errors.append(np.sqrt(np.mean((mean - values)[n_trials:] ** 2)))
    assert np.mean(errors) < (0.5 if n_trials == 12 else 0.06)


def test_the_order_of_the_trials_hardly_matters() -> None:
    """Sorted by value, the last stage would be like nothing before."""
    values = collapsing_values() - collapsing_values().mean()
    rows = np.random.default_rng(0).choice(len(CODES), 35, replace=False)
    by_value = rows[np.argsort(values[rows])]
    mean, _ = Surrogate(SPACE[rows], values[rows], 4, of_numbers=True).predict(SPACE)
    sorted_mean, _ = Surrogate(SPACE[by_value], values[by_value], 4, of_numbers=True).predict(
        SPACE
    )
    assert np.sqrt(np.mean((mean - sorted_mean) ** 2)) < 0.1


def test_pending_configurations_shrink_uncertainty_and_leave_the_mean() -> None:
    rows, pending = np.array([0, 30, 60, 80]), np.array([40, 41])
    targets = np.array([0.5, -1.0, 0.2, 1.0])
    mean, std = Surrogate(SPACE[rows], targets, 4).predict(SPACE)
    later_mean, later_std = Surrogate(SPACE[rows], targets, 4, pending=SPACE[pending]).predict(
        SPACE
    )
    np.testing.assert_allclose(later_mean, mean, atol=1e-6)
    assert (later_std <= std + 1e-9).all()
    assert (later_std[pending] < 0.5 * std[pending]).all()


def test_described_features_tell_configurations_apart_that_knobs_do_not() -> None:
    """Values follow a feature that has nothing to do with the knobs."""
    rng = np.random.default_rng(0)
    feature = rng.normal(size=(len(CODES), 1)).astype(np.float32)
    values = np.sin(2.0 * feature[:, 0]).astype(np.float64)
    described = ModelInputs(SPACE.kernel, SPACE.trees, feature)
    rows = np.arange(0, 81, 2)
    others = np.arange(1, 81, 2)
    mean, _ = Surrogate(described[rows], values[rows], 4).predict(described)
    blind, _ = Surrogate(SPACE[rows], values[rows], 4).predict(SPACE)
    assert np.corrcoef(mean[others], values[others])[0, 1] > 0.9
    assert abs(np.corrcoef(blind[others], values[others])[0, 1]) < 0.5


@pytest.mark.parametrize("apart", [5, 20], ids=["more trials than features", "fewer"])
def test_screening_is_the_mean_of_main_effects_and_pairs(apart: int) -> None:
    rows = np.arange(0, 81, apart)
    fitted = Surrogate(SPACE[rows], collapsing_values()[rows], 4, mixtures=module.MIXTURES[:2])
    mean, _ = fitted.predict(SPACE)
    screened = fitted.screen(SPACE.kernel)
    np.testing.assert_allclose(screened - screened.mean(), mean - mean.mean(), atol=1e-4)


def test_many_trials_that_lie_close_together_are_no_difficulty() -> None:
    encoding = SpaceEncoding({name: FloatDistribution(0.0, 1.0) for name in "abcdef"})
    rng = np.random.default_rng(0)
    codes = 0.4 + 1e-6 * rng.normal(size=(300, 6))
    inputs = ModelInputs(
        encoding.kernel_features(codes),
        encoding.tree_features(codes),
        np.empty((300, 0), dtype=np.float32),
    )
    mean, std = Surrogate(inputs, rng.normal(size=300), 6, of_numbers=True).predict(inputs)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()


def test_one_trial_is_enough() -> None:
    mean, std = Surrogate(SPACE[np.array([0])], np.zeros(1), 4).predict(SPACE)
    assert np.isfinite(mean).all()
    assert std[0] == std.min()


def test_the_same_trials_give_the_same_surrogate() -> None:
    rows = np.arange(0, 81, 5)
    first, second = (
        Surrogate(SPACE[rows], collapsing_values()[rows], 4).predict(SPACE) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
