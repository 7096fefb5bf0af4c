"""`tune`: a study, an objective and a sampler put together, and the best model written."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import time
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.metrics import top_k_correct
from optuna_quantune.objective import check_writable
from optuna_quantune.objective import DEFAULT_CACHE
from optuna_quantune.objective import Metric
from optuna_quantune.objective import Progress
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.objective import write_model
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.selection import select
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import Target


# Fewer evaluation inputs than this are not split: either half would say too little.
SMALLEST_SPLIT: Final = 400

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The chosen model beside the float model on the same inputs.

    Attributes:
        inputs: Number of inputs.
        float_model: The float model's measurement.
        quantized: The quantized model's measurement.
        difference: Quantized minus float top-1 accuracy with its paired 95 % interval; None
            without labels.
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
        float_model: The float model that it was built from.
        path: The model that was written, or None if no output was asked for.
        goal_met: Whether `max_accuracy_drop` holds for the chosen trial; True if none was asked.
        all_inputs: Float and quantized model on all evaluation inputs.
        held_out: The same on the inputs that took no part in the selection; None if there were too
            few to split.
        latency: Batch-1 latency beside the float model.
        float_bytes: Size of the float model's file.
        quantized_bytes: Size of the quantized model's file.
        seconds: Wall-clock time of the whole run.
        interrupted: Whether Ctrl-C ended the search.
    """

    study: optuna.Study
    trial: FrozenTrial
    config: QuantizationConfig
    float_model: FloatModel
    path: Path | None
    goal_met: bool
    all_inputs: Comparison
    held_out: Comparison | None
    latency: LatencyRatio
    float_bytes: int
    quantized_bytes: int
    seconds: float
    interrupted: bool


def tune(
    model: str | Path,
    *,
    calibration: InputSource,
    evaluation: InputSource,
    space: SearchSpace | str = "quantune",
    metric: Metric | None = None,
    target: str | Target = "cpu",
    sampler: BaseSampler | str = "quantune",
    pruner: BasePruner | None = None,
    n_trials: int = 20,
    timeout: float | None = None,
    max_accuracy_drop: float | None = None,
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

    Of the trials that cannot be told from the best one, the fastest is chosen
    (`optuna_quantune.selection.select`).

    Half of the evaluation inputs are kept out of the search when there are at least
    `SMALLEST_SPLIT`, so that the result can be reported on inputs that chose nothing.

    Args:
        model: The float ONNX model.
        calibration: Inputs that activation ranges are taken from.
        evaluation: Inputs, with labels if there are any, that accuracy is measured on.
        space: A search space, or the name of a preset.
        metric: What is maximized: ``top1``, ``top5``, ``agreement`` or ``sqnr_db``; ``top1`` with
            labels and ``agreement`` without by default.
        target: The device, by name or as it is.
        sampler: ``quantune``, the name of an Optuna sampler class, ``module:factory`` with the
            signature ``factory(search_space, *, seed)``, or a sampler.
        pruner: An Optuna pruner; None measures every trial to its end.
        n_trials: Number of trials, those already in the study included.
        timeout: Seconds after which no further trial is begun.
        max_accuracy_drop: Bound on the loss of the metric against float (0.01 is one point): the
            fastest configuration within it is chosen. Without it the most accurate one is.
        storage: An Optuna storage, a database URL, or the path of a journal file.
        study_name: Name of the study in the storage.
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
    if n_trials < 1:
        raise InputError(f"n_trials: {n_trials} is not positive")
    if output is not None:
        check_writable(output)
    search_space = SearchSpace.load(space) if isinstance(space, str) else space
    selected, held_out = _split(len(evaluation), seed)
    objective = QuantizationObjective(
        model,
        calibration=calibration,
        evaluation=evaluation.subset(selected) if held_out.size else evaluation,
        space=search_space,
        metric=metric,
        target=target,
        max_accuracy_drop=max_accuracy_drop,
        cache=cache,
        threads=threads,
        progress=progress,
    )
    study = _open_study(
        storage,
        study_name,
        make_sampler(sampler, objective, seed=seed) if isinstance(sampler, str) else sampler,
        pruner or NopPruner(),
    )
    objective.claim(study)
    objective.prepare()
    interrupted = _optimize(study, objective, n_trials, timeout, callbacks)
    trial, goal_met = select(study)
    quantized = objective.quantize(search_space.config(trial.params))
    data = quantized.proto.SerializeToString()
    path = None if output is None else write_model(quantized.proto, output)
    measured = path or data
    float_outputs = objective.float_evaluation.outputs
    if held_out.size:
        rest = objective.outputs(objective.model.path, evaluation.subset(held_out), "float model")
        float_outputs = np.empty((len(evaluation), *rest.shape[1:]), dtype=rest.dtype)
        float_outputs[selected] = objective.float_evaluation.outputs
        float_outputs[held_out] = rest
    int8_outputs = objective.outputs(measured, evaluation, "final model")
    everything = np.arange(len(evaluation))
    return TuningResult(
        study=study,
        trial=trial,
        config=quantized.config,
        float_model=objective.model,
        path=path,
        goal_met=goal_met,
        all_inputs=_compare(float_outputs, int8_outputs, evaluation.labels, everything),
        held_out=_compare(float_outputs, int8_outputs, evaluation.labels, held_out)
        if held_out.size
        else None,
        latency=objective.latency(data),
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
        return QuantuneSampler(space, features=objective.features, seed=seed)
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


def _split(n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the inputs that select and of those that only report, each in order."""
    if n < SMALLEST_SPLIT:
        return np.arange(n), np.arange(0)
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n - n // 2]), np.sort(order[n - n // 2 :])


def _compare(
    float_outputs: NDArray[np.float32],
    int8_outputs: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    indices: NDArray[np.int64],
) -> Comparison:
    reference, outputs = float_outputs[indices], int8_outputs[indices]
    truth = None if labels is None else labels[indices]
    difference = None
    if truth is not None:
        difference = paired_difference_interval(
            top_k_correct(outputs, truth, k=1), top_k_correct(reference, truth, k=1)
        )
    return Comparison(
        inputs=len(indices),
        float_model=measure(reference, reference=reference, labels=truth),
        quantized=measure(outputs, reference=reference, labels=truth),
        difference=difference,
    )


def _optimize(
    study: optuna.Study,
    objective: QuantizationObjective,
    n_trials: int,
    timeout: float | None,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
) -> bool:
    """Runs the trials that are still missing; returns whether Ctrl-C ended them."""
    trials = study.get_trials(deepcopy=False)
    finished = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)
    if finished:
        _logger.info(f"Study {study.study_name!r} goes on after {finished} finished trials.")
    _enqueue_interrupted(study, trials)
    if finished >= n_trials:
        return False
    try:
        study.optimize(
            objective,
            n_trials=n_trials - finished,
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
) -> optuna.Study:
    if isinstance(storage, str):
        storage = _open_storage(storage)
    try:
        return optuna.create_study(
            storage=storage,
            study_name=study_name,
            sampler=sampler,
            pruner=pruner,
            direction="maximize",
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
    module_name, _, factory_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"sampler {name!r}: cannot be imported ({error})") from error
    sampler = factory(space, seed=seed)
    if not isinstance(sampler, BaseSampler):
        raise InputError(f"sampler {name!r}: gave a {type(sampler).__name__}, not a sampler")
    return sampler
