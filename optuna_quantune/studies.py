"""Studies of a search: opened by name, and worked on by one process or by many."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import datetime
from datetime import timedelta
from pathlib import Path
from typing import Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import check_distribution_compatibility
from optuna.exceptions import ExperimentalWarning
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.storages import JournalStorage
from optuna.storages import RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal import JournalFileOpenLock
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import SQLAlchemyError

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.process import is_abandoned
from optuna_quantune.search.pruner import DEFAULT_INDIFFERENCE
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.search.sampler import QuantuneSampler


FINISHED: Final = (TrialState.COMPLETE, TrialState.PRUNED)
# Other processes' trials are waited for as long as the longest trial took, and as much again.
_PATIENCE: Final = 2.0
_POLL_SECONDS: Final = 0.2
# What a database file of SQLite begins with.
_SQLITE: Final = b"SQLite format 3\0"
# Seconds that a line of a journal may take to be written.
_LONGEST_WRITE: Final = 2.0

_logger = logging.getLogger(__name__)


def name_of_study(objective: QuantizationObjective) -> str:
    """The name of a study that was given none: the same search finds it again, no other does."""
    search = f"{objective.fingerprint} {objective.goals} {dict(objective.space)}"
    return f"{objective.model.path.stem}-{hashlib.sha256(search.encode()).hexdigest()[:8]}"


def create_study(
    storage: BaseStorage | str | None,
    name: str | None,
    sampler: BaseSampler,
    pruner: BasePruner,
    directions: Sequence[Direction],
) -> optuna.Study:
    """The study of that name in a storage; makes one if there is none.

    Raises:
        InputError: If it cannot be opened.
    """
    if isinstance(storage, str):
        storage = _open_storage(storage)
    try:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            pruner=pruner,
            directions=directions,
            load_if_exists=True,
        )
    except (ValueError, OSError, SQLAlchemyError) as error:
        raise InputError(f"study {name!r}: cannot be opened ({_first_line(error)})") from error


def load_study(storage: BaseStorage | str, name: str | None) -> optuna.Study:
    """A study that is there already.

    Args:
        storage: An Optuna storage, a database URL, or the path of a journal file.
        name: Its name; None where the storage has one study only.

    Raises:
        InputError: If there is no such storage or study.
    """
    if isinstance(storage, str):
        _check_exists(storage)
        storage = _open_storage(storage)
    try:
        names = optuna.get_all_study_names(storage)
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            there = ", ".join(map(repr, names)) or "none"
            wanted = "study name: is needed" if name is None else f"study {name!r}: is not there"
            raise InputError(f"{wanted}; the storage's studies: {there}")
        return optuna.load_study(study_name=name, storage=storage)
    except InputError:
        raise
    except (ValueError, OSError, SQLAlchemyError) as error:
        raise InputError(f"study {name!r}: cannot be opened ({_first_line(error)})") from error


def _check_exists(storage: str) -> None:
    """Refuses a file that is not there, which opening it would make."""
    path: str | None = storage
    if "://" in storage:
        try:
            url = make_url(storage)
        except SQLAlchemyError as error:
            raise InputError(f"storage {storage}: is no database URL") from error
        path = url.database if url.get_backend_name() == "sqlite" else None
    if path is not None and not Path(path).is_file():
        raise InputError(f"storage {storage}: there is no file {path}")


def _open_storage(storage: str) -> BaseStorage:
    if "://" not in storage:
        _check_journal(Path(storage))
    try:
        if "://" not in storage:
            # Optuna's default lock is a symbolic link, which Windows grants to few.
            lock = JournalFileOpenLock(storage) if os.name == "nt" else None
            return JournalStorage(JournalFileBackend(storage, lock_obj=lock))
        # A trial whose process died is found by its missing heartbeat and run again. Both are
        # marked experimental: their interface may change, their function is old.
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            try:
                return _database(storage)
            except OperationalError:  # perhaps another process is just making its tables
                time.sleep(_POLL_SECONDS)
                return _database(storage)
    # RuntimeError: made by an older Optuna; the others: lines of a journal that make no sense.
    except (
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AssertionError,
        SQLAlchemyError,
    ) as error:
        raise InputError(f"storage {storage}: cannot be opened ({_first_line(error)})") from error


def _database(url: str) -> RDBStorage:
    return RDBStorage(
        url,
        heartbeat_interval=60,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
    )


def _check_journal(path: Path) -> None:
    """Refuses a file that Optuna would damage: it appends to whatever is there.

    Raises:
        InputError: If it is no journal, or its last line is half written.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        begin = file.read(len(_SQLITE))
        if begin == _SQLITE:
            raise InputError(f"storage {path}: is a database of SQLite; give sqlite:///{path}")
        if not begin.startswith(b"{"):
            raise InputError(f"storage {path}: is a file, and no journal of Optuna")
    deadline = time.monotonic() + _LONGEST_WRITE
    while not (is_whole := _ends_in_a_line(path)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)  # another process may just be writing it
    with path.open("rb") as file:
        first = file.readline()
    try:
        is_journal = "op_code" in json.loads(first)
    except (ValueError, TypeError):
        is_journal = False
    if not is_journal:
        raise InputError(f"storage {path}: is a file, and no journal of Optuna")
    if not is_whole:
        raise InputError(
            f"storage {path}: its last line is half written, as after a crash; remove that line, "
            "and the rest goes on"
        )


def _ends_in_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def check_budget(n_trials: int | None, timeout: float | None) -> None:
    """Refuses a search that nothing ends, or that nothing begins.

    Raises:
        InputError: If both are None, or one is not positive.
    """
    if n_trials is None and timeout is None:
        raise InputError("n_trials and timeout: give at least one of them")
    if n_trials is not None and n_trials < 1:
        raise InputError(f"n_trials: {n_trials} is not positive")
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout: {timeout} seconds is not positive")


def check_space(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> None:
    """Refuses a study whose trials have other choices, before anything is written to it.

    Raises:
        InputError: If a knob of the trials is missing, or its values are not theirs.
    """
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            try:
                check_distribution_compatibility(distribution, space[name])
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"study {study.study_name!r}: was begun with other choices of the knob "
                    f"{name!r}; give another study name"
                ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def optimize(
    study: optuna.Study,
    objective: QuantizationObjective,
    n_trials: int | None,
    timeout: float | None,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
    *,
    wait: bool,
) -> bool:
    """Runs the trials that are still missing, beside other processes that do the same.

    Args:
        study: The study.
        objective: What a trial runs.
        n_trials: Trials in all, those of other processes included; None for no such number.
        timeout: Seconds after which no trial is begun. The first of a study is in any case.
        callbacks: Called after every trial of this process.
        wait: Whether the trials that other processes still run at the end are waited for, no
            longer than trials have taken so far.

    Returns:
        Whether Ctrl-C ended it.
    """
    _fail_abandoned(study)
    trials = study.get_trials(deepcopy=False)
    # What began before and still runs may have died with its process. Who does not wait for the
    # others' trials takes those for running that have not run for longer than others have.
    patience = timedelta() if wait else _patience(trials)
    begin = datetime.now() - patience
    finished = sum(trial.state in FINISHED for trial in trials)
    if finished:
        _logger.info(f"Study {study.study_name!r} goes on after {finished} finished trials.")
    _enqueue_interrupted(study, trials)
    if timeout is not None and timeout <= 0:
        # Preparation took all the time: one trial, so that there is a model to write.
        n_trials, timeout = 1, None
    missing = None if n_trials is None else n_trials - _begun(trials, begin)
    if missing is not None and missing <= 0:
        return False

    def stop_when_enough(study: optuna.Study, trial: FrozenTrial) -> None:
        begun = _begun(study.get_trials(deepcopy=False), begin)
        if n_trials is not None and begun >= n_trials:
            study.stop()

    try:
        if not _is_exhausted(study):
            study.optimize(
                objective,
                n_trials=missing,
                timeout=timeout,
                callbacks=[*callbacks, stop_when_enough],
                catch=(TrialFailure,),
            )
            _is_exhausted(study)
        if wait:
            _wait_for_others(study, begin)
    except KeyboardInterrupt:
        return True
    return False


def _is_exhausted(study: optuna.Study) -> bool:
    """Whether there is nothing left to try, and says so then."""
    sampler = study.sampler
    if not isinstance(sampler, QuantuneSampler) or not sampler.is_exhausted(study):
        return False
    _logger.info(f"Study {study.study_name!r}: all configurations of the space have been tried.")
    return True


def _wait_for_others(study: optuna.Study, since: datetime) -> None:
    begin, told = time.monotonic(), False
    while True:
        trials = study.get_trials(deepcopy=False)
        running = sum(_runs_since(trial, since) for trial in trials)
        if not running or time.monotonic() - begin > _patience(trials).total_seconds():
            return
        if not told:
            _logger.info(f"Waiting for trials that other processes still run: {running}.")
            told = True
        time.sleep(_POLL_SECONDS)


def _patience(trials: Sequence[FrozenTrial]) -> timedelta:
    """How long a trial may take before it is given up: longer than any other has taken."""
    took = [trial.duration for trial in trials if trial.duration is not None]
    return _PATIENCE * max(took, default=timedelta())


def _begun(trials: Sequence[FrozenTrial], since: datetime) -> int:
    """How many trials have finished, or run and began not before a time."""
    return sum(trial.state in FINISHED or _runs_since(trial, since) for trial in trials)


def _runs_since(trial: FrozenTrial, begin: datetime) -> bool:
    started = trial.datetime_start
    return trial.state == TrialState.RUNNING and started is not None and started >= begin


def default_pruner(objective: QuantizationObjective) -> RacingPruner:
    """The pruner of a search: what is better by less than half an input is not better there."""
    return RacingPruner(indifference=max(DEFAULT_INDIFFERENCE, 0.5 / len(objective.evaluation)))


def _fail_abandoned(study: optuna.Study) -> None:
    """Ends trials whose process died on this machine: journals never find out."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_abandoned(trial):
            with contextlib.suppress(UpdateFinishedTrialError):  # another process was faster
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _enqueue_interrupted(study: optuna.Study, trials: list[FrozenTrial]) -> None:
    """Gives trials that were interrupted, which have no error of their own, the run they are owed.

    Ctrl-C ended them, or the end of their process.
    """
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
