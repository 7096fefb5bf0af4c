"""Which parameters a configuration has, in a space where some depend on others.

An objective may ask for a parameter only if another one has certain values: the learning rate only
of a network, the units of a layer only if there are as many. The space does not say so, but the
trials do. What a configuration does not have must not tell it from others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.encoding import is_countable
from optuna_quantune.search.encoding import SpaceEncoding


if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Codes: TypeAlias = NDArray[np.float64]

# A parameter is believed to decide whether another one is asked for when it is less likely than
# this that any of them would explain the trials by chance.
_CHANCE = 0.25


@dataclass(frozen=True)
class _Condition:
    """That a parameter is asked for depends on another.

    Attributes:
        column: The parameter.
        parent: The other.
        without: Codes of the other, NaN where it is not asked for itself, without the parameter.
    """

    column: int
    parent: int
    without: Codes


class Conditions:
    """What finished trials say of which parameters depend on which.

    A parameter depends on the one with the fewest values that explains all trials. Of values that
    were not tried it is taken to be asked for.

    Args:
        encoding: The space.
        asked: Codes of complete trials, NaN where one has not asked for the parameter, float64 of
            shape (n_trials, n_params).

    Attributes:
        known: Columns of the parameters that all trials have asked for, or of which it is known
            when they are asked for.
    """

    known: list[int]

    def __init__(self, encoding: SpaceEncoding, asked: Codes) -> None:
        self._encoding = encoding
        self._conditions: list[_Condition] = []
        missing = np.isnan(asked)
        self.known = np.flatnonzero(~missing.any(axis=0)).tolist()
        left = np.flatnonzero(missing.any(axis=0) & ~missing.all(axis=0)).tolist()
        while found := [f for c in left if (f := _condition(c, self.known, encoding, asked))]:
            self._conditions += found
            self.known += [condition.column for condition in found]
            left = [column for column in left if column not in self.known]

    def __bool__(self) -> bool:
        return bool(self._conditions)

    def inactive(self, codes: Codes) -> NDArray[np.bool_]:
        """Which parameters configurations do not have, bool of the shape of `codes`."""
        result = np.zeros(codes.shape, dtype=bool)
        for condition in self._conditions:
            states = np.where(result[:, condition.parent], np.nan, codes[:, condition.parent])
            result[:, condition.column] = _is_in(states, condition.without)
        return result

    def kernel_features(self, codes: Codes, kernel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Kernel features in which to lack a parameter is like no value of it, and like itself.

        Args:
            codes: The configurations, float64 of shape (n_configs, n_params).
            kernel: The ``SpaceEncoding.kernel_features`` of the codes.
        """
        if not self._conditions:
            return kernel
        inactive, kernel = self.inactive(codes), kernel.copy()
        sizes = self._encoding.block_sizes
        ends = np.cumsum(sizes)
        conditional = [condition.column for condition in self._conditions]
        for column in conditional:
            kernel[inactive[:, column], ends[column] - sizes[column] : ends[column]] = 0.0
        return np.concatenate([kernel, inactive[:, conditional].astype(np.float32)], axis=1)

    def tree_features(self, codes: Codes, trees: NDArray[np.float32]) -> NDArray[np.float32]:
        """Columns for trees, NaN for what a configuration lacks.

        Args:
            codes: The configurations, float64 of shape (n_configs, n_params).
            trees: The ``SpaceEncoding.tree_features`` of the codes.
        """
        if not self._conditions:
            return trees
        return self._encoding.tree_features(np.where(self.inactive(codes), np.nan, codes))


def inferred_space(trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """The parameters that all trials have, and those of which it is known when they have them.

    Those whose range has changed are left out.

    Args:
        trials: The complete trials of a study.
    """
    space: dict[str, BaseDistribution] = {}
    changed = set()
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if space.setdefault(name, distribution) != distribution:
                changed.add(name)
    space = {n: d for n, d in space.items() if n not in changed and is_countable(d)}
    if all(trial.params.keys() >= space.keys() for trial in trials):
        return space
    encoding = SpaceEncoding(space)
    asked = encoding.encode_known([trial.params for trial in trials])
    names = [encoding.names[column] for column in Conditions(encoding, asked).known]
    return {name: space[name] for name in names}


def _condition(
    column: int, known: list[int], encoding: SpaceEncoding, asked: Codes
) -> _Condition | None:
    """On which one of the known parameters another depends, if on any."""
    is_missing = np.isnan(asked[:, column])
    found = []
    for parent in known:
        states = asked[:, parent]
        without, n_states = np.unique(states[is_missing]), len(np.unique(states))
        # The first trial of each value says nothing; each further one halves the chance.
        chance = len(known) * 0.5 ** (len(states) - n_states)
        is_likely = encoding.n_values[parent] > 0 and chance <= _CHANCE
        if is_likely and not _is_in(states[~is_missing], without).any():
            found.append((n_states, _Condition(column, parent, without)))
    return min(found, key=lambda each: each[0])[1] if found else None


def _is_in(states: Codes, some: Codes) -> NDArray[np.bool_]:
    return np.isin(states, some) | (np.isnan(states) & np.isnan(some).any())
