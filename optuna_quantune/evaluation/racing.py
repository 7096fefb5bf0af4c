"""Racing: which inputs to run next, and when the answer is certain enough.

The float model's outputs are known for all inputs, so what an int8 model is worth differs from the
float model's worth only where an outcome (a predicted class, or whether the label is among the
five highest scores) flips. An outcome flips when noise eats up its margin, and on most inputs
margins are far larger than the noise of a decent configuration. So a few inputs of all margins are
run first, then the others in ascending margin, and among them some at random from all that are
left, until what may still flip no longer matters.

What is claimed of the inputs that were not run rests on a model, not on sampling alone: the margin
that an int8 model leaves is a straight line of the float margin plus noise, whose scale grows with
the margin, too (a clipped or collapsed model takes more from wide margins), with the tail of
Student's t with 6 degrees of freedom. It is fitted to the inputs that were run, and the random
ones among them show it every size of margin. The intervals hold the uncertainty of the fit and the
chance of each flip. They do not hold for a model that fails on so few wide-margin inputs that none
of them was drawn: ranges calibrated on a single image did this to 1 to 2 % of SqueezeNet's inputs,
whatever their margin, and without the random inputs its intervals held 84 % of the time. With them
such intervals still hold too rarely: simulated failures on 2 % and on 5 % of 800 inputs, at any
margin, were within them 60 % and 75 % of the time instead of 95 %. How often they were right on
the recorded tables is measured by `benchmarks/racing.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from typing import Final
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betainc
from scipy.special import gammaincc
from scipy.special import stdtr

from optuna_quantune.evaluation.metrics import Interval


if TYPE_CHECKING:
    from numpy.typing import NDArray

# Fewer inputs than this are all run: the fit needs most of them anyway.
SMALLEST_RACE: Final = 100
# Inputs of all margins that are run first, and the handful of them after which a race first looks.
PILOT: Final = 64
HANDFUL: Final = 16
# One of so many inputs after the pilot is drawn at random, the others have the smallest margins.
_ONE_RANDOM_OF: Final = 4
# A race looks again when it has run so many times the inputs of its last look.
_GROWTH: Final = 1.2
# And always at a multiple of this, so that no batch is broken for it.
_MULTIPLE: Final = 16
# Degrees of freedom of the noise. With 6 the flips that were left behind were 0.7 to 1.3 times
# those expected on the recorded tables; with 100, nearly a normal, up to 3.5 times.
_TAIL: Final = 6.0
# Variance of the logarithm of the noise's scale, times the inputs that it was fitted to. A sample
# from this t distribution gives 1.25; the rest covers that the fit extrapolates to wide margins.
_SCALE_VARIANCE: Final = 3.0
# The noise at margin 0 is at least this share of the mean; on the recorded tables it was 0.3 to 1.
_LEAST_INTERCEPT: Final = 0.25
# Relative variance of the flips that the fit expects, beside that of the random sample's. For
# collapsed models the fit was off by up to a third on the recorded tables.
_FIT_VARIANCE: Final = 1 / 8
_FIT_STEPS: Final = 5
# Both ends of an interval of 95 %.
_LOW, _HIGH = 0.025, 0.975


def order(margins: NDArray[np.float64], *, seed: int) -> NDArray[np.int64]:
    """The order in which the inputs of a race are run.

    First the pilot, one random input from each of `PILOT` equal shares of the margins, so that
    any of its first inputs spread over all margins; then three times the input with the smallest
    margin that is left, once one at random, and so on.

    Args:
        margins: The float model's margins, shape (n,).
        seed: Chooses the random inputs. Models compared with each other need the same.

    Returns:
        Each of the n indices once, shape (n,).
    """
    ascending = np.argsort(margins, kind="stable")
    if len(margins) < SMALLEST_RACE:
        return ascending
    rng = np.random.default_rng(seed)
    edges = np.linspace(0, len(margins), PILOT + 1).astype(np.int64)
    pilot = ascending[rng.integers(edges[:-1], edges[1:])[_spread(PILOT)]]
    taken = set(pilot.tolist())
    smallest, random = iter(ascending.tolist()), iter(rng.permutation(len(margins)).tolist())
    rest = []
    for position in range(1, len(margins) - PILOT + 1):
        source = smallest if position % _ONE_RANDOM_OF else random
        index = next(index for index in source if index not in taken)
        taken.add(index)
        rest.append(index)
    return np.concatenate([pilot, np.array(rest, dtype=np.int64)])


def rank_margins(
    scores: NDArray[Any], classes: NDArray[np.int64], *, k: int
) -> NDArray[np.float64]:
    """How far a class is above the k-th highest score of the others.

    Args:
        scores: Shape (n, classes), with more than k classes.
        classes: One class of each input, shape (n,).
        k: Rank, at least 1.

    Returns:
        Shape (n,), in the unit of the scores; positive where the class is among the k highest.
    """
    rows = np.arange(len(scores))
    others = scores.astype(np.float64)
    own = others[rows, classes]
    others[rows, classes] = -np.inf
    return np.asarray(own - np.partition(others, -k, axis=1)[:, -k])


def looks(n: int) -> list[int]:
    """After how many of n inputs a race estimates and may end; the last is n."""
    if n < SMALLEST_RACE:
        return [n]
    steps = [HANDFUL, PILOT]
    while steps[-1] < n:
        grown = math.ceil(_GROWTH * steps[-1])
        steps.append(min(n, grown + -grown % _MULTIPLE))
    return steps


class Race:
    """Estimates shares of inputs from the ones that were run so far.

    Example:
        >>> race = Race(margins)
        >>> for start, stop in itertools.pairwise([0, *looks(len(margins))]):
        ...     indices = order[start:stop]
        ...     race.add(indices, margins_left(indices))
        ...     interval = race.estimate(right, float_right)
        ...     if half_width(interval) <= 0.005:
        ...         break

    Args:
        margins: What the float model's outcome bears on each input before it flips, not negative,
            shape (n,).
    """

    def __init__(self, margins: NDArray[np.float64]) -> None:
        self._margins = margins
        self._left = np.full(len(margins), np.nan)
        self._fit: _Fit | None = None
        self.seen: NDArray[np.bool_] = np.zeros(len(margins), np.bool_)

    def add(self, indices: NDArray[np.int64], margins_left: NDArray[np.float64]) -> None:
        """Notes inputs that were run.

        Args:
            indices: Which, shape (m,).
            margins_left: Of the same outcomes, under the int8 model, shape (m,): not positive
                where the outcome flipped. What is not a finite number counts as a flip by as much
                as the margin was.
        """
        margins = self._margins[indices]
        self._left[indices] = np.where(np.isfinite(margins_left), margins_left, -margins)
        self.seen[indices] = True
        self._fit = None

    def estimate(self, right: NDArray[np.bool_], float_right: NDArray[np.bool_]) -> Interval:
        """The share of all inputs that the int8 model gets right, with its 95 % interval.

        Where the float model is right a flip makes the outcome wrong; where it is wrong, a flip
        makes it right as often as on the inputs that were run.

        Args:
            right: Whether the int8 model is right on the inputs that were run, shape (n,).
            float_right: Whether the float model is right, shape (n,).
        """
        n, unseen = len(self._margins), ~self.seen
        known = int((right & self.seen).sum()) + int((float_right & unseen).sum())
        if not unseen.any():
            return Interval(known / n, known / n, known / n)
        if self._fit is None:
            self._fit = _fit(self._margins[self.seen], self._left[self.seen])
        lost = self._flips(float_right, 1.0)
        flipped = self.seen & ~float_right & (self._left <= 0)
        # Rule of succession: half of the flips before any was seen.
        share_mended = (int((right & flipped).sum()) + 1) / (int(flipped.sum()) + 2)
        won = self._flips(~float_right, share_mended)
        return Interval(
            (known - lost.estimate + won.estimate) / n,
            (known - lost.high + won.low) / n,
            (known - lost.low + won.high) / n,
        )

    def _flips(self, group: NDArray[np.bool_], share: float) -> Interval:
        """How many unseen inputs of a group flip, times a share of them, with its interval.

        The inputs that were drawn beyond the margin up to which all were run are a random sample
        of what lies there. Where none of them flips the fit alone must say how many of the others
        do. The more of them flip, as for a collapsed model, the more the sample counts: its
        relative variance is 1 over its flips, that of the fit is taken as `_FIT_VARIANCE`. And
        where they flip at all, the interval is at least that of the sample.
        """
        assert self._fit is not None
        unseen = group & ~self.seen
        margins = self._margins[unseen]
        if not len(margins):
            return Interval(0.0, 0.0, 0.0)
        expected, doubt = self._fit.flips(margins), self._fit.variance_of_flips(margins)
        sample = group & self.seen & (self._margins > margins.min())
        size = int(sample.sum())
        if size:
            flipped = int((self._left[sample] <= 0).sum())
            excess = flipped - self._fit.flips(self._margins[sample])
            weight = _FIT_VARIANCE / (_FIT_VARIANCE + 1.0 / flipped) if flipped else 0.0
            expected = max(0.0, expected + weight * excess * len(margins) / size)
            doubt += flipped * (1.0 - flipped / (size + 1)) * (len(margins) / size) ** 2
        expected, doubt = share * expected, share**2 * doubt
        low = min(_count_quantile(_LOW, expected, doubt), len(margins))
        high = min(_count_quantile(_HIGH, expected, doubt), len(margins))
        # Counts are whole and a mean is not: a mean of 0.01 has the interval from 0 to 0.
        return Interval(min(max(expected, low), high), low, high)


def half_width(interval: Interval) -> float:
    """Half the width of an interval, in its unit: a race ends when it is small enough."""
    return (interval.high - interval.low) / 2


def weights(margins: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For how many inputs each input that was run stands, for means that no margin explains.

    The inputs up to the largest margin below which all were run stand for themselves, those that
    were drawn beyond it for all inputs there.

    Args:
        margins: The float model's margins, shape (n,).
        seen: The inputs that were run in the order of `order`, at least one, shape (n,).

    Returns:
        Numbers that sum up to n, 0 for inputs that were not run, shape (n,).
    """
    ascending = np.argsort(margins, kind="stable")
    gaps = np.flatnonzero(~seen[ascending])
    result = seen.astype(np.float64)
    if len(gaps):
        beyond = ascending[gaps[0] :]
        sample = seen[beyond]
        if not sample.any():  # nothing was drawn there: all that was run stands for the rest
            beyond, sample = ascending, seen[ascending]
        result[beyond[sample]] = len(beyond) / sample.sum()
    return result


@dataclass(frozen=True)
class _Fit:
    """The margin that is left, as a line of the float margin, and the scale of its noise.

    Attributes:
        line: Intercept and slope of the mean, shape (2,).
        scale: Intercept and slope of the standard deviation, not negative, shape (2,).
        covariance: Of the line's parameters, shape (2, 2).
        inputs: Number of inputs that it was fitted to.
    """

    line: NDArray[np.float64]
    scale: NDArray[np.float64]
    covariance: NDArray[np.float64]
    inputs: int

    def flips(
        self,
        margins: NDArray[np.float64],
        line_off: NDArray[np.float64] | float = 0.0,
        log_scale_off: float = 0.0,
    ) -> float:
        """Expected number of flips on inputs, with parameters off by so much."""
        columns = _columns(margins)
        deviation = np.maximum(columns @ self.scale, np.finfo(np.float64).tiny)
        standard = columns @ (self.line + line_off) / (deviation * math.exp(log_scale_off))
        return float(stdtr(_TAIL, -standard * math.sqrt(_TAIL / (_TAIL - 2))).sum())

    def variance_of_flips(self, margins: NDArray[np.float64]) -> float:
        """Variance of `flips` because the parameters are only estimates (delta method)."""
        expected = self.flips(margins)
        directions = np.linalg.cholesky(self.covariance).T
        steps = [self.flips(margins, line_off=direction) for direction in directions]
        steps.append(self.flips(margins, log_scale_off=math.sqrt(_SCALE_VARIANCE / self.inputs)))
        return sum((step - expected) ** 2 for step in steps)


def _fit(margins: NDArray[np.float64], left: NDArray[np.float64]) -> _Fit:
    """Weighted least squares for the line and, on absolute residuals, for the scale, in turn."""
    columns = _columns(margins)
    # Where a model makes no noise at all, as its own float copy, a hair keeps the algebra finite.
    least = 1e-9 * max(float(margins.max()), np.finfo(np.float64).tiny)
    deviation = np.ones(len(margins))
    for _ in range(_FIT_STEPS):
        line = _least_squares(columns, left, deviation)
        residual = np.abs(left - columns @ line)
        scale = _noise_scale(columns, residual, deviation)
        deviation = np.maximum(columns @ scale, least)
    spread = math.sqrt(float(np.mean(np.square((left - columns @ line) / deviation))))
    weighted = columns / np.maximum(spread * deviation, least)[:, None]
    covariance: NDArray[np.float64] = np.linalg.inv(weighted.T @ weighted).astype(np.float64)
    return _Fit(line, spread * scale, covariance, len(margins))


def _columns(margins: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.ones_like(margins), margins], axis=1)


def _least_squares(
    columns: NDArray[np.float64], values: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    weighted = columns / deviation[:, None]
    return np.linalg.lstsq(weighted, values / deviation, rcond=None)[0].astype(np.float64)


def _noise_scale(
    columns: NDArray[np.float64], residual: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Least squares for the scale; no slope below 0, and no noise far below the mean at margin 0.

    A handful of inputs may lie so that the intercept vanishes, and with it every doubt about the
    many inputs of small margins.
    """
    floor = _LEAST_INTERCEPT * float(residual.mean())
    intercept, slope = _least_squares(columns, residual, deviation)
    if slope < 0:
        weight = 1.0 / np.square(deviation)
        return np.array([float(weight @ residual) / float(weight.sum()), 0.0])
    if intercept < floor:
        margins = columns[:, 1] / deviation
        slope = float(margins @ ((residual - floor) / deviation)) / float(margins @ margins)
        return np.array([floor, max(0.0, slope)])
    return np.array([intercept, slope])


def _count_quantile(probability: float, mean: float, doubt: float) -> float:
    """Quantile of a Poisson count whose mean is only known up to a variance.

    With a gamma distribution of the mean the count is negative binomial, of the variance
    ``mean + doubt``.
    """
    if mean < 1e-9:
        return 0.0
    most = mean + 10.0 * math.sqrt(mean + doubt) + 10.0
    counts = np.arange(math.ceil(most))
    if doubt < 1e-6 * mean:
        below = gammaincc(counts + 1.0, mean)
    else:
        below = betainc(mean**2 / doubt, counts + 1.0, mean / (mean + doubt))
    return float(np.searchsorted(below, probability))


def _spread(n: int) -> NDArray[np.int64]:
    """0 to n - 1 so that the first of them are spread evenly (van der Corput's sequence)."""
    bits = max(1, (n - 1).bit_length())
    reversed_ = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits)]
    return np.array([i for i in reversed_ if i < n])
