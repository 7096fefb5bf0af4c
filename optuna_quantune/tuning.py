"""`tune`: a study, an objective and a sampler put together, and the best model written."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from typing import get_args

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.chosen_sampler import make_sampler
from optuna_quantune.chosen_sampler import RECORDS
from optuna_quantune.chosen_sampler import Source
from optuna_quantune.comparison import compare_with_float
from optuna_quantune.comparison import Comparison
from optuna_quantune.comparison import float_outputs
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.chosen_metric import MetricFunction
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.chosen_metric import SessionFunction
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import Inputs
from optuna_quantune.evaluation.evaluator import Progress
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.goals import Objective
from optuna_quantune.goals import Outcome
from optuna_quantune.objective import DEFAULT_CACHE
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.output_file import check_writable
from optuna_quantune.output_file import write_model
from optuna_quantune.plan import SearchPlan
from optuna_quantune.plan import SMALLEST_SPLIT
from optuna_quantune.plan import split
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.quantizer import QuantizedModel
from optuna_quantune.remarks import remark_lines
from optuna_quantune.selection import metric_value
from optuna_quantune.selection import Preference
from optuna_quantune.selection import rank
from optuna_quantune.selection import SAME_LATENCY
from optuna_quantune.selection import select
from optuna_quantune.space import SearchSpace
from optuna_quantune.studies import check_budget
from optuna_quantune.studies import check_space
from optuna_quantune.studies import create_study
from optuna_quantune.studies import default_pruner
from optuna_quantune.studies import name_of_study
from optuna_quantune.studies import optimize
from optuna_quantune.summary import Summary
from optuna_quantune.target import Target


# Interleaved batch-1 runs of the float and the chosen model: three times those of a trial.
_FINAL_LATENCY_REPEATS: Final = 60
# Trials whose latency is measured again under a bound on it, until one keeps it.
_MOST_CHOSEN: Final = 5

_logger = logging.getLogger(__name__)


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
        float_bytes: Size of the float model's file, with external data.
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

    @property
    def remarks(self) -> list[str]:
        """What must not be overlooked, a sentence each."""
        return remark_lines(
            self.missed,
            self.latency,
            self.target,
            self.float_model,
            interrupted=self.interrupted,
        )

    @property
    def summary(self) -> Summary:
        """The result as plain values, as the study keeps it."""
        return Summary(
            trial=self.trial.number,
            config=dataclasses.asdict(self.config),
            model=self.float_model.path.name,
            target=self.target.name,
            metric=self.metric.name,
            direction=self.metric.direction,
            all_inputs=self.all_inputs,
            held_out=self.held_out,
            latency=self.latency,
            float_bytes=self.float_bytes,
            quantized_bytes=self.quantized_bytes,
            seconds=self.seconds,
            remarks=tuple(self.remarks),
        )


class ResultInterrupted(KeyboardInterrupt):
    """Ctrl-C when the search had ended, while its result was measured.

    Attributes:
        study: The study, with every trial.
        metric: What was measured.
        path: The model that was written; None if there is none yet.
    """

    def __init__(self, study: optuna.Study, metric: ChosenMetric, path: Path | None) -> None:
        super().__init__()
        self.study = study
        self.metric = metric
        self.path = path


def tune(
    model: str | Path,
    *,
    calibration: Inputs,
    evaluation: Inputs | None = None,
    space: SearchSpace | str = "quantune",
    metric: MetricName | MetricFunction | None = None,
    evaluate: SessionFunction | None = None,
    direction: Direction = "maximize",
    objectives: Sequence[Objective] = ("accuracy",),
    target: str | Target = "cpu",
    providers: Sequence[Provider] | None = None,
    sampler: BaseSampler | str = "quantune",
    source_studies: Sequence[Source] = (RECORDS,),
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
        calibration: Inputs that activation ranges are taken from: an input source, an array or
            arrays by input name, or the path of a file of arrays.
        evaluation: Inputs, with labels if there are any, that accuracy is measured on; may be
            left out with `evaluate`.
        space: A search space, the name of a preset, or the path of a JSON file.
        metric: ``top1``, ``top5``, ``agreement`` or ``sqnr_db``, or a function of the outputs;
            see `QuantizationObjective` for this and the next three.
        evaluate: A function of a session, in place of `metric`.
        direction: Which values of a function of the user's are better.
        objectives: What is optimised: ``accuracy`` (the metric), ``latency``, ``size``.
        target: The device, by name or as it is.
        providers: ONNX Runtime execution providers; None takes the target's.
        sampler: ``quantune``, the name of an Optuna sampler class, ``module:factory`` with the
            signature ``factory(search_space, *, seed)``, or a sampler.
        source_studies: What ``quantune`` learns from before the first trial: earlier studies of
            other models, as `QuantuneSampler` takes them, and ``records`` for those of the
            reference models that the package ships; nothing when it is empty.
        pruner: An Optuna pruner; by default a `RacingPruner`, to which half an input that selects
            is no gain. `optuna.pruners.NopPruner` stops none.
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
        threads: Threads of one inference when latency is measured, as the application will have
            them; None is all cores.
        progress: Called with stage, items done and items in all.
        callbacks: Called after every trial, as by `optuna.Study.optimize`.

    Raises:
        InputError: If an argument cannot be used, or no trial succeeded.
        KeyboardInterrupt: If Ctrl-C comes before a trial was completed.
        ResultInterrupted: If Ctrl-C comes when the search has ended, while the result is measured.
    """
    start = time.perf_counter()
    check_budget(n_trials, timeout)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: {seed} is not between 0 and {2**32 - 1}")
    if prefer not in (None, *get_args(Preference)):
        raise InputError(f"prefer {prefer!r}: use 'latency', 'size' or 'accuracy'")
    if output is not None:
        check_writable(output, model)
    calibration = as_input_source(calibration)
    evaluation = None if evaluation is None else as_input_source(evaluation)
    plan = SearchPlan(
        space=SearchSpace.load(space) if isinstance(space, str) else space,
        metric=None if callable(metric) else metric,
        has_own_metric=callable(metric) or evaluate is not None,
        direction=direction,
        objectives=tuple(objectives),
        target=target if isinstance(target, str) else target.name,
        sampler=sampler if isinstance(sampler, str) else None,
        max_accuracy_drop=max_accuracy_drop,
        max_latency=max_latency,
        max_size=max_size,
        precision=precision,
        exact=exact,
        seed=seed,
        n_trials=n_trials,
    )
    selecting, held_out = split(evaluation, plan.seed, own_inputs=evaluate is not None)
    objective = plan.objective(
        model,
        calibration=calibration,
        evaluation=selecting,
        metric=metric if callable(metric) else None,
        evaluate=evaluate,
        target=None if isinstance(target, str) else target,
        providers=providers,
        cache=cache,
        threads=threads,
        progress=progress,
    )
    study = create_study(
        storage,
        study_name or (None if storage is None else name_of_study(objective)),
        make_sampler(sampler, objective, seed=seed, source_studies=source_studies),
        pruner or default_pruner(objective),
        objective.directions,
    )
    check_space(study, objective.space)
    objective.claim(study)
    plan.note(study)
    objective.prepare()
    reference = float_outputs(objective, evaluation, held_out)
    if evaluation is not None and evaluate is None and not held_out.size:
        _logger.warning(
            f"{len(evaluation)} evaluation inputs are too few to hold half of them out of the "
            f"search (fewer than {SMALLEST_SPLIT}): the result is reported on those that chose "
            "it, which is too good on average."
        )
    left = None if timeout is None else timeout - (time.perf_counter() - start)
    interrupted = optimize(study, objective, n_trials, left, callbacks, wait=True)
    if interrupted and not _has_result(study):
        raise KeyboardInterrupt
    path: Path | None = None
    try:
        trial, kept, quantized, latency = _chosen(study, objective, prefer)
        data = quantized.proto.SerializeToString()
        path = None if output is None else write_model(quantized.proto, output)
        try:
            all_inputs, unseen = compare_with_float(
                objective, path or data, evaluation, reference, held_out
            )
        except InputError:
            raise
        except Exception as error:  # whatever a user's function raises
            written = "" if path is None else f"; the model was written to {path} all the same"
            raise InputError(
                f"metric {objective.metric!r}: fails for the model of trial {trial.number} on all "
                f"inputs: {type(error).__name__}: {error}{written}"
            ) from error
    except KeyboardInterrupt as stop:
        raise ResultInterrupted(study, objective.chosen_metric, path) from stop
    result = TuningResult(
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
        float_bytes=objective.model.file_bytes,
        quantized_bytes=len(data),
        seconds=time.perf_counter() - start,
        interrupted=interrupted,
    )
    result.summary.note(study)
    return result


def _has_result(study: optuna.Study) -> bool:
    """Whether a trial was completed, or failed with an error that tells why none was."""
    return any(
        trial.state == TrialState.COMPLETE or "error" in trial.user_attrs
        for trial in study.get_trials(deepcopy=False)
    )


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
    size = "size" in goals.objectives or goals.max_size is not None
    if not objective.target.measures_latency:
        return "size"
    return "size" if size and not goals.needs_latency else "latency"


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
        return objective.goals.missed(outcome, when="in its trial ")
    drop = 0.0
    if comparison.difference is not None:
        difference, sign = comparison.difference, objective.chosen_metric.sign
        drop = min(-sign * difference.low, -sign * difference.high)
    at_best = Outcome(metric_value(trial), drop, latency.low, size)
    return objective.goals.missed(
        at_best, when="measured again, even at the favourable end of its interval, "
    )
