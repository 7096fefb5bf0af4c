"""How many inputs flip that were not run: a model of what quantization does to margins.

The margin that an int8 model leaves of a float margin ``m`` is taken as ``a + b m`` plus noise of
scale ``c + d m`` (a clipped or collapsed model takes more from wide margins). Which outcomes flip
is decided in the lower tail of the noise, far beyond what most inputs show, and that tail differs
from one configuration to the next: maximum-likelihood degrees of freedom of Student's t were 2 to
30 on the recorded tables, and on some models one to two of a hundred inputs fail whatever their
margin. So neither is a constant here. Every pair of a tail and a share of wild failures is
weighted by its likelihood on the inputs that were run, and what is expected is averaged over the
pairs (Hoeting et al., Bayesian Model Averaging: A Tutorial, Statistical Science 14, 1999): where
the inputs do not say how heavy the tail is, the answer is as uncertain as that makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln
from scipy.special import stdtr


if TYPE_CHECKING:
    from numpy.typing import NDArray

# Degrees of freedom of the lower tail, from the heaviest with an expectation to nearly a normal,
# and shares of inputs whose margin is lost whatever it was, a factor of 4 between them. Each pair
# is as likely as another before an input was run.
_TAILS: Final = np.array([2.0, 3.0, 5.0, 10.0, 30.0])
_WILD: Final = np.array([0.0, 0.001, 0.004, 0.016, 0.064])
# A wild failure leaves a margin between -m and m, any as likely as another: half of them flip.
_WILD_FLIPS: Final = 0.5
# The line and the scale are fitted with the weights of a t distribution of so many degrees of
# freedom, so that a few wild failures do not move them (Lange, Little and Taylor, Robust
# Statistical Modeling Using the t Distribution, JASA 84, 1989).
_ROBUST: Final = 4.0
# Variance of the logarithm of the noise's scale, times the inputs that it was fitted to: 1.25 for
# this t distribution, the rest because the fit is used on margins wider than most of these.
_SCALE_VARIANCE: Final = 3.0
# The noise at margin 0 is at least this share of the mean; on the recorded tables it was 0.3 to 1.
_LEAST_INTERCEPT: Final = 0.25
# Relative variance of what the fit expects, because the line and the scale are not quite straight:
# 0.27 to 0.29 by the method of moments on the recorded tables, where more than 30 were expected.
_FIT_VARIANCE: Final = 1 / 4
# The scale is about the mean size of the noise, and 0.7 to 1.3 times that fits each of the tails.
# A model of which most outputs are the same leaves no noise, and without a floor no doubt.
_LEAST_SPREAD: Final = 0.1
# Margins whose variance is at most this share of their squared mean are the same.
_LEAST_VARIATION: Final = 1e-12
_FIT_STEPS: Final = 5
_SPREAD_STEPS: Final = 6
# Margins are summed up in so many groups of neighbours before the tails are evaluated on them.
_GROUPS: Final = 48
_LOG_DENSITY: Final = (
    gammaln((_TAILS + 1) / 2) - gammaln(_TAILS / 2) - 0.5 * np.log(math.pi * _TAILS)
)


@dataclass(frozen=True)
class MarginNoise:
    """What was learned of a model's noise from the inputs that were run.

    Attributes:
        line: Intercept and slope of the margin that is left, shape (2,).
        scale: Intercept and slope of the noise's scale, neither of them negative, shape (2,).
        covariance: Of the line's parameters, shape (2, 2).
        below: Share of inputs below the line.
        spread: For each tail the factor of the scale with which it fits best, shape (tails,).
        weight: Of each share of wild failures and each tail, shape (shares, tails), sum 1.
        inputs: Number of inputs that were run.
    """

    line: NDArray[np.float64]
    scale: NDArray[np.float64]
    covariance: NDArray[np.float64]
    below: float
    spread: NDArray[np.float64]
    weight: NDArray[np.float64]
    inputs: int

    @classmethod
    def fit(cls, margins: NDArray[np.float64], left: NDArray[np.float64]) -> MarginNoise:
        """Learns from inputs that were run.

        Args:
            margins: Of the float model's outcomes, not negative, shape (n,).
            left: What the int8 model leaves of them, shape (n,).
        """
        # Where a model makes no noise at all, as its own float copy, a hair keeps it finite.
        least = 1e-9 * (float(margins.max()) or 1.0)
        deviation, robust = np.ones(len(margins)), np.ones(len(margins))
        for _ in range(_FIT_STEPS):
            precision = robust / np.square(deviation)
            line = _line(margins, left, precision)
            residual = left - line[0] - line[1] * margins
            scale = _noise_scale(margins, np.abs(residual), precision)
            scale[0] = max(scale[0], least)
            deviation = scale[0] + scale[1] * margins
            standard = residual / deviation
            robust = (_ROBUST + 1) / (_ROBUST + np.square(standard))
        variance = float(np.mean(robust * np.square(standard))) * np.square(deviation)
        precision = robust / np.maximum(variance, least**2)
        covariance = _covariance(margins, precision)
        # Where every output is the same, all that is left is exactly 0, and that has flipped.
        is_below = standard <= 0
        below = (int(is_below.sum()) + 0.5) / (len(margins) + 1)
        spread = _spread(standard[is_below])
        # Likelihood of the inputs below the line; of those above it only that they are above.
        density = below * _lower_density(standard[is_below], spread) / deviation[is_below]
        lost = margins[is_below]
        wild = np.where(left[is_below] >= -lost, 0.5 / np.maximum(lost, least), 0.0)
        mixed = np.multiply.outer(1 - _WILD, density) + np.multiply.outer(_WILD, wild)[:, None]
        likelihood = np.log(np.maximum(mixed, np.finfo(np.float64).tiny)).sum(axis=-1)
        likelihood += (np.log(1 - _WILD) * int((~is_below).sum()))[:, None]
        weight = np.exp(likelihood - likelihood.max())
        return cls(line, scale, covariance, below, spread, weight / weight.sum(), len(margins))

    def flips(
        self, margins: NDArray[np.float64], sample: NDArray[np.float64], sample_flips: int
    ) -> tuple[float, float]:
        """Expected number of flips among inputs that were not run, and its variance.

        The variance is that of the expectation, because nothing of the model is known but from
        the inputs that were run; the chance of each flip comes on top. A random sample of inputs
        like these corrects the model by a factor, which has a gamma distribution of mean 1 and
        variance `_FIT_VARIANCE` before the sample is seen.

        Args:
            margins: Of the inputs that were not run, shape (n,), at least one.
            sample: Of inputs that were run and drawn at random from the same margins, shape (m,).
            sample_flips: How many of these have flipped.
        """
        expected, variance = self._flips(margins)
        in_sample = self._flips(sample)[0] if len(sample) else np.zeros(1)
        shape, rate = 1 / _FIT_VARIANCE + sample_flips, 1 / _FIT_VARIANCE + in_sample
        variance = np.square(shape / rate) * variance + np.square(expected / rate) * shape
        expected = shape / rate * expected
        mean = float((self.weight * expected).sum())
        return mean, float((self.weight * (variance + np.square(expected - mean))).sum())

    def _flips(
        self, margins: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Expected flips for each pair, and their variance because the fit is an estimate.

        The variance is the delta method's: slopes of the expectation by the line and by the
        logarithm of the scale.
        """
        center, count = _groups(margins)
        deviation = self.scale[0] + self.scale[1] * center
        standard = (self.line[0] + self.line[1] * center) / deviation
        tail = 2 * stdtr(_TAILS[:, None], -np.abs(standard) / self.spread[:, None])
        share = np.where(standard > 0, self.below * tail, 1 - (1 - self.below) * tail)
        density = count * self.below * _lower_density(-np.abs(standard), self.spread)
        by_line = np.stack([density / deviation, density * center / deviation], axis=-1).sum(1)
        by_scale = density @ standard
        variance = np.einsum("ti,ij,tj->t", by_line, self.covariance, by_line)
        variance += np.square(by_scale) * _SCALE_VARIANCE / self.inputs
        expected = np.multiply.outer(1 - _WILD, share @ count)
        expected += (_WILD * _WILD_FLIPS * len(margins))[:, None]
        return expected, variance


def _line(
    margins: NDArray[np.float64], values: NDArray[np.float64], precision: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Intercept and slope of the weighted least squares."""
    total = float(precision.sum())
    mean, value = float(precision @ margins) / total, float(precision @ values) / total
    across = margins - mean
    spread = float(precision @ np.square(across))
    slope = float(precision @ (across * (values - value))) / spread if spread > 0 else 0.0
    return np.array([value - slope * mean, slope])


def _covariance(
    margins: NDArray[np.float64], precision: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of intercept and slope; where all margins are the same nothing is said about a slope."""
    total = float(precision.sum())
    mean = float(precision @ margins) / total
    spread = float(precision @ np.square(margins - mean))
    slope = 1.0 / spread if spread > _LEAST_VARIATION * total * mean**2 else 0.0
    return np.array([[1.0 / total + mean**2 * slope, -mean * slope], [-mean * slope, slope]])


def _noise_scale(
    margins: NDArray[np.float64], residual: NDArray[np.float64], precision: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Least squares for the scale; no slope below 0, and no noise far below the mean at margin 0.

    A handful of inputs may lie so that the intercept vanishes, and with it every doubt about the
    many inputs of small margins.
    """
    floor = _LEAST_INTERCEPT * float(residual.mean())
    intercept, slope = _line(margins, residual, precision)
    if slope < 0:
        return np.array([float(precision @ residual / precision.sum()), 0.0])
    if intercept < floor:
        slope = float(precision @ (margins * (residual - floor)))
        return np.array([floor, max(0.0, slope / float(precision @ np.square(margins)))])
    return np.array([intercept, slope])


def _spread(standard: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each tail the most likely scale of residuals below 0, by expectation maximisation."""
    square = np.square(standard) if len(standard) else np.zeros(1)
    spread = np.full(len(_TAILS), max(math.sqrt(float(np.median(square))), _LEAST_SPREAD))
    for _ in range(_SPREAD_STEPS):
        weight = (_TAILS[:, None] + 1) / (_TAILS[:, None] + square / np.square(spread)[:, None])
        spread = np.maximum(np.sqrt((weight * square).mean(axis=1)), _LEAST_SPREAD)
    return spread


def _lower_density(
    standard: NDArray[np.float64], spread: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Density of each tail below 0, where all of it lies, shape (tails, n)."""
    square = np.square(standard / spread[:, None])
    log = _LOG_DENSITY[:, None] - (_TAILS[:, None] + 1) / 2 * np.log1p(square / _TAILS[:, None])
    return np.asarray(2 * np.exp(log) / spread[:, None])


def _groups(margins: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and sizes of groups of neighbouring margins."""
    edges = np.unique(np.linspace(0, len(margins), _GROUPS + 1).astype(np.int64))
    size = np.diff(edges).astype(np.float64)
    return np.add.reduceat(np.sort(margins), edges[:-1]) / size, size
