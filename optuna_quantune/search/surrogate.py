"""The cost model: what the trials so far say about every other configuration.

A Gaussian process whose kernel is partly made by gradient-boosted trees (XGBoost). A linear model
on the knobs is the best one for the first trials, products of knobs are needed soon after, and
trees find what neither can express: a whole region that collapses once two knobs meet. Each has a
kernel; how much each counts is decided by the marginal likelihood of the trials. The trees' kernel
is the share of trees in which two configurations fall into the same leaf (Thebelt et al., *Tree
ensemble kernels for Bayesian optimization with known constraints over mixed-feature spaces*,
NeurIPS 2022, arXiv 2207.00879; He et al., *Practical lessons from predicting clicks on ads at
Facebook*, ADKDD 2014, for trees as a feature transform of a linear model).

Trees explain whatever they have been fitted to, pure noise too. With categorical knobs alone, of
which trials soon repeat every choice, that does little harm; with numbers a tree can give every
trial a leaf of its own. There a kernel with trees counts by how well it predicts trials that its
trees have not seen: half of the trials from the other half, and part of that half from the rest of
it (Dawid, *Statistical theory: the prequential approach*, JRSS A 147(2), 1984). For a kernel
without trees such a chain of predictions is the marginal likelihood, so the two compare. The
choices are measured in ``benchmarks/ablation_surrogate.py``.

Plain numpy, scipy and xgboost: nothing here knows of a study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dtrtrs


if TYPE_CHECKING:
    import xgboost

Array: TypeAlias = NDArray[np.float64]

# Weights of the main-effect, pairwise, product and tree kernels, from "only main effects" to
# "mostly trees"; each row sums to 1.
MIXTURES = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.6, 0.4, 0.0, 0.0],
        [0.3, 0.3, 0.4, 0.0],
        [0.1, 0.2, 0.7, 0.0],
        [0.5, 0.0, 0.0, 0.5],
        [0.2, 0.2, 0.0, 0.6],
        [0.1, 0.1, 0.4, 0.4],
    ]
)
# Noise variances, as shares of the kernel's variance. Functions of numbers can be smooth; with
# less noise the covariance of many trials that lie close together may not be positive definite, as
# the features are float32.
_NOISES = np.array([0.003, 0.03, 0.15])
_NOISES_OF_NUMBERS = np.array([1e-4, 3e-3, 0.1])
# Kernel weights (main effects, pairs, products, features) for the first look at mean functions.
_FIRST_LOOK = np.array([0.4, 0.3, 0.3, 0.3])
# Where the kernel of the trees stands among the others.
_TREE_KERNEL = 3
# Variance of the constant, as a share of the kernel's; it stands for the unknown mean.
_CONSTANT = 0.5
# Decay of the product kernel: agreement exp(-1 / (0.15 n_params)) for one differing parameter.
_PRODUCT_SCALE = 0.15
# Hyperparameter settings that are averaged over, the most likely ones; the rest have hardly any
# weight.
_N_AVERAGED = 4
# Likeliest mixtures that are tried with the other noises too.
_N_REFINED = 2
# Stages in which trials are predicted; each doubles the trials that the trees have seen.
_N_STAGES = 3
_TREE_PARAMS: dict[str, Any] = {
    "max_depth": 3,
    "eta": 0.3,
    "lambda": 1.0,
    "min_child_weight": 1,
    "tree_method": "exact",
    "nthread": 1,
    "verbosity": 0,
    "base_score": 0.0,
}
_N_TREES = 20


@dataclass(frozen=True)
class ModelInputs:
    """What the surrogate sees of configurations.

    Attributes:
        kernel: Blocks of unit norm per parameter, float32 of shape (n_configs, n_features); see
            ``SpaceEncoding.kernel_features``.
        trees: Columns for the trees, float32 of shape (n_configs, n_columns), NaN where unknown.
        described: Standardised features of the configurations for a smooth kernel, float32 of
            shape (n_configs, n_described), finite; no columns where nothing is described.
    """

    kernel: NDArray[np.float32]
    trees: NDArray[np.float32]
    described: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.kernel)

    def __getitem__(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ModelInputs:
        return ModelInputs(self.kernel[rows], self.trees[rows], self.described[rows])

    def append(self, other: ModelInputs) -> ModelInputs:
        """These configurations followed by others."""
        return ModelInputs(
            np.concatenate([self.kernel, other.kernel]),
            np.concatenate([self.trees, other.trees]),
            np.concatenate([self.described, other.described]),
        )


@dataclass(frozen=True)
class _Task:
    """What is to be explained.

    Attributes:
        residuals: What each mean function leaves of the targets, shape (n_trials, n_means).
        noise: Variance that is known of each target, shape (n_trials,).
        log_beliefs: Logarithm of the belief in each mean function, shape (n_means,).
    """

    residuals: Array
    noise: Array
    log_beliefs: Array


@dataclass(frozen=True)
class _Stage:
    """Trials to be predicted from others, by trees that have seen the others only.

    Attributes:
        rows: The trials, int64 of shape (n_rows,): the others, then those to be predicted.
        n_others: How many the others are.
        kernels: Between all of these, shape (n_kernels, n_rows, n_rows).
    """

    rows: NDArray[np.int64]
    n_others: int
    kernels: Array


@dataclass(frozen=True)
class _Posterior:
    """One hyperparameter setting conditioned on the trials, under each mean function.

    Attributes:
        mixture: The kernel's weights.
        cholesky: Factor of the known configurations' covariance.
        alpha: Weights of the known configurations in the mean, shape (n_known, n_means).
        variance: Variance of the kernel, shape (n_means,).
        log_evidence: Logarithm of the marginal likelihood times the belief, shape (n_means,); with
            trees, of the likelihood of trials that they have not seen.
    """

    mixture: Array
    cholesky: Array
    alpha: Array
    variance: Array
    log_evidence: Array


class Surrogate:
    """Posterior mean and standard deviation of configurations, given trials.

    There may be several mean functions: that nothing is known, what a prior expects, what earlier
    studies expect. Each is believed as far as the trials have come out as it says (by the marginal
    likelihood), so one that misleads loses its say as trials come in.

    Args:
        inputs: The trials' configurations, at least one.
        targets: The trials' targets, roughly standardised, float64 of shape (n_trials,).
        n_params: The number of parameters; the squared norm of a row of ``inputs.kernel``.
        means: The trials' targets as each mean function expects them, float64 of shape
            (n_trials, n_means). By default 0, the only one.
        beliefs: How far each mean function is believed before the trials; positive, float64 of
            shape (n_means,). By default all alike.
        noise: Standard deviation of what is known of each target, float64 of shape (n_trials,).
            By default the targets are as exact as each other.
        pending: Configurations that are being measured now. They are taken to come out as
            expected: the mean does not change, the uncertainty near them shrinks.
        mixtures: Kernel weights to choose from, float64 of shape (n_mixtures, 4).
        of_numbers: Whether parameters have an order: kernels with trees then count by what they
            predict of trials that their trees have not seen, and less noise is thought possible.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        targets: Array,
        n_params: int,
        *,
        means: Array | None = None,
        beliefs: Array | None = None,
        noise: Array | None = None,
        pending: ModelInputs | None = None,
        mixtures: Array = MIXTURES,
        of_numbers: bool = False,
    ) -> None:
        self._n_params = n_params
        if means is None:
            means = np.zeros((len(targets), 1))
        task = _Task(
            residuals=targets[:, None] - means,
            noise=np.zeros(len(targets)) if noise is None else noise**2,
            log_beliefs=np.zeros(means.shape[1]) if beliefs is None else np.log(beliefs),
        )
        self._known = inputs if pending is None else inputs.append(pending)
        # The trees learn what the mean functions leave, weighted by a first look at these.
        plain = self._plain_kernels(self._known)
        noises = _NOISES_OF_NUMBERS if of_numbers else _NOISES
        first = _condition(plain, task, _FIRST_LOOK[: len(plain)], noises[1])
        left = task.residuals @ _softmax(first.log_evidence)
        weights = 1.0 / (1.0 + task.noise)
        self._trees = _fit_trees(inputs.trees, left, weights)
        self._known_leaves = _leaves(self._trees, self._known.trees)
        kernels = _with_tree_kernel(plain, self._known_leaves, self._known_leaves)
        stages = _stages(plain, inputs.trees, left, weights) if of_numbers else []
        self._posteriors = _posteriors(kernels, task, mixtures, noises, stages)
        evidence = np.array([posterior.log_evidence for posterior in self._posteriors])
        self._probabilities = _softmax(evidence)

    @property
    def belief(self) -> Array:
        """Posterior probability of each mean function; float64 of shape (n_means,)."""
        return np.asarray(self._probabilities.sum(axis=0))

    def predict(self, inputs: ModelInputs, means: Array | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation, each float64 of shape (n_configs,).

        Args:
            inputs: The configurations.
            means: What each mean function expects of them, float64 of shape (n_configs, n_means).
        """
        leaves = _leaves(self._trees, inputs.trees)
        kernels = _with_tree_kernel(self._plain_kernels(inputs), leaves, self._known_leaves)
        expected = np.zeros((len(inputs), 1)) if means is None else means
        mean = np.zeros(len(inputs))
        second_moment = np.zeros(len(inputs))
        for probability, posterior in zip(self._probabilities, self._posteriors, strict=True):
            cross = _mixed(posterior.mixture, kernels)
            mean_here = expected + cross @ posterior.alpha
            explained = _solve(posterior.cholesky, cross.T)
            prior_variance = posterior.mixture.sum() + _CONSTANT
            unexplained = np.maximum(prior_variance - np.sum(explained**2, axis=0), 1e-9)
            mean += mean_here @ probability
            second_moment += mean_here**2 @ probability
            second_moment += unexplained * (posterior.variance @ probability)
        return mean, np.sqrt(np.maximum(second_moment - mean**2, 1e-12))

    def screen(self, kernel: NDArray[np.float32]) -> NDArray[np.float64]:
        """The main-effect and pairwise part of the mean, for far more configurations.

        That part is a quadratic form of the kernel features, so its cost does not depend on the
        number of trials.

        Args:
            kernel: As in ``ModelInputs``, float32 of shape (n_configs, n_features).

        Returns:
            float64 of shape (n_configs,), up to a constant.
        """
        known = self._known.kernel / np.float32(self._n_params)
        alphas = np.array(
            [p.alpha @ w for p, w in zip(self._posteriors, self._probabilities, strict=True)]
        )
        parts = np.array([posterior.mixture[:2] for posterior in self._posteriors])
        main, pair = (parts.T @ alphas).astype(np.float32)
        if len(known) < known.shape[1]:  # as where a parameter has thousands of choices
            agreement = kernel @ known.T
            return np.asarray(agreement**2 @ pair + agreement @ main, dtype=np.float64)
        linear = known.T @ main
        quadratic = (known.T * pair) @ known
        result: Array = np.einsum("ij,ij->i", kernel @ quadratic + linear, kernel).astype(
            np.float64
        )
        return result

    def _plain_kernels(self, inputs: ModelInputs) -> Array:
        """The kernels without trees against the known configurations.

        float64 of shape (n_kernels, n_configs, n_known): main effects, pairs, products and, where
        there are features, their kernel.
        """
        known = self._known
        agreement = (inputs.kernel @ known.kernel.T).astype(np.float64) / self._n_params
        kernels = [agreement, agreement**2, np.exp((agreement - 1.0) / _PRODUCT_SCALE)]
        n_described = inputs.described.shape[1]
        if n_described:
            a, b = inputs.described.astype(np.float64), known.described.astype(np.float64)
            distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2.0 * a @ b.T
            kernels.append(np.exp(-0.5 * np.maximum(distance, 0.0) / n_described))
        return np.stack(kernels)


def _fit_trees(inputs: NDArray[np.float32], targets: Array, weights: Array) -> xgboost.Booster:
    import xgboost

    data = xgboost.DMatrix(inputs, targets, weight=weights, nthread=1)
    # xgboost.train would copy the booster at the end, which takes as long as eight trees.
    booster = xgboost.Booster(_TREE_PARAMS, [data])
    for iteration in range(_N_TREES):
        booster.update(data, iteration)
    return booster


def _leaves(trees: xgboost.Booster, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """One-hot leaves, scaled so that inner products are shares of trees."""
    import xgboost

    leaves = trees.predict(xgboost.DMatrix(inputs, nthread=1), pred_leaf=True).astype(np.int64)
    n_nodes = 2 ** (_TREE_PARAMS["max_depth"] + 1)
    one_hot = np.zeros((len(leaves), _N_TREES, n_nodes), dtype=np.float32)
    np.put_along_axis(one_hot, leaves[:, :, None], 1.0, axis=2)
    one_hot /= np.sqrt(np.float32(_N_TREES))
    return one_hot.reshape(len(leaves), -1)


def _with_tree_kernel(
    plain: Array, leaves: NDArray[np.float32], known_leaves: NDArray[np.float32]
) -> Array:
    shares = (leaves @ known_leaves.T).astype(np.float64)
    return np.insert(plain, _TREE_KERNEL, shares, axis=0)


def _stages(
    plain: Array, inputs: NDArray[np.float32], targets: Array, weights: Array
) -> list[_Stage]:
    """The trials in stages; in the first, where no tree has seen any, all share their leaves.

    Every stage is spread over all trials, as the late ones of a search are much alike.
    """
    parts: list[NDArray[np.int64]] = []
    rest = np.arange(len(targets))
    while len(parts) < _N_STAGES - 1 and len(rest) > 1:
        parts.insert(0, rest[1::2])
        rest = rest[::2]
    stages = [_Stage(rest, 0, np.insert(_between(plain, rest), _TREE_KERNEL, 1.0, axis=0))]
    for part in parts:
        others = stages[-1].rows
        rows = np.concatenate([others, part])
        trees = _fit_trees(inputs[others], targets[others], weights[others])
        leaves = _leaves(trees, inputs[rows])
        kernels = _with_tree_kernel(_between(plain, rows), leaves, leaves)
        stages.append(_Stage(rows, len(others), kernels))
    return stages


def _between(kernels: Array, rows: NDArray[np.int64]) -> Array:
    return np.asarray(kernels[:, rows[:, None], rows])


def _posteriors(
    kernels: Array, task: _Task, mixtures: Array, noises: Array, stages: list[_Stage]
) -> list[_Posterior]:
    """Conditions hyperparameter settings on the residuals; keeps the likely ones.

    ``kernels`` may have more rows than there are residuals: the rest are pending configurations.
    """
    if len(kernels) > mixtures.shape[1]:
        # Every mixture once without and once half made of the kernel on described features.
        without = np.pad(mixtures, ((0, 0), (0, 1)))
        mixtures = np.concatenate([without, 0.5 * without + 0.5 * np.eye(len(kernels))[-1]])
    # All mixtures with the middle noise, then the other noises with the likeliest mixtures.
    low, middle, high = noises
    fits = [_condition(kernels, task, mixture, middle, stages) for mixture in mixtures]
    fits.sort(key=lambda fit: -fit.log_evidence.max())
    for fit in fits[:_N_REFINED]:
        for noise in (low, high):
            fits.append(_condition(kernels, task, fit.mixture, noise, stages))
    fits.sort(key=lambda fit: -fit.log_evidence.max())
    return fits[:_N_AVERAGED]


def _condition(
    kernels: Array, task: _Task, mixture: Array, noise: float, stages: Sequence[_Stage] = ()
) -> _Posterior:
    """The posterior under one hyperparameter setting.

    The amplitude is integrated out under a scaled inverse chi-squared prior worth two trials of
    variance 1, so the marginal likelihood is that of a Student t distribution. Targets are roughly
    standardised, so what is known of their noise counts as a share of the kernel's variance.

    Given ``stages``, the likelihood and the amplitude of a mixture with trees are those of the
    predictions of the stages.
    """
    n_trials, n_known = len(task.residuals), kernels.shape[1]
    covariance = _mixed(mixture, kernels)
    covariance.flat[:: n_known + 1] += noise
    covariance.flat[: n_trials * (n_known + 1) : n_known + 1] += task.noise
    cholesky = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
    whitened = np.zeros((n_known, task.residuals.shape[1]))
    # Pending configurations come out as expected: their whitened residual stays zero.
    part = cholesky[:n_trials, :n_trials]
    whitened[:n_trials] = _solve(part, task.residuals)
    errors, scales = whitened[:n_trials], np.diag(part)
    if stages and mixture[_TREE_KERNEL] > 0.0:
        errors, scales = _predicted(stages, task, mixture, noise)
    power = np.sum(errors**2, axis=0) + 2.0
    return _Posterior(
        mixture=mixture,
        cholesky=cholesky,
        alpha=_solve(cholesky, whitened, transposed=True),
        variance=power / (n_trials + 2.0),
        log_evidence=task.log_beliefs
        - 0.5 * (n_trials + 2.0) * np.log(power)
        - np.log(scales).sum(),
    )


def _predicted(
    stages: Sequence[_Stage], task: _Task, mixture: Array, noise: float
) -> tuple[Array, Array]:
    """How the trials come out in the stages, each predicted from its others.

    Returns:
        Their errors in standard deviations of the predictions, float64 of shape (n_trials,
        n_means), and the deviations, float64 of shape (n_trials,), for an amplitude of 1.
    """
    errors, scales = [], []
    for stage in stages:
        covariance = _mixed(mixture, stage.kernels)
        covariance.flat[:: len(covariance) + 1] += noise + task.noise[stage.rows]
        cholesky = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
        errors.append(_solve(cholesky, task.residuals[stage.rows])[stage.n_others :])
        scales.append(np.diag(cholesky)[stage.n_others :])
    return np.concatenate(errors), np.concatenate(scales)


def _mixed(mixture: Array, kernels: Array) -> Array:
    """The weighted sum of kernels, and the constant; shape of one of them."""
    flat = mixture @ kernels.reshape(len(kernels), -1)
    flat += _CONSTANT
    return np.asarray(flat.reshape(kernels.shape[1:]))


def _solve(cholesky: Array, right: Array, *, transposed: bool = False) -> Array:
    """Solves with a lower triangular matrix.

    ``scipy.linalg.solve_triangular`` without its checks, which take longer than such small solves.
    """
    solution, _ = dtrtrs(cholesky, right, lower=1, trans=int(transposed))
    return np.asarray(solution, dtype=np.float64)


def _softmax(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.sum())
