"""Runs the float model and its quantized ones over the evaluation inputs, and measures them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.labels import check_label_range
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.metrics import class_scores
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import near_chance
from optuna_quantune.evaluation.metrics import TOP5
from optuna_quantune.evaluation.runner import iterate
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.evaluation.runner import run
from optuna_quantune.evaluation.runner import run_first
from optuna_quantune.evaluation.runner import why_one_at_a_time


if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from optuna_quantune.evaluation.chosen_metric import ChosenMetric
    from optuna_quantune.evaluation.dataset import InputSource
    from optuna_quantune.evaluation.dataset import InputSpec
    from optuna_quantune.evaluation.latency import LatencyRatio
    from optuna_quantune.evaluation.runner import OnFeed
    from optuna_quantune.evaluation.runner import Provider

# Stage ("float model", "calibration", "predictions", "evaluation", ...), items done, items in all.
Progress = Callable[[str, int, int], None]
# The outputs so far, batches by output name, and the number of inputs done.
OnBatch = Callable[["Mapping[str, Sequence[NDArray[Any]]]", int], None]

# Interleaved batch-1 runs of the float and the int8 model.
LATENCY_REPEATS = 20

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        measurement: Accuracy against labels and against the float model.
        all_outputs: The model's outputs by name for all evaluation inputs, batch axis first.
        seconds: Wall-clock time.
    """

    measurement: Measurement
    all_outputs: Mapping[str, NDArray[Any]]
    seconds: float

    @property
    def outputs(self) -> NDArray[Any]:
        """The first output, of a classifier the scores, shape (n, classes)."""
        return next(iter(self.all_outputs.values()))


class Evaluator:
    """Measures models of one task beside its float model.

    Args:
        float_model: The float model's file.
        specs: Its inputs.
        output_names: Those of its outputs that are measured, in their order.
        inputs: What models are measured on, with labels if there are any.
        calibration: What the float model is run on for calibration, to try it out.
        metric: What counts.
        compares_outputs: Whether models are run on `inputs`; if not, the user's own loop is all
            that is measured, and one input is there for the latency.
        providers: ONNX Runtime execution providers in order of preference.
        exact_products: Whether models are for another device than this processor, whose
            saturation must not count.
        threads: Threads of one inference when latency is measured; None is all cores.
        batch_size: Inputs that are run at a time; None chooses.
        progress: Called with the stage, the items done and the items in all.
    """

    def __init__(
        self,
        float_model: Path,
        *,
        specs: Sequence[InputSpec],
        output_names: Sequence[str],
        inputs: InputSource,
        calibration: InputSource,
        metric: ChosenMetric,
        compares_outputs: bool,
        providers: Sequence[Provider],
        exact_products: bool,
        threads: int | None,
        batch_size: int | None,
        progress: Progress,
    ) -> None:
        self._float_model = float_model
        self._specs = specs
        self._output_names = output_names
        self._inputs = inputs
        self._calibration = calibration
        self._metric = metric
        self._compares_outputs = compares_outputs
        self._providers = providers
        self._exact_products = exact_products
        self._threads = threads
        self._given_batch_size = batch_size
        self._progress = progress

    @cached_property
    def batch_size(self) -> int | None:
        """Inputs that are run at a time; None chooses, where the model takes several."""
        if self._given_batch_size is not None:
            return self._given_batch_size
        reason = why_one_at_a_time(self._float_session, self._calibration, self._output_names)
        if reason is None:
            return None
        _logger.warning(f"Inputs are run one at a time, which takes longer: {reason}.")
        return 1

    def try_out(self) -> None:
        """Runs the float model on single inputs, to find mistakes before long work.

        Raises:
            InputError: It cannot be run on one of them, or labels do not fit its outputs.
        """
        if "float_evaluation" in self.__dict__:
            return
        session = self._float_session  # kept for what else the float model is run on
        if not self._compares_outputs:  # they may have any shape
            run_first(session, self._calibration.bind(self._specs))
            return
        for inputs in (self._calibration, self._inputs):
            outputs = self.outputs(session, inputs.subset([0]), "float model")
        if self._metric.of_classes:
            classes = class_scores(next(iter(outputs.values()))).shape[1]
            if self._metric.name == "top5" and classes <= TOP5:
                raise InputError(
                    f"metric 'top5': the model has {classes} classes, which are always among the "
                    f"{TOP5} highest; take top1"
                )
            _check_labels(self._inputs, classes)

    @cached_property
    def float_evaluation(self) -> Evaluation:
        """The float model measured on the evaluation inputs.

        Raises:
            InputError: If it cannot be run or measured, or gives no number for any input.
        """
        evaluation = self.evaluate_float_model(self._inputs)
        if evaluation.measurement.top1 is not None:
            _warn_near_chance(evaluation.measurement.top1, class_scores(evaluation.outputs))
        elif self._metric.of_classes:
            _warn_of_one_class(class_scores(evaluation.outputs))
        return evaluation

    def evaluate_float_model(self, inputs: InputSource) -> Evaluation:
        """The float model measured on other inputs than those that select.

        Raises:
            InputError: If it cannot be run or measured, or gives no number for any input.
        """
        try:
            return self._evaluate(self._float_model, inputs, "float model", None, reference=None)
        except InputError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise InputError(
                f"metric {self._metric.name!r}: fails for the float model: "
                f"{type(error).__name__}: {error}"
            ) from error

    def evaluate(self, model: bytes | Path, on_batch: OnBatch | None = None) -> Evaluation:
        """Measures a model, its bytes or a file, on the evaluation inputs.

        Args:
            model: The model.
            on_batch: As for `outputs`.
        """
        reference = self.float_evaluation.all_outputs
        return self._evaluate(model, self._inputs, "evaluation", on_batch, reference=reference)

    def _evaluate(
        self,
        model: bytes | Path,
        inputs: InputSource,
        stage: str,
        on_batch: OnBatch | None,
        *,
        reference: Mapping[str, NDArray[Any]] | None,
    ) -> Evaluation:
        start = time.perf_counter()
        session = self._session(model)
        outputs: Mapping[str, NDArray[Any]] = {}
        measurement = Measurement(0, None, None, None, None)
        if self._compares_outputs:
            if reference is None:
                no_numbers: list[NDArray[np.bool_]] = []
                outputs = self.outputs(
                    session, inputs, stage, on_feed=lambda feed: no_numbers.append(_is_nan(feed))
                )
                _check_numbers(inputs, np.concatenate(no_numbers), outputs)
            else:
                outputs = self.outputs(session, inputs, stage, on_batch)
            measurement = self.measure(outputs, reference or outputs, inputs)
        if self._metric.loop is not None:
            own = self._metric.run_loop(session)
            measurement = dataclasses.replace(measurement, own=own)
        return Evaluation(measurement, outputs, time.perf_counter() - start)

    def outputs(
        self,
        model: bytes | Path | onnxruntime.InferenceSession,
        inputs: InputSource,
        stage: str,
        on_batch: OnBatch | None = None,
        on_feed: OnFeed | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Runs a model of this task over inputs.

        Args:
            model: A model file, its bytes, or a session of it.
            inputs: What to run it on.
            stage: Name of this work for the progress callback.
            on_batch: Called with the outputs so far, batches by output name, and the number of
                inputs done; may raise to stop.
            on_feed: Called with each batch before it is run, see `iterate`.

        Returns:
            The model's outputs by name, batch axis first, in the order of the inputs.

        Raises:
            InputError: If the model cannot be run, or an output's shape changes with the input.
        """
        session = self._session(model) if isinstance(model, bytes | Path) else model
        inputs = inputs.bind(self._specs)
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self._output_names}
        done = 0
        for indices, values in iterate(
            session,
            inputs,
            batch_size=self.batch_size,
            outputs=self._output_names,
            on_feed=on_feed,
        ):
            for name, batch in parts.items():
                batch.append(values[name])
            done += len(indices)
            self._progress(stage, done, len(inputs))
            if on_batch is not None:
                on_batch(parts, done)
        return {name: _joined(name, batches) for name, batches in parts.items()}

    def runner(self, model: bytes) -> Callable[[NDArray[np.int64]], dict[str, NDArray[Any]]]:
        """Runs a model on the evaluation inputs of some indices, part by part."""
        session = self._session(model)
        done = 0

        def outputs(indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
            nonlocal done
            values = run(
                session,
                self._inputs,
                batch_size=self.batch_size,
                indices=indices,
                outputs=self._output_names,
            )
            done += len(indices)
            self._progress("evaluation", done, len(self._inputs))
            return values

        return outputs

    def measure(
        self,
        outputs: Mapping[str, NDArray[Any]],
        reference: Mapping[str, NDArray[Any]],
        inputs: InputSource,
    ) -> Measurement:
        """Measures a model's outputs for inputs beside the float model's.

        Args:
            outputs: The model's outputs by name, batch axis first.
            reference: The float model's.
            inputs: What they are the outputs for: the evaluation inputs, or a subset of them.
        """
        if self._metric.of_classes:
            _check_labels(inputs, class_scores(next(iter(outputs.values()))).shape[1])
        return self._metric.measure(
            outputs, reference, labels=inputs.labels, indices=inputs.positions
        )

    def measure_first(self, parts: Mapping[str, Sequence[NDArray[Any]]], n: int) -> Measurement:
        """Measures the outputs so far, as `on_batch` gets them, of the first n inputs."""
        return self.measure(
            {name: _joined(name, batches) for name, batches in parts.items()},
            {name: values[:n] for name, values in self.float_evaluation.all_outputs.items()},
            self._inputs.subset(np.arange(n)),
        )

    def latency(self, model: bytes, *, repeats: int = LATENCY_REPEATS) -> LatencyRatio:
        """Batch-1 latency of a model beside the float model's, run by run in turn.

        Args:
            model: The model's bytes.
            repeats: Measured runs of each model.
        """
        return latency_ratio(
            self._latency_session(model),
            self._float_latency_session,
            list(self._inputs.batches(1, np.arange(1))),
            repeats=repeats,
        )

    @cached_property
    def _float_session(self) -> onnxruntime.InferenceSession:
        return self._session(self._float_model)

    @cached_property
    def _float_latency_session(self) -> onnxruntime.InferenceSession:
        return self._latency_session(self._float_model)

    def _latency_session(self, model: bytes | Path) -> onnxruntime.InferenceSession:
        return make_session(
            model, threads=self._threads, providers=self._providers, spinning=False
        )

    def _session(self, model: bytes | Path) -> onnxruntime.InferenceSession:
        """A session for evaluation: one thread, as many batches side by side as there are cores.

        A loop of the user's runs one batch after the other, on the cores of the application.
        """
        if model == self._float_model and "_float_session" in self.__dict__:
            return self._float_session
        threads = 1 if self._metric.loop is None else self._threads
        return make_session(
            model,
            threads=threads,
            providers=self._providers,
            exact_products=self._exact_products,
        )


def _check_labels(inputs: InputSource, classes: int) -> None:
    """Refuses labels that no class has, by the number that the user knows the input by."""
    if inputs.labels is not None:
        check_label_range(inputs.labels, classes=classes, positions=inputs.positions)


def _joined(name: str, batches: Sequence[NDArray[Any]]) -> NDArray[Any]:
    shapes = {batch.shape[1:] for batch in batches}
    if len(shapes) > 1:
        raise InputError(
            f"the model's output {name!r} changes its shape with the input, "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}; measure it with a loop of your own "
            "(evaluate=)"
        )
    return np.concatenate(batches)


def _is_nan(values: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether a value of each row is not a number, booleans of shape (n,)."""
    rows = len(next(iter(values.values())))
    found = np.zeros(rows, np.bool_)
    for array in values.values():
        if array.dtype.kind == "f":
            found |= np.isnan(array).reshape(rows, -1).any(axis=1)
    return found


def _check_numbers(
    inputs: InputSource, no_numbers: NDArray[np.bool_], outputs: Mapping[str, NDArray[Any]]
) -> None:
    """Tells of inputs, and of what the float model makes of the others, that are no numbers.

    Args:
        inputs: What was run.
        no_numbers: Which of them have values that are not numbers, shape (n,): a Relu, say, makes
            numbers of them.
        outputs: The outputs by name, batch axis first.
    """
    if no_numbers.any():
        _logger.warning(
            f"{inputs}: values are not numbers (NaN) for {_count(no_numbers, inputs)}. They "
            "are measured like the others."
        )
    for name, values in outputs.items():
        is_nan = _is_nan({name: values})
        if is_nan.all():
            raise InputError(
                f"the float model's output {name!r} is not a number (NaN) for any evaluation "
                "input; look at the inputs and their preprocessing"
            )
        if (is_nan & ~no_numbers).any():
            _logger.warning(
                f"The float model's output {name!r} is not a number (NaN) for "
                f"{_count(is_nan, inputs)}."
            )


def _count(chosen: NDArray[np.bool_], inputs: InputSource) -> str:
    first = inputs.positions[int(np.argmax(chosen))]
    return f"{chosen.sum()} of {len(inputs)} evaluation inputs, first for number {first}"


def _warn_near_chance(top1: float, scores: NDArray[Any]) -> None:
    n, classes = scores.shape
    if near_chance(top1, n, classes):
        _logger.warning(
            f"The float model's top-1 accuracy is {top1:.1%} on {n} inputs, near chance "
            f"for {classes} classes. The preprocessing (mean, std, scale, channel order, "
            "crop) or the labels probably do not belong to this model."
        )


def _warn_of_one_class(scores: NDArray[Any]) -> None:
    predicted = np.unique(scores.argmax(axis=1))
    if len(predicted) == 1 and len(scores) > 1:
        _logger.warning(
            f"The float model predicts class {predicted[0]} for all {len(scores)} inputs, so that "
            "agreement with it tells little. The inputs or their preprocessing probably do not "
            "belong to this model; if they do, the metric sqnr_db tells more."
        )
