"""Wall clock of the whole job on real models, each method in a process of its own, side by side.

    python -m benchmarks.live TASKS [--models NAME ...] [--sample 12] [--full NAME ...]
        [--trials 20] [--trials-others 30] [--memory-limit-gb 16] [--methods NAME ...]

TASKS holds what `python -m benchmarks.export_task` wrote. For each model:

- ``exhaustive``: all 96 configurations as a user of ONNX Runtime tries them
  (`benchmarks.onnxruntime_user`), on a random sample of configurations, alike many of each
  calibration method and number of inputs, which decide how long they take, extrapolated; in full
  for the models under ``--full``;
- ``rule of thumb``: per channel, uint8 activations, MinMax, 128 inputs, no search;
- ``random``, ``grid``, ``genetic``, ``XGBoost``: the searches of the paper with our objective, by
  `baselines`;
- ``quantune``: this project's `tune`; ``quantune, extended``: the same with that space.

All read the same arrays, choose by the same half of the inputs and report on the other half. Every
step is one line in `benchmarks/results/live/steps.jsonl` (of a processor without VNNI in
`live_without_vnni/`), so that an interrupted run goes on. What takes more memory than the limit is
stopped, and counts with its time until then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.live_report import EXTENDED
from benchmarks.live_report import write
from benchmarks.onnxruntime_user import grid
from benchmarks.onnxruntime_user import kinds_of_cost
from benchmarks.peers.task import Task


RESULTS = Path(__file__).parent / "results" / machine.results_of("live")
# The searches that the paper compares, by their factory here.
OTHERS = {
    "random": "baselines.random:create",
    "grid": "baselines.grid_lexicographic:create",
    "genetic": "baselines.genetic:create",
    "XGBoost": "baselines.quantune_published:create",
}
# The split of `tune` depends on its seed; tasks have that of this one.
SEED = 0
_POLL_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--models", nargs="+", help="all tasks by default")
    parser.add_argument("--sample", type=int, default=12, help="configurations of the exhaustive")
    parser.add_argument("--full", nargs="+", default=(), help="models with all configurations")
    parser.add_argument("--trials", type=int, default=20, help="trials of quantune")
    parser.add_argument("--trials-others", type=int, default=30)
    parser.add_argument("--memory-limit-gb", type=float, default=16.0)
    parser.add_argument("--methods", nargs="+", help="run these only, such as exhaustive; all")
    arguments = parser.parse_args()
    present = sorted(path.parent.name for path in arguments.tasks.glob("*/task.json"))
    for name in arguments.models or present:
        task = Task.load(arguments.tasks / name)
        order = sample(len(grid()) if name in arguments.full else arguments.sample)
        steps = {
            "quantune": search_step(task, "quantune", arguments.trials),
            EXTENDED: search_step(task, "quantune", arguments.trials, space="extended"),
        }
        steps |= {"rule of thumb": user_step(task, "rule")}
        steps |= {
            other: search_step(task, factory, arguments.trials_others)
            for other, factory in OTHERS.items()
        }
        steps |= {f"exhaustive {number}": user_step(task, str(number)) for number in order}
        for step, command in steps.items():
            if arguments.methods and not step.startswith(tuple(arguments.methods)):
                continue
            run_step(name, step, command, arguments.memory_limit_gb)
    write(RESULTS, arguments.tasks)


def sample(n: int) -> list[int]:
    """Numbers of random configurations of the exhaustive search, in turn of each kind."""
    rng = np.random.default_rng(SEED)
    kinds = [rng.permutation(numbers).tolist() for numbers in kinds_of_cost().values()]
    return list(itertools.chain.from_iterable(zip(*kinds, strict=True)))[:n]


def user_step(task: Task, which: str) -> list[str]:
    """Command of one configuration of the exhaustive search, or of the rule of thumb."""
    return ["benchmarks.onnxruntime_user", str(task.folder), which]


def search_step(task: Task, sampler: str, trials: int, *, space: str = "quantune") -> list[str]:
    """Command of one search."""
    options = [sampler, space, str(trials), str(SEED)]
    return ["benchmarks.live_search", str(task.folder), *options]


def run_step(model: str, step: str, command: list[str], memory_limit_gb: float) -> None:
    """Runs a step in a process of its own, unless it is known, and keeps its line."""
    path = RESULTS / "steps.jsonl"
    if any((line["model"], line["step"]) == (model, step) for line in known_steps(path)):
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        outcome = run([*command, str(output)], Path(folder), memory_limit_gb)
    line = {
        "model": model,
        "step": step,
        **outcome,
        "load_before": round(load, 2),
        "machine": machine.describe(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(model, step, {k: v for k, v in outcome.items() if isinstance(v, int | float)})


def known_steps(path: Path) -> list[dict[str, Any]]:
    """The steps that need not be run again: those that ended, or had no memory to."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line.get("failed", "memory") == "memory"]


def run(command: list[str], folder: Path, memory_limit_gb: float) -> dict[str, Any]:
    """What a module printed as JSON in its last line, or why there is none.

    Args:
        command: A module and its arguments.
        folder: Where its output is collected.
        memory_limit_gb: Resident memory at which the process is ended.
    """
    start = time.perf_counter()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=err)
        while process.poll() is None:
            if resident_gb(process.pid) > memory_limit_gb:
                process.kill()
                process.wait()
                seconds = time.perf_counter() - start
                return {"failed": "memory", "seconds": round(seconds, 3)}
            time.sleep(_POLL_SECONDS)
    seconds = round(time.perf_counter() - start, 3)
    if process.returncode != 0:
        last = (folder / "err").read_text().strip().splitlines()[-1:]
        return {"failed": " ".join(last)[:300], "seconds": seconds}
    result: dict[str, Any] = json.loads((folder / "out").read_text().splitlines()[-1])
    return {**result, "seconds": seconds}


def resident_gb(pid: int) -> float:
    """Resident memory of a process; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


if __name__ == "__main__":
    main()
