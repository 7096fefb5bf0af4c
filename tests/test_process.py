from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from optuna_quantune.process import is_gone
from optuna_quantune.process import PROCESS_KEY
from optuna_quantune.process import this_process
from optuna_quantune.studies import create_study
from optuna_quantune.studies import optimize


NAME = "from optuna_quantune.process import this_process; print(this_process())"


@pytest.fixture
def ended() -> str:
    """The name of a process that has ended."""
    printed = subprocess.run([sys.executable, "-c", NAME], capture_output=True, text=True)
    return printed.stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
def test_a_process_is_gone_when_it_has_ended(ended: str) -> None:
    assert is_gone(ended)
    assert not is_gone(this_process())
    with subprocess.Popen(
        [sys.executable, "-c", f"{NAME}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as other:
        assert other.stdin is not None
        # The output is a pipe, so that it comes when the process has ended: ask the system.
        machine = this_process().rsplit(" ", 2)[0]
        start = Path(f"/proc/{other.pid}/stat")
        ticks = start.read_text().rsplit(")", 1)[1].split()[19] if start.exists() else "?"
        assert not is_gone(f"{machine} {other.pid} {ticks}")
        other.communicate("\n")


@pytest.mark.skipif(not Path("/proc").exists(), reason="starts of processes are not known")
def test_another_process_with_the_number_of_one_that_ended_is_told_from_it() -> None:
    machine, number, _ = this_process().rsplit(" ", 2)
    assert is_gone(f"{machine} {number} 1")


@pytest.mark.parametrize("name", [None, 3, "", "a b", "a b c", f"elsewhere {10**30} 1"])
def test_of_other_machines_and_of_what_is_no_name_nothing_is_known(name: object) -> None:
    assert not is_gone(name)
    machine = this_process().rsplit(" ", 2)[0]
    assert not is_gone(f"{machine} {10**30} 1")


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
@pytest.mark.parametrize("is_journal", [True, False])
def test_a_trial_whose_process_was_killed_is_run_again(
    tmp_path: Path, ended: str, is_journal: bool
) -> None:
    storage = str(tmp_path / "journal.log") if is_journal else optuna.storages.InMemoryStorage()
    place = (storage, "toy", optuna.samplers.RandomSampler(seed=0))
    pruner = optuna.pruners.NopPruner()
    killed, running = (create_study(*place, pruner, ["maximize"]).ask() for _ in range(2))
    for trial, process in ((killed, ended), (running, this_process())):
        trial.set_user_attr(PROCESS_KEY, process)
        trial.suggest_categorical("x", (0, 1, 2, 3))

    study = create_study(*place, pruner, ["maximize"])

    def objective(trial: optuna.Trial) -> float:
        return float(trial.suggest_categorical("x", (0, 1, 2, 3)))

    optimize(study, objective, 1, None, (), wait=True)  # type: ignore[arg-type]
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.RUNNING, TrialState.COMPLETE]
    assert study.trials[2].params == killed.params
