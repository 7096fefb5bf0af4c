"""Workers: they join a search that `tune` began, and none that is another's."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import datetime
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import optuna
import pytest
from numpy.typing import NDArray
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.space import SearchSpace
from optuna_quantune.studies import optimize
from optuna_quantune.tuning import tune
from optuna_quantune.worker import work


NARROW = SearchSpace(
    {
        "scheme": ["asymmetric", "symmetric", "symmetric_uint8"],
        "clipping": ["max", "kl"],
        "granularity": ["tensor", "channel"],
    }
)


@pytest.fixture
def task(toy_model: Path, toy_inputs: NDArray[np.float32]) -> dict[str, object]:
    """What `tune` and `work` both take; enough inputs to hold half of them out."""
    inputs = np.concatenate([toy_inputs] * 5)
    inputs = inputs * np.linspace(0.5, 1.5, len(inputs), dtype=np.float32)[:, None, None, None]
    labels = onnxruntime.InferenceSession(str(toy_model)).run(None, {"input": inputs})[0]
    return {
        "model": toy_model,
        "calibration": ArrayInputs(toy_inputs[:40]),
        "evaluation": ArrayInputs(inputs, labels=labels.argmax(axis=1)),
        "cache": None,
    }


def test_a_worker_goes_on_with_what_tune_began(task, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    storage = str(tmp_path / "journal.log")
    never = optuna.pruners.NopPruner()
    bounds = {"exact": True, "max_size": 10**9, "seed": 3, "pruner": never}
    began = tune(**task, space=NARROW, n_trials=2, storage=storage, study_name="toy", **bounds)
    assert work(**task, storage=storage).get_trials() == began.study.get_trials()  # has enough
    study = work(**task, storage=storage, study_name="toy", n_trials=6, pruner=never)
    trials = study.get_trials()
    assert len(trials) == 6
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert len({str(trial.params) for trial in trials}) == 6
    for trial in trials:
        assert set(trial.params) == set(NARROW)
        assert trial.user_attrs["n"] == 200  # exact, and the held-out half is held out here, too
        assert "size" in trial.constraints
    again = tune(**task, space=NARROW, n_trials=6, storage=storage, study_name="toy", **bounds)
    assert again.study.get_trials() == trials
    # Trials of both ran on the same inputs, so that one model gives the same number in either.
    rerun = tune(**task, space=NARROW, n_trials=12, **bounds).study.trials
    values = {str(sorted(trial.params.items())): trial.value for trial in rerun}
    for trial in trials:
        assert trial.value == values[str(sorted(trial.params.items()))]


def test_a_worker_with_another_model_or_other_inputs_is_refused(  # type: ignore[no-untyped-def]
    task, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    tune(**task, n_trials=1, storage=storage, study_name="toy")
    for change in (
        {"calibration": ArrayInputs(toy_inputs[:20])},
        {"evaluation": ArrayInputs(toy_inputs)},
    ):
        with pytest.raises(
            InputError, match="study 'toy': belongs to another model, other inputs"
        ):
            work(**{**task, **change}, storage=storage, n_trials=3)
    assert len(optuna.load_study(study_name="toy", storage=storage).trials) == 1


@pytest.mark.parametrize("storage", ["sqlite:///{}/no.db", "{}/no.log"])
def test_a_storage_that_is_not_there_is_not_made(task, tmp_path: Path, storage: str) -> None:  # type: ignore[no-untyped-def]
    place = storage.format(tmp_path)
    with pytest.raises(InputError, match=r"storage .*: there is no file .*no\."):
        work(**task, storage=place, study_name="toy")
    assert list(tmp_path.iterdir()) == []


def test_a_study_that_is_not_there_is_told_from_those_that_are(task, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "journal.log")))
    with pytest.raises(InputError, match="study name: is needed; the storage's studies: none"):
        work(**task, storage=storage)
    for name in ("first", "second"):
        optuna.create_study(storage=storage, study_name=name)
    with pytest.raises(InputError, match="study 'x': is not there; .* 'first', 'second'"):
        work(**task, storage=storage, study_name="x")
    with pytest.raises(InputError, match="study 'first': was not begun by `tune`"):
        work(**task, storage=storage, study_name="first")


def test_what_another_version_noted_is_refused(task, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    storage = str(tmp_path / "journal.log")
    study = tune(**task, n_trials=1, storage=storage, study_name="toy").study
    noted = study.user_attrs["search"]
    for damaged in ({}, {**noted, "unheard_of": 1}, {**noted, "seed": "0"}, [1]):
        study.set_user_attr("search", damaged)
        with pytest.raises(InputError, match="study 'toy': its search was noted by another ver"):
            work(**task, storage=storage)


def closeness(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return -float(np.abs(outputs - reference).mean())


def test_a_function_of_the_users_is_asked_for_and_never_imported_from_the_storage(  # type: ignore[no-untyped-def]
    task, tmp_path: Path
) -> None:
    storage = str(tmp_path / "journal.log")
    tune(**task, metric=closeness, n_trials=1, storage=storage)
    with pytest.raises(InputError, match="function of your own, 'closeness'; give it as metric"):
        work(**task, storage=storage, n_trials=2)
    study = work(**task, metric=closeness, storage=storage, n_trials=2)
    assert [trial.value < 0 for trial in study.trials] == [True, True]
    # A storage that names a module must not have it run.
    plan = study.user_attrs["search"]
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    sys.path.append(str(tmp_path))
    try:
        study.set_user_attr("search", {**plan, "sampler": "evil:create"})
        with pytest.raises(InputError, match="begun with a sampler of your own; give it"):
            work(**task, metric=closeness, storage=storage, n_trials=3)
    finally:
        sys.path.remove(str(tmp_path))


def test_a_sampler_of_the_users_is_asked_for(task, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    storage = str(tmp_path / "journal.log")
    tune(**task, sampler=optuna.samplers.RandomSampler(), n_trials=1, storage=storage)
    with pytest.raises(InputError, match="begun with a sampler of your own; give it as sampler"):
        work(**task, storage=storage, n_trials=2)
    assert len(work(**task, sampler="RandomSampler", storage=storage, n_trials=2).trials) == 2


def test_processes_side_by_side_share_the_trials_and_repeat_none(
    toy_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "inputs.py").write_text(
        "import numpy as np\n"
        "def inputs(split):\n"
        "    rng = np.random.default_rng(0 if split == 'calibration' else 1)\n"
        "    return rng.standard_normal((64, 3, 16, 16)).astype(np.float32)\n"
    )
    shared = (str(toy_model), "--data", "inputs:inputs", "--storage", "journal.log")
    rest = ("--study-name", "toy", "--cache", "cache", "--threads", "1")

    def start(command: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "optuna_quantune.cli", command, *shared, *rest, *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start("tune", "--n-trials", "1", "--output", "first.onnx")
    assert first.communicate()[1] is not None
    assert first.returncode == 0
    workers = [start("worker", "--n-trials", "24") for _ in range(2)]
    printed = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    study = optuna.load_study(
        study_name="toy",
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal.log"))),
    )
    finished = [t for t in study.trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    # Two that begin a trial at the same moment cannot see each other's.
    assert 24 <= len(finished) <= 25
    own = [int(out.split("Ran ")[1].split()[0]) for out, _ in printed]
    assert all(own)
    assert sum(own) == len(finished) - 1
    assert len({str(sorted(t.params.items())) for t in finished}) >= len(finished) - 1


def test_tune_waits_for_the_trials_of_others_but_not_for_the_dead(tmp_path: Path) -> None:
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(tmp_path / "x"))))
    study.ask()  # its process died

    def slow(trial: optuna.Trial) -> float:
        time.sleep(0.5)
        return 0.0

    def by_another() -> None:
        trial = study.ask()
        time.sleep(1.0)
        study.tell(trial, 1.0)

    other = threading.Thread(target=by_another)

    def objective(trial: optuna.Trial) -> float:
        if not other.ident:
            other.start()
        return slow(trial)

    begin = time.monotonic()
    assert not optimize(study, objective, 2, None, (), wait=True)  # type: ignore[arg-type]
    assert time.monotonic() - begin < 5.0
    assert [t.state for t in study.trials] == [
        TrialState.RUNNING,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    other.join()


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_worker_leaves_the_last_trial_to_whom_has_begun_it_unless_he_died(minutes: int) -> None:
    study = optuna.create_study()
    now = datetime.now()
    for state, start, end in (
        (TrialState.COMPLETE, now - timedelta(minutes=20), now - timedelta(minutes=19)),
        (TrialState.RUNNING, now - timedelta(minutes=minutes), None),
    ):
        trial = optuna.trial.create_trial(state=state, value=None if end is None else 0.0)
        trial.datetime_start, trial.datetime_complete = start, end
        study.add_trial(trial)
    ran = []

    def objective(trial: optuna.Trial) -> float:
        ran.append(trial.number)
        return 0.0

    optimize(study, objective, 2, None, (), wait=False)  # type: ignore[arg-type]
    assert ran == ([2] if minutes else [])


def test_a_worker_of_a_search_without_a_number_of_trials_needs_one(task, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    storage = str(tmp_path / "journal.log")
    tune(**task, space=NARROW, n_trials=None, timeout=0.1, max_size=1e9, storage=storage)
    with pytest.raises(InputError, match="n_trials and timeout: give at least one"):
        work(**task, storage=storage)
    assert len(work(**task, storage=storage, n_trials=2).trials) == 2
