"""One whole `tune` on a task, with any sampler, in a process of its own.

    python -m benchmarks.live_search TASK SAMPLER SPACE N_TRIALS SEED OUTPUT

SAMPLER and SPACE are what `tune` takes: ``quantune`` or ``baselines.genetic:create``, and a
preset. Nothing is cached from earlier runs, and what the package knows of models of the same
family is left out. Prints one line of JSON: when each trial ended, in seconds from the call, with
its value, and what the result says.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import optuna

from benchmarks.peers.task import peak_memory_mb
from benchmarks.peers.task import Task
from optuna_quantune import records
from optuna_quantune import tune
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.search.pruner import CORRECT_KEY


def main() -> None:
    folder, sampler, space, n_trials, seed, output = sys.argv[1:]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    task = Task.load(folder)
    calibration = ArrayInputs(task.calibration)
    evaluation = ArrayInputs(task.evaluation, labels=task.labels)
    is_ours = sampler == "quantune"
    studies = records.source_studies(without=task.family)
    before_mb = peak_memory_mb()
    trials: list[dict[str, Any]] = []
    start = time.perf_counter()

    def record(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        trials.append(
            {
                "seconds": round(time.perf_counter() - start, 3),
                "state": trial.state.name,
                "value": trial.value,
                "params": trial.params,
                "correct": trial.user_attrs.get(CORRECT_KEY),
            }
        )

    result = tune(
        task.model,
        calibration=calibration,
        evaluation=evaluation,
        sampler=sampler,
        source_studies=studies if is_ours else (),
        space=space,
        n_trials=int(n_trials),
        seed=int(seed),
        output=output,
        cache=None,
        callbacks=[record],
    )
    assert result.held_out is not None
    difference = result.held_out.difference
    assert difference is not None
    print(
        json.dumps(
            {
                "sampler": sampler,
                "trials": trials,
                "chosen": result.trial.number,
                "total_seconds": round(result.seconds, 3),
                "top1_held_out": result.held_out.quantized.top1,
                "top1_float_held_out": result.held_out.float_model.top1,
                "agreement_held_out": result.held_out.quantized.agreement,
                "difference": [difference.estimate, difference.low, difference.high],
                "latency_ratio": result.latency.ratio,
                "memory_mb": round(peak_memory_mb() - before_mb),
            }
        )
    )


if __name__ == "__main__":
    main()
