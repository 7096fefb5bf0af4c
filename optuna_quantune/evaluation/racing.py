"""Racing: which inputs to run next, and when the answer is certain enough.

The float model's outputs are known for all inputs, so what an int8 model is worth differs from the
float model's worth only where an outcome (a predicted class, or whether the label is among the
five highest scores) flips. An outcome flips when noise eats up its margin, and on most inputs
margins are far larger than the noise of a decent configuration. So a few inputs of all margins are
run first, then the others in ascending margin, and among them some at random from all that are
left, until what may still flip no longer matters.

What is claimed of the inputs that were not run rests on a model, not on sampling alone: what
quantization does to margins (`optuna_quantune.evaluation.margin_noise`), fitted to the inputs that
were run, and the random ones among them show it every size of margin. The intervals hold the
uncertainty of the fit, how heavy the tail of the noise may be, a share of inputs that fail
whatever their margin, and the chance of each flip. What they cannot hold is a kind of failure that
has left no trace in the inputs that were run. How often they were right on the recorded tables,
and on tables that were not seen while they were designed, is measured by `benchmarks/racing.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betainc
from scipy.special import gammaincc

from optuna_quantune.evaluation.margin_noise import MarginNoise
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
        self._noise: MarginNoise | None = None
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
        self._noise = None

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
        if self._noise is None:
            self._noise = MarginNoise.fit(self._margins[self.seen], self._left[self.seen])
        # Where scores are equal an outcome can stay although its margin is gone: an outcome that
        # was right has flipped where it is wrong. One that was wrong may have flipped unseen.
        lost = self._flips(float_right, ~right, 1.0)
        flipped = self.seen & ~float_right & (self._left <= 0)
        # Rule of succession: half of the flips before any was seen.
        share_mended = (int((right & flipped).sum()) + 1) / (int(flipped.sum()) + 2)
        won = self._flips(~float_right, flipped, share_mended)
        return Interval(
            (known - lost.estimate + won.estimate) / n,
            (known - lost.high + won.low) / n,
            (known - lost.low + won.high) / n,
        )

    def _flips(
        self, group: NDArray[np.bool_], flipped: NDArray[np.bool_], share: float
    ) -> Interval:
        """How many unseen inputs of a group flip, times a share of them, with its interval.

        The inputs that were drawn beyond the margin up to which all were run are a random sample
        of what lies there.
        """
        assert self._noise is not None
        unseen = group & ~self.seen
        margins = self._margins[unseen]
        if not len(margins):
            return Interval(0.0, 0.0, 0.0)
        sample = group & self.seen & (self._margins > margins.min())
        sample_flips = int(flipped[sample].sum())
        expected, doubt = self._noise.flips(margins, self._margins[sample], sample_flips)
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


def _count_quantile(probability: float, mean: float, doubt: float) -> float:
    """Quantile of a Poisson count whose mean is only known up to a variance.

    With a gamma distribution of the mean the count is negative binomial, of the variance
    ``mean + doubt``.
    """
    if mean < 1e-9:
        return 0.0
    known = doubt < 1e-6 * mean

    def below(count: int) -> float:
        if known:
            return float(gammaincc(count + 1.0, mean))
        return float(betainc(mean**2 / doubt, count + 1.0, mean / (mean + doubt)))

    most = math.ceil(mean + 10.0 * math.sqrt(mean + doubt) + 10.0)
    return float(bisect_left(range(most), probability, key=below))


def _spread(n: int) -> NDArray[np.int64]:
    """0 to n - 1 so that the first of them are spread evenly (van der Corput's sequence)."""
    bits = max(1, (n - 1).bit_length())
    reversed_ = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits)]
    return np.array([i for i in reversed_ if i < n])
