"""The chosen model beside the float model: on all evaluation inputs, and on those held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import jackknife_interval
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.ladder import RANKS
from optuna_quantune.objective import QuantizationObjective


_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The chosen model beside the float model on the same inputs.

    Attributes:
        inputs: Number of inputs; 0 where a loop of the user's brings its own.
        float_model: The float model's measurement.
        quantized: The quantized model's measurement.
        difference: Quantized minus float metric with its paired 95 % interval; None for the
            noise ratio, for a loop of the user's, of which nothing is known but its value, and for
            a metric of the user's that fails on parts of the inputs.
    """

    inputs: int
    float_model: Measurement
    quantized: Measurement
    difference: Interval | None


def float_outputs(
    objective: QuantizationObjective, evaluation: InputSource | None, held_out: NDArray[np.int64]
) -> Mapping[str, NDArray[Any]]:
    """The float model's outputs for all evaluation inputs, measured as the search will be.

    Before a search it finds what is wrong with the inputs that take no part in it.

    Raises:
        InputError: If the float model cannot be run or measured on them.
    """
    selected = objective.float_evaluation.all_outputs
    if evaluation is None or not held_out.size:
        return selected
    rest = objective.evaluate_float_model(evaluation.subset(held_out)).all_outputs
    selecting = np.setdiff1d(np.arange(len(evaluation)), held_out)
    return {
        name: _merged((selecting, selected[name]), (held_out, rest[name])) for name in selected
    }


def compare_with_float(
    objective: QuantizationObjective,
    model: Path | bytes,
    evaluation: InputSource | None,
    reference: Mapping[str, NDArray[Any]],
    held_out: NDArray[np.int64],
) -> tuple[Comparison, Comparison | None]:
    """Float and quantized model on all inputs, and on those that took no part in the search.

    Args:
        objective: What the search measured.
        model: The quantized model.
        evaluation: All evaluation inputs; None where a loop of the user's brings its own.
        reference: The float model's outputs for them, as from `float_outputs`.
        held_out: Indices of those that took no part.
    """
    metric = objective.chosen_metric
    if evaluation is None or metric.loop is not None:
        before, after = objective.float_evaluation, objective.evaluate(model)
        return Comparison(after.measurement.n, before.measurement, after.measurement, None), None
    outputs = objective.outputs(model, evaluation, "final model")
    everything = _compare(metric, outputs, reference, evaluation)
    if not held_out.size:
        return everything, None
    return everything, _compare(
        metric,
        {name: values[held_out] for name, values in outputs.items()},
        {name: values[held_out] for name, values in reference.items()},
        evaluation.subset(held_out),
    )


def _merged(*parts: tuple[NDArray[np.int64], NDArray[Any]]) -> NDArray[Any]:
    """Rows that stand at given indices, put together."""
    rows = np.concatenate([values for _, values in parts])
    return rows[np.argsort(np.concatenate([indices for indices, _ in parts]))]


def _compare(
    metric: ChosenMetric,
    outputs: Mapping[str, NDArray[Any]],
    reference: Mapping[str, NDArray[Any]],
    inputs: InputSource,
) -> Comparison:
    def own_difference(indices: NDArray[np.int64]) -> float:
        chosen = inputs.subset(indices)
        ours = {name: values[indices] for name, values in outputs.items()}
        theirs = {name: values[indices] for name, values in reference.items()}

        def value(models: Mapping[str, NDArray[Any]]) -> float:
            return metric.call_function(
                models, theirs, labels=chosen.labels, indices=chosen.positions
            )

        return value(ours) - value(theirs)

    def measure(models: Mapping[str, NDArray[Any]]) -> Measurement:
        return metric.measure(models, reference, labels=inputs.labels, indices=inputs.positions)

    difference = None
    if metric.is_own and len(inputs) > 1:
        try:
            found = jackknife_interval(own_difference, len(inputs))
            # Where no input changes it nothing is known of others, which is not a width of 0.
            difference = found if found.low < found.high else None
        except Exception as error:  # whatever a user's function raises on a part of the inputs
            _logger.warning(
                f"The difference in {metric.name!r} has no interval: the metric fails on part of "
                f"the inputs ({type(error).__name__}: {error})."
            )
    elif metric.of_classes:
        first = next(iter(outputs))
        ours, theirs = outputs[first], reference[first]
        if metric.name == "agreement" or inputs.labels is None:
            same = agrees(ours, theirs)
            difference = paired_difference_interval(same, np.ones_like(same))
        else:
            k = RANKS[metric.name]
            difference = paired_difference_interval(
                top_k_correct(ours, inputs.labels, k=k), top_k_correct(theirs, inputs.labels, k=k)
            )
    return Comparison(len(inputs), measure(reference), measure(outputs), difference)
