"""The trials of a study as arrays: the only place that reads trials and their attributes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_quantune.search.encoding import plain
from optuna_quantune.search.pruner import latest_estimate
from optuna_quantune.search.targets import LARGEST


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from optuna_quantune.search.encoding import SpaceEncoding

Array: TypeAlias = NDArray[np.float64]

_PLAN_KEY = "quantune:plan"
# Half-width of a trial's interval, which holds its value with 95 %, in standard deviations.
_INTERVAL = 1.96
# Values of system attributes must be shorter than 2046 characters in an RDBStorage.
_MAX_ATTR_LENGTH = 2045


@dataclass(frozen=True)
class History:
    """What the trials of a study say about one search space. Rows are trials by number.

    Attributes:
        codes: Trials with values, float64 of shape (n_trials, n_params).
        values: Their objectives, all to be minimised, infinities allowed, float64 of shape
            (n_trials, n_objectives).
        noise: Standard deviation of the values of the first objective around the trials' true
            ones, 0 for complete trials, inf where it is unknown; float64 of shape (n_trials,).
        constraints: Constraint values by name (feasible when at most 0), NaN where a trial set
            none, each float64 of shape (n_trials,).
        asked: Codes of complete trials, NaN where one has not asked for the parameter, float64 of
            shape (n_complete, n_params).
        failed: Codes of failed trials and of those that were pruned before any report, float64 of
            shape (n_failed, n_params).
        pending: Codes of running and enqueued trials, float64 of shape (n_pending, n_params).
        seen: Codes that determine a whole configuration that is measured, failed or pending, NaN
            where a complete trial has not asked for the parameter (it speaks for all its values),
            float64 of shape (n_seen, n_params). A trial with parameters beyond the space, as in
            a conditional one, is not among them: it is one of many with the same codes. Those
            that are set from outside, and have the same value there, do not count as beyond.
        finished: Numbers of the trials that had finished.
    """

    codes: Array
    values: Array
    noise: Array
    constraints: Mapping[str, Array]
    asked: Array
    failed: Array
    pending: Array
    seen: Array
    finished: frozenset[int]

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Which trials violate no constraint; bool of shape (n_trials,)."""
        result = np.ones(len(self.codes), dtype=bool)
        for values in self.constraints.values():
            result &= ~(values > 0.0)
        return result


def read_history(
    study: Study,
    encoding: SpaceEncoding,
    current: int | None,
    fixed: Mapping[str, Any] = MappingProxyType({}),
    *,
    ending: int | None = None,
    is_inferred: bool = False,
) -> History:
    """Reads all trials of the study except the one with the number ``current``.

    Trials that lack a parameter of the space, or have a value outside it, are left out. A trial
    that was stopped early, or is still running, counts as its `latest_estimate` with the
    uncertainty that this says. Without one, a pruned trial counts as its last intermediate
    value, but as no better than the median of the complete ones, and of unknown uncertainty: that
    it was stopped says so much and no more. One that was pruned before it reported anything counts
    as failed: so objectives reject configurations that cannot be run.

    Args:
        study: The study.
        encoding: The space.
        current: The number of the trial that is left out.
        fixed: Values of parameters that are set from outside.
        ending: The number of a trial that is complete and still counts as running.
        is_inferred: Whether the space is what the complete trials have asked for, so that one that
            lacks a parameter has had no use for it.
    """
    # As in GridSampler: pruners such as HyperbandPruner hide trials from study.get_trials, and a
    # cached list would miss what other processes are running.
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
    sign = np.array([-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions])
    informative: list[tuple[FrozenTrial, Array]] = []
    asked, failed, pending, seen = [], [], [], []
    for trial in trials:
        if trial.number == current:
            continue
        is_complete = trial.state == TrialState.COMPLETE or trial.number == ending
        codes = encoding.encode(configuration_of(trial, encoding))
        if codes is None and is_complete and is_inferred:
            codes = _filled(trial, encoding)
        if codes is None:
            continue
        if is_complete:
            asked.append(_as_asked(trial, encoding, codes))
        if _is_whole(trial, encoding, fixed):
            seen.append(asked[-1] if is_complete else codes)
        if trial.state == TrialState.FAIL:
            failed.append(codes)
        elif trial.state == TrialState.COMPLETE or _estimate(trial, len(sign)) is not None:
            informative.append((trial, codes))
        elif not trial.state.is_finished():
            pending.append(codes)
        elif trial.intermediate_values:
            informative.append((trial, codes))
        elif trial.params:  # else it was never begun, as an enqueued duplicate
            failed.append(codes)
    # What was interrupted, and measured when it was run again, has not failed.
    measured = {codes.tobytes() for _, codes in informative}
    failed = [codes for codes in failed if codes.tobytes() not in measured]
    complete = [t.values for t, _ in informative if t.state == TrialState.COMPLETE]
    middle = _finite_median(sign * _rows(complete, len(sign)))
    outcomes = [_outcome(trial, sign, middle) for trial, _ in informative]
    names = sorted({name for trial, _ in informative for name in trial.constraints})
    return History(
        codes=_rows([codes for _, codes in informative], encoding.n_params),
        values=_clipped(_rows([values for values, _ in outcomes], len(sign))),
        noise=np.array([noise for _, noise in outcomes], dtype=np.float64),
        constraints={
            name: _clipped(np.array([t.constraints.get(name, np.nan) for t, _ in informative]))
            for name in names
        },
        asked=_rows(asked, encoding.n_params),
        failed=_rows(failed, encoding.n_params),
        pending=_rows(pending, encoding.n_params),
        seen=_rows(seen, encoding.n_params),
        finished=frozenset(trial.number for trial in trials if trial.state.is_finished()),
    )


def is_taken(
    study: Study,
    encoding: SpaceEncoding,
    codes: Array,
    current: int,
    known: frozenset[int],
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> bool:
    """Whether a trial that was not yet known has published or measured a configuration.

    Every trial first publishes its plan and then asks this, so of two that choose alike the one
    that published later sees the other. Both may see each other.

    Args:
        study: The study.
        encoding: The space.
        codes: The configuration, float64 of shape (n_params,).
        current: The number of the trial that asks.
        known: Numbers of the trials that need not be looked at again.
        fixed: Values of parameters that are set from outside.
    """
    return any(
        np.array_equal(other, codes)
        for trial in study._storage.get_all_trials(study._study_id, deepcopy=False)
        if trial.number != current and trial.number not in known
        if _is_whole(trial, encoding, fixed)
        if (other := encoding.encode(configuration_of(trial, encoding))) is not None
    )


def publish_plan(
    study: Study,
    trial: FrozenTrial,
    params: Mapping[str, Any],
    features: Mapping[str, float] | None = None,
) -> None:
    """Tells other threads and processes what a running trial is going to measure.

    What is known of the configuration beforehand stays with the trial, for studies that learn
    from this one.
    """
    known = {name: value for name, value in (features or {}).items() if math.isfinite(value)}
    values = {name: plain(value) for name, value in params.items()}
    text = json.dumps({"params": values, "features": known})
    # A shorter plan must overwrite a longer one entirely; JSON ends may be padded.
    text = text.ljust(len("".join(_plan_chunks(study._storage.get_trial(trial._trial_id)))))
    for start in range(0, len(text), _MAX_ATTR_LENGTH):
        study._storage.set_trial_system_attr(
            trial._trial_id,
            f"{_PLAN_KEY}:{start // _MAX_ATTR_LENGTH}",
            text[start : start + _MAX_ATTR_LENGTH],
        )


def published_features(trial: FrozenTrial) -> dict[str, float]:
    """The features that the sampler has stored with a trial; none if another proposed it."""
    features: dict[str, float] = _plan(trial).get("features", {})
    return features


def configuration_of(trial: FrozenTrial, encoding: SpaceEncoding) -> dict[str, Any]:
    """The parameters of a trial, those included that it has not asked for yet."""
    if trial.params.keys() >= encoding.name_set:
        return trial.params
    enqueued = trial.system_attrs.get("fixed_params", {})
    return {**_plan(trial).get("params", {}), **enqueued, **trial.params}


def _plan_chunks(trial: FrozenTrial) -> list[str]:
    chunks: list[str] = []
    while (chunk := trial.system_attrs.get(f"{_PLAN_KEY}:{len(chunks)}")) is not None:
        chunks.append(chunk)
    return chunks


def _plan(trial: FrozenTrial) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads("".join(_plan_chunks(trial)) or "{}")
    except json.JSONDecodeError:
        # Another process is just writing it.
        return {}
    return plan


def _is_whole(trial: FrozenTrial, encoding: SpaceEncoding, fixed: Mapping[str, Any]) -> bool:
    others = trial.params.keys() - encoding.name_set
    return all(
        trial.distributions[name].single() or (name in fixed and trial.params[name] == fixed[name])
        for name in others
    )


def _as_asked(trial: FrozenTrial, encoding: SpaceEncoding, codes: Array) -> Array:
    """The codes of a complete trial, NaN where it has not asked for the parameter.

    What an objective asks for is decided by what it has been told before, so that all
    configurations that agree in that are one.
    """
    asked = np.array([name in trial.params for name in encoding.names])
    return np.where(asked, codes, np.nan) if asked.any() else codes


def _filled(trial: FrozenTrial, encoding: SpaceEncoding) -> Array | None:
    """The codes of a trial with neutral ones for what it has not asked for."""
    (codes,) = encoding.encode_known([trial.params])
    lacking = np.isnan(codes)
    if lacking.sum() > len(encoding.name_set - trial.params.keys()):
        return None  # a value outside the space
    return np.where(lacking, encoding.neutral, codes)


def _estimate(trial: FrozenTrial, n_objectives: int) -> tuple[float, float] | None:
    """The latest estimate of a trial's only value, and its standard deviation."""
    estimated = latest_estimate(trial)
    if estimated is None or n_objectives > 1:
        return None
    value, low, high = estimated
    return value, max(high - low, 0.0) / (2.0 * _INTERVAL)


def _outcome(trial: FrozenTrial, sign: Array, middle: Array) -> tuple[Array, float]:
    """The values of a trial, to be minimised, and the noise of the first."""
    if trial.state == TrialState.COMPLETE:
        return sign * np.array(trial.values, dtype=float), 0.0
    estimate = _estimate(trial, len(sign))
    if estimate is not None:
        return sign * estimate[0], estimate[1]
    last = sign * trial.intermediate_values[max(trial.intermediate_values)]
    return np.where(np.isnan(last), np.inf, np.maximum(last, middle)), math.inf


def _finite_median(values: Array) -> Array:
    """The median of the finite values of each column, -inf where there is none."""
    columns = [column[np.isfinite(column)] for column in _clipped(values).T]
    return np.array([np.median(c) if len(c) else -np.inf for c in columns], dtype=np.float64)


def _clipped(values: Array) -> Array:
    return np.where(np.isinf(values), values, np.clip(values, -LARGEST, LARGEST))


def _rows(rows: Sequence[Sequence[float] | Array], n_columns: int) -> Array:
    return np.array(rows, dtype=np.float64).reshape(len(rows), n_columns)
