"""Studies as `tune` leaves them, made of fixed numbers: nothing is quantized or run."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.comparison import Comparison
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.summary import Summary


BEGIN = datetime.datetime(2026, 1, 1)
CHOICES = {"scheme": ["symmetric", "power2"], "clipping": ["max", "kl"]}


def make_trial(
    values: float | Sequence[float] | None = None,
    *,
    state: TrialState = TrialState.COMPLETE,
    reports: Mapping[int, float] | None = None,
    duration: float = 2.0,
    constraints: Mapping[str, float] | None = None,
    params: Mapping[str, Any] | None = None,
    choices: Mapping[str, Sequence[Any]] = CHOICES,
    **attributes: Any,
) -> FrozenTrial:
    """A trial; its number is given by the study that it is added to."""
    params = {"scheme": "symmetric", "clipping": "max"} if params is None else params
    trial = optuna.trial.create_trial(
        state=state,
        values=[values] if isinstance(values, float) else values,
        params=dict(params),
        distributions={name: CategoricalDistribution(choices[name]) for name in params},
        intermediate_values=dict(reports or {}),
        constraints=dict(constraints) if constraints else None,
        user_attrs=attributes,
    )
    if state.is_finished():
        trial.datetime_start = BEGIN
        trial.datetime_complete = BEGIN + datetime.timedelta(seconds=duration)
    return trial


def make_study(*trials: FrozenTrial, directions: Sequence[str] = ("maximize",)) -> optuna.Study:
    study = optuna.create_study(directions=list(directions), study_name="a study")
    study.set_metric_names(["top1", "latency", "size"][: len(directions)])
    study.set_user_attr("metric", "top1")
    study.add_trials(trials)
    return study


def measured(
    value: float, ratio: float, sqnr_db: float, *, others: Sequence[float] = (), **more: Any
) -> FrozenTrial:
    """A completed trial as a `QuantizationObjective` leaves it."""
    attributes = {
        "top1": value,
        "metric_value": value,
        "agreement": value + 0.1,
        "sqnr_db": sqnr_db,
        "predicted_sqnr_db": sqnr_db - 3.0,
        "latency_ratio": ratio,
        "latency_low": ratio - 0.05,
        "latency_high": ratio + 0.1,
        "size_bytes": 2_500_000,
        "inputs_evaluated": 200,
        "interval": [value - 0.01, value + 0.02],
        "seconds": {"build": 0.5, "evaluate": 0.75, "latency": 0.25},
    }
    return make_trial([value, *others], **{**attributes, **more})


def make_summary(**changes: Any) -> Summary:
    def measurement(n: int, top1: float, agreement: float, sqnr_db: float) -> Measurement:
        return Measurement(n, top1, None, agreement, sqnr_db)

    fields: dict[str, Any] = {
        "trial": 1,
        "config": {"scheme": "symmetric", "float_layers": 2},
        "model": "net.onnx",
        "target": "cpu",
        "metric": "top1",
        "direction": "maximize",
        "all_inputs": Comparison(
            1000,
            measurement(1000, 0.80, 1.0, float("inf")),
            measurement(1000, 0.79, 0.95, 30.0),
            Interval(-0.01, -0.016, -0.004),
        ),
        "held_out": Comparison(
            500,
            measurement(500, 0.78, 1.0, float("inf")),
            measurement(500, 0.775, 0.94, 29.0),
            Interval(-0.005, -0.0125, 0.0025),
        ),
        "latency": LatencyRatio(2.0, 4.0, 0.5, 0.45, 0.55),
        "float_bytes": 10_000_000,
        "quantized_bytes": 2_600_000,
        "seconds": 61.4,
        "remarks": ("Goal not met: it loses 0.01, more than 0.001.",),
    }
    return Summary(**{**fields, **changes})
