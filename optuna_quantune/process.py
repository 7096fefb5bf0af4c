"""Which process runs a trial, so that a trial is not taken for running when its process died."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import datetime
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Final

from optuna.trial import FrozenTrial
from optuna.trial import TrialState


# User attribute of a trial: the process that runs it.
PROCESS_KEY: Final = "process"
# A trial notes its process before anything else.
_LONGEST_BEGINNING: Final = timedelta(minutes=5)


def this_process() -> str:
    """A name that no other process has: machine, number and time of its start."""
    number = os.getpid()
    return f"{_machine()} {number} {_start(number)}"


def is_abandoned(trial: FrozenTrial) -> bool:
    """Whether a running trial's process has ended, or never came to note itself."""
    if trial.state != TrialState.RUNNING:
        return False
    if PROCESS_KEY in trial.user_attrs:
        return is_gone(trial.user_attrs[PROCESS_KEY])
    begun = trial.datetime_start
    return begun is not None and datetime.now() - begun > _LONGEST_BEGINNING


def is_gone(name: object) -> bool:
    """Whether a process of this machine has ended.

    Args:
        name: As from `this_process`; a storage may hold anything.

    Returns:
        False also where nothing can be known: of other machines, and of this one before it was
        started last.
    """
    if not isinstance(name, str) or len(parts := name.rsplit(" ", 2)) != 3:
        return False
    machine, number, start = parts
    if machine != _machine() or not number.isdecimal() or os.name != "posix":
        return False
    try:
        os.kill(int(number), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's, or no process number at all
        return False
    return start != _start(int(number))


@cache
def _machine() -> str:
    """Stands for what process numbers are unique in: a machine since its start, or a container."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:  # not Linux
        pass
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _start(number: int) -> str:
    """When a process was started, in ticks since the machine was; numbers are used again."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:  # not Linux
        return "?"
    return status.rsplit(")", 1)[1].split()[19]
