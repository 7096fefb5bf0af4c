"""Earlier studies that the sampler learns from, as plain values.

An Optuna study is one, wherever it is stored; so is a table of recorded trials that travels with a
package. Both become a ``SourceStudy``, and nothing that learns from it need know which it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import Literal
from typing import TYPE_CHECKING

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.search.history import published_features


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class SourceStudy:
    """Trials of an earlier study: of another model, another size, another target.

    Attributes:
        name: What it was, for error messages and reports.
        direction: Whether its values are to be made small or large.
        params: The parameters of each trial. They need not be those of the study that learns from
            it; what both have is used.
        values: The value of each trial, in the study's own unit, infinities allowed.
        features: Named numbers of each trial, as ``QuantuneSampler(features=...)`` gives them;
            empty where nothing is known. A number that is the same in all trials of a study
            describes its task.

    Raises:
        InputError: If the direction is neither of the two, the others are not of one length, or a
            value is NaN.
    """

    name: str
    direction: Literal["minimize", "maximize"]
    params: tuple[Mapping[str, Any], ...]
    values: tuple[float, ...]
    features: tuple[Mapping[str, float], ...]

    def __post_init__(self) -> None:
        if self.direction not in {"minimize", "maximize"}:
            raise InputError(
                f"source study {self.name!r}: the direction {self.direction!r} is neither "
                "'minimize' nor 'maximize'"
            )
        if not len(self.params) == len(self.values) == len(self.features):
            raise InputError(
                f"source study {self.name!r}: {len(self.params)} params, {len(self.values)} "
                f"values and {len(self.features)} features; give one of each for every trial"
            )
        if np.isnan(self.values).any():
            raise InputError(f"source study {self.name!r}: a value is NaN; leave such trials out")

    @classmethod
    def from_study(cls, study: Study) -> SourceStudy:
        """The complete trials of an Optuna study; of several objectives, the first.

        Features are those that a ``QuantuneSampler`` has stored with its trials, and the numbers
        among a trial's user attributes.
        """
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        is_maximized = study.directions[0] == StudyDirection.MAXIMIZE
        return cls(
            name=study.study_name,
            direction="maximize" if is_maximized else "minimize",
            params=tuple(trial.params for trial in trials),
            values=tuple(trial.values[0] for trial in trials),
            features=tuple(_features(trial) for trial in trials),
        )


def _features(trial: FrozenTrial) -> dict[str, float]:
    numbers = {
        name: float(value)
        for name, value in trial.user_attrs.items()
        if isinstance(value, (int, float)) and not abs(value) > sys.float_info.max
    }
    return {**numbers, **published_features(trial)}
