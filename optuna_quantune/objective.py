"""The Optuna objective: parameters -> configuration -> int8 model -> measured values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
import time
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Final

import onnx
import optuna
import platformdirs
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import NopPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_quantune.builder import Builder
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.chosen_metric import MetricFunction
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.chosen_metric import SessionFunction
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import Inputs
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.evaluator import Evaluation
from optuna_quantune.evaluation.evaluator import Evaluator
from optuna_quantune.evaluation.evaluator import LATENCY_REPEATS
from optuna_quantune.evaluation.evaluator import OnBatch
from optuna_quantune.evaluation.evaluator import Progress
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import can_be_class_scores
from optuna_quantune.evaluation.metrics import class_scores
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.evaluation.racing import looks
from optuna_quantune.evaluation.racing import SMALLEST_RACE
from optuna_quantune.evaluation.runner import check_providers
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.goals import DROP_CONSTRAINT
from optuna_quantune.goals import Goals
from optuna_quantune.goals import Objective
from optuna_quantune.goals import Outcome
from optuna_quantune.goals import ROUNDING
from optuna_quantune.ladder import Climb
from optuna_quantune.ladder import Ladder
from optuna_quantune.ladder import RANKS
from optuna_quantune.output_file import check_cache
from optuna_quantune.output_file import check_writable
from optuna_quantune.output_file import write_model
from optuna_quantune.process import PROCESS_KEY
from optuna_quantune.process import this_process
from optuna_quantune.quantization.agreement import AgreementModel
from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.measurable_outputs import measurable_outputs
from optuna_quantune.quantization.measurable_outputs import outputs_of_inputs
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.quantizer import QuantizedModel
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.search.configurations import CONSTRAINT_PRIOR
from optuna_quantune.search.configurations import PRIOR_FEATURE
from optuna_quantune.search.pruner import BAR_KEY
from optuna_quantune.search.pruner import CORRECT_KEY
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.search.pruner import RUNGS_KEY
from optuna_quantune.search.pruner import SEEN_KEY
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import pack
from optuna_quantune.selection import VALUE_KEY
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target
from optuna_quantune.target import Target


DEFAULT_CACHE: Final = platformdirs.user_cache_dir("optuna-quantune")
# User attribute of a study: what its values were measured on.
TASK_KEY: Final = "task"
# Half the width of the 95 % interval at which a trial ends, as a share and in inputs, whichever is
# more. With it searches on the recorded tables found a winner within 0.1 points of the best, and
# with 0.005 not always (benchmarks/results/racing).
DEFAULT_PRECISION: Final = 0.002
DEFAULT_PRECISION_INPUTS: Final = 2
# User attribute of a trial: how many inputs were run for its value.
INPUTS_KEY: Final = "inputs_evaluated"
# Intermediate values that a trial reports to its pruner where it runs all inputs in their order.
_REPORTS: Final = 10


class TrialFailure(RuntimeError):
    """A configuration that could not be built or run.

    Its trial fails; the study goes on where `optimize` is given ``catch=(TrialFailure,)``, as by
    `tune`.
    """


class QuantizationObjective:
    """An Optuna objective that quantizes a model as a trial says and measures it.

    Any sampler, pruner and storage works with it; a sampler that is told of a search space, or of
    features, takes `objective.space` and `objective.features`. The value is the accuracy on the
    evaluation inputs (or the agreement with the float model when there are no labels), to be
    maximized; with several `objectives` there is one value for each, and a study is created with
    ``directions=objective.directions``. What explains it stands in the trial's user attributes:
    ``config``, ``digest``, ``top1``, ``top5``, ``agreement``, ``sqnr_db``, ``margin_sqnr_db``,
    ``metric_value``, ``latency_ratio`` with its interval, ``size_bytes``, ``seconds`` and the
    predicted noise.

    With ``top1``, ``top5`` and ``agreement`` a trial ends as soon as its value is known to
    `precision`, and is then an estimate: ``inputs_evaluated``, ``interval`` and ``certain`` say
    how good.

    A configuration that builds the very model of an earlier trial takes that trial's result
    instead of being measured again.

    Example:
        >>> objective = QuantizationObjective("model.onnx", calibration=calib, evaluation=val)
        >>> sampler = QuantuneSampler(objective.space, features=objective.features)
        >>> study = optuna.create_study(direction="maximize", sampler=sampler)
        >>> study.optimize(objective, n_trials=20, catch=(TrialFailure,))
        >>> objective.export(study.best_trial, "model.int8.onnx")

    Args:
        model: The float ONNX model.
        calibration: Inputs that activation ranges are taken from: an input source, an array or
            arrays by input name, or the path of a file of arrays.
        evaluation: Inputs, with labels if there are any, that configurations are measured on.
            None only with `evaluate`, which brings its own.
        space: The search space; the ``quantune`` preset by default.
        metric: ``top1``, ``top5``, ``agreement`` (share of inputs with the float model's top-1
            class) or ``sqnr_db`` (output signal-to-noise ratio); by default ``top1`` with labels,
            without them ``agreement`` of a classifier and ``sqnr_db`` of other models. Or a
            function ``metric(outputs, reference_outputs)`` that gives a number: it is called
            with the model's and the float model's outputs for the same inputs, arrays with the
            batch axis first; one array for a model with one output, a mapping from output name
            to array for a model with several. If it has a parameter ``labels`` it gets the
            labels (any numbers, not only class indices), and if it has a parameter ``indices``
            the inputs' places in `evaluation`, shape (n,), for truth that it keeps itself.
        evaluate: In place of `metric` a function ``evaluate(session)`` that runs an
            ``onnxruntime.InferenceSession`` on inputs of its own and gives a number.
        direction: Whether larger (``maximize``) or smaller values of the user's own function are
            better.
        objectives: What the values of a trial are, in this order: ``accuracy`` (the metric),
            ``latency`` (batch 1, as a ratio to the float model) and ``size`` (bytes), the last two
            to be minimized.
        target: Name of a target, or the target itself.
        providers: ONNX Runtime execution providers in order of preference, names or pairs of a
            name and a mapping of options; None takes the target's.
        max_accuracy_drop: Largest loss of the metric against float, in the metric's unit (0.01
            is one point of accuracy). Trials carry this bound and the next two as constraints;
            None sets none.
        max_latency: Largest latency as a ratio to the float model (0.5 is twice as fast).
        max_size: Largest size of the model file in bytes.
        precision: A trial ends when half the width of its value's 95 % interval is no larger
            (0.002 is 0.2 points of accuracy); what the interval rests on is said in
            `optuna_quantune.evaluation.racing`. None is 0.002, but never less than two of the
            evaluation inputs.
        exact: Run every trial to its end, unless the study's pruner stops it.
        cache: Folder where calibration statistics are kept for the next run; by default the
            user's cache folder. None keeps nothing.
        threads: Threads of one inference when latency is measured, as the application will have
            them; None is all cores.
        batch_size: Inputs that are run at a time; None chooses, and is 1 for a model that two
            inputs at once confuse. 1 holds for calibration, too.
        progress: Called during long work with the stage, the items done and the items in all.

    Raises:
        InputError: If the model, the inputs or an argument cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        calibration: Inputs,
        evaluation: Inputs | None = None,
        space: SearchSpace | None = None,
        metric: MetricName | MetricFunction | None = None,
        evaluate: SessionFunction | None = None,
        direction: Direction = "maximize",
        objectives: Sequence[Objective] = ("accuracy",),
        target: str | Target = "cpu",
        providers: Sequence[Provider] | None = None,
        max_accuracy_drop: float | None = None,
        max_latency: float | None = None,
        max_size: int | None = None,
        precision: float | None = None,
        exact: bool = False,
        cache: str | Path | None = DEFAULT_CACHE,
        threads: int | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model: FloatModel = load_float_model(model)
        self.target = get_target(target) if isinstance(target, str) else target
        self.space = self.target.restrict(
            SearchSpace.preset("quantune") if space is None else space
        )
        if isinstance(self.space.get("calibration_images"), IntDistribution):
            raise InputError(
                "knob 'calibration_images': give a list of choices, not a range, as the "
                "statistics of each are kept"
            )
        fixed = [spec for spec in self.model.inputs if spec.shape and (spec.shape[0] or 1) > 1]
        if fixed:
            raise InputError(
                f"model {model}: input {fixed[0].name!r} has a fixed batch of "
                f"{fixed[0].shape[0]}; export it with a free first axis, or one of 1"
            )
        if cache is not None and Path(cache) != Path(DEFAULT_CACHE):
            check_cache(Path(cache))
        if providers is not None:
            check_providers(providers)
            self.target = dataclasses.replace(self.target, providers=tuple(providers))
        if not any(o.dtype.kind == "f" for o in measurable_outputs(self.model)):
            raise InputError(
                f"model {model}: neither an output nor what an output is selected from is of real "
                "numbers, so that noise cannot be measured"
            )
        outputs = outputs_of_inputs(self.model)
        specs = [InputSpec(i.name, i.shape, i.dtype) for i in self.model.inputs]
        calibration = as_input_source(calibration)
        evaluation = None if evaluation is None else as_input_source(evaluation)
        self.calibration = calibration.bind(specs)
        if any(None in spec.shape[1:] for spec in self.calibration.specs):
            self.space = _without_bias_correction(self.space)
        if evaluation is None and evaluate is None:
            raise InputError("evaluation: give inputs, or a function of your own as evaluate")
        # A loop brings its own inputs; one input is needed all the same to measure latency.
        compares_outputs = evaluation is not None
        self.evaluation = (evaluation or calibration.subset([0])).bind(specs)
        self.chosen_metric = ChosenMetric.of(
            metric,
            evaluate,
            direction,
            labels=self.evaluation.labels is not None,
            classifies=can_be_class_scores(outputs[0].shape),
        )
        if not self.chosen_metric.is_own and not any(o.dtype.kind == "f" for o in outputs):
            raise InputError(
                f"metric {self.metric!r}: compares real numbers, and the outputs of {model} are "
                "none; give a metric of your own"
            )
        self.goals = Goals(tuple(objectives), max_accuracy_drop, max_latency, max_size)
        if self.goals.needs_latency:
            self.target.check_latency()
        if max_accuracy_drop is not None and self.metric == "sqnr_db":
            raise InputError(
                "max_accuracy_drop: the float model has no noise to compare with; give a metric "
                "that it has, too, or bound latency or size"
            )
        if precision is None:
            precision = max(DEFAULT_PRECISION, DEFAULT_PRECISION_INPUTS / len(self.evaluation))
        if not precision > 0:
            raise InputError(f"precision: {precision} is not positive; for all inputs say exact")
        self._precision = None if exact else precision
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self._evaluator = Evaluator(
            self.model.path,
            specs=specs,
            output_names=[spec.name for spec in outputs],
            inputs=self.evaluation,
            calibration=self.calibration,
            metric=self.chosen_metric,
            compares_outputs=compares_outputs,
            providers=self.target.providers,
            exact_products=self.target.is_elsewhere,
            threads=threads,
            batch_size=batch_size,
            progress=self.progress,
        )
        self._builder = Builder(
            self.model,
            self.calibration,
            space=self.space,
            target=self.target,
            takes_batches=lambda: self._evaluator.batch_size != 1,
            cache=None if cache is None else Path(cache),
            progress=self.progress,
        )
        self._threads = threads
        self._lock = threading.RLock()

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.chosen_metric.name

    @property
    def directions(self) -> list[Direction]:
        """What a study of this objective is created with: one direction for each objective."""
        better = self.chosen_metric.direction
        return [better if o == "accuracy" else "minimize" for o in self.goals.objectives]

    def prepare(self) -> None:
        """Does what all trials share, once: float outputs, calibration, the probe for noise.

        Trials do it on first use; calling it shows mistakes before a study is created. What can
        be tried on a single input is tried first: the model on a calibration and an evaluation
        input, the providers, the shape of the outputs and the range of the labels.

        Raises:
            InputError: If the float model cannot be run on the inputs, labels do not fit it, or
                the user's own metric fails on it.
        """
        with self._lock:
            self._evaluator.try_out()
            _ = self.float_evaluation
            self._builder.prepare()

    @property
    def float_evaluation(self) -> Evaluation:
        """The float model measured on the evaluation inputs; measures on first use.

        Raises:
            InputError: If it cannot be run or measured.
        """
        return self._evaluator.float_evaluation

    def evaluate_float_model(self, inputs: InputSource) -> Evaluation:
        """The float model measured on other inputs, such as those that take no part in a search.

        Raises:
            InputError: If it cannot be run or measured on them.
        """
        return self._evaluator.evaluate_float_model(inputs)

    @property
    def quantizer(self) -> Quantizer:
        """Builds configurations of the model without equalization; the first use calibrates."""
        return self._builder.quantizer(equalized=False)

    @property
    def float_order(self) -> Sequence[tuple[str, ...]]:
        """Names of what each step of the knob ``float_layers`` leaves in float, too.

        Of the model without equalization.
        """
        return self._builder.float_order(equalized=False)

    @property
    def placed_graph(self) -> PlacedGraph:
        """What `float_order` rests on: noise and time of nodes and tensors, one by one."""
        return self._builder.placed_graph(equalized=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model, the inputs, the metric, the objectives and the target."""
        labels = self.evaluation.labels
        parts = [
            self.model.fingerprint,
            self.calibration.fingerprint(),
            self.evaluation.fingerprint(),
            "" if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
            self.metric,
            self.directions,
            self.goals.objectives,
            dataclasses.asdict(self.target),
        ]
        if self.goals.bounds:  # a trial keeps by how much it breaks those that it was measured for
            parts.append(self.goals.bounds)
        if self.goals.needs_latency and self._threads is not None:
            parts.append({"threads": self._threads})
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def features(self, params: Mapping[str, Any]) -> dict[str, float]:
        """What is predicted of a configuration: `QuantuneSampler` learns from it beside the knobs.

        The predicted noise, and what follows from it:

        - ``expected_agreement``, where there are classes: predicted noise turned into expected
          agreement by the float model's outputs;
        - ``prior``, the expected value of the first objective, ``prior_2`` that of the second, and
          so on. Of top-1 and top-5 it is the expected agreement times the float model's accuracy,
          of metrics without classes the predicted output SQNR, in the order of which their values
          are expected;
        - ``prior:latency``, ``prior:size``, and ``prior:accuracy_drop`` if accuracy is no
          objective: the expected values of the constraints that there are. (Accuracy as an
          objective rises as its loss falls; that needs no second estimate.)

        Latency is estimated node by node, and only for the target ``cpu``.

        Args:
            params: Parameters of a trial of `space`.
        """
        config = self.space.config(params)
        prediction = self._builder.predict(config)
        features = prediction.features()
        if self.chosen_metric.of_classes:
            features["expected_agreement"] = self._expected_agreement(prediction)
        goals = self.goals
        wanted = {*goals.objectives}
        wanted |= {"latency"} if goals.needs_latency else set()
        wanted |= {"size"} if goals.max_size is not None else set()
        priors = {
            "accuracy": self._expected(prediction),
            "latency": self._builder.predict_latency(config) if "latency" in wanted else math.nan,
            "size": self._builder.predict_size(config) if "size" in wanted else math.nan,
        }
        for number, objective in enumerate(goals.objectives, start=1):
            if not math.isnan(priors[objective]):
                name = PRIOR_FEATURE if number == 1 else f"{PRIOR_FEATURE}_{number}"
                features[name] = priors[objective]
        # What is not classified has its prior in another unit than its value.
        value = priors["accuracy"] if self.chosen_metric.of_classes else math.nan
        outcome = self.outcome(value, priors["latency"], priors["size"])
        for name, violation in goals.constraints(outcome).items():
            redundant = name == DROP_CONSTRAINT and "accuracy" in goals.objectives
            if not redundant and not math.isnan(violation):
                features[CONSTRAINT_PRIOR + name] = violation
        return features

    def expected_latency(self, params: Mapping[str, Any]) -> float:
        """About how long a configuration takes over the float model, before it is built.

        Estimated node by node; NaN for other targets than ``cpu``.

        Args:
            params: Parameters of a trial of `space`, or any knobs.
        """
        return self._builder.predict_latency(self.space.config(params))

    def _expected(self, prediction: NoisePrediction) -> float:
        """What is expected of the metric's value; without classes something that rises with it."""
        if not self.chosen_metric.of_classes:
            return self.chosen_metric.sign * prediction.features()["predicted_sqnr_db"]
        ceiling = 1.0 if self.metric == "agreement" else self.value(self.float_evaluation)
        return ceiling * self._expected_agreement(prediction)

    def _expected_agreement(self, prediction: NoisePrediction) -> float:
        return self._agreement.expected(prediction.confusion, prediction.highest_output)

    def value(self, evaluation: Evaluation) -> float:
        """The metric's value of an evaluation."""
        return self.chosen_metric.value(evaluation.measurement)

    def quantize(self, config: QuantizationConfig) -> QuantizedModel:
        """Builds the int8 model of a configuration.

        Raises:
            InputError: If the target cannot run it.
        """
        return self._builder.quantize(config)

    def check(self, config: QuantizationConfig) -> None:
        """Refuses numbers beyond what this model and these inputs have: in a search they mean all.

        Raises:
            InputError: If the configuration has more float layers than there are steps, or more
                calibration images than there are inputs.
        """
        images, inputs = config.calibration_images, len(self.calibration)
        if images != ALL_IMAGES and images > inputs:
            raise InputError(
                f"knob 'calibration_images': {images} is more than the {inputs} calibration "
                f"inputs; use 1 to {inputs}, or 'all'"
            )
        if not config.float_layers:
            return
        steps = len(self._builder.float_order(equalized=config.equalization))
        if config.float_layers > steps:
            raise InputError(
                f"knob 'float_layers': {config.float_layers} is more than there are worthwhile "
                f"steps in this model; use 0 to {steps}"
            )

    def evaluate(self, model: onnx.ModelProto | bytes | Path) -> Evaluation:
        """Measures a model, its bytes or a model file on the evaluation inputs."""
        data = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
        return self._evaluator.evaluate(data)

    def __call__(self, trial: Trial) -> float | tuple[float, ...]:
        """Runs one trial.

        Returns:
            The value, or the values where there are several objectives.

        Raises:
            InputError: If the study holds values of another model, other inputs or another metric.
            TrialFailure: If the configuration cannot be built or run.
            optuna.TrialPruned: If the study's pruner stops the trial.
        """
        self.claim(trial.study)
        trial.set_user_attr(PROCESS_KEY, this_process())
        self.prepare()
        config = self.space.suggest(trial)
        try:
            return self._run_trial(trial, config)
        except (optuna.TrialPruned, InputError):
            raise
        except Exception as error:
            # One configuration that ONNX Runtime cannot build or run must not end the study.
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            raise TrialFailure(f"trial {trial.number}: {error}") from error

    def _run_trial(self, trial: Trial, config: QuantizationConfig) -> float | tuple[float, ...]:
        start = time.perf_counter()
        try:
            quantized = self.quantize(config)
        except InputError as error:
            # All that trials share was tried out before: it is about this configuration alone.
            raise RuntimeError(str(error)) from error
        seconds = {"build": time.perf_counter() - start}
        trial.set_user_attr("config", dataclasses.asdict(config))
        trial.set_user_attr("digest", quantized.digest)
        for name, feature in self.features(trial.params).items():
            trial.set_user_attr(name, feature)
        twin = _finished_twin(trial, quantized.digest)
        if twin is not None:
            for name, attribute in twin.user_attrs.items():
                if name != PROCESS_KEY:
                    trial.set_user_attr(name, attribute)
            trial.set_user_attr("config", dataclasses.asdict(config))
            trial.set_user_attr("duplicate_of", twin.number)
            if twin.state == TrialState.PRUNED:
                for step, estimate in twin.intermediate_values.items():
                    trial.report(estimate, step)
                raise optuna.TrialPruned
            return self._finish(trial, twin.user_attrs[VALUE_KEY])
        data = quantized.proto.SerializeToString()
        try:
            start = time.perf_counter()
            measurement = self._measure_trial(trial, data)
            seconds["evaluate"] = time.perf_counter() - start
            start = time.perf_counter()
            latency = self.latency(data)
            seconds["latency"] = time.perf_counter() - start
        except InputError as error:
            # The float model has been run on the same inputs: it is about this model alone.
            raise RuntimeError(str(error)) from error
        for name, number in dataclasses.asdict(measurement).items():
            trial.set_user_attr(name, number)
        trial.set_user_attr("latency_ratio", latency.ratio)
        trial.set_user_attr("latency_low", latency.low)
        trial.set_user_attr("latency_high", latency.high)
        trial.set_user_attr("latency_ms", latency.median_ms)
        trial.set_user_attr("size_bytes", len(data))
        trial.set_user_attr("seconds", seconds)
        return self._finish(trial, self.chosen_metric.value(measurement))

    def _measure_trial(self, trial: Trial, model: bytes) -> Measurement:
        if self._ladder is not None:
            return self._climb(trial, model, self._ladder)
        evaluation = self._evaluator.evaluate(model, self._reporter(trial))
        labels = self.evaluation.labels
        if evaluation.measurement.agreement is not None:
            same = pack(agrees(evaluation.outputs, self.float_evaluation.outputs))
            trial.set_user_attr(AGREES_KEY, same)
        if self.metric == "agreement":
            trial.set_user_attr(CORRECT_KEY, same)
        elif labels is not None and self.metric in RANKS:
            correct = top_k_correct(evaluation.outputs, labels, k=RANKS[self.metric])
            trial.set_user_attr(CORRECT_KEY, pack(correct))
        return evaluation.measurement

    def _climb(self, trial: Trial, model: bytes, ladder: Ladder) -> Measurement:
        """Runs a trial's model up the ladder until it is certain enough, or pruned."""
        reports = self.goals.is_single
        prior = self._expected(self._builder.predict(self.space.config(trial.params)))
        rungs = [[0, prior, 0.0, 1.0]]  # a prediction promises nothing
        if reports:
            trial.report(prior, step=0)
        if self.goals.max_accuracy_drop is not None:
            bar = self.value(self.float_evaluation) - self.goals.max_accuracy_drop - ROUNDING
            trial.set_user_attr(BAR_KEY, bar)
        climb = Climb(ladder)
        for interval in climb.run(self._evaluator.runner(model)):
            done = int(climb.seen.sum())
            certain = climb.is_certain(interval, self._precision)
            rungs.append([done, interval.estimate, interval.low, interval.high])
            if self.goals.objectives[0] == "accuracy":
                trial.set_user_attr(RUNGS_KEY, rungs)
            # What a pruner reads; the rest is noted once, as writing to a database takes long.
            trial.set_user_attr(SEEN_KEY, pack(climb.seen))
            trial.set_user_attr(CORRECT_KEY, pack(climb.right[self.metric]))
            is_pruned = False
            if reports:
                trial.report(interval.estimate, step=done)
                is_pruned = not certain and trial.should_prune()
            if certain or is_pruned:
                break
        for name, attribute in (
            (AGREES_KEY, pack(climb.right["agreement"])),
            (INPUTS_KEY, done),
            ("interval", [interval.low, interval.high]),
            ("certain", certain),
        ):
            trial.set_user_attr(name, attribute)
        if is_pruned:
            raise optuna.TrialPruned
        if climb.seen.all():
            return self._evaluator.measure(climb.outputs(), ladder.reference, self.evaluation)
        return climb.measurement()

    def estimate(self, params: Mapping[str, Any], *, inputs: int | None = None) -> Interval:
        """The metric's value of a configuration on all inputs, from any rung of the ladder.

        Args:
            params: Parameters of a trial of `space`.
            inputs: How many inputs may be run. 0 is the predicted noise alone, 16 the least that
                anything can be said from, and None as many as `precision` needs.

        Returns:
            The estimate with its 95 % interval, from as many inputs as a rung below `inputs` has;
            the interval of a prediction is 0 to 1.

        Raises:
            InputError: If the metric has no rungs, or fewer inputs are given than the first needs.
        """
        if self._ladder is None:
            raise InputError(
                f"metric {self.metric!r}: has no rungs; they need top1, top5 or agreement and at "
                f"least {SMALLEST_RACE} evaluation inputs"
            )
        if inputs == 0:
            return Interval(
                self._expected(self._builder.predict(self.space.config(params))), 0.0, 1.0
            )
        first, *others = looks(len(self.evaluation))
        if inputs is not None and inputs < first:
            raise InputError(f"inputs: {inputs} is less than the {first} of the first rung")
        climb = Climb(self._ladder)
        model = self.quantize(self.space.config(params)).proto.SerializeToString()
        for interval, following in zip(
            climb.run(self._evaluator.runner(model)), [*others, math.inf], strict=True
        ):
            enough = climb.is_certain(interval, self._precision) if inputs is None else False
            if enough or (inputs is not None and following > inputs):
                break
        return interval

    def _finish(self, trial: Trial, value: float) -> float | tuple[float, ...]:
        """Notes the metric's value and the constraints, and gives the values of the trial.

        Latency and size stand in the trial's user attributes already.
        """
        trial.set_user_attr(VALUE_KEY, value)
        attributes = trial.user_attrs
        outcome = self.outcome(value, attributes["latency_ratio"], attributes["size_bytes"])
        for name, violation in self.goals.constraints(outcome).items():
            trial.set_constraint(name, violation)
        values = self.goals.values(outcome)
        return values if len(values) > 1 else values[0]

    def outcome(self, value: float, latency_ratio: float, size_bytes: float) -> Outcome:
        """What counts of a model, beside the float model.

        Args:
            value: The metric's value.
            latency_ratio: Its latency over the float model's.
            size_bytes: Its size.
        """
        drop = self.chosen_metric.sign * (self.value(self.float_evaluation) - value)
        return Outcome(value, drop, latency_ratio, size_bytes)

    def latency(self, model: bytes, *, repeats: int = LATENCY_REPEATS) -> LatencyRatio:
        """Batch-1 latency of a model beside the float model's, run by run in turn.

        Args:
            model: The model's bytes.
            repeats: Measured runs of each model.
        """
        return self._evaluator.latency(model, repeats=repeats)

    def export(self, trial: FrozenTrial, path: str | Path) -> Path:
        """Builds the model of a finished trial again and writes it.

        Args:
            trial: A trial of a study with this objective.
            path: The ``.onnx`` file to write; its folder must exist.

        Raises:
            InputError: If the trial has no configuration, or the file cannot be written or is the
                float model.
        """
        if "config" not in trial.user_attrs:
            raise InputError(f"trial {trial.number}: has no configuration; was it measured here?")
        check_writable(path, self.model.path)
        return write_model(self.quantize(self.space.config(trial.params)).proto, path)

    def claim(self, study: optuna.Study) -> None:
        """Marks a study as this objective's, so that values of different tasks never mix.

        Raises:
            InputError: If the study belongs to another model, other inputs, another metric,
                other bounds or another target, or has other directions.
        """
        wanted = [StudyDirection[direction.upper()] for direction in self.directions]
        if study.directions != wanted:
            raise InputError(
                f"study {study.study_name!r}: has the directions "
                f"{[d.name.lower() for d in study.directions]}; create it with "
                f"directions={self.directions}"
            )
        known = study.user_attrs.get(TASK_KEY)
        if known is None or not study.get_trials(deepcopy=False):  # it stopped before any trial
            study.set_user_attr(TASK_KEY, self.fingerprint)
            study.set_user_attr("metric", self.metric)
            names = [self.metric if o == "accuracy" else o for o in self.goals.objectives]
            with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                study.set_metric_names(names)  # for tables, plots and optuna-dashboard
        else:
            self.check_owner(study)

    def check_owner(self, study: optuna.Study) -> None:
        """Refuses a study that is not this objective's already.

        Raises:
            InputError: If the study belongs to another model, other inputs, another metric, other
                bounds or another target.
        """
        if study.user_attrs.get(TASK_KEY) != self.fingerprint:
            raise InputError(
                f"study {study.study_name!r}: belongs to another model, other inputs, other "
                "objectives or bounds, another metric, another target or, where latency counts, "
                "another number of threads; give another study name"
            )

    def outputs(
        self, model: bytes | Path, inputs: InputSource, stage: str
    ) -> dict[str, NDArray[Any]]:
        """Runs a model of this objective's task over inputs.

        Args:
            model: A model file, or its bytes.
            inputs: What to run it on.
            stage: Name of this work for the progress callback.

        Returns:
            The model's outputs by name, batch axis first, in the order of the inputs.

        Raises:
            InputError: If the model cannot be run, or an output's shape changes with the input.
        """
        return self._evaluator.outputs(model, inputs, stage)

    @cached_property
    def _ladder(self) -> Ladder | None:
        """What trials climb; None where each runs all inputs in their order."""
        if not self.chosen_metric.of_classes or len(self.evaluation) < SMALLEST_RACE:
            return None
        classes = class_scores(self.float_evaluation.outputs).shape[1]
        if classes <= RANKS.get(self.metric, 1):  # every label is among the highest
            return None
        return Ladder(self.metric, self.float_evaluation.all_outputs, self.evaluation.labels)

    def _reporter(self, trial: Trial) -> OnBatch | None:
        """Reports intermediate values of a trial; Optuna has none for several objectives.

        A function of the user's may be slow, or mean nothing on a part of the inputs, and noise
        needs all outputs so far: without a pruner that uses such values they are not made.
        """
        if not self.goals.is_single or self.chosen_metric.loop is not None:
            return None
        # Racing needs rungs with intervals, which only a ladder has.
        is_unused = isinstance(trial.study.pruner, NopPruner | RacingPruner)
        if is_unused and not self.chosen_metric.of_classes:
            return None
        total, reported = len(self.evaluation), 0

        def report(parts: Mapping[str, Sequence[NDArray[Any]]], done: int) -> None:
            nonlocal reported
            if done * _REPORTS // total > reported:
                reported = done * _REPORTS // total
                measurement = self._evaluator.measure_first(parts, done)
                trial.report(self.chosen_metric.value(measurement), step=done)
                if done < total and trial.should_prune():
                    raise optuna.TrialPruned

        return report

    @cached_property
    def _agreement(self) -> AgreementModel:
        return AgreementModel(class_scores(self.float_evaluation.outputs))


def _without_bias_correction(space: SearchSpace) -> SearchSpace:
    """What calibration inputs of several shapes allow, which have no mean."""
    knob = "bias_correction"
    if knob not in space:
        return space
    given = space[knob]
    if not isinstance(given, CategoricalDistribution) or False not in given.choices:
        raise InputError(f"knob {knob!r}: needs calibration inputs of one shape; leave it out")
    return SearchSpace({**space, knob: CategoricalDistribution([False])})


def _finished_twin(trial: Trial, digest: str) -> FrozenTrial | None:
    """The first completed trial that built the same model, or else the first pruned one."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    finished = trial.study.get_trials(deepcopy=False, states=states)
    twins = [other for other in finished if other.user_attrs.get("digest") == digest]
    return min(twins, key=lambda other: (other.state, other.number), default=None)
