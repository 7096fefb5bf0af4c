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
    columns = range(len(configurations.may_share_unit)) if np.isfinite(values).any() else ()
    lines = [_line_of_first(configurations, trials, values, column) for column in columns]
    return Combined(
        values,
        history.noise,
        [_on(line, column) for column, line in enumerate(lines)],
        lines[-1].spread if lines else None,
    )


def before_trials(configurations: Configurations, guesses: Guesses, weights: Array) -> Array:
    """What the guesses alone say of configurations; less is better, float64 of shape (n,)."""
    reference = configurations.reference.guesses
    # The last one is the best informed.
    values, over_space = (
        np.column_stack([part.values[:, -1], part.further]) for part in (guesses, reference)
    )
    known = np.array([0, *configurations.further_objectives])
    front = Tchebycheff.fit(over_space, weights[known])
    spread = float(np.std(front(over_space))) or 1.0
    return first_look(front(values) / spread, guesses.limits, reference.limits)


def _several(
    configurations: Configurations, values: Array, trials: Described, weights: Array
) -> Combined:
    transforms = [TargetTransform.fit(column) for column in values.T]
    scaled = np.column_stack([t(column) for t, column in zip(transforms, values.T, strict=True)])
    lines: dict[int, tuple[PriorLine, Callable[[Guesses], Array]]] = {}
    if configurations.has_guess and np.isfinite(values[:, 0]).any():
        last = len(configurations.may_share_unit) - 1
        line = _line_of_first(configurations, trials, values[:, 0], last)
        lines[0] = line, lambda guesses: guesses.values[:, last]
    reference = configurations.reference.guesses.further
    for column, objective in enumerate(configurations.further_objectives):
        finite = np.isfinite(values[:, objective])
        if finite.any():
            guess = trials.guesses.further[finite, column]
            line = PriorLine.fit(reference[:, column], guess, values[finite, objective])
            lines[objective] = line, lambda guesses, c=column: guesses.further[:, c]  # type: ignore[misc]

    def expected(guesses: Guesses) -> Array:
        columns = np.zeros((len(guesses), values.shape[1]))  # where nothing is guessed, the middle
        for objective, (line, guess_of) in lines.items():
            columns[:, objective] = transforms[objective](line(guess_of(guesses)))
        return columns

    # The first trials say little of how far the objectives reach over the space.
    reach = [scaled, expected(configurations.reference.guesses)] if lines else [scaled]
    front = Tchebycheff.fit(np.concatenate(reach), weights)
    expectations = [lambda guesses: front(expected(guesses))] if lines else []
    return Combined(front(scaled), np.zeros(len(values)), expectations, None)


def _line_of_first(
    configurations: Configurations, trials: Described, values: Array, column: int
) -> PriorLine:
    """The line in one of the guesses at the first objective."""
    finite = np.isfinite(values)
    return PriorLine.fit(
        configurations.reference.guesses.values[:, column],
        trials.guesses.values[finite, column],
        values[finite],
        may_share_unit=configurations.may_share_unit[column],
    )


def _on(line: PriorLine, column: int) -> Expectation:
    return lambda guesses: line(guesses.values[:, column])
