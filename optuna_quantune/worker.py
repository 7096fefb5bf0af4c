"""`work`: another process, or another machine, takes part in a search that `tune` began."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from optuna_quantune.chosen_sampler import make_sampler
from optuna_quantune.chosen_sampler import RECORDS
from optuna_quantune.chosen_sampler import Source
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import MetricFunction
from optuna_quantune.evaluation.chosen_metric import SessionFunction
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import Inputs
from optuna_quantune.evaluation.evaluator import Progress
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.objective import DEFAULT_CACHE
from optuna_quantune.plan import SearchPlan
from optuna_quantune.plan import split
from optuna_quantune.studies import check_budget
from optuna_quantune.studies import default_pruner
from optuna_quantune.studies import load_study
from optuna_quantune.studies import optimize
from optuna_quantune.target import Target


def work(
    model: str | Path,
    *,
    storage: BaseStorage | str,
    study_name: str | None = None,
    calibration: Inputs,
    evaluation: Inputs | None = None,
    metric: MetricFunction | None = None,
    evaluate: SessionFunction | None = None,
    target: Target | None = None,
    providers: Sequence[Provider] | None = None,
    sampler: BaseSampler | str | None = None,
    source_studies: Sequence[Source] = (RECORDS,),
    pruner: BasePruner | None = None,
    n_trials: int | None = None,
    timeout: float | None = None,
    cache: str | Path | None = DEFAULT_CACHE,
    threads: int | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]] = (),
) -> optuna.Study:
    """Runs trials of a study that `tune` began, until the study has as many as `tune` asked for.

    What is searched, and how, stands in the study; the model and the inputs must be the ones that
    it was begun with, as their hashes say. The processes see each other's trials through the
    storage, and none tries what another has tried. `tune`, called again or still running, chooses
    among all trials and writes the model.

    Args:
        model: The float ONNX model.
        storage: The study's Optuna storage, a database URL, or the path of a journal file.
        study_name: Its name; None where the storage has one study only.
        calibration: Inputs that activation ranges are taken from.
        evaluation: All evaluation inputs, as `tune` has them: those that it holds out of the
            search are held out here, too.
        metric: The user's own function of outputs, where the study measures by one. A study names
            it but does not bring it: nothing is run that a storage says.
        evaluate: The user's own function of a session, in the same way.
        target: The device, where `tune` was given one that no name stands for.
        providers: ONNX Runtime execution providers, as `tune` has them.
        sampler: In place of the study's: a sampler or what `tune` takes. Needed where `tune` was
            given an object or ``module:factory``.
        source_studies: What the sampler ``quantune`` learned from before, as `tune` has it.
        pruner: In place of `tune`'s default.
        n_trials: Trials of the study in all, in place of what `tune` was asked for. This or the
            timeout is needed where `tune` was given no number.
        timeout: Seconds from the call on after which no further trial is begun.
        cache: Folder of the calibration statistics; None keeps nothing.
        threads: Threads of one inference when latency is measured, as the application will have
            them; None is all cores.
        progress: Called with stage, items done and items in all.
        callbacks: Called after every trial of this process.

    Returns:
        The study.

    Raises:
        InputError: If there is no such study, it belongs to another model or other inputs, or an
            argument cannot be used.
    """
    start = time.perf_counter()
    study = load_study(storage, study_name)
    plan = SearchPlan.of(study)
    total = plan.n_trials if n_trials is None else n_trials
    check_budget(total, timeout)
    if plan.has_own_metric and metric is None and evaluate is None:
        raise InputError(
            f"study {study.study_name!r}: is measured by a function of your own, "
            f"{study.user_attrs.get('metric')!r}; give it as metric or evaluate"
        )
    evaluation = None if evaluation is None else as_input_source(evaluation)
    selecting, _ = split(evaluation, plan.seed, own_inputs=evaluate is not None)
    objective = plan.objective(
        model,
        calibration=calibration,
        evaluation=selecting,
        metric=metric,
        evaluate=evaluate,
        target=target,
        providers=providers,
        cache=cache,
        threads=threads,
        progress=progress,
    )
    objective.check_owner(study)
    chosen = sampler or plan.sampler
    if chosen is None or (sampler is None and ":" in str(chosen)):
        raise InputError(
            f"study {study.study_name!r}: was begun with a sampler of your own; give it as sampler"
        )
    study.sampler = make_sampler(chosen, objective, seed=plan.seed, source_studies=source_studies)
    # Processes that begin together would otherwise propose the same.
    study.sampler.reseed_rng()
    study.pruner = pruner or default_pruner(objective)
    objective.prepare()
    left = None if timeout is None else timeout - (time.perf_counter() - start)
    optimize(study, objective, total, left, callbacks, wait=False)
    return study
