"""One number for each trial, to be minimised, and what is expected of it for any configuration.

With one objective the number is its value; with several it is a scalarisation of them. What is
guessed of the objectives before any trial becomes a line in each guess that is fitted to the
trials; the lines together say what number a configuration is expected to have.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.acquisition import Tchebycheff
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.configurations import Described
from optuna_quantune.search.configurations import Guesses
from optuna_quantune.search.history import History
from optuna_quantune.search.prior import first_look
from optuna_quantune.search.prior import PriorLine
from optuna_quantune.search.targets import TargetTransform


Array: TypeAlias = NDArray[np.float64]
Expectation = Callable[[Guesses], Array]


@dataclass(frozen=True)
class Combined:
    """The trials' numbers.

    Attributes:
        values: To be minimised, infinities allowed, float64 of shape (n_trials,).
        noise: Standard deviations around the trials' true values, 0 for complete trials, inf where
            unknown; shape as above.
        expectations: What each guess makes of configurations, best informed last: from guesses to
            float64 of shape (n_configs,).
        spread: Standard deviation of the best informed one over the space, if that is known.
    """

    values: Array
    noise: Array
    expectations: Sequence[Expectation]
    spread: float | None


def combine(
    configurations: Configurations, history: History, trials: Described, weights: Array
) -> Combined:
    """Makes one number of the objectives.

    Args:
        configurations: The search space.
        history: The trials, at least one.
        trials: Their configurations.
        weights: Weights of the objectives, non-negative, summing to 1.
    """
    if len(weights) > 1:
        return _several(configurations, history.values, trials, weights)
    values = history.values[:, 0]
    finite = np.isfinite(values)
    lines = [
        PriorLine.fit(reference, guess[finite], values[finite], may_share_unit=may_share_unit)
        for reference, guess, may_share_unit in zip(
            configurations.reference.guesses.values.T,
            trials.guesses.values.T,
            configurations.may_share_unit,
            strict=True,
        )
        if finite.any()
    ]
    return Combined(
        values,
        history.noise,
        [_on(line, column) for column, line in enumerate(lines)],
        lines[-1].spread if lines else None,
    )


def before_trials(configurations: Configurations, guesses: Guesses, weights: Array) -> Array:
    """What the guesses alone say of configurations; less is better, float64 of shape (n,)."""
    reference = configurations.reference.guesses
    over_space = _best_informed(reference)
    front = Tchebycheff.fit(over_space, weights[_guessed_objectives(configurations)])
    spread = float(np.std(front(over_space))) or 1.0
    values = front(_best_informed(guesses)) / spread
    return first_look(values, guesses.limits, reference.limits)


def _several(
    configurations: Configurations, values: Array, trials: Described, weights: Array
) -> Combined:
    transforms = [TargetTransform.fit(column) for column in values.T]
    scaled = np.column_stack([t(column) for t, column in zip(transforms, values.T, strict=True)])
    objectives = _guessed_objectives(configurations)
    over_space = _best_informed(configurations.reference.guesses)
    of_trials = _best_informed(trials.guesses)
    lines = {}
    for column, objective in enumerate(objectives):
        finite = np.isfinite(values[:, objective])
        lines[objective] = PriorLine.fit(
            over_space[:, column],
            of_trials[finite, column],
            values[finite, objective],
            may_share_unit=objective > 0 or configurations.may_share_unit[-1],
        )

    def expected(guessed: Array) -> Array:
        columns = np.zeros((len(guessed), values.shape[1]))  # where nothing is guessed, the middle
        for (objective, line), guess in zip(lines.items(), guessed.T, strict=True):
            columns[:, objective] = transforms[objective](line(guess))
        return columns

    if not lines:
        return Combined(Tchebycheff.fit(scaled, weights)(scaled), np.zeros(len(values)), [], None)
    # The first trials say little of how far the objectives reach over the space.
    front = Tchebycheff.fit(np.concatenate([scaled, expected(over_space)]), weights)
    return Combined(
        front(scaled),
        np.zeros(len(values)),
        [lambda guesses: front(expected(_best_informed(guesses)))],
        None,
    )


def _guessed_objectives(configurations: Configurations) -> list[int]:
    """The objectives that there are guesses of, in the order of `_best_informed`."""
    return [*range(configurations.has_guess), *configurations.further_objectives]


def _best_informed(guesses: Guesses) -> Array:
    """One guess for each objective that has some, float64 of shape (n_configs, n_guessed)."""
    return np.concatenate([guesses.values[:, -1:], guesses.further], axis=1)


def _on(line: PriorLine, column: int) -> Expectation:
    return lambda guesses: line(guesses.values[:, column])
