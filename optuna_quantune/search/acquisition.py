"""Scores of candidates: how much is gained by measuring one, as far as the surrogate can tell.

Everything is minimised and every score is a logarithm, larger is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx
from scipy.special import log_ndtr
from scipy.special import ndtr


Array: TypeAlias = NDArray[np.float64]

# Weight of the sum in the augmented Tchebycheff norm; keeps weakly dominated points from tying
# with Pareto-optimal ones (Knowles, ParEGO, IEEE TEC 10(1), 2006, section IV-A).
_AUGMENTATION = 0.05


def log_expected_improvement(mean: Array, std: Array, best: float) -> Array:
    """Logarithm of the expected improvement on ``best``, exact also where it underflows.

    Ament et al., *Unexpected improvements to expected improvement for Bayesian optimization*,
    NeurIPS 2023, arXiv 2310.20708, equation 9.

    Args:
        mean: Posterior means, float64 of shape (n_candidates,).
        std: Posterior standard deviations, positive, float64 of shape (n_candidates,).
        best: The least target so far.

    Returns:
        float64 of shape (n_candidates,).
    """
    z = (best - mean) / std
    # The improvement is std * h(z), h(z) = phi(z) + z Phi(z). Below -1 that is a difference of
    # nearly equal numbers: phi(z) times a ratio that erfcx keeps exact, until it is 1 / z^2.
    near, far = np.maximum(z, -1.0), np.clip(z, -1e4, -1.0)
    direct = np.log(_density(near) + near * ndtr(near))
    ratio = 1.0 + far * np.sqrt(0.5 * np.pi) * erfcx(-far / np.sqrt(2.0))
    log_ratio = np.where(z > -1e4, np.log(ratio), -2.0 * np.log(np.maximum(-z, 1.0)))
    tail = -0.5 * z**2 - 0.5 * np.log(2.0 * np.pi) + log_ratio
    return np.asarray(np.log(std) + np.where(z > -1.0, direct, tail), dtype=np.float64)


def _density(z: Array) -> Array:
    return np.asarray(np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi), dtype=np.float64)


def log_probability_below(mean: Array, std: Array, bound: float) -> Array:
    """Logarithm of the probability that a value is at most ``bound``; shapes as above."""
    return np.asarray(log_ndtr((bound - mean) / std))


@dataclass(frozen=True)
class Tchebycheff:
    """Augmented Tchebycheff scalarisation of several objectives.

    Every Pareto-optimal point minimises it for some weights, on concave fronts too, which no
    weighted sum can do (Knowles, ParEGO, IEEE TEC 10(1), 2006).

    Attributes:
        lowest: The least value of each objective, float64 of shape (n_objectives,).
        extent: Their ranges, positive; shape as above.
        weights: Non-negative, summing to 1; shape as above.
    """

    lowest: Array
    extent: Array
    weights: Array

    @classmethod
    def fit(cls, targets: Array, weights: Array) -> Tchebycheff:
        """The scalarisation that sees the given targets between 0 and 1.

        Args:
            targets: Objectives to be minimised, float64 of shape (n_trials, n_objectives).
            weights: Of the objectives.
        """
        lowest = targets.min(axis=0)
        extent = targets.max(axis=0) - lowest
        return cls(lowest, np.where(extent > 0.0, extent, 1.0), weights)

    def __call__(self, targets: Array) -> Array:
        """From float64 of shape (n, n_objectives) to float64 of shape (n,), to be minimised."""
        weighted = (targets - self.lowest) / self.extent * self.weights
        result: Array = weighted.max(axis=1) + _AUGMENTATION * weighted.sum(axis=1)
        return result
