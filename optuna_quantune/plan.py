"""What a search is, kept in its study: who joins it needs the model and the inputs, no more."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any
from typing import Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.chosen_metric import MetricFunction
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.chosen_metric import SessionFunction
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.goals import Objective
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import Target


PLAN_KEY: Final = "search"
# Fewer evaluation inputs than this are not split: either half would say too little.
SMALLEST_SPLIT: Final = 400

# What the fields of a plan may be that nothing else checks; a storage may hold anything.
_KINDS: Final[dict[str, type | UnionType]] = {
    "metric": str | None,
    "has_own_metric": bool,
    "direction": str,
    "target": str,
    "sampler": str | None,
    "max_accuracy_drop": float | int | None,
    "max_latency": float | int | None,
    "max_size": float | int | None,
    "precision": float | int | None,
    "exact": bool,
    "seed": int,
    "n_trials": int | None,
}


@dataclass(frozen=True)
class SearchPlan:
    """What decides how a search goes, beside the model and the inputs.

    Functions and objects of the user's cannot be kept in a study: who joins brings them along.

    Attributes:
        space: The search space as it was asked for, before the target restricts it.
        metric: The metric, if it has a name; None for the default or a function of the user's.
        has_own_metric: Whether a function of the user's measures.
        direction: Which values of such a function are better.
        objectives: What is optimised.
        target: The device's name.
        sampler: What `make_sampler` makes the sampler of; None for a sampler of the user's.
        max_accuracy_drop: Bound on the loss of the metric against float.
        max_latency: Bound on the latency as a ratio to float.
        max_size: Bound on the model file's size in bytes.
        precision: Half the width of the 95 % interval that ends a trial; None for the default.
        exact: Whether every trial runs on all inputs.
        seed: Seed of the sampler and of the split of the evaluation inputs.
        n_trials: Trials in all; None if there is no such number.
    """

    space: SearchSpace
    metric: MetricName | None
    has_own_metric: bool
    direction: Direction
    objectives: tuple[Objective, ...]
    target: str
    sampler: str | None
    max_accuracy_drop: float | None
    max_latency: float | None
    max_size: int | None
    precision: float | None
    exact: bool
    seed: int
    n_trials: int | None

    def objective(
        self,
        model: str | Path,
        *,
        metric: MetricFunction | None,
        evaluate: SessionFunction | None,
        target: Target | None,
        evaluation: InputSource | None,
        **options: Any,
    ) -> QuantizationObjective:
        """The objective of the search.

        Args:
            model: The float ONNX model.
            metric: The user's function of outputs, if there is one.
            evaluate: The user's function of a session, if there is one.
            target: The device, if it is not one that a name stands for.
            evaluation: The inputs that select.
            **options: What else `QuantizationObjective` takes: `calibration`, `providers`,
                `cache`, `threads`, `progress`.

        Raises:
            InputError: If an argument cannot be used.
        """
        return QuantizationObjective(
            model,
            space=self.space,
            metric=metric or self.metric,
            evaluate=evaluate,
            evaluation=evaluation,
            direction=self.direction,
            objectives=self.objectives,
            target=target or self.target,
            max_accuracy_drop=self.max_accuracy_drop,
            max_latency=self.max_latency,
            max_size=self.max_size,
            precision=self.precision,
            exact=self.exact,
            **options,
        )

    def note(self, study: optuna.Study) -> None:
        """Keeps it in a study."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if isinstance(value, np.generic):  # which JSON does not take
                fields[name] = value.item()
        fields["space"] = {
            name: json.loads(distribution_to_json(distribution))
            for name, distribution in self.space.items()
        }
        study.set_user_attr(PLAN_KEY, fields)

    @classmethod
    def of(cls, study: optuna.Study) -> SearchPlan:
        """The plan that a study keeps.

        Raises:
            InputError: If it keeps none that can be read.
        """
        found = study.user_attrs.get(PLAN_KEY)
        if found is None:
            raise InputError(
                f"study {study.study_name!r}: was not begun by `tune`, so that nothing says how "
                "its search goes"
            )
        try:
            for name, kind in _KINDS.items():
                if not isinstance(found[name], kind):
                    raise TypeError(f"{name} is {found[name]!r}")
            knobs = {
                name: json_to_distribution(json.dumps(distribution))
                for name, distribution in found["space"].items()
            }
            return cls(
                **{
                    **found,
                    "space": SearchSpace(knobs),
                    "objectives": tuple(found["objectives"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"study {study.study_name!r}: its search was noted by another version and cannot "
                f"be joined ({type(error).__name__}: {error}); use the same version everywhere"
            ) from error


def split(
    evaluation: InputSource | None, seed: int, *, own_inputs: bool = False
) -> tuple[InputSource | None, NDArray[np.int64]]:
    """The inputs that select, and the indices of those that only report, in order.

    Args:
        evaluation: All evaluation inputs; None without any.
        seed: Of the search.
        own_inputs: Whether a loop of the user's brings its own inputs, which only the user can
            split.
    """
    if evaluation is None or own_inputs or len(evaluation) < SMALLEST_SPLIT:
        return evaluation, np.arange(0)
    n = len(evaluation)
    order = np.random.default_rng(seed).permutation(n)
    return evaluation.subset(np.sort(order[: n - n // 2])), np.sort(order[n - n // 2 :])
