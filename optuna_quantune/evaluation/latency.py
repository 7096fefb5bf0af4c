"""How long one input takes, against a reference model on the same machine at the same time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quantune.errors import InputError
from optuna_quantune.pipeline import CORES


if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

# With 5 pairs even the interval from the smallest to the largest ratio holds the median with
# probability 1 - 2 / 2^5 = 93.75 % only.
_MIN_REPEATS = 6
_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class LatencyRatio:
    """Latency of a model against a reference model.

    Attributes:
        median_ms: Milliseconds of one run of the model: such that the quotient of this and the
            next is `ratio`, and their geometric mean the median of that of neighbouring runs. (On
            a machine with a fast and a slow phase the medians of the two models can be of
            different phases.)
        reference_median_ms: Milliseconds of one run of the reference model.
        ratio: Median of the ratios of neighbouring runs, model over reference; below 1 the model
            is faster.
        low: Lower end of the 95 % confidence interval of ``ratio``.
        high: Upper end of it.
    """

    median_ms: float
    reference_median_ms: float
    ratio: float
    low: float
    high: float


def latency_ratio(
    session: onnxruntime.InferenceSession,
    reference_session: onnxruntime.InferenceSession,
    feeds: Sequence[dict[str, NDArray[Any]]],
    *,
    repeats: int = 30,
    seconds: float = 0.1,
    warmup: int = 5,
) -> LatencyRatio:
    """Compare the latency of two models, run by run in turns.

    Each ratio comes from two runs that follow each other, in alternating order, on the same feed,
    so that a slower phase of the machine slows both. Whatever else this process evaluates waits
    meanwhile. Both sessions should be made alike, with the threads that the application will use
    and without spinning (:func:`~optuna_quantune.evaluation.runner.make_session`): threads of one
    session that wait in a busy loop take the cores away from the other.

    Args:
        session: The model.
        reference_session: The reference, in general the float model.
        feeds: Inputs by name, in general of batch size 1; used in turns.
        repeats: Measured runs of each model, at least 6; small models are run more often.
        seconds: How long models are run in turns at least, up to 1,000 times each: a few runs of
            a tenth of a millisecond say little.
        warmup: Runs of each model before, not measured: the first ones allocate memory.

    Raises:
        InputError: There are no feeds, or too few repeats for an interval.
    """
    if not feeds:
        raise InputError("latency needs at least one input")
    if repeats < _MIN_REPEATS:
        raise InputError(f"latency needs at least {_MIN_REPEATS} repeats, not {repeats}")
    pairs: list[tuple[float, float]] = []
    sessions = (session, reference_session)
    total = 0.0
    with CORES.take():  # no other trial of this process runs meanwhile
        for turn in range(-warmup, max(repeats, _MOST_REPEATS)):
            if turn >= repeats and total >= 1e3 * seconds:
                break
            pair = [0.0, 0.0]
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                begin = time.perf_counter_ns()
                sessions[which].run(None, feeds[turn % len(feeds)])
                pair[which] = (time.perf_counter_ns() - begin) / 1e6
            if turn >= 0:
                pairs.append((pair[0], pair[1]))
                total += sum(pair)
    milliseconds = np.array(pairs)
    low, ratio, high = median_interval(milliseconds[:, 0] / milliseconds[:, 1])
    both = float(np.median(np.sqrt(milliseconds.prod(axis=1))))
    part = math.sqrt(ratio)
    return LatencyRatio(both * part, both / part, ratio, low, high)


def median_interval(
    values: NDArray[np.float64], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Give a median between two order statistics that hold it, whatever the distribution.

    The number of values below the true median is binomial with probability 1/2, so the r-th
    smallest and the r-th largest value hold it with probability 1 - 2 P(B < r) (G. J. Hahn and
    W. Q. Meeker, Statistical Intervals, 1991, chapter 5). The largest r that keeps the confidence
    is taken.

    Args:
        values: Independent values of shape (n,), n large enough for r = 1.
        confidence: Probability with which the interval holds the true median, 0 to 1.

    Returns:
        Lower end, median, upper end.
    """
    ordered = np.sort(values)
    n = len(ordered)
    rank = 0
    tail = 0.0  # P(B <= rank - 1)
    while 2 * (tail + math.comb(n, rank) / 2**n) <= 1 - confidence:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    if rank == 0:
        raise InputError(f"{n} values are too few for an interval of {confidence:.0%}")
    return float(ordered[rank - 1]), float(np.median(ordered)), float(ordered[n - rank])
