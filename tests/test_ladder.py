"""Trials that climb the ladder: what they run, what they report, what they are worth."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.selection import pack
from optuna_quantune.selection import select
from optuna_quantune.selection import unpack
from optuna_quantune.selection import VALUE_KEY
from optuna_quantune.space import SearchSpace


Make = Callable[..., QuantizationObjective]

N = 400
GOOD: dict[str, object] = {
    "calibration_images": "all",
    "scheme": "asymmetric",
    "clipping": "max",
    "granularity": "channel",
    "mixed_precision": "first_last",
}
# The first calibration input is far too small for the others.
COLLAPSED: dict[str, object] = {**GOOD, "calibration_images": 1, "granularity": "tensor"}
METRICS = ("top1", "top5", "agreement")


@pytest.fixture(scope="module")
def many_inputs() -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    scale = np.exp(0.3 * rng.standard_normal((N, 1, 1, 1)))
    return (rng.standard_normal((N, 3, 16, 16)) * scale).astype(np.float32)


@pytest.fixture(scope="module")
def make(toy_model: Path, many_inputs: NDArray[np.float32]) -> Make:
    """Makes objectives of the toy model with random labels, which it is mostly wrong about."""
    labels = np.random.default_rng(3).integers(0, 10, N)
    calibration = many_inputs[:40].copy()
    calibration[0] *= 0.01

    def objective(**arguments: object) -> QuantizationObjective:
        return QuantizationObjective(
            toy_model,
            calibration=ArrayInputs(calibration),
            evaluation=ArrayInputs(many_inputs, labels=labels),
            cache=None,
            **arguments,  # type: ignore[arg-type]
        )

    return objective


def run(
    objective: QuantizationObjective, *configurations: Mapping[str, object]
) -> list[FrozenTrial]:
    study = optuna.create_study(direction="maximize", pruner=RacingPruner())
    for params in configurations:
        study.enqueue_trial(dict(params))
    study.optimize(objective, n_trials=len(configurations))
    return study.trials


@pytest.mark.parametrize("metric", METRICS)
def test_an_exact_trial_has_the_value_of_all_inputs(make: Make, metric: str) -> None:
    objective = make(metric=metric, exact=True)
    (trial,) = run(objective, GOOD)
    measured = objective.evaluate(objective.quantize(objective.space.config(GOOD)).proto)
    assert trial.value == objective.value(measured)
    for name in ("top1", "top5", "agreement"):
        assert trial.user_attrs[name] == getattr(measured.measurement, name)
    assert trial.user_attrs["sqnr_db"] == pytest.approx(measured.measurement.sqnr_db, abs=1e-3)
    assert trial.user_attrs["inputs_evaluated"] == N
    assert trial.user_attrs["interval"] == [trial.value, trial.value]
    assert unpack(trial.user_attrs["correct"], N).mean() == trial.value


@pytest.mark.parametrize("metric", METRICS)
def test_a_race_ends_early_within_its_precision_of_the_truth(make: Make, metric: str) -> None:
    objective = make(metric=metric, precision=0.01)
    (trial,) = run(objective, GOOD)
    measured = objective.evaluate(objective.quantize(objective.space.config(GOOD)).proto)
    low, high = trial.user_attrs["interval"]
    assert trial.user_attrs["certain"]
    assert trial.user_attrs["inputs_evaluated"] < N / 2
    assert (high - low) / 2 <= 0.01
    assert low <= objective.value(measured) <= high
    assert low <= trial.value <= high
    # The others are estimates, too.
    for name in ("top1", "top5", "agreement"):
        assert trial.user_attrs[name] == pytest.approx(
            getattr(measured.measurement, name), abs=0.1
        )
    assert trial.user_attrs["sqnr_db"] == pytest.approx(measured.measurement.sqnr_db, abs=1.5)
    seen = unpack(trial.user_attrs["seen"], N)
    assert seen.sum() == trial.user_attrs["inputs_evaluated"]
    assert unpack(trial.user_attrs["agrees"], N)[~seen].all()


def test_every_rung_is_an_intermediate_value_with_its_interval(make: Make) -> None:
    (trial,) = run(make(exact=True), GOOD)
    rungs = trial.user_attrs["rungs"]
    assert [step for step, *_ in rungs[:3]] == [0, 16, 64]
    assert trial.intermediate_values == {step: estimate for step, estimate, _, _ in rungs}
    assert rungs[0][1] == trial.user_attrs["prior"]
    assert rungs[0][2:] == [0.0, 1.0]
    assert rungs[-1] == [N, trial.value, trial.value, trial.value]
    assert all(low <= estimate <= high for _, estimate, low, high in rungs)


def test_a_collapsed_configuration_ends_within_the_pilot_and_its_latency_is_not_measured(
    make: Make,
) -> None:
    objective = make(metric="agreement")
    good, collapsed = run(objective, GOOD, COLLAPSED)
    assert good.state == TrialState.COMPLETE
    assert collapsed.state == TrialState.PRUNED
    assert collapsed.user_attrs["inputs_evaluated"] <= 64
    assert "latency_ratio" not in collapsed.user_attrs


def test_the_model_of_a_pruned_trial_is_not_run_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(metric="agreement")
    study = optuna.create_study(direction="maximize", pruner=RacingPruner())
    for params in (GOOD, COLLAPSED):
        study.enqueue_trial(params)
    study.optimize(objective, n_trials=2)
    monkeypatch.setattr(objective._evaluator, "runner", None)  # nothing may be run
    study.enqueue_trial(COLLAPSED)
    study.optimize(objective, n_trials=1)
    assert study.trials[2].state == TrialState.PRUNED
    assert study.trials[2].user_attrs["duplicate_of"] == 1
    assert study.trials[2].intermediate_values == study.trials[1].intermediate_values


def test_trials_do_not_depend_on_the_process_that_runs_them(make: Make) -> None:
    first, second = (run(make(), GOOD)[0] for _ in range(2))
    assert first.intermediate_values == second.intermediate_values
    assert first.user_attrs["seen"] == second.user_attrs["seen"]


def test_the_objective_can_be_asked_for_any_rung(make: Make) -> None:
    objective = make(metric="agreement")
    (trial,) = run(objective, GOOD)
    by_step = {step: Interval(*rest) for step, *rest in trial.user_attrs["rungs"]}
    assert objective.estimate(GOOD, inputs=0) == by_step[0]
    assert objective.estimate(GOOD, inputs=16) == by_step[16]
    assert objective.estimate(GOOD, inputs=70) == by_step[64]
    assert objective.estimate(GOOD) == by_step[trial.user_attrs["inputs_evaluated"]]
    exact = objective.estimate(GOOD, inputs=N)
    assert exact.low == exact.high
    with pytest.raises(InputError, match="inputs: 3 is less than the 16"):
        objective.estimate(GOOD, inputs=3)
    with pytest.raises(InputError, match="'sqnr_db': has no rungs"):
        make(metric="sqnr_db").estimate(GOOD)


def test_a_bar_is_what_a_bound_on_the_drop_leaves(make: Make) -> None:
    (trial,) = run(make(metric="agreement", max_accuracy_drop=0.05), GOOD)
    assert trial.user_attrs["bar"] == pytest.approx(0.95)


def test_several_objectives_race_without_reports(make: Make) -> None:
    objective = make(metric="agreement", objectives=("accuracy", "size"), precision=0.01)
    study = optuna.create_study(directions=objective.directions)
    study.enqueue_trial(GOOD)
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.intermediate_values == {}
    assert trial.user_attrs["inputs_evaluated"] < N
    assert trial.values[0] == trial.user_attrs[VALUE_KEY]


@pytest.mark.parametrize("metric", METRICS)
def test_the_default_precision_is_no_finer_than_two_inputs(make: Make, metric: str) -> None:
    assert N < 1000, "with more inputs the other bound, 0.002, would decide"
    (by_default,) = run(make(metric=metric), GOOD)
    (two_inputs,) = run(make(metric=metric, precision=2 / N), GOOD)
    (one_input,) = run(make(metric=metric, precision=1 / N), GOOD)
    for name in ("value", "intermediate_values"):
        assert getattr(by_default, name) == getattr(two_inputs, name)
    seen = [trial.user_attrs["inputs_evaluated"] for trial in (by_default, two_inputs, one_input)]
    assert seen[0] == seen[1] < seen[2]


def test_a_precision_that_is_none_is_refused(make: Make) -> None:
    with pytest.raises(InputError, match="precision: 0.0 is not positive"):
        make(precision=0.0)


def test_a_paired_test_leaves_out_inputs_that_one_trial_has_not_run() -> None:
    study = optuna.create_study(direction="maximize")
    right = np.ones(N, np.bool_)
    wrong = right.copy()
    wrong[200:260] = False
    for bits, seen, latency in ((right, 200, 1.0), (wrong, N, 0.2)):
        trial = study.ask()
        for name, value in {
            "correct": pack(bits),
            "agrees": pack(bits),
            "seen": pack(np.arange(N) < seen),
            "n": N,
            "latency_ratio": latency,
        }.items():
            trial.set_user_attr(name, value)
        study.tell(trial, float(bits.mean()))
    # On the inputs that both have run they are alike, so that the faster one is chosen.
    assert select(study)[0].number == 1


def test_few_inputs_run_in_their_order(toy_model: Path, toy_inputs: NDArray[np.float32]) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs),
        space=SearchSpace.preset("quantune"),
        cache=None,
    )
    (trial,) = run(objective, GOOD)
    assert "rungs" not in trial.user_attrs
    assert trial.value == trial.user_attrs["agreement"]
