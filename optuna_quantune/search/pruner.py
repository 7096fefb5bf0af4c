"""Stops a trial that can no longer be the best, by comparison with the incumbent.

All that it needs stands in the storage, so that it works with any sampler, in any process, and on
a study that is continued: what a trial knows of its value so far, with an interval, and for which
inputs it was right. A trial that tells nothing of this is never stopped.
"""

from __future__ import annotations

import math
from typing import Any
from typing import Final
from typing import NamedTuple
from typing import TYPE_CHECKING

from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState
from scipy.special import bdtr


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optuna.study import Study
    from optuna.trial import FrozenTrial

# User attributes of a trial. What it reported: [step, estimate, low, high] each time, the interval
# holding the final value with 95 %.
RUNGS_KEY: Final = "rungs"
# One bit an input, in hexadecimal: whether the trial is right there, and whether it has run there.
CORRECT_KEY: Final = "correct"
SEEN_KEY: Final = "seen"
# A value from which on something else than the value decides which trial is best; without it the
# best value is the best trial.
BAR_KEY: Final = "bar"
DEFAULT_INDIFFERENCE: Final = 0.0005


class _Rung(NamedTuple):
    """An estimate of a trial's value with its 95 % interval, so that larger is better."""

    estimate: float
    low: float
    high: float


class RacingPruner(BasePruner):
    """Prunes a trial whose value will not be better than the incumbent's by what is worth it.

    The incumbent is the best complete trial that violates no constraint. A trial is pruned when
    the 95 % interval of its difference to the incumbent says that it is better by `indifference`
    at most, or when its own interval lies wholly beyond the bar that a trial has to reach. Both
    intervals are about the same inputs, so that the luck of the inputs is in neither: the trial
    has lost on these inputs, by however little. The difference's interval is put together from
    the two (Zou and Donner, Construction of confidence limits about effect measures, Statistics
    in Medicine 27, 2008): as what the two do not know yet is not the same, it is narrower than
    their sum. A trial without intervals is never pruned.

    A trial that is as good as the incumbent is pruned, too, even if it is faster. Where speed
    matters as much as that, give the objective a bound on the drop (``max_accuracy_drop``), which
    is the bar then, or the pruner a `confidence`.

    With a `confidence` a trial is kept, too, that has not lost in general: it is pruned only when
    the incumbent is also better on the inputs that both have run by more than chance explains
    (McNemar's exact test, Q. McNemar, Psychometrika 12, 1947). That costs more, and leaves more
    trials among which something else than the value, as speed, can decide.

    `QuantizationObjective` writes what the pruner reads; any other objective may do so: the user
    attributes ``rungs``, a list of ``[step, estimate, low, high]``, one for each report, and if
    it has them ``correct`` and ``seen``, one bit an input in hexadecimal.

    Example:
        >>> study = optuna.create_study(direction="maximize", pruner=RacingPruner())
        >>> study.optimize(QuantizationObjective("model.onnx", ...), n_trials=20)

    Args:
        indifference: How much better than the incumbent a trial must be able to be, in the unit
            of the value. The default of 0.05 points of an accuracy is half of the 0.1 points that
            a search may lose: the other half is for intervals that do not hold.
        confidence: Of the test on common inputs, between 0 and 1; None makes no test. That of the
            intervals is the objective's.

    Raises:
        ValueError: If `confidence` is not between 0 and 1, or `indifference` is negative.
    """

    def __init__(
        self, *, indifference: float = DEFAULT_INDIFFERENCE, confidence: float | None = None
    ) -> None:
        if not indifference >= 0.0:
            raise ValueError(f"indifference: {indifference} is negative")
        if confidence is not None and not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence: {confidence} is not between 0 and 1")
        self._indifference = indifference
        self._confidence = confidence

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial cannot become the best any more."""
        ours = _last_rung(study, trial)
        incumbent = _incumbent(study, trial)
        if ours is None or incumbent is None:
            return False
        theirs = _last_rung(study, incumbent)
        if theirs is None:
            return False
        bar = trial.user_attrs.get(BAR_KEY)
        if bar is not None and _sign(study) * float(bar) < theirs.low:
            return ours.high < _sign(study) * float(bar)
        # Between infinite estimates the gain is NaN, which says nothing.
        is_no_gain = _largest_gain(ours, theirs) <= self._indifference
        return is_no_gain and self._loses(trial.user_attrs, incumbent.user_attrs)

    def _loses(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
        """Whether the incumbent is better in general, where that is asked and can be told."""
        keys = (CORRECT_KEY, SEEN_KEY)
        known = all(key in attributes for key in keys for attributes in (ours, theirs))
        if self._confidence is None or not known:
            return True
        right, seen, their_right, their_seen = (
            int(attributes[key], 16) for attributes in (ours, theirs) for key in keys
        )
        common = seen & their_seen
        only_ours = (right & ~their_right & common).bit_count()
        only_theirs = (their_right & ~right & common).bit_count()
        chance = float(bdtr(only_ours, only_ours + only_theirs, 0.5))
        return chance <= (1.0 - self._confidence) / 2.0


def latest_estimate(trial: FrozenTrial) -> tuple[float, float, float] | None:
    """A trial's latest estimate of its value and both ends of its interval; None without them.

    An objective may mean something else by ``rungs``, and a NaN is no estimate.
    """
    match trial.user_attrs.get(RUNGS_KEY):
        case [
            *_,
            [_, int() | float() as estimate, int() | float() as low, int() | float() as high],
        ]:
            known = not any(map(math.isnan, (estimate, low, high)))
            return (float(estimate), float(low), float(high)) if known else None
    return None


def _sign(study: Study) -> float:
    return 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0


def _last_rung(study: Study, trial: FrozenTrial) -> _Rung | None:
    """What a trial knows of its value; None if it has no interval."""
    estimated = latest_estimate(trial)
    if estimated is None:
        return None
    estimate, low, high = estimated
    return _Rung(estimate, low, high) if _sign(study) > 0 else _Rung(-estimate, -high, -low)


def _largest_gain(ours: _Rung, theirs: _Rung) -> float:
    """Upper end of the 95 % interval of our value minus theirs."""
    doubt = math.hypot(ours.high - ours.estimate, theirs.estimate - theirs.low)
    return ours.estimate - theirs.estimate + doubt


def _incumbent(study: Study, trial: FrozenTrial) -> FrozenTrial | None:
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [
        other
        for other in finished
        if other.number != trial.number
        and all(violation <= 0 for violation in other.constraints.values())
    ]
    return max(feasible, key=lambda other: _sign(study) * other.values[0], default=None)
