"""The cost model: what the trials so far say about every other configuration.

A Gaussian process whose kernel is partly made by gradient-boosted trees (XGBoost). A linear model
on the knobs is the best one for the first trials, products of knobs are needed soon after, and
trees find what neither can express: a whole region that collapses once two knobs meet. Each has a
kernel; how much each counts is decided by the marginal likelihood of the trials, so trees that
explain nothing have no say. The trees' kernel is the share of trees in which two configurations
fall into the same leaf (Thebelt et al., *Tree ensemble kernels for Bayesian optimization with
known constraints over mixed-feature spaces*, NeurIPS 2022, arXiv 2207.00879; He et al., *Practical
lessons from predicting clicks on ads at Facebook*, ADKDD 2014, for trees as a feature transform of
a linear model). The choices are measured in ``benchmarks/ablation_surrogate.py``.

Plain numpy, scipy and xgboost: nothing here knows of a study.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular


if TYPE_CHECKING:
    import xgboost

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
# Noise variances, as shares of the kernel's variance.
_NOISES = np.array([0.003, 0.03, 0.15])
# Variance of the constant, as a share of the kernel's; it stands for the unknown mean.
_CONSTANT = 0.5
# Decay of the product kernel: agreement exp(-1 / (0.15 n_params)) for one differing parameter.
_PRODUCT_SCALE = 0.15
# Hyperparameter settings that are averaged over, the most likely ones; the rest have hardly any
# weight.
_N_AVERAGED = 4
# Likeliest mixtures that are tried with the other noises too.
_N_REFINED = 2
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
class _Posterior:
    """One hyperparameter setting conditioned on the trials."""

    mixture: NDArray[np.float64]
    cholesky: NDArray[np.float64]
    alpha: NDArray[np.float64]
    variance: float
    log_evidence: float


class Surrogate:
    """Posterior mean and standard deviation of configurations, given trials.

    Args:
        inputs: The trials' configurations, at least one.
        targets: The trials' targets, roughly standardised, less the prior mean where there is
            one; float64 of shape (n_trials,).
        n_params: The number of parameters; the squared norm of a row of ``inputs.kernel``.
        pending: Configurations that are being measured now. They are taken to come out as
            expected: the mean does not change, the uncertainty near them shrinks.
        mixtures: Kernel weights to choose from, float64 of shape (n_mixtures, 4).
    """

    def __init__(
        self,
        inputs: ModelInputs,
        targets: NDArray[np.float64],
        n_params: int,
        *,
        pending: ModelInputs | None = None,
        mixtures: NDArray[np.float64] = MIXTURES,
    ) -> None:
        self._n_params = n_params
        self._trees = _fit_trees(inputs.trees, targets)
        self._known = inputs if pending is None else inputs.append(pending)
        self._known_leaves = self._leaves(self._known)
        kernels = self._kernels(self._known, self._known_leaves)
        self._posteriors = _posteriors(kernels, targets, mixtures)
        evidence = np.array([posterior.log_evidence for posterior in self._posteriors])
        self._probabilities = np.exp(evidence - evidence.max())
        self._probabilities /= self._probabilities.sum()

    def predict(self, inputs: ModelInputs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation, each float64 of shape (n_configs,)."""
        kernels = self._kernels(inputs, self._leaves(inputs))
        mean = np.zeros(len(inputs))
        second_moment = np.zeros(len(inputs))
        for probability, posterior in zip(self._probabilities, self._posteriors, strict=True):
            cross = np.tensordot(posterior.mixture, kernels, axes=1) + _CONSTANT
            mean_here = cross @ posterior.alpha
            explained = solve_triangular(
                posterior.cholesky, cross.T, lower=True, check_finite=False
            )
            prior_variance = posterior.mixture.sum() + _CONSTANT
            variance = posterior.variance * np.maximum(
                prior_variance - np.sum(explained**2, axis=0), 1e-9
            )
            mean += probability * mean_here
            second_moment += probability * (variance + mean_here**2)
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
        alphas = np.array([posterior.alpha for posterior in self._posteriors])
        parts = np.array([posterior.mixture[:2] for posterior in self._posteriors])
        main, pair = ((self._probabilities[:, None] * parts).T @ alphas).astype(np.float32)
        linear = known.T @ main
        quadratic = (known.T * pair) @ known
        result: NDArray[np.float64] = np.einsum(
            "ij,ij->i", kernel @ quadratic + linear, kernel
        ).astype(np.float64)
        return result

    def _leaves(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """One-hot leaves, scaled so that inner products are shares of trees."""
        import xgboost

        leaves = self._trees.predict(
            xgboost.DMatrix(inputs.trees, nthread=1), pred_leaf=True
        ).astype(np.int64)
        n_nodes = 2 ** (_TREE_PARAMS["max_depth"] + 1)
        one_hot = np.zeros((len(leaves), _N_TREES, n_nodes), dtype=np.float32)
        np.put_along_axis(one_hot, leaves[:, :, None], 1.0, axis=2)
        one_hot /= np.sqrt(np.float32(_N_TREES))
        return one_hot.reshape(len(leaves), -1)

    def _kernels(self, inputs: ModelInputs, leaves: NDArray[np.float32]) -> NDArray[np.float64]:
        """The kernels against the known configurations, (n_kernels, n_configs, n_known)."""
        known = self._known
        agreement = (inputs.kernel @ known.kernel.T).astype(np.float64) / self._n_params
        kernels = [
            agreement,
            agreement**2,
            np.exp((agreement - 1.0) / _PRODUCT_SCALE),
            (leaves @ self._known_leaves.T).astype(np.float64),
        ]
        n_described = inputs.described.shape[1]
        if n_described:
            a, b = inputs.described.astype(np.float64), known.described.astype(np.float64)
            distance = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2.0 * a @ b.T
            kernels.append(np.exp(-0.5 * np.maximum(distance, 0.0) / n_described))
        return np.stack(kernels)


def _fit_trees(inputs: NDArray[np.float32], targets: NDArray[np.float64]) -> xgboost.Booster:
    import xgboost

    data = xgboost.DMatrix(inputs, targets, nthread=1)
    # xgboost.train would copy the booster at the end, which takes as long as eight trees.
    booster = xgboost.Booster(_TREE_PARAMS, [data])
    for iteration in range(_N_TREES):
        booster.update(data, iteration)
    return booster


def _posteriors(
    kernels: NDArray[np.float64], targets: NDArray[np.float64], mixtures: NDArray[np.float64]
) -> list[_Posterior]:
    """Conditions hyperparameter settings on the targets; keeps the likely ones.

    ``kernels`` may have more rows than there are targets: the rest are pending configurations.
    """
    if len(kernels) > mixtures.shape[1]:
        # Every mixture once without and once half made of the kernel on described features.
        without = np.pad(mixtures, ((0, 0), (0, 1)))
        mixtures = np.concatenate([without, 0.5 * without + 0.5 * np.eye(len(kernels))[-1]])
    # All mixtures with the middle noise, then the other noises with the likeliest mixtures.
    low, middle, high = _NOISES
    fits = [_condition(kernels, targets, mixture, middle) for mixture in mixtures]
    fits.sort(key=lambda fit: -fit.log_evidence)
    for fit in fits[:_N_REFINED]:
        fits += [_condition(kernels, targets, fit.mixture, noise) for noise in (low, high)]
    fits.sort(key=lambda fit: -fit.log_evidence)
    return fits[:_N_AVERAGED]


def _condition(
    kernels: NDArray[np.float64],
    targets: NDArray[np.float64],
    mixture: NDArray[np.float64],
    noise: float,
) -> _Posterior:
    """The posterior under one hyperparameter setting.

    The amplitude is integrated out under a scaled inverse chi-squared prior worth two trials of
    variance 1, so the marginal likelihood is that of a Student t distribution.
    """
    n_trials, n_known = len(targets), kernels.shape[1]
    covariance = np.tensordot(mixture, kernels, axes=1) + _CONSTANT
    covariance[np.diag_indices(n_known)] += noise
    cholesky = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
    whitened = np.zeros(n_known)
    # Pending configurations come out as expected: their whitened residual stays zero.
    part = cholesky[:n_trials, :n_trials]
    whitened[:n_trials] = solve_triangular(part, targets, lower=True, check_finite=False)
    power = float(whitened @ whitened) + 2.0
    return _Posterior(
        mixture=mixture,
        cholesky=cholesky,
        alpha=solve_triangular(cholesky, whitened, lower=True, trans="T", check_finite=False),
        variance=power / (n_trials + 2.0),
        log_evidence=-0.5 * (n_trials + 2.0) * np.log(power) - np.log(np.diag(part)).sum(),
    )
