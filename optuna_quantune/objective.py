"""The Optuna objective: parameters -> configuration -> int8 model -> measured values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Final
from typing import get_args
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import optuna
import platformdirs
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial
from optuna.trial import Trial
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import class_scores
from optuna_quantune.evaluation.metrics import margins
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import near_chance
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.evaluation.runner import iterate
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.equalization import equalize
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.noise import expected_agreement
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.probe import PROBE_INPUTS
from optuna_quantune.quantization.quantizer import QuantizedModel
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.search.configurations import PRIOR_FEATURE
from optuna_quantune.selection import AGREES_KEY
from optuna_quantune.selection import CORRECT_KEY
from optuna_quantune.selection import pack
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target
from optuna_quantune.target import Target


Metric = Literal["top1", "top5", "agreement", "sqnr_db"]
# Stage ("float model", "calibration", "probe", "evaluation"), items done, items in all.
Progress = Callable[[str, int, int], None]

DEFAULT_CACHE: Final = platformdirs.user_cache_dir("optuna-quantune")
# Constraint of a trial under `max_accuracy_drop`: feasible when not positive.
DROP_CONSTRAINT: Final = "accuracy_drop"
# User attribute of a study: what its values were measured on.
TASK_KEY: Final = "task"
# The k of the top-k metrics.
_RANKS: Final[dict[str, int]] = {"top1": 1, "top5": 5}
# Intermediate values that a trial reports to its pruner.
_REPORTS: Final = 10
# Interleaved batch-1 runs of the float and the int8 model in each trial.
_LATENCY_REPEATS: Final = 20

_logger = logging.getLogger(__name__)


class TrialFailure(RuntimeError):
    """A configuration that could not be built or run; its trial fails, the study goes on."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        measurement: Accuracy against labels and against the float model.
        outputs: The model's first output for each evaluation input, shape (n, classes).
        seconds: Wall-clock time.
    """

    measurement: Measurement
    outputs: NDArray[np.float32]
    seconds: float


class QuantizationObjective:
    """An Optuna objective that quantizes a model as a trial says and measures it.

    Any sampler, pruner and storage works with it. The value is the accuracy on the evaluation
    inputs (or the agreement with the float model when there are no labels), to be maximized;
    what explains it stands in the trial's user attributes: ``config``, ``digest``, ``top1``,
    ``top5``, ``agreement``, ``sqnr_db``, ``latency_ratio``, ``size_bytes``, ``seconds`` and the
    predicted noise. A configuration that builds the very model of an earlier trial takes that
    trial's result instead of being measured again.

    Example:
        >>> objective = QuantizationObjective("model.onnx", calibration=calib, evaluation=val)
        >>> study = optuna.create_study(direction="maximize")
        >>> study.optimize(objective, n_trials=20)
        >>> objective.export(study.best_trial, "model.int8.onnx")

    Args:
        model: The float ONNX model.
        calibration: Inputs that activation ranges are taken from.
        evaluation: Inputs, with labels if there are any, that configurations are measured on.
        space: The search space; the ``quantune`` preset by default.
        metric: ``top1``, ``top5``, ``agreement`` (share of inputs with the float model's top-1
            class) or ``sqnr_db`` (output signal-to-noise ratio). By default ``top1`` with labels
            and ``agreement`` without.
        target: Name of a target, or the target itself.
        max_accuracy_drop: Largest loss of the metric against float (0.01 is one point); trials
            carry it as the constraint `DROP_CONSTRAINT`. None sets no constraint.
        cache: Folder where calibration statistics are kept for the next run; by default the
            user's cache folder. None keeps nothing.
        threads: Threads of one inference when latency is measured, as the application will have
            them; None is all cores.
        batch_size: Inputs that are run at a time; None chooses.
        progress: Called during long work with the stage, the items done and the items in all.

    Raises:
        InputError: If the model, the inputs or an argument cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        calibration: InputSource,
        evaluation: InputSource,
        space: SearchSpace | None = None,
        metric: Metric | None = None,
        target: str | Target = "cpu",
        max_accuracy_drop: float | None = None,
        cache: str | Path | None = DEFAULT_CACHE,
        threads: int | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model: FloatModel = load_float_model(model)
        self.space = SearchSpace.preset("quantune") if space is None else space
        self.target = get_target(target) if isinstance(target, str) else target
        self._specs = [InputSpec(i.name, i.shape, i.dtype) for i in self.model.inputs]
        self.calibration = calibration.bind(self._specs)
        self.evaluation = evaluation.bind(self._specs)
        self.metric: Metric = metric or ("agreement" if self.evaluation.labels is None else "top1")
        if self.metric not in get_args(Metric):
            raise InputError(f"metric {metric!r}: use one of {', '.join(get_args(Metric))}")
        if self.metric in ("top1", "top5") and self.evaluation.labels is None:
            raise InputError(
                f"metric {self.metric!r}: the evaluation inputs have no labels; "
                "give labels or use the metric 'agreement'"
            )
        if max_accuracy_drop is not None and (max_accuracy_drop < 0 or metric == "sqnr_db"):
            raise InputError(
                f"max_accuracy_drop: {max_accuracy_drop} must not be negative, "
                "and goes with an accuracy or agreement metric"
            )
        self.max_accuracy_drop = max_accuracy_drop
        self._cache = None if cache is None else Path(cache)
        self._threads = threads
        self._batch_size = batch_size
        self._progress = progress or (lambda stage, done, total: None)
        self._lock = threading.RLock()
        # By the value of the knob `equalization`, which changes the float model and with it
        # everything that is measured on it.
        self._quantizers: dict[bool, Quantizer] = {}
        self._noise_models: dict[bool, NoiseModel] = {}

    def prepare(self) -> None:
        """Does what all trials share, once: float outputs, calibration, the probe for noise.

        Trials do it on first use; calling it shows mistakes before a study is created.

        Raises:
            InputError: If the float model cannot be run on the inputs, or labels do not fit it.
        """
        with self._lock:
            _ = self.float_evaluation
            for equalized in self._choices("equalization", default=False):
                self._noise(equalized=equalized)

    @cached_property
    def float_evaluation(self) -> Evaluation:
        """The float model measured on the evaluation inputs."""
        evaluation = self._evaluate(self.model.path, "float model", reference=None)
        top1 = evaluation.measurement.top1
        if top1 is not None:
            n, classes = class_scores(evaluation.outputs).shape
            if near_chance(top1, n, classes):
                _logger.warning(
                    f"The float model's top-1 accuracy is {top1:.1%} on {n} inputs, near chance "
                    f"for {classes} classes. The preprocessing (mean, std, scale, channel order, "
                    "crop) or the labels probably do not belong to this model."
                )
        return evaluation

    @property
    def quantizer(self) -> Quantizer:
        """Builds configurations of the model without equalization; the first use calibrates."""
        return self._quantizer(equalized=False)

    def _quantizer(self, *, equalized: bool) -> Quantizer:
        with self._lock:
            if equalized not in self._quantizers:
                model = equalize(self.model, self.calibration) if equalized else self.model
                statistics = calibrate(
                    model,
                    self.calibration,
                    required_activations(place(model)),
                    sizes=self._calibration_sizes(),
                    cache=self._cache,
                    progress=lambda done, total: self._progress("calibration", done, total),
                )
                self._quantizers[equalized] = Quantizer(
                    model,
                    statistics,
                    activation_storage=self.target.activation_storage,
                    bias_correction=BiasCorrection(model, self.calibration),
                    equalized=equalized,
                )
            return self._quantizers[equalized]

    def _noise(self, *, equalized: bool) -> NoiseModel:
        with self._lock:
            if equalized not in self._noise_models:
                quantizer = self._quantizer(equalized=equalized)
                first = np.arange(min(PROBE_INPUTS, len(self.calibration)))
                gains = probe(
                    quantizer.model,
                    list(self.calibration.batches(1, first)),
                    quantizer.clipping_ranges(),
                    progress=lambda done, total: self._progress("probe", done, total),
                )
                self._noise_models[equalized] = NoiseModel(quantizer, gains)
            return self._noise_models[equalized]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model, the inputs, the metric and the target: what values depend on."""
        labels = self.evaluation.labels
        parts = [
            self.model.fingerprint,
            self.calibration.fingerprint(),
            self.evaluation.fingerprint(),
            "" if labels is None else hashlib.sha256(labels.tobytes()).hexdigest(),
            self.metric,
            dataclasses.asdict(self.target),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def features(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Predicted noise of a configuration: what `QuantuneSampler` learns from beside the knobs.

        The feature ``prior`` is the metric's expected value: predicted noise turned into expected
        agreement by the margins of the float model's outputs (times its accuracy for top-1 and
        top-5), or the predicted output SQNR itself.

        Args:
            params: Parameters of a trial of `space`.
        """
        config = self.space.config(params)
        with self._lock:
            prediction = self._noise(equalized=config.equalization).predict(config)
        features = prediction.features()
        if self.metric == "sqnr_db":
            return features | {PRIOR_FEATURE: features["predicted_sqnr_db"]}
        power = float(np.mean(np.square(self.float_evaluation.outputs, dtype=np.float64)))
        expected = expected_agreement(self._margins, prediction.total * power)
        ceiling = 1.0 if self.metric == "agreement" else self.value(self.float_evaluation)
        return features | {"expected_agreement": expected, PRIOR_FEATURE: expected * ceiling}

    def value(self, evaluation: Evaluation) -> float:
        """The metric's value of an evaluation."""
        value = getattr(evaluation.measurement, self.metric)
        assert value is not None
        return float(value)

    def quantize(self, config: QuantizationConfig) -> QuantizedModel:
        """Builds the int8 model of a configuration."""
        with self._lock:  # placements and ranges are shared between threads
            return self._quantizer(equalized=config.equalization).quantize(config)

    def evaluate(self, model: onnx.ModelProto | Path) -> Evaluation:
        """Measures a model, or a model file, on the evaluation inputs."""
        data = model if isinstance(model, Path) else model.SerializeToString()
        return self._evaluate(data, "evaluation", reference=self.float_evaluation.outputs)

    def __call__(self, trial: Trial) -> float:
        """Runs one trial.

        Raises:
            InputError: If the study holds values of another model, other inputs or another metric.
            TrialFailure: If the configuration cannot be built or run.
            optuna.TrialPruned: If the study's pruner stops the trial.
        """
        self.claim(trial.study)
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

    def _run_trial(self, trial: Trial, config: QuantizationConfig) -> float:
        start = time.perf_counter()
        quantized = self.quantize(config)
        seconds = {"build": time.perf_counter() - start}
        trial.set_user_attr("config", dataclasses.asdict(config))
        trial.set_user_attr("digest", quantized.digest)
        for name, feature in self.features(trial.params).items():
            trial.set_user_attr(name, feature)
        twin = _finished_twin(trial, quantized.digest)
        if twin is not None:
            for name, attribute in twin.user_attrs.items():
                trial.set_user_attr(name, attribute)
            trial.set_user_attr("config", dataclasses.asdict(config))
            trial.set_user_attr("duplicate_of", twin.number)
            assert twin.value is not None
            self._constrain(trial, twin.value)
            return twin.value
        data = quantized.proto.SerializeToString()
        evaluation = self._evaluate(
            data, "evaluation", reference=self.float_evaluation.outputs, trial=trial
        )
        seconds["evaluate"] = evaluation.seconds
        start = time.perf_counter()
        latency = self.latency(data)
        seconds["latency"] = time.perf_counter() - start
        for name, number in dataclasses.asdict(evaluation.measurement).items():
            trial.set_user_attr(name, number)
        reference = self.float_evaluation.outputs
        same = pack(agrees(evaluation.outputs, reference))
        trial.set_user_attr(AGREES_KEY, same)
        labels = self.evaluation.labels
        if self.metric == "agreement":
            trial.set_user_attr(CORRECT_KEY, same)
        elif labels is not None and self.metric in _RANKS:
            correct = top_k_correct(evaluation.outputs, labels, k=_RANKS[self.metric])
            trial.set_user_attr(CORRECT_KEY, pack(correct))
        trial.set_user_attr("latency_ratio", latency.ratio)
        trial.set_user_attr("latency_ms", latency.median_ms)
        trial.set_user_attr("size_bytes", len(data))
        trial.set_user_attr("seconds", seconds)
        value = self.value(evaluation)
        self._constrain(trial, value)
        return value

    def _constrain(self, trial: Trial, value: float) -> None:
        if self.max_accuracy_drop is not None:
            drop = self.value(self.float_evaluation) - value
            trial.set_constraint(DROP_CONSTRAINT, drop - self.max_accuracy_drop)

    def latency(self, model: bytes) -> LatencyRatio:
        """Batch-1 latency of a model beside the float model's, run by run in turn."""
        feeds = list(self.evaluation.batches(1, np.arange(1)))
        return latency_ratio(
            make_session(
                model, threads=self._threads, providers=self.target.providers, spinning=False
            ),
            self._float_latency_session,
            feeds,
            repeats=_LATENCY_REPEATS,
        )

    def export(self, trial: FrozenTrial, path: str | Path) -> Path:
        """Builds the model of a finished trial again and writes it.

        Args:
            trial: A trial of a study with this objective.
            path: The ``.onnx`` file to write; its folder must exist.

        Raises:
            InputError: If the trial has no configuration, or the file cannot be written.
        """
        if "config" not in trial.user_attrs:
            raise InputError(f"trial {trial.number}: has no configuration; was it measured here?")
        return write_model(self.quantize(self.space.config(trial.params)).proto, path)

    def claim(self, study: optuna.Study) -> None:
        """Marks a study as this objective's, so that values of different tasks never mix.

        Raises:
            InputError: If the study belongs to another model, other inputs, another metric or
                another target.
        """
        known = study.user_attrs.get(TASK_KEY)
        if known is None:
            study.set_user_attr(TASK_KEY, self.fingerprint)
            study.set_user_attr("metric", self.metric)
        elif known != self.fingerprint:
            raise InputError(
                f"study {study.study_name!r}: belongs to another model, other inputs, another "
                "metric or another target; give another study name"
            )

    def _calibration_sizes(self) -> list[int | str]:
        default = QuantizationConfig().calibration_images
        return [default, *self._choices("calibration_images", default=default)]

    def _choices(self, knob: str, *, default: Any) -> tuple[Any, ...]:
        """The values that a knob can have in the space."""
        distribution = self.space.get(knob)
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices
        return (default,)

    def outputs(
        self,
        model: bytes | Path,
        inputs: InputSource,
        stage: str,
        on_batch: Callable[[list[NDArray[np.float32]], int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Runs a model of this objective's task over inputs.

        Args:
            model: A model file or its bytes.
            inputs: What to run it on.
            stage: Name of this work for the progress callback.
            on_batch: Called with the outputs so far and the number of inputs done; may raise to
                stop.

        Returns:
            The model's first output, shape (n, ...).
        """
        session = make_session(model, providers=self.target.providers)
        name = self.model.outputs[0].name
        inputs = inputs.bind(self._specs)
        parts: list[NDArray[np.float32]] = []
        done = 0
        for indices, values in iterate(
            session, inputs, batch_size=self._batch_size, outputs=[name]
        ):
            parts.append(values[name])
            done += len(indices)
            self._progress(stage, done, len(inputs))
            if on_batch is not None:
                on_batch(parts, done)
        return np.concatenate(parts)

    def _evaluate(
        self,
        model: bytes | Path,
        stage: str,
        *,
        reference: NDArray[np.float32] | None,
        trial: Trial | None = None,
    ) -> Evaluation:
        start = time.perf_counter()
        total, reported = len(self.evaluation), 0

        def report(parts: list[NDArray[np.float32]], done: int) -> None:
            nonlocal reported
            if trial is not None and done * _REPORTS // total > reported:
                reported = done * _REPORTS // total
                trial.report(self._running_value(parts, reference, done), step=done)
                if done < total and trial.should_prune():
                    raise optuna.TrialPruned

        outputs = self.outputs(model, self.evaluation, stage, report)
        measurement = measure(
            outputs,
            reference=outputs if reference is None else reference,
            labels=self.evaluation.labels,
        )
        return Evaluation(measurement, outputs, time.perf_counter() - start)

    def _running_value(
        self, parts: list[NDArray[np.float32]], reference: NDArray[np.float32] | None, done: int
    ) -> float:
        labels = self.evaluation.labels
        assert reference is not None
        measurement = measure(
            np.concatenate(parts),
            reference=reference[:done],
            labels=None if labels is None else labels[:done],
        )
        return float(getattr(measurement, self.metric))

    @cached_property
    def _margins(self) -> NDArray[np.float64]:
        return margins(self.float_evaluation.outputs).astype(np.float64)

    @cached_property
    def _float_latency_session(self) -> onnxruntime.InferenceSession:
        return make_session(
            self.model.path,
            threads=self._threads,
            providers=self.target.providers,
            spinning=False,
        )


def check_writable(path: str | Path) -> None:
    """Finds out before any work whether a model can be written to `path`.

    Raises:
        InputError: If the folder is missing or cannot be written to, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output {path}: is a folder; name the .onnx file to write")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp"):
            pass
    except OSError as error:
        raise InputError(f"output {path}: cannot be written ({error.strerror})") from error


def write_model(model: onnx.ModelProto, path: str | Path) -> Path:
    """Writes a model beside its final name and renames it, so no half model is ever left.

    Raises:
        InputError: If the file cannot be written.
    """
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(model.SerializeToString())
        Path(file.name).chmod(0o666 & ~_umask())
        Path(file.name).replace(path)
    except OSError as error:
        raise InputError(f"output {path}: cannot be written ({error.strerror})") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finished_twin(trial: Trial, digest: str) -> FrozenTrial | None:
    """The first completed trial that built the same model, if there is one."""
    finished = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((t for t in finished if t.user_attrs.get("digest") == digest), None)
