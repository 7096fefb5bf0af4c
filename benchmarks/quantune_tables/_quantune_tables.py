"""The problem: a configuration is looked up in a table of exact measurements."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from csv import DictReader
from functools import cache
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.study import StudyDirection
from optunahub.benchmarks import BaseProblem


_FOLDER = Path(__file__).parent
_SEARCH_SPACE: dict[str, BaseDistribution] = {
    "calibration_images": CategoricalDistribution((1, 32, "all")),
    "scheme": CategoricalDistribution(
        ("asymmetric", "symmetric", "symmetric_uint8", "symmetric_power2")
    ),
    "clipping": CategoricalDistribution(("max", "kl")),
    "granularity": CategoricalDistribution(("tensor", "channel")),
    "mixed_precision": CategoricalDistribution(("none", "first_last")),
}
_DIRECTIONS = {
    "top1": StudyDirection.MAXIMIZE,
    "top5": StudyDirection.MAXIMIZE,
    "agreement": StudyDirection.MAXIMIZE,
    "sqnr_db": StudyDirection.MAXIMIZE,
    "latency_ratio": StudyDirection.MINIMIZE,
    "size_bytes": StudyDirection.MINIMIZE,
}


class Problem(BaseProblem):
    """Finds the best int8 configuration of one neural network.

    All 96 configurations of five quantization knobs were built and measured on every labelled
    input, so an evaluation is exact and takes no time.

    Args:
        model: One of :attr:`available_models`.
        metric: What is optimized, one of :attr:`available_metrics`, or several for
            multi-objective optimization.
        max_accuracy_drop: Loss of top-1 accuracy against the float model above which a
            configuration is infeasible (0.01 is one point); ``None`` is no constraint.

    Raises:
        ValueError: If there is no such model or metric, or it was not recorded for the model.
    """

    available_metrics = tuple(_DIRECTIONS)

    def __init__(
        self,
        model: str = "mobilenetv2_1.0",
        *,
        metric: str | Sequence[str] = "top1",
        max_accuracy_drop: float | None = None,
    ) -> None:
        self._metrics = (metric,) if isinstance(metric, str) else tuple(metric)
        unknown = [name for name in self._metrics if name not in _DIRECTIONS]
        if unknown or not self._metrics:
            raise ValueError(f"metric {metric!r}: use some of {', '.join(_DIRECTIONS)}")
        models = {row["model"]: row for row in _read("models.csv")}
        if model not in models:
            raise ValueError(f"model {model!r}: use one of {', '.join(models)}")
        self.model = model
        self.family = models[model]["family"]
        self._float_model = models[model]
        self._max_accuracy_drop = max_accuracy_drop
        self._rows = {_key(row): row for row in _read("tables.csv") if row["model"] == model}
        for name in self._metrics:
            if not all(row[name] for row in self._rows.values()):
                raise ValueError(f"metric {name!r}: it was not recorded for {model}")

    @staticmethod
    def available_models() -> list[str]:
        """Names of the models that have a table."""
        return [row["model"] for row in _read("models.csv")]

    @property
    def search_space(self) -> dict[str, BaseDistribution]:
        """The five knobs: 3 x 4 x 2 x 2 x 2 = 96 configurations."""
        return dict(_SEARCH_SPACE)

    @property
    def directions(self) -> list[StudyDirection]:
        """Whether each metric is to be large or small."""
        return [_DIRECTIONS[name] for name in self._metrics]

    @property
    def metric_names(self) -> list[str]:
        """Names of the objectives, in their order."""
        return list(self._metrics)

    def evaluate(self, params: dict[str, Any]) -> float | list[float]:
        """The measured values of a configuration.

        Args:
            params: A value for each knob of :attr:`search_space`.

        Returns:
            The value of the metric, or a list if there are several.
        """
        values = [float(self._row(params)[name]) for name in self._metrics]
        return values[0] if len(values) == 1 else values

    def evaluate_constraints(self, params: dict[str, Any]) -> dict[str, float]:
        """The accuracy drop beyond what is allowed; not positive where it is feasible."""
        if self._max_accuracy_drop is None:
            return {}
        drop = float(self._float_model["top1"]) - float(self._row(params)["top1"])
        return {"accuracy_drop": drop - self._max_accuracy_drop}

    def features(self, params: Mapping[str, Any]) -> dict[str, float]:
        """What was predicted of a configuration before it was measured.

        ``predicted_sqnr_db`` is the output's signal-to-noise ratio that a noise model expects,
        ``expected_agreement`` the share of inputs whose prediction it expects to stay that of the
        float model, and ``prior`` the top-1 accuracy that follows.
        """
        row = self._row(params)
        names = ("predicted_sqnr_db", "expected_agreement", "prior")
        return {name: float(row[name]) for name in names}

    def seconds(self, params: Mapping[str, Any]) -> float:
        """How long building and measuring a configuration took, for simulations of time."""
        return float(self._row(params)["seconds"])

    def float_value(self, metric: str) -> float:
        """Accuracy of the float model: ``top1`` or ``top5``."""
        return float(self._float_model[metric])

    def best_value(self) -> float:
        """The best value of all configurations, for a regret.

        Raises:
            ValueError: If there are several objectives.
        """
        if len(self._metrics) > 1:
            raise ValueError("there is no single best value of several objectives")
        values = [float(row[self._metrics[0]]) for row in self._rows.values()]
        return max(values) if self.directions[0] == StudyDirection.MAXIMIZE else min(values)

    def _row(self, params: Mapping[str, Any]) -> dict[str, str]:
        return self._rows[_key(params)]


def _key(params: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(params[name]) for name in _SEARCH_SPACE)


@cache
def _read(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(newline="", encoding="utf-8") as file:
        return list(DictReader(file))
