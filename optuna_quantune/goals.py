"""What a search is for: the values of a trial, and the bounds that a model has to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from typing import get_args
from typing import Literal

from optuna_quantune.errors import InputError


Objective = Literal["accuracy", "latency", "size"]

# Constraints of a trial, feasible when not positive: the metric's loss beyond its bound in the
# metric's unit; latency and size beyond theirs as a share of the bound.
DROP_CONSTRAINT: Final = "accuracy_drop"
# A drop that differs from its bound by less is the bound: 1 - 0.99 is more than 0.01 in float64.
ROUNDING: Final = 1e-9
LATENCY_CONSTRAINT: Final = "latency"
SIZE_CONSTRAINT: Final = "size"


@dataclass(frozen=True)
class Outcome:
    """What counts of one model.

    Attributes:
        value: The metric's value.
        drop: How much worse it is than the float model's, in the metric's unit.
        latency_ratio: Batch-1 latency over the float model's.
        size_bytes: Size of the model file.
    """

    value: float
    drop: float
    latency_ratio: float
    size_bytes: float


@dataclass(frozen=True)
class Goals:
    """The objectives of a search and its bounds.

    Attributes:
        objectives: What the values of a trial are, in this order.
        max_accuracy_drop: Largest loss of the metric against float, in the metric's unit.
        max_latency: Largest latency as a ratio to the float model's.
        max_size: Largest size of the model file in bytes.

    Raises:
        InputError: If an objective is unknown or named twice, or a bound cannot be kept by any
            model.
    """

    objectives: tuple[Objective, ...] = ("accuracy",)
    max_accuracy_drop: float | None = None
    max_latency: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        known = get_args(Objective)
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise InputError(f"objectives: give different ones of {', '.join(known)}")
        for objective in self.objectives:
            if objective not in known:
                raise InputError(f"objective {objective!r}: use {', '.join(known)}")
        # "not >=": what is no number is refused, too.
        if self.max_accuracy_drop is not None and not self.max_accuracy_drop >= 0:
            raise InputError(f"max_accuracy_drop: {self.max_accuracy_drop} must not be negative")
        if self.max_latency is not None and not self.max_latency > 0:
            raise InputError(
                f"max_latency: {self.max_latency} must be positive: a ratio to the float model"
            )
        if self.max_size is not None and not self.max_size >= 1:
            raise InputError(f"max_size: {self.max_size} must be positive: bytes of the model")

    @property
    def is_single(self) -> bool:
        """Whether accuracy is the only objective, so that trials have intermediate values."""
        return self.objectives == ("accuracy",)

    @property
    def needs_latency(self) -> bool:
        """Whether latency is an objective or bounded."""
        return "latency" in self.objectives or self.max_latency is not None

    def values(self, outcome: Outcome) -> tuple[float, ...]:
        """The values of a trial, one for each objective."""
        by_name = {
            "accuracy": outcome.value,
            "latency": outcome.latency_ratio,
            "size": outcome.size_bytes,
        }
        return tuple(float(by_name[objective]) for objective in self.objectives)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that there are, by name."""
        every = {
            DROP_CONSTRAINT: self.max_accuracy_drop,
            LATENCY_CONSTRAINT: self.max_latency,
            SIZE_CONSTRAINT: self.max_size,
        }
        return {name: float(bound) for name, bound in every.items() if bound is not None}

    def constraints(self, outcome: Outcome) -> dict[str, float]:
        """The constraints of a trial, by name; one for each bound."""
        constraints = {}
        if self.max_accuracy_drop is not None:
            excess = outcome.drop - self.max_accuracy_drop
            constraints[DROP_CONSTRAINT] = 0.0 if abs(excess) < ROUNDING else excess
        if self.max_latency is not None:
            constraints[LATENCY_CONSTRAINT] = outcome.latency_ratio / self.max_latency - 1.0
        if self.max_size is not None:
            constraints[SIZE_CONSTRAINT] = outcome.size_bytes / self.max_size - 1.0
        return constraints

    def missed(self, outcome: Outcome, *, when: str = "") -> tuple[str, ...]:
        """One sentence for each bound that a model does not keep.

        Args:
            outcome: What was measured.
            when: Said before what is another number whenever it is measured.
        """
        told = {
            DROP_CONSTRAINT: (
                f"{when}it loses {outcome.drop:.4g}, more than {self.max_accuracy_drop}"
            ),
            LATENCY_CONSTRAINT: (
                f"{when}its latency is {outcome.latency_ratio:.2f}x that of the float model, more "
                f"than {self.max_latency}x"
            ),
            SIZE_CONSTRAINT: f"it has {outcome.size_bytes:,} bytes, more than {self.max_size}",
        }
        return tuple(told[name] for name, by in self.constraints(outcome).items() if by > 0)
