"""Finds the best of 96 configurations of a quantized network in 15 trials.

The accuracy is made up, with the habits of a real one: one scale for each channel helps most,
clipping hurts without it, and only few calibration images are too few. It needs no network and no
images, so the example takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
import optunahub


SPACE = {
    "calibration_images": CategoricalDistribution((1, 32, 256)),
    "scheme": CategoricalDistribution(("asymmetric", "symmetric", "uint8", "power2")),
    "clipping": CategoricalDistribution(("max", "kl")),
    "granularity": CategoricalDistribution(("tensor", "channel")),
    "mixed_precision": CategoricalDistribution(("none", "first_last")),
}


def top1_accuracy(trial: optuna.Trial) -> float:
    config: dict[str, Any] = {
        name: trial.suggest_categorical(name, knob.choices) for name, knob in SPACE.items()
    }
    drop = {1: 4.0, 32: 0.6, 256: 0.5}[config["calibration_images"]]
    drop += {"asymmetric": 0.0, "symmetric": 0.4, "uint8": 0.2, "power2": 1.5}[config["scheme"]]
    if config["granularity"] == "tensor":
        drop += 12.0 if config["clipping"] == "kl" else 6.0
    elif config["clipping"] == "max":
        drop += 0.3
    if config["mixed_precision"] == "none":
        drop *= 1.2
    return 72.0 - drop


if __name__ == "__main__":
    # Loads the folder that this file is in. Elsewhere:
    # optunahub.load_module("samplers/quantune").QuantuneSampler
    quantune = optunahub.load_local_module(
        "samplers/quantune", registry_root=str(Path(__file__).resolve().parents[2])
    )
    study = optuna.create_study(
        direction="maximize", sampler=quantune.QuantuneSampler(SPACE, seed=0)
    )
    study.optimize(top1_accuracy, n_trials=15)
    print(f"{study.best_value:.2f} % top-1 in trial {study.best_trial.number}:")
    print(study.best_params)
