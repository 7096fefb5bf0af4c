"""Trials as rows of text, for whatever shows them as a table.

What stands in a study may have been written by anyone: attributes that are missing, or that are
no numbers, are left empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.objective import INPUTS_KEY
from optuna_quantune.report.numbers import figure
from optuna_quantune.report.numbers import optional
from optuna_quantune.report.numbers import short
from optuna_quantune.report.numbers import times
from optuna_quantune.selection import VALUE_KEY


@dataclass(frozen=True)
class TrialRow:
    """What is told of a trial beside its knobs; empty where it is not known.

    Attributes:
        trial: The trial's number.
        state: ``complete``, ``pruned``, ``fail``, ``running`` or ``waiting``.
        value: The metric's value; of a pruned trial its estimate when it was stopped.
        interval: The 95 % interval of the value.
        agreement: Share of inputs with the float model's prediction.
        sqnr_db: Output signal-to-noise ratio in decibels.
        latency: Ratio to the float model, with its 95 % interval.
        megabytes: Size of the model file.
        inputs: How many inputs were run for the value.
        seconds: Duration.
        note: Why it failed, whose model it built again, or which bounds it breaks.
    """

    trial: str
    state: str
    value: str
    interval: str
    agreement: str
    sqnr_db: str
    latency: str
    megabytes: str
    inputs: str
    seconds: str
    note: str

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialRow:
        """The row of a trial."""
        value, interval = trial_value(trial), trial_interval(trial)
        ratio, size = attribute(trial, "latency_ratio"), attribute(trial, "size_bytes")
        inputs = attribute(trial, INPUTS_KEY) or attribute(trial, "n")
        return cls(
            trial=str(trial.number),
            state=trial.state.name.lower(),
            value="" if value is None else short(value),
            interval="" if interval is None else "[{}, {}]".format(*map(short, interval)),
            agreement=optional(attribute(trial, "agreement"), ".4f"),
            sqnr_db=optional(attribute(trial, "sqnr_db"), ".1f"),
            latency=""
            if ratio is None
            else times(ratio, attribute(trial, "latency_low"), attribute(trial, "latency_high")),
            megabytes="" if size is None else figure(size / 1e6),
            inputs=optional(inputs, ".0f"),
            seconds=f"{trial.duration.total_seconds():.1f}" if trial.duration else "",
            note=_note(trial),
        )


def attribute(trial: FrozenTrial, name: str) -> float | None:
    """A user attribute of a trial, if it is a number."""
    return number(trial.user_attrs.get(name))


def number(value: object) -> float | None:
    """A value, if it is a number; infinite ones are (the SQNR of equal outputs)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # an integer beyond all floats, which nothing here measures
        return None


def trial_value(trial: FrozenTrial) -> float | None:
    """The metric's value of a complete trial, the last estimate of another one."""
    if trial.state == TrialState.COMPLETE:
        value = attribute(trial, VALUE_KEY)
        return number(trial.values[0]) if value is None else value
    return last_report(trial)


def last_report(trial: FrozenTrial) -> float | None:
    """What a trial reported last to its pruner."""
    if not trial.intermediate_values:
        return None
    return number(trial.intermediate_values[max(trial.intermediate_values)])


def trial_interval(trial: FrozenTrial) -> tuple[float, float] | None:
    """The 95 % interval of a trial's value: lower and upper end."""
    found = trial.user_attrs.get("interval")
    if not isinstance(found, Sequence) or len(found) != 2:
        return None
    low, high = (number(end) for end in found)
    return None if low is None or high is None else (low, high)


def keeps_bounds(trial: FrozenTrial) -> bool:
    """Whether a trial breaks none of the bounds that it carries as constraints."""
    return all(violation <= 0 for violation in trial.constraints.values())


def best_first(trials: Iterable[FrozenTrial], direction: Direction) -> list[FrozenTrial]:
    """Complete trials by value and, where it is the same, speed; the others behind them."""
    sign = 1.0 if direction == "maximize" else -1.0
    order = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

    def key(trial: FrozenTrial) -> tuple[int, float, float, int]:
        place = order.index(trial.state) if trial.state in order else len(order)
        value, ratio = trial_value(trial), attribute(trial, "latency_ratio")
        return (
            place,
            math.inf if value is None else -sign * value,
            math.inf if ratio is None else ratio,
            trial.number,
        )

    return sorted(trials, key=key)


def shared_knobs(trials: Sequence[FrozenTrial]) -> tuple[list[str], list[str]]:
    """The names of the knobs that differ between trials, and of those that do not."""
    knobs = list(dict.fromkeys(name for trial in trials for name in trial.params))
    same = [k for k in knobs if len({str(t.params.get(k)) for t in trials}) == 1]
    if len(trials) < 2:
        return knobs, []
    return [name for name in knobs if name not in same], same


def knob_text(params: Mapping[str, Any], names: Iterable[str]) -> str:
    """Some knobs of a configuration in one line."""
    return ", ".join(f"{name} {params[name]}" for name in names if name in params)


def first_line(error: object) -> str:
    """The line of an error that says what it is."""
    return str(error).split("\n")[0]


def _note(trial: FrozenTrial) -> str:
    if trial.state == TrialState.FAIL:
        return first_line(trial.user_attrs.get("error", ""))
    notes = []
    twin = attribute(trial, "duplicate_of")
    if twin is not None:
        notes.append(f"the same model as trial {twin:.0f}")
    broken = [name for name, violation in trial.constraints.items() if violation > 0]
    if broken:
        notes.append(f"breaks the bound on {', '.join(broken)}".replace("_", " "))
    return "; ".join(notes)
