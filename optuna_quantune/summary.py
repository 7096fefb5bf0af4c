"""What a search found, kept in its study: a report or a dashboard needs no model to show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from typing import Final

import onnxruntime
import optuna

from optuna_quantune.comparison import Comparison
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import Measurement


SUMMARY_KEY: Final = "result"

_PACKAGES: Final = ("optuna-quantune", "onnx", "optuna", "numpy")


@dataclass(frozen=True)
class Summary:
    """The result of `tune` as plain values.

    Attributes:
        trial: Number of the chosen trial.
        config: Its knobs.
        model: Name of the float model's file.
        target: Name of the device that it was built for.
        metric: Name of what was measured.
        direction: Which values of the metric are better.
        all_inputs: Float and quantized model on all evaluation inputs.
        held_out: The same on the inputs that took no part in the selection, if there are any.
        latency: Batch-1 latency beside the float model.
        float_bytes: Size of the float model's file, with external data.
        quantized_bytes: Size of the quantized model's file.
        seconds: Wall-clock time of the search.
        remarks: What must not be overlooked, a sentence each.
        versions: Version of each package that the result depends on.
    """

    trial: int
    config: Mapping[str, Any]
    model: str
    target: str
    metric: str
    direction: Direction
    all_inputs: Comparison
    held_out: Comparison | None
    latency: LatencyRatio
    float_bytes: int
    quantized_bytes: int
    seconds: float
    remarks: tuple[str, ...]
    versions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {
            # As the module says it: onnxruntime-gpu and others are packages of other names.
            "onnxruntime": onnxruntime.__version__,
            **{name: version(name) for name in _PACKAGES},
        }
    )

    def note(self, study: optuna.Study) -> None:
        """Keeps it in a study, in place of what an earlier search left there."""
        study.set_user_attr(SUMMARY_KEY, dataclasses.asdict(self))

    @classmethod
    def of(cls, study: optuna.Study) -> Summary | None:
        """What the last search of a study found.

        Returns:
            None where no search has ended yet, or where what the study holds was not written by
            this version of the package.
        """
        found = study.user_attrs.get(SUMMARY_KEY)
        if not isinstance(found, Mapping):
            return None
        try:
            return cls(
                **{
                    **found,
                    "all_inputs": _comparison(found["all_inputs"]),
                    "held_out": found["held_out"] and _comparison(found["held_out"]),
                    "latency": LatencyRatio(**found["latency"]),
                    "remarks": tuple(found["remarks"]),
                }
            )
        except (KeyError, TypeError):
            return None


def _comparison(found: Mapping[str, Any]) -> Comparison:
    difference = found["difference"]
    return Comparison(
        found["inputs"],
        Measurement(**found["float_model"]),
        Measurement(**found["quantized"]),
        None if difference is None else Interval(**difference),
    )
