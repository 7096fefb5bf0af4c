"""Optuna's own conformance cases for samplers, run on QuantuneSampler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_samplers import MultiObjectiveSamplerTestCase
from optuna.testing.pytest_samplers import RelativeSamplerTestCase

from optuna_quantune.search.sampler import QuantuneSampler


SamplerFactory = Callable[[], BaseSampler]


class TestConformance(
    BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase
):
    @pytest.fixture(
        params=[
            lambda: QuantuneSampler(n_startup_trials=0),
            lambda: QuantuneSampler(seed=0),
        ],
        ids=["no startup", "default"],
    )
    def sampler(self, request: pytest.FixtureRequest) -> SamplerFactory:
        factory: SamplerFactory = request.param
        return factory
