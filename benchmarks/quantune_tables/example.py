"""Compares two samplers by their regret after twenty trials, on every model."""

from __future__ import annotations

from pathlib import Path

import optuna
import optunahub


# Loads the folder that this file is in. Elsewhere:
# optunahub.load_module("benchmarks/quantune_tables")
quantune_tables = optunahub.load_local_module(
    "benchmarks/quantune_tables", registry_root=str(Path(__file__).resolve().parents[2])
)

if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"random": optuna.samplers.RandomSampler, "TPE": optuna.samplers.TPESampler}
    for model in quantune_tables.Problem.available_models():
        problem = quantune_tables.Problem(model)
        for name, sampler in samplers.items():
            study = optuna.create_study(directions=problem.directions, sampler=sampler(seed=0))
            study.optimize(problem, n_trials=20)
            regret = 100 * (problem.best_value() - study.best_value)
            print(f"{model}, {name}: {regret:.2f} points below the best")
