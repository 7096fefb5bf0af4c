"""SMAC3: Bayesian optimization with a random forest, made for categorical knobs.

Lindauer et al., *SMAC3: A Versatile Bayesian Optimization Package for Hyperparameter Optimization*
(JMLR 23, 2022), by its own hyperparameter-optimization facade: random forest, logarithmic expected
improvement, Sobol' initial design. The facade's design takes ten trials a knob, at most a quarter
of the trials announced; here it takes ten in all, as TPE and GP do in Optuna, so that it has a
chance within 25. It needs ``pip install smac``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from baselines.fixed_space import FixedSpaceSampler


STARTUP_TRIALS = 10
# SMAC stops after the trials that it was told of; more than the search space of any preset.
_MOST_TRIALS = 10_000


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """SMAC on the given search space.

    Raises:
        ImportError: If the package ``smac`` is missing.
        ValueError: If a parameter has a step, which its configuration space lacks.
    """
    return SmacSampler(search_space, seed=seed)


class SmacSampler(FixedSpaceSampler):
    """SMAC's ask and tell for one process: what it has learned lives in this object.

    Args:
        search_space: Categorical knobs, and int and float ones without a step.
        seed: Seed of all random numbers; None is 0, as SMAC always takes one.
    """

    def __init__(self, search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> None:
        try:
            import smac
            from ConfigSpace import ConfigurationSpace
            from smac import HyperparameterOptimizationFacade as Facade
        except ImportError as error:
            raise ImportError(f"baselines.smac needs: pip install smac ({error})") from error
        super().__init__(search_space, seed=seed)
        space = ConfigurationSpace(seed=seed or 0)
        space.add([_hyperparameter(name, knob) for name, knob in search_space.items()])
        scenario = smac.Scenario(
            space,
            deterministic=True,
            n_trials=_MOST_TRIALS,
            seed=seed or 0,
            # It insists on writing its scenario somewhere.
            output_directory=Path(tempfile.mkdtemp(prefix="smac3-")),
        )
        self._smac = Facade(
            scenario,
            target_function=_never_called,
            initial_design=Facade.get_initial_design(scenario, n_configs=STARTUP_TRIALS),
            config_selector=Facade.get_config_selector(scenario, retrain_after=1),
            overwrite=True,
            logging_level=False,
        )
        self._asked: dict[int, Any] = {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Asks SMAC."""
        import joblib

        # Its trees are too small for threads: they cost half as much again and change nothing.
        with joblib.parallel_config(backend="sequential"):
            info = self._smac.ask()
        self._asked[trial.number] = info
        return {
            name: _native(info.config[name], distribution)
            for name, distribution in search_space.items()
        }

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Tells SMAC the value, or that there is none."""
        from smac.runhistory import StatusType
        from smac.runhistory import TrialValue

        info = self._asked.pop(trial.number, None)
        if info is None:
            return
        if state == TrialState.COMPLETE and values is not None:
            sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
            value = TrialValue(cost=sign * values[0])
        else:
            value = TrialValue(cost=float("inf"), status=StatusType.CRASHED)
        self._smac.tell(info, value, save=False)


def _hyperparameter(name: str, distribution: BaseDistribution) -> Any:
    from ConfigSpace import Categorical
    from ConfigSpace import Float
    from ConfigSpace import Integer

    if isinstance(distribution, CategoricalDistribution):
        # By index: its choices must be of one type.
        return Categorical(name, list(range(len(distribution.choices))))
    if isinstance(distribution, IntDistribution) and distribution.step == 1:
        return Integer(name, (distribution.low, distribution.high), log=distribution.log)
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        return Float(name, (distribution.low, distribution.high), log=distribution.log)
    raise ValueError(f"{name}: SMAC has no parameter like {distribution!r}")


def _native(value: Any, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(value)]
    return int(value) if isinstance(distribution, IntDistribution) else float(value)


def _never_called(config: Any, seed: int = 0) -> float:
    raise AssertionError("SMAC is asked and told, and runs nothing itself")
