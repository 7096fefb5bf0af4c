"""Which trial to deploy: the best of many noisy numbers is not the best configuration.

With 500 inputs an accuracy has a standard error of about two points, so the trial with the
highest value is mostly a lucky one. All trials saw the same inputs, and paired tests tell which of
them are really worse than it; among the others speed and output noise decide, which are known far
better.
"""

from __future__ import annotations

from typing import Any
from typing import Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.metrics import paired_difference_interval


# User attributes of a trial: for each input one bit, packed and in hexadecimal.
CORRECT_KEY: Final = "correct"
AGREES_KEY: Final = "agrees"
# Latency ratios this close are the same: they vary by about a tenth between runs.
_SAME_LATENCY: Final = 1.1


def select(study: optuna.Study) -> tuple[FrozenTrial, bool]:
    """The trial to deploy, and whether it meets the bound on the accuracy drop.

    Under a bound (trials carry constraints) the fastest trial within it is chosen. Without one, or
    when no trial is within it, all trials stay that a paired 95 % interval cannot tell from the
    one with the best value, in that value and in agreement with the float model; of these the
    fastest are taken, and of trials equally fast the one with the least output noise.

    Raises:
        InputError: If no trial of the study is complete.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not trials:
        errors = [t.user_attrs["error"] for t in study.get_trials() if "error" in t.user_attrs]
        reason = f"; the last one failed with: {errors[-1]}" if errors else ""
        raise InputError(f"study {study.study_name!r}: no trial was completed{reason}")
    bounded = [trial for trial in trials if trial.constraints]
    within = [t for t in bounded if all(value <= 0 for value in t.constraints.values())]
    if within:
        return _fastest(within), True
    best = max(trials, key=lambda trial: (trial.value, _sqnr(trial)))
    rivals = [trial for trial in trials if not _tells_apart(best, trial, CORRECT_KEY)]
    most_faithful = max(rivals, key=lambda trial: (_agreement(trial), _sqnr(trial)))
    rivals = [trial for trial in rivals if not _tells_apart(most_faithful, trial, AGREES_KEY)]
    return _fastest(rivals), not bounded


def pack(bits: NDArray[np.bool_]) -> str:
    """Bits, shape (n,), as a hexadecimal string."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, n: int) -> NDArray[np.bool_]:
    """The first `n` bits of a hexadecimal string."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(packed, count=n).astype(np.bool_)


def _fastest(trials: list[FrozenTrial]) -> FrozenTrial:
    limit = _SAME_LATENCY * min(_latency(trial) for trial in trials)
    fast = [trial for trial in trials if _latency(trial) <= limit]
    return max(fast, key=lambda trial: (_sqnr(trial), -trial.number))


def _tells_apart(better: FrozenTrial, other: FrozenTrial, key: str) -> bool:
    """Whether `better` is better by more than chance explains; without bits, at all."""
    attributes: tuple[dict[str, Any], ...] = (better.user_attrs, other.user_attrs)
    if not all(key in each for each in attributes):
        return key == CORRECT_KEY and better.value != other.value
    first, second = (unpack(each[key], each["n"]) for each in attributes)
    return paired_difference_interval(first, second).low > 0.0


def _latency(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("latency_ratio", 1.0))


def _agreement(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("agreement", 0.0))


def _sqnr(trial: FrozenTrial) -> float:
    return float(trial.user_attrs.get("sqnr_db", 0.0))
