"""Which trial to deploy: the best of many noisy numbers is not the best configuration.

With 500 inputs an accuracy has a standard error of about two points, so the trial with the
highest value is mostly a lucky one. All trials saw the same inputs, and paired tests tell which of
them are really worse than it; among the others speed and noise decide, which are known far better.
On the recorded tables the least noisy of them agrees with the float model on 0.4 % more of other
inputs than the one with the best value, and is no less accurate (benchmarks/results/choice).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from typing import Final
from typing import Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.goals import DROP_CONSTRAINT
from optuna_quantune.goals import LATENCY_CONSTRAINT
from optuna_quantune.goals import SIZE_CONSTRAINT
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.search.pruner import SEEN_KEY


Preference = Literal["latency", "size", "accuracy"]

# User attribute of a trial, of the kind of CORRECT_KEY: whether it agrees with the float model.
AGREES_KEY: Final = "agrees"
# User attribute of a trial: the metric's value, also where it is not an objective.
VALUE_KEY: Final = "metric_value"
# Latency ratios this close are the same: they vary by about a tenth between runs.
SAME_LATENCY: Final = 1.1
# Sizes this close are the same: a scale for each channel in place of one costs more.
_SAME_SIZE: Final = 1.001


def select(
    study: optuna.Study,
    *,
    prefer: Preference = "latency",
    direction: Direction = "maximize",
    without: Collection[int] = (),
) -> tuple[FrozenTrial, bool]:
    """The trial to deploy, and whether it keeps all bounds.

    Trials carry bounds as constraints (`optuna_quantune.goals`). With a bound on the accuracy
    drop, the fastest (or smallest) of the trials that keep all bounds is chosen. Without one, all
    trials that keep the bounds stay which a paired 95 % interval cannot tell from the one with the
    best value, in that value and in agreement with the float model; of these the fastest (or
    smallest) are taken, and of trials equally fast the least noisy one. Where accuracy is
    preferred, noise decides at once. It is that of the margins by which classes win, where there
    are classes, and otherwise that of the outputs.

    When no trial keeps all bounds, the most accurate of those that keep the bounds on latency and
    size is chosen in the same way; when there is none of these either, the most accurate of those
    that are about as little beyond them as the nearest.

    Args:
        study: Trials of a `QuantizationObjective`.
        prefer: What decides where accuracy does not.
        direction: Which values of the metric are better.
        without: Numbers of trials that are not looked at.

    Raises:
        InputError: If no trial of the study is complete.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [trial for trial in complete if trial.number not in without]
    if not trials:
        errors = [t.user_attrs["error"] for t in study.get_trials() if "error" in t.user_attrs]
        reason = f"; the last one failed with: {errors[-1]}" if errors else ""
        raise InputError(f"study {study.study_name!r}: no trial was completed{reason}")
    if len(study.directions) > 1:  # what another trial beats in all of them is not chosen
        front = {trial.number for trial in study.best_trials}
        trials = [trial for trial in trials if trial.number in front] or trials
    within = [t for t in trials if all(value <= 0 for value in t.constraints.values())]
    if within:
        bounded = any(DROP_CONSTRAINT in trial.constraints for trial in within)
        if bounded and prefer != "accuracy":
            return _preferred(within, prefer), True
        return _preferred(not_worse_than_best(within, direction), prefer), True
    excess = [_excess(trial) for trial in trials]
    limit = SAME_LATENCY * (1.0 + min(excess)) - 1.0 if min(excess) > 0.0 else 0.0
    least = [t for t, e in zip(trials, excess, strict=True) if e <= limit]
    return _preferred(not_worse_than_best(least, direction), prefer), False


def metric_value(trial: FrozenTrial) -> float:
    """The metric's value of a complete trial, whatever the objectives of its study are."""
    value = trial.user_attrs.get(VALUE_KEY)
    return float(trial.values[0] if value is None else value)


def rank(trial: FrozenTrial, direction: Direction) -> tuple[float, float]:
    """What orders complete trials: the metric's value, larger for better, then output noise."""
    sign = 1.0 if direction == "maximize" else -1.0
    return sign * metric_value(trial), sqnr_db(trial)


def sqnr_db(trial: FrozenTrial) -> float:
    """Signal over the output's noise of a trial, in decibels; 0 where it was not measured."""
    return float(trial.user_attrs.get("sqnr_db") or 0.0)


def little_noise(trial: FrozenTrial) -> tuple[float, float]:
    """What orders trials by their noise, larger for less: of margins, then of outputs.

    Margins suffer, and outputs hardly, where scores are cut off at one value and tie.
    """
    return float(trial.user_attrs.get("margin_sqnr_db") or 0.0), sqnr_db(trial)


def tells_apart(better: FrozenTrial, other: FrozenTrial, key: str) -> bool:
    """Whether `better` is better by more than chance explains; without bits, at all."""
    attributes: tuple[dict[str, Any], ...] = (better.user_attrs, other.user_attrs)
    if not all(key in each for each in attributes):
        return key == CORRECT_KEY and metric_value(better) != metric_value(other)
    n = int(better.user_attrs["n"])
    first, second = (unpack(each[key], n) for each in attributes)
    common = np.ones(n, dtype=np.bool_)
    for each in attributes:
        if SEEN_KEY in each:  # of an input that a trial has not run it says nothing of its own
            common &= unpack(each[SEEN_KEY], n)
    return paired_difference_interval(first[common], second[common]).low > 0.0


def pack(bits: NDArray[np.bool_]) -> str:
    """Bits, shape (n,), as a hexadecimal string."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, n: int) -> NDArray[np.bool_]:
    """The first `n` bits of a hexadecimal string."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(packed, count=n).astype(np.bool_)


def not_worse_than_best(trials: list[FrozenTrial], direction: Direction) -> list[FrozenTrial]:
    """The trials that paired tests cannot tell from the best one, in value and in agreement."""
    best = max(trials, key=lambda trial: rank(trial, direction))
    rivals = [trial for trial in trials if not tells_apart(best, trial, CORRECT_KEY)]
    most_faithful = max(rivals, key=lambda trial: (_agreement(trial), sqnr_db(trial)))
    return [trial for trial in rivals if not tells_apart(most_faithful, trial, AGREES_KEY)]


def _preferred(trials: list[FrozenTrial], prefer: Preference) -> FrozenTrial:
    """Of the fastest or the smallest trials, or of all of them, the least noisy one."""
    few = trials
    if prefer == "latency":
        fastest = min(trials, key=_latency)
        high = float(fastest.user_attrs.get("latency_high", 0.0))
        limit = max(SAME_LATENCY * _latency(fastest), high)
        few = [trial for trial in trials if _latency(trial) <= limit]
    elif prefer == "size":
        limit = _SAME_SIZE * min(_size(trial) for trial in trials)
        few = [trial for trial in trials if _size(trial) <= limit]
    return max(few, key=lambda trial: (*little_noise(trial), -trial.number))


def _excess(trial: FrozenTrial) -> float:
    """How far a trial is beyond its bounds on latency and size, as a share of them."""
    constraints = trial.constraints
    return sum(
        max(0.0, constraints.get(name, 0.0)) for name in (LATENCY_CONSTRAINT, SIZE_CONSTRAINT)
    )


def _latency(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("latency_ratio", 1.0))


def _size(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("size_bytes", 0.0))


def _agreement(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("agreement") or 0.0)
