"""Optuna's conformance cases and what is particular to QuantuneSampler, in any registry folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase
import optunahub
import pytest


_quantune = optunahub.load_local_module(
    "samplers/quantune", registry_root=str(Path(__file__).resolve().parents[3])
)


class TestConformance(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: _quantune.QuantuneSampler(n_startup_trials=0, seed=0)


def test_study_ends_after_every_configuration_was_measured_once() -> None:
    space: dict[str, BaseDistribution] = {
        "clipping": CategoricalDistribution(("max", "kl")),
        "granularity": CategoricalDistribution(("tensor", "channel", "block")),
    }

    def objective(trial: optuna.Trial) -> float:
        clipping = trial.suggest_categorical("clipping", ("max", "kl"))
        granularity = trial.suggest_categorical("granularity", ("tensor", "channel", "block"))
        return len(clipping) + len(granularity)

    study = optuna.create_study(sampler=_quantune.QuantuneSampler(space, seed=0))
    study.optimize(objective)

    measured = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(measured) == len(set(measured)) == 6
    with pytest.raises(_quantune.SearchSpaceExhausted):
        study.ask(space)
