"""What a report shows of a study, read from it once: no model and no inputs are needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import get_args

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.plan import PLAN_KEY
from optuna_quantune.report.trial_rows import attribute
from optuna_quantune.report.trial_rows import keeps_bounds
from optuna_quantune.report.trial_rows import number
from optuna_quantune.report.trial_rows import trial_value
from optuna_quantune.summary import Summary


@dataclass(frozen=True)
class FloatPoint:
    """The metric's value of the float model.

    Attributes:
        value: The value.
        inputs: On which inputs, in words.
    """

    value: float
    inputs: str


@dataclass(frozen=True)
class Contents:
    """A study as a report shows it.

    Attributes:
        study_name: The study's name.
        trials: All trials in the order of their numbers.
        metric: Name of what was measured.
        direction: Which values of the metric are better.
        objectives: The name of each objective, in the order of the trials' values, and which
            values of it are better.
        target: Name of the device; None where the study does not say.
        summary: The result of the last search that ended; None if none did.
        best: The best trial by the study's own objective, with several objectives those that no
            other one beats in all; empty where no completed trial keeps all bounds.
    """

    study_name: str
    trials: tuple[FrozenTrial, ...]
    metric: str
    direction: Direction
    objectives: tuple[tuple[str, Direction], ...]
    target: str | None
    summary: Summary | None
    best: tuple[FrozenTrial, ...]

    @classmethod
    def of(cls, study: optuna.Study) -> Contents:
        """Reads a study of `tune`, of a `QuantizationObjective`, or of anything else."""
        directions = [_direction(direction) for direction in study.directions]
        names = study.metric_names or [
            "value" if len(directions) == 1 else f"value {place}"
            for place in range(len(directions))
        ]
        objectives = tuple(zip(names, directions, strict=True))
        summary = Summary.of(study)
        attributes = study.user_attrs
        plan = attributes.get(PLAN_KEY)
        plan = plan if isinstance(plan, Mapping) else {}
        metric = str(attributes.get("metric", names[0]))
        return cls(
            study_name=study.study_name,
            trials=tuple(study.get_trials(deepcopy=False)),
            metric=metric,
            direction=dict(objectives).get(metric) or _planned_direction(plan),
            objectives=objectives,
            target=_text(plan.get("target")) if summary is None else summary.target,
            summary=summary,
            best=tuple(_best(study, objectives)),
        )

    @property
    def complete(self) -> list[FrozenTrial]:
        """The trials that were measured to their end."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @property
    def marked(self) -> tuple[FrozenTrial, ...]:
        """The chosen trial, or while there is none the best so far."""
        if self.summary is None:
            return self.best
        return tuple(t for t in self.trials if t.number == self.summary.trial)

    @property
    def float_point(self) -> FloatPoint | None:
        """The float model's value that those of trials compare with, where it is known.

        Trials are measured on the inputs that select. The float model's share of right answers
        there follows from that on all inputs and on those held out; metrics of one's own are no
        shares, and theirs is that on all inputs.
        """
        if self.summary is None:
            return FloatPoint(1.0, "any inputs") if self.metric == "agreement" else None
        everything, held_out = self.summary.all_inputs, self.summary.held_out
        all_values = dataclasses.asdict(everything.float_model)
        field = self.metric if self.metric in all_values else "own"
        value = number(all_values[field])
        if value is None or not math.isfinite(value):
            return None
        rest = None if held_out is None else getattr(held_out.float_model, field)
        if held_out is None or rest is None or field == "own":
            return FloatPoint(value, f"all {everything.inputs} inputs")
        selecting = everything.inputs - held_out.inputs
        share = (value * everything.inputs - rest * held_out.inputs) / selecting
        return FloatPoint(share, f"the {selecting} inputs of the search")

    @property
    def front(self) -> list[FrozenTrial]:
        """Of the trials that keep all bounds those that none beats in the metric and in latency.

        Fastest first, so that the metric improves from one to the next.
        """
        sign = 1.0 if self.direction == "maximize" else -1.0
        placed = []
        for trial in filter(keeps_bounds, self.complete):
            ratio, value = attribute(trial, "latency_ratio"), trial_value(trial)
            if ratio is not None and value is not None:
                placed.append((ratio, -sign * value, trial.number, trial))
        front: list[FrozenTrial] = []
        least_loss = math.inf
        for _, loss, _, trial in sorted(placed, key=lambda place: place[:3]):
            if loss < least_loss:
                front.append(trial)
                least_loss = loss
        return front


def _direction(direction: StudyDirection) -> Direction:
    return "minimize" if direction == StudyDirection.MINIMIZE else "maximize"


def _planned_direction(plan: Mapping[str, Any]) -> Direction:
    """The direction of a metric that is no objective."""
    direction: Direction = plan.get("direction", "maximize")
    return direction if direction in get_args(Direction) else "maximize"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _best(study: optuna.Study, objectives: Sequence[tuple[str, Direction]]) -> list[FrozenTrial]:
    if len(objectives) > 1:
        return [trial for trial in study.best_trials if keeps_bounds(trial)]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # Not `study.best_trial`, which does not know of trials from before there was a bound.
    kept = [trial for trial in complete if keeps_bounds(trial)]
    sign = 1.0 if objectives[0][1] == "maximize" else -1.0
    return sorted(kept, key=lambda trial: -sign * float(trial.values[0]))[:1]
