"""The metric of a search: one of `metrics.py` by name, or a function of the user's own."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import get_args
from typing import Literal
from typing import TYPE_CHECKING

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.metrics import are_classes_of
from optuna_quantune.evaluation.metrics import mean_sqnr_db
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import Measurement


if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

MetricName = Literal["top1", "top5", "agreement", "sqnr_db"]
Direction = Literal["maximize", "minimize"]
# `function(outputs, reference_outputs)`, and by name `labels` and `indices` if it has them.
MetricFunction = Callable[..., float]
# The user's own loop over the user's own inputs.
SessionFunction = Callable[["onnxruntime.InferenceSession"], float]

# Metrics that are a share of the inputs, each of which is right or wrong.
_OF_CLASSES = ("top1", "top5", "agreement")


@dataclasses.dataclass(frozen=True)
class ChosenMetric:
    """What a search maximizes or minimizes, and how it is computed from a model's outputs.

    Attributes:
        name: A `MetricName`, or the name of the user's function.
        direction: Which values are better.
        function: The user's function of outputs; None for a metric by name and for `loop`.
        loop: The user's function of a session; None for the others.
    """

    name: str
    direction: Direction = "maximize"
    function: MetricFunction | None = None
    loop: SessionFunction | None = None

    @classmethod
    def of(
        cls,
        metric: MetricName | MetricFunction | None,
        evaluate: SessionFunction | None,
        direction: Direction,
        *,
        labels: bool,
        classifies: bool = True,
    ) -> ChosenMetric:
        """Checks the arguments of a search that say what its metric is.

        Args:
            metric: A name, a function of outputs, or None for the default.
            evaluate: A function of a session, or None.
            direction: Which values of a function of the user's are better.
            labels: Whether the evaluation inputs have labels.
            classifies: Whether the first output can be scores of classes, for the default.

        Raises:
            InputError: They contradict each other, or one of them cannot be used.
        """
        if direction not in get_args(Direction):
            raise InputError(f"direction {direction!r}: use 'maximize' or 'minimize'")
        if metric is not None and evaluate is not None:
            raise InputError("metric and evaluate: give one of them; both measure the model")
        if callable(metric) or evaluate is not None:
            name = _name(metric if evaluate is None else evaluate)
            if name in (*get_args(MetricName), "latency", "size"):  # objectives of their own
                raise InputError(f"metric: a function of your own cannot be named {name!r}")
            if not callable(metric) and not callable(evaluate):
                raise InputError("evaluate: must be a function of an InferenceSession")
            return cls(name, direction, metric if callable(metric) else None, evaluate)
        name = metric or ("top1" if labels else "agreement" if classifies else "sqnr_db")
        if name not in get_args(MetricName):
            raise InputError(
                f"metric {metric!r}: use one of {', '.join(get_args(MetricName))}, or a function"
            )
        if direction != "maximize":
            raise InputError(f"metric {name!r}: is maximized; 'minimize' is for your own metric")
        if name in ("top1", "top5") and not labels:
            raise InputError(
                f"metric {name!r}: the evaluation inputs have no labels; "
                "give labels or use the metric 'agreement'"
            )
        return cls(name)

    @property
    def is_own(self) -> bool:
        """Whether it is a function of the user's."""
        return self.function is not None or self.loop is not None

    @property
    def of_classes(self) -> bool:
        """Whether it is a share of inputs that are right or wrong, 0 to 1."""
        return not self.is_own and self.name in _OF_CLASSES

    @property
    def sign(self) -> float:
        """1 where larger values are better, otherwise -1."""
        return 1.0 if self.direction == "maximize" else -1.0

    def measure(
        self,
        outputs: Mapping[str, NDArray[Any]],
        reference: Mapping[str, NDArray[Any]],
        *,
        labels: NDArray[Any] | None,
        indices: NDArray[np.int64],
    ) -> Measurement:
        """Measures a model's outputs beside the float model's.

        Accuracy and agreement are those of the first output, and are measured where the metric
        is one of them or the labels are classes of that output; the noise is that of all outputs.

        Args:
            outputs: Outputs by name, batch axis first, shape (n, ...).
            reference: The float model's outputs for the same inputs.
            labels: Labels of shape (n, ...), class indices where the metric needs them, or None.
            indices: Where the inputs stand in the source that the user gave, shape (n,).

        Raises:
            InputError: The outputs do not go with the metric.
            ValueError: The user's function gave something else than a number.
        """
        first = next(iter(outputs))
        n = len(outputs[first])
        measured = Measurement(n, None, None, None, mean_sqnr_db(outputs, reference))
        if self.of_classes or (labels is not None and are_classes_of(outputs[first], labels)):
            of_first = measure(outputs[first], reference=reference[first], labels=labels)
            measured = dataclasses.replace(of_first, sqnr_db=measured.sqnr_db)
        if self.function is None:
            return measured
        value = self.call_function(outputs, reference, labels=labels, indices=indices)
        return dataclasses.replace(measured, own=value)

    def call_function(
        self,
        outputs: Mapping[str, NDArray[Any]],
        reference: Mapping[str, NDArray[Any]],
        *,
        labels: NDArray[Any] | None,
        indices: NDArray[np.int64],
    ) -> float:
        """The value of the user's function of outputs; see `measure` for the arguments.

        Raises:
            ValueError: It is something else than a number.
        """
        assert self.function is not None
        wanted = _wanted(self.function, {"labels": labels, "indices": indices})
        return self._number(self.function(_alone(outputs), _alone(reference), **wanted))

    def run_loop(self, session: onnxruntime.InferenceSession) -> float:
        """The value that the user's own loop gives for a model.

        Raises:
            ValueError: It is something else than a number.
        """
        assert self.loop is not None
        return self._number(self.loop(session))

    def value(self, measurement: Measurement) -> float:
        """The metric's value of a measurement."""
        value = measurement.own if self.is_own else getattr(measurement, self.name)
        assert value is not None
        return float(value)

    def _number(self, value: object) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            raise ValueError(f"the metric gave {value!r}, not a number")
        return number


def _name(function: object) -> str:
    """A function's name for tables; classes with ``__call__`` and partials have none."""
    name = getattr(function, "__name__", type(function).__name__)
    return "metric" if name == "<lambda>" else str(name)


def _wanted(function: MetricFunction, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in parameters}


def _alone(outputs: Mapping[str, NDArray[Any]]) -> NDArray[Any] | Mapping[str, NDArray[Any]]:
    """The array of a model with one output, or all outputs by name: as inputs are given, too."""
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
