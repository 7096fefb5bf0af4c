"""Quantune as we read its abstract: XGBoost on knobs and architecture, greedy, with transfer.

Lee et al. (arXiv 2202.05048) "build a gradient tree boosting model to accelerate the search"; the
code of their tuner is not public and nothing but the abstract was known to us. So every detail
here is OUR READING, chosen in its favour where there was a choice, and no number is theirs:

- features are the knobs, one-hot, and the model's architecture, without which trees could not
  learn from several models;
- the target is the accuracy, as the drop against the float model, which makes models comparable;
- XGBoost's own defaults;
- cold, the first trials are drawn at random; with records of other models there are none;
- then the trees are fitted and the best predicted configurations are taken as a batch, greedily,
  without exploration, and so on;
- nothing is measured twice (with repeats it was as bad as random search).

``QuantuneSampler`` is this project's own sampler and shares no code with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from baselines.fixed_space import FixedSpaceSampler
from baselines.fixed_space import stop
from baselines.grid import grid_values


# As many as TPE and GP draw at random in Optuna.
STARTUP_TRIALS = 10
# Small, so that the trees are fitted often.
BATCH_SIZE = 4
BOOSTING_ROUNDS = 100


@dataclass(frozen=True)
class ModelRecord:
    """One model, and what is known of its configurations.

    Attributes:
        architecture: Numbers that describe the model, such as its layers; always the same names.
        float_value: The objective of the float model.
        params: Measured configurations.
        values: Their objectives, higher is better.
    """

    architecture: Mapping[str, float]
    float_value: float
    params: Sequence[Mapping[str, Any]] = ()
    values: Sequence[float] = ()


def create(search_space: Mapping[str, BaseDistribution], *, seed: int | None) -> BaseSampler:
    """Without transfer: one model, whose architecture is therefore left out."""
    return PublishedQuantuneSampler(search_space, seed=seed)


def create_with_transfer(
    search_space: Mapping[str, BaseDistribution],
    *,
    seed: int | None,
    model: ModelRecord,
    sources: Sequence[ModelRecord],
) -> BaseSampler:
    """With the records of other models."""
    return PublishedQuantuneSampler(search_space, seed=seed, model=model, sources=sources)


class PublishedQuantuneSampler(FixedSpaceSampler):
    """Greedy batches of the configurations that boosted trees predict to be best.

    Args:
        search_space: Categorical knobs, or others with a step; all configurations are listed.
        seed: Seed of the startup trials and of ties.
        model: The model that is tuned; needed with sources only.
        sources: Other models.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution],
        *,
        seed: int | None,
        model: ModelRecord | None = None,
        sources: Sequence[ModelRecord] = (),
    ) -> None:
        super().__init__(search_space, seed=seed)
        self._choices = {name: grid_values(name, knob) for name, knob in search_space.items()}
        self._grid = list(itertools.product(*self._choices.values()))
        self._model = model or ModelRecord({}, 0.0)
        self._seed = int(np.random.default_rng(seed).integers(2**31))
        # Ties are broken by a fixed random order, and the startup trials follow it.
        self._order = np.random.default_rng(self._seed).permutation(len(self._grid))
        self._startup_trials = 0 if sources else STARTUP_TRIALS
        self._source_rows = [self._row(s, params) for s in sources for params in s.params]
        self._source_drops = [s.float_value - value for s in sources for value in s.values]

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The best predicted configuration that no trial has, by the trees of this batch."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        seen = {self._key(t.params) for t in others}
        left = [int(row) for row in self._order if self._grid[row] not in seen]
        if not left:
            left = self._order.tolist()
        complete = [t for t in others if t.state == TrialState.COMPLETE]
        if len(complete) < self._startup_trials:
            row = left[0]
        else:
            told = self._told_before_this_batch(complete)
            sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
            values = [sign * trial.value for trial in told if trial.value is not None]
            drops = self._predict_drops([t.params for t in told], values, left)
            row = left[int(np.argmin(drops))]
        params = dict(zip(self._choices, self._grid[row], strict=True))
        return {name: params[name] for name in search_space}

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stops the study when no configuration is left."""
        if len({self._key(t.params) for t in study.get_trials(deepcopy=False)}) == len(self._grid):
            stop(study)

    def _told_before_this_batch(self, complete: list[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that the trees of the present batch are fitted to."""
        in_batches = max(len(complete) - self._startup_trials, 0) // BATCH_SIZE * BATCH_SIZE
        return complete[: self._startup_trials + in_batches]

    def _predict_drops(
        self, params: list[dict[str, Any]], values: list[float], rows: list[int]
    ) -> NDArray[np.float32]:
        """Drops of rows of the grid, predicted by trees on the sources and the told trials."""
        own_rows = [self._row(self._model, p) for p in params]
        features = np.array([*self._source_rows, *own_rows])
        drops = np.array([*self._source_drops, *(self._model.float_value - v for v in values)])
        booster = xgboost.train(
            {"objective": "reg:squarederror", "seed": self._seed, "nthread": 1},
            xgboost.DMatrix(features, drops),
            num_boost_round=BOOSTING_ROUNDS,
        )
        left = [dict(zip(self._choices, self._grid[row], strict=True)) for row in rows]
        candidates = np.array([self._row(self._model, p) for p in left])
        predicted: NDArray[np.float32] = booster.predict(xgboost.DMatrix(candidates))
        return predicted

    def _key(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(params.get(name) for name in self._choices)

    def _row(self, model: ModelRecord, params: Mapping[str, Any]) -> NDArray[np.float64]:
        """One-hot categorical knobs, the values of others, and the architecture."""
        knobs: list[float] = []
        for name, choices in self._choices.items():
            if isinstance(self._search_space[name], CategoricalDistribution):
                knobs += [float(params[name] == choice) for choice in choices]
            else:
                knobs.append(float(params[name]))
        architecture = [float(model.architecture[name]) for name in sorted(model.architecture)]
        return np.array(knobs + architecture)
