"""`tune`: a study, an objective and a sampler put together, and the best model written."""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Final
from typing import get_args

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from optuna_quantune import records
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.chosen_metric import MetricFunction
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.chosen_metric import SessionFunction
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.evaluator import Progress
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import jackknife_interval
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.goals import Objective
from optuna_quantune.goals import Outcome
from optuna_quantune.importing import import_function
from optuna_quantune.model_file import check_writable
from optuna_quantune.model_file import write_model
from optuna_quantune.objective import DEFAULT_CACHE
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.quantizer import QuantizedModel
from optuna_quantune.search.pruner import DEFAULT_INDIFFERENCE
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.selection import metric_value
from optuna_quantune.selection import Preference
from optuna_quantune.selection import rank
from optuna_quantune.selection import SAME_LATENCY
from optuna_quantune.selection import select
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import Target


# Fewer evaluation inputs than this are not split: either half would say too little.
SMALLEST_SPLIT: Final = 400
# Interleaved batch-1 runs of the float and the chosen model: three times those of a trial.
_FINAL_LATENCY_REPEATS: Final = 60
# Trials whose latency is measured again under a bound on it, until one keeps it.
_MOST_CHOSEN: Final = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The chosen model beside the float model on the same inputs.

    Attributes:
        inputs: Number of inputs; 0 where a loop of the user's brings its own.
        float_model: The float model's measurement.
        quantized: The quantized model's measurement.
        difference: Quantized minus float metric with its paired 95 % interval; None for the
            noise ratio and for a loop of the user's, of which nothing is known but its value.
    """

    inputs: int
    float_model: Measurement
    quantized: Measurement
    difference: Interval | None


@dataclass(frozen=True)
class TuningResult:
    """What `tune` found.

    Attributes:
        study: The study, with every trial.
        trial: The chosen trial.
        config: Its configuration.
        target: What it was built for.
        float_model: The float model that it was built from.
        path: The model that was written, or None if no output was asked for.
        missed: One sentence for each bound that the chosen model does not keep, in its trial or
            when it was measured again.
        pareto: With several objectives the trials that no other trial beats in all of them.
        metric: What was measured.
        all_inputs: Float and quantized model on all evaluation inputs.
        held_out: The same on the inputs that took no part in the selection; None if there were too
            few to split.
        latency: Batch-1 latency beside the float model, measured once more.
        float_bytes: Size of the float model's file.
        quantized_bytes: Size of the quantized model's file.
        seconds: Wall-clock time of the whole run.
        interrupted: Whether Ctrl-C ended the search.
    """

    study: optuna.Study
    trial: FrozenTrial
    config: QuantizationConfig
    target: Target
    float_model: FloatModel
    path: Path | None
    missed: tuple[str, ...]
    pareto: tuple[FrozenTrial, ...]
    metric: ChosenMetric
    all_inputs: Comparison
    held_out: Comparison | None
    latency: LatencyRatio
    float_bytes: int
    quantized_bytes: int
    seconds: float
    interrupted: bool

    @property
    def goal_met(self) -> bool:
        """Whether the chosen model keeps all bounds that were asked for."""
        return not self.missed


def tune(
    model: str | Path,
    *,
    calibration: InputSource,
    evaluation: InputSource | None = None,
    space: SearchSpace | str = "quantune",
    metric: MetricName | MetricFunction | None = None,
    evaluate: SessionFunction | None = None,
    direction: Direction = "maximize",
    objectives: Sequence[Objective] = ("accuracy",),
    target: str | Target = "cpu",
    providers: Sequence[Provider] | None = None,
    sampler: BaseSampler | str = "quantune",
    pruner: BasePruner | None = None,
    n_trials: int | None = 20,
    timeout: float | None = None,
    max_accuracy_drop: float | None = None,
    max_latency: float | None = None,
    max_size: int | None = None,
    prefer: Preference | None = None,
    precision: float | None = None,
    exact: bool = False,
    storage: BaseStorage | str | None = None,
    study_name: str | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    cache: str | Path | None = DEFAULT_CACHE,
    threads: int | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]] = (),
) -> TuningResult:
    """Searches the best int8 configuration of a float ONNX model and writes the model.

    With a storage, a study of the same name goes on where it stopped: `n_trials` counts the
    trials that are finished already. Ctrl-C ends the search; the best model so far is written.

    Of the trials that cannot be told from the best one, the fastest is chosen; under a bound on
    latency or size the best one itself (`optuna_quantune.selection.select`). A latency that just
    keeps its bound is measured again, and the next trial taken if it does not. With several
    objectives the result has the Pareto front, and the model that is written is chosen from it in
    the same way. A bound that no trial keeps is no error: the best model so far is written, and
    `TuningResult.missed` says what it lacks.

    Half of the evaluation inputs are kept out of the search when there are at least
    `SMALLEST_SPLIT`, so that the result can be reported on inputs that chose nothing; when there
    are fewer, a warning is logged.

    Args:
        model: The float ONNX model.
        calibration: Inputs that activation ranges are taken from.
        evaluation: Inputs, with labels if there are any, that accuracy is measured on; may be
            left out with `evaluate`.
        space: A search space, or the name of a preset.
        metric: ``top1``, ``top5``, ``agreement`` or ``sqnr_db``, or a function of the outputs;
            see `QuantizationObjective` for this and the next three.
        evaluate: A function of a session, in place of `metric`.
        direction: Which values of a function of the user's are better.
        objectives: What is optimised: ``accuracy`` (the metric), ``latency``, ``size``.
        target: The device, by name or as it is.
        providers: ONNX Runtime execution providers; None takes the target's.
        sampler: ``quantune``, the name of an Optuna sampler class, ``module:factory`` with the
            signature ``factory(search_space, *, seed)``, or a sampler.
        pruner: An Optuna pruner; `RacingPruner` by default. `optuna.pruners.NopPruner` stops none.
        n_trials: Number of trials, those already in the study included; None, with a `timeout`,
            sets no number.
        timeout: Seconds from the call on after which no further trial is begun. The first one is
            in any case.
        max_accuracy_drop: Bound on the loss of the metric against float (0.01 is one point): the
            fastest configuration within it is chosen. Without it the most accurate one is.
        max_latency: Bound on the latency as a ratio to float (0.5 is twice as fast).
        max_size: Bound on the model file's size in bytes.
        prefer: What decides among configurations that cannot be told from the best one:
            ``latency``, ``size``, or ``accuracy``, which is the least noise, as it says more than
            their values. By default ``accuracy`` under a bound on latency or size without one on
            accuracy; otherwise ``size`` if it is an objective or has a bound and latency does not,
            and ``latency``.
        precision: A trial ends when half the width of its value's 95 % interval is no larger
            (0.002 is 0.2 points of accuracy). None is 0.002, but never less than two of the
            inputs that select. The result is measured on all inputs.
        exact: Run every trial to its end, unless the pruner stops it.
        storage: An Optuna storage, a database URL, or the path of a journal file.
        study_name: Name of the study in the storage; None makes one of the model's name and what
            is searched, so that the same call goes on with its own study.
        seed: Seed of the sampler and of the split.
        output: The ``.onnx`` file to write.
        cache: Folder of the calibration statistics; None keeps nothing.
        threads: Threads of ONNX Runtime.
        progress: Called with stage, items done and items in all.
        callbacks: Called after every trial, as by `optuna.Study.optimize`.

    Raises:
        InputError: If an argument cannot be used, or no trial succeeded.
    """
    start = time.perf_counter()
    _check_budget(n_trials, timeout)
    if prefer not in (None, *get_args(Preference)):
        raise InputError(f"prefer {prefer!r}: use 'latency', 'size' or 'accuracy'")
    if output is not None:
        check_writable(output, model)
    search_space = SearchSpace.load(space) if isinstance(space, str) else space
    # A loop of the user's brings its own inputs; only the user can split them.
    selecting, held_out = (
        (evaluation, np.arange(0)) if evaluation is None or evaluate else _split(evaluation, seed)
    )
    objective = QuantizationObjective(
        model,
        calibration=calibration,
        evaluation=selecting,
        space=search_space,
        metric=metric,
        evaluate=evaluate,
        direction=direction,
        objectives=objectives,
        target=target,
        providers=providers,
        max_accuracy_drop=max_accuracy_drop,
        max_latency=max_latency,
        max_size=max_size,
        precision=precision,
        exact=exact,
        cache=cache,
        threads=threads,
        progress=progress,
    )
    inputs = len(objective.evaluation)
    study = _open_study(
        storage,
        study_name or (None if storage is None else _study_name(objective)),
        make_sampler(sampler, objective, seed=seed) if isinstance(sampler, str) else sampler,
        # What is better by less than half an input is not better on these inputs.
        pruner or RacingPruner(indifference=max(DEFAULT_INDIFFERENCE, 0.5 / inputs)),
        objective.directions,
    )
    objective.claim(study)
    objective.prepare()
    if evaluation is not None and evaluate is None and not held_out.size:
        _logger.warning(
            f"{len(evaluation)} evaluation inputs are too few to hold half of them out of the "
            f"search (fewer than {SMALLEST_SPLIT}): the result is reported on those that chose "
            "it, which is too good on average."
        )
    left = None if timeout is None else timeout - (time.perf_counter() - start)
    interrupted = _optimize(study, objective, n_trials, left, callbacks)
    trial, kept, quantized, latency = _chosen(study, objective, prefer)
    data = quantized.proto.SerializeToString()
    path = None if output is None else write_model(quantized.proto, output)
    all_inputs, unseen = _measure_again(objective, path or data, evaluation, held_out)
    return TuningResult(
        study=study,
        trial=trial,
        config=quantized.config,
        target=objective.target,
        float_model=objective.model,
        path=path,
        missed=_missed(objective, trial, kept, latency, unseen or all_inputs),
        pareto=tuple(study.best_trials) if len(study.directions) > 1 else (),
        metric=objective.chosen_metric,
        all_inputs=all_inputs,
        held_out=unseen,
        latency=latency,
        float_bytes=objective.model.path.stat().st_size,
        quantized_bytes=len(data),
        seconds=time.perf_counter() - start,
        interrupted=interrupted,
    )


def make_sampler(name: str, objective: QuantizationObjective, *, seed: int) -> BaseSampler:
    """A sampler for an objective's search space.

    Args:
        name: ``quantune``, the name of a class in `optuna.samplers`, or ``module:factory`` with
            the signature ``factory(search_space, *, seed)``. A module is looked for in the
            current folder, too.
        objective: What the sampler will be used with.
        seed: Seed of the sampler.

    Raises:
        InputError: If there is no such sampler, or it cannot be made.
    """
    space = objective.space
    if name == "quantune":
        is_accuracy = objective.goals.objectives[0] == "accuracy"
        return QuantuneSampler(
            space,
            features=objective.features,
            source_studies=records.source_studies(objective.metric) if is_accuracy else (),
            seed=seed,
        )
    if ":" in name:
        return _sampler_of_factory(name, space, seed)
    known = [
        item
        for item in optuna.samplers.__all__
        if item.endswith("Sampler") and not item.startswith(("Base", "PartialFixed"))
    ]
    if name not in known:
        raise InputError(
            f"sampler {name!r}: unknown; use 'quantune', 'module:factory' or one of "
            f"{', '.join(known)}"
        )
    constructor = getattr(optuna.samplers, name)
    accepted = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {"seed": seed} if "seed" in accepted else {}
    if name == "GridSampler":
        arguments["search_space"] = _choices(space)
    sampler = constructor(**arguments)
    assert isinstance(sampler, BaseSampler)
    return sampler


def _study_name(objective: QuantizationObjective) -> str:
    """The name of a study that was given none: the same search finds it again, no other does."""
    search = f"{objective.fingerprint} {objective.goals} {dict(objective.space)}"
    return f"{objective.model.path.stem}-{hashlib.sha256(search.encode()).hexdigest()[:8]}"


def _check_budget(n_trials: int | None, timeout: float | None) -> None:
    if n_trials is None and timeout is None:
        raise InputError("n_trials and timeout: give at least one of them")
    if n_trials is not None and n_trials < 1:
        raise InputError(f"n_trials: {n_trials} is not positive")
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout: {timeout} seconds is not positive")


def _split(evaluation: InputSource, seed: int) -> tuple[InputSource, NDArray[np.int64]]:
    """The inputs that select, and the indices of those that only report, in order."""
    n = len(evaluation)
    if n < SMALLEST_SPLIT:
        return evaluation, np.arange(0)
    order = np.random.default_rng(seed).permutation(n)
    return evaluation.subset(np.sort(order[: n - n // 2])), np.sort(order[n - n // 2 :])


def _chosen(
    study: optuna.Study, objective: QuantizationObjective, prefer: Preference | None
) -> tuple[FrozenTrial, bool, QuantizedModel, LatencyRatio]:
    """The trial to deploy, whether it keeps all bounds, its model, and its latency measured again.

    A trial's own latency is a quick measurement, and one that just keeps the bound may have been
    lucky. If it does not keep it again the next one is taken. If none does, it is the most
    accurate of those that are about as fast as the fastest.
    """
    bound, metric = objective.goals.max_latency, objective.chosen_metric
    measured: list[tuple[FrozenTrial, bool, QuantizedModel, LatencyRatio]] = []
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    while len(measured) < min(_MOST_CHOSEN, max(complete, 1)):
        trial, kept = select(
            study,
            prefer=prefer or _preference(objective),
            direction=metric.direction,
            without=[trial.number for trial, *_ in measured],
        )
        quantized = objective.quantize(objective.space.config(trial.params))
        latency = objective.latency(
            quantized.proto.SerializeToString(), repeats=_FINAL_LATENCY_REPEATS
        )
        measured.append((trial, kept, quantized, latency))
        if bound is None or latency.ratio <= bound:
            return measured[-1]
        if not kept:
            break
    limit = SAME_LATENCY * min(latency.ratio for *_, latency in measured)
    fastest = [candidate for candidate in measured if candidate[-1].ratio <= limit]
    return max(fastest, key=lambda candidate: rank(candidate[0], metric.direction))


def _preference(objective: QuantizationObjective) -> Preference:
    goals = objective.goals
    bounded = goals.max_latency is not None or goals.max_size is not None
    if bounded and goals.max_accuracy_drop is None:
        return "accuracy"
    latency = "latency" in goals.objectives or goals.max_latency is not None
    size = "size" in goals.objectives or goals.max_size is not None
    if not objective.target.measures_latency:
        return "size"
    return "size" if size and not latency else "latency"


def _measure_again(
    objective: QuantizationObjective,
    model: Path | bytes,
    evaluation: InputSource | None,
    held_out: NDArray[np.int64],
) -> tuple[Comparison, Comparison | None]:
    """Float and quantized model on all inputs, and on those that took no part in the search."""
    metric = objective.chosen_metric
    before = objective.float_evaluation
    if evaluation is None or metric.loop is not None:
        after = objective.evaluate(model)
        return Comparison(after.measurement.n, before.measurement, after.measurement, None), None
    reference = before.all_outputs
    if held_out.size:
        unseen = evaluation.subset(held_out)
        rest = objective.outputs(objective.model.path, unseen, "float model")
        selecting = np.setdiff1d(np.arange(len(evaluation)), held_out)
        reference = {
            name: _merged((selecting, reference[name]), (held_out, rest[name])) for name in rest
        }
    outputs = objective.outputs(model, evaluation, "final model")
    everything = _compare(metric, outputs, reference, evaluation)
    if not held_out.size:
        return everything, None
    return everything, _compare(
        metric,
        {name: values[held_out] for name, values in outputs.items()},
        {name: values[held_out] for name, values in reference.items()},
        unseen,
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
        difference = jackknife_interval(own_difference, len(inputs))
    elif metric.of_classes:
        first = next(iter(outputs))
        ours, theirs = outputs[first], reference[first]
        if metric.name == "agreement" or inputs.labels is None:
            same = agrees(ours, theirs)
            difference = paired_difference_interval(same, np.ones_like(same))
        else:
            k = 5 if metric.name == "top5" else 1
            difference = paired_difference_interval(
                top_k_correct(ours, inputs.labels, k=k), top_k_correct(theirs, inputs.labels, k=k)
            )
    return Comparison(len(inputs), measure(reference), measure(outputs), difference)


def _missed(
    objective: QuantizationObjective,
    trial: FrozenTrial,
    kept: bool,
    latency: LatencyRatio,
    comparison: Comparison,
) -> tuple[str, ...]:
    """The bounds that the chosen model does not keep.

    A trial is chosen because its numbers are good, and some of them are lucky. A bound that it
    kept is missed all the same if the interval of what was measured afterwards lies beyond it.
    """
    attributes = trial.user_attrs
    size = int(attributes["size_bytes"])
    if not kept:
        outcome = objective.outcome(metric_value(trial), attributes["latency_ratio"], size)
        return objective.goals.missed(outcome)
    drop = 0.0
    if comparison.difference is not None:
        difference, sign = comparison.difference, objective.chosen_metric.sign
        drop = min(-sign * difference.low, -sign * difference.high)
    at_best = Outcome(metric_value(trial), drop, latency.low, size)
    return tuple(
        f"measured again, even at the favourable end of its interval, {sentence}"
        for sentence in objective.goals.missed(at_best)
    )


def _optimize(
    study: optuna.Study,
    objective: QuantizationObjective,
    n_trials: int | None,
    timeout: float | None,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
) -> bool:
    """Runs the trials that are still missing; returns whether Ctrl-C ended them."""
    trials = study.get_trials(deepcopy=False)
    finished = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
    if finished:
        _logger.info(f"Study {study.study_name!r} goes on after {finished} finished trials.")
    _enqueue_interrupted(study, trials)
    missing = None if n_trials is None else n_trials - finished
    if timeout is not None and timeout <= 0:
        # Preparation took all the time: one trial, so that there is a model to write.
        missing, timeout = int(finished == 0), None
    if missing is not None and missing <= 0:
        return False
    try:
        study.optimize(
            objective,
            n_trials=missing,
            timeout=timeout,
            callbacks=list(callbacks),
            catch=(TrialFailure,),
        )
    except KeyboardInterrupt:
        return True
    return False


def _enqueue_interrupted(study: optuna.Study, trials: list[FrozenTrial]) -> None:
    """Gives trials that Ctrl-C ended, which have no error of their own, the run they are owed."""
    interrupted = [
        t.params
        for t in trials
        if t.state == TrialState.FAIL and "error" not in t.user_attrs and t.params
    ]
    others = [t for t in trials if t.state != TrialState.FAIL]
    run_or_queued = [t.system_attrs.get("fixed_params", t.params) for t in others]
    for params in interrupted:
        if params not in run_or_queued:
            study.enqueue_trial(params)
            run_or_queued.append(params)


def _open_study(
    storage: BaseStorage | str | None,
    study_name: str | None,
    sampler: BaseSampler,
    pruner: BasePruner,
    directions: Sequence[Direction],
) -> optuna.Study:
    if isinstance(storage, str):
        storage = _open_storage(storage)
    try:
        return optuna.create_study(
            storage=storage,
            study_name=study_name,
            sampler=sampler,
            pruner=pruner,
            directions=directions,
            load_if_exists=True,
        )
    except (ValueError, OSError, SQLAlchemyError) as error:
        raise InputError(
            f"study {study_name!r}: cannot be opened ({_first_line(error)})"
        ) from error


def _open_storage(storage: str) -> BaseStorage:
    try:
        if "://" not in storage:
            return JournalStorage(JournalFileBackend(storage))
        # A trial whose process died is found by its missing heartbeat and run again. Both are
        # marked experimental: their interface may change, their function is old.
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            return RDBStorage(
                storage,
                heartbeat_interval=60,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )
    except (ImportError, OSError, ValueError, SQLAlchemyError) as error:
        raise InputError(f"storage {storage}: cannot be opened ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _choices(space: SearchSpace) -> dict[str, list[Any]]:
    """The grid of a space of categorical knobs."""
    return {
        name: list(distribution.choices)
        for name, distribution in space.items()
        if isinstance(distribution, CategoricalDistribution)
    }


def _sampler_of_factory(name: str, space: SearchSpace, seed: int) -> BaseSampler:
    factory = import_function(name, "sampler")
    try:
        sampler = factory(space, seed=seed)
    except Exception as error:  # whatever a user's function raises
        raise InputError(
            f"sampler {name!r}: fails when it is called with the search space and seed={seed}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(sampler, BaseSampler):
        raise InputError(f"sampler {name!r}: gave a {type(sampler).__name__}, not a sampler")
    return sampler
