from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import optuna
import pytest
from numpy.typing import NDArray

from optuna_quantune.builder import Builder
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.goals import Goals
from optuna_quantune.goals import Outcome
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.report.console import pareto_table
from optuna_quantune.selection import select
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target
from optuna_quantune.tuning import tune
from optuna_quantune.tuning import TuningResult


OUTCOME = Outcome(value=0.7, drop=0.02, latency_ratio=0.6, size_bytes=3_000_000)

SPACE = SearchSpace(
    {"granularity": ["tensor", "channel"], "mixed_precision": ["none", "first_last"]}
)


@pytest.fixture
def run(toy_model: Path, toy_inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`tune` with all 4 configurations, their latency a fixed function of their size."""

    def latency(self: object, model: bytes, *, repeats: int = 0) -> LatencyRatio:
        ratio = len(model) / 20_000
        return LatencyRatio(ratio, 1.0, ratio, 0.9 * ratio, 1.1 * ratio)

    monkeypatch.setattr(QuantizationObjective, "latency", latency)

    def run(**arguments: Any) -> TuningResult:
        inputs = ArrayInputs(toy_inputs)
        options: dict[str, Any] = {"space": SPACE, "n_trials": 4, "cache": None}
        options |= {"calibration": inputs, "evaluation": inputs, **arguments}
        return tune(toy_model, **options)

    return run


def test_values_come_in_the_order_of_the_objectives() -> None:
    assert Goals(("size", "accuracy", "latency")).values(OUTCOME) == (3e6, 0.7, 0.6)
    assert Goals().values(OUTCOME) == (0.7,)


def test_a_constraint_is_feasible_exactly_where_its_bound_is_kept() -> None:
    kept = Goals(max_accuracy_drop=0.02, max_latency=0.6, max_size=3_000_000)
    assert set(kept.constraints(OUTCOME).values()) == {0.0}
    assert kept.missed(OUTCOME) == ()
    missed = Goals(max_accuracy_drop=0.01, max_latency=0.5, max_size=2_999_999)
    assert all(violation > 0 for violation in missed.constraints(OUTCOME).values())
    drop, latency, size = missed.missed(OUTCOME)
    assert "loses 0.02, more than 0.01" in drop
    assert "0.60x" in latency
    assert "3,000,000 bytes" in size
    assert Goals().constraints(OUTCOME) == {}
    for right, bound in ((0.99, 0.01), (0.98, 0.02), (0.95, 0.05)):  # 1 - 0.99 is more than 0.01
        kept = Goals(max_accuracy_drop=bound)
        outcome = dataclasses.replace(OUTCOME, drop=1.0 - right)
        assert kept.constraints(outcome) == {"accuracy_drop": 0.0}
        assert kept.missed(outcome) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objectives": ()}, "objectives: give different ones of accuracy, latency, size"),
        ({"objectives": ("size", "size")}, "objectives: give different ones"),
        ({"objectives": ("speed",)}, "objective 'speed': use accuracy, latency, size"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop: -0.1 must not be negative"),
        ({"max_latency": 0.0}, "max_latency: 0.0 must be positive"),
        ({"max_latency": float("nan")}, "max_latency: nan must be positive"),
        ({"max_accuracy_drop": float("nan")}, "max_accuracy_drop: nan must not be negative"),
        ({"max_size": 0}, "max_size: 0 must be positive"),
    ],
)
def test_goals_that_no_model_can_reach_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Goals(**arguments)


def test_a_study_with_several_objectives_has_their_values_and_its_pareto_front(run) -> None:  # type: ignore[no-untyped-def]
    result = run(objectives=["size", "accuracy", "latency"])
    study = result.study
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["size", "agreement", "latency"]
    values = np.array([trial.values for trial in study.trials])
    for trial, (size, agreement, latency) in zip(study.trials, values, strict=True):
        attributes = trial.user_attrs
        assert (size, agreement) == (attributes["size_bytes"], attributes["agreement"])
        assert attributes["latency_low"] < latency < attributes["latency_high"]
    costs = values * [1, -1, 1]
    best = [
        number
        for number, cost in enumerate(costs)
        if not any(np.all(other <= cost) and np.any(other < cost) for other in costs)
    ]
    assert sorted(trial.number for trial in result.pareto) == best
    assert len(pareto_table(result).trials) == len(best)
    assert result.trial.number in range(4)


def test_with_one_objective_there_is_no_front(run) -> None:  # type: ignore[no-untyped-def]
    result = run()
    assert result.pareto == ()
    assert [trial.value for trial in result.study.trials] == [
        trial.user_attrs["agreement"] for trial in result.study.trials
    ]


def test_the_most_accurate_within_a_bound_on_size_is_written(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sizes = sorted(trial.user_attrs["size_bytes"] for trial in run().study.trials)
    result = run(max_size=sizes[1], output=tmp_path / "int8.onnx")
    assert result.goal_met
    assert (tmp_path / "int8.onnx").stat().st_size <= sizes[1]
    assert {t.user_attrs["size_bytes"] > sizes[1] for t in result.study.trials} == {True, False}
    for trial in result.study.trials:
        kept = trial.user_attrs["size_bytes"] <= sizes[1]
        assert (trial.constraints["size"] <= 0) == kept
    assert result.remarks == []


def test_a_bound_that_no_trial_keeps_gives_the_nearest_and_says_so(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    result = run(max_latency=0.01, output=tmp_path / "int8.onnx")
    assert not result.goal_met
    assert (tmp_path / "int8.onnx").is_file()
    latencies = [trial.user_attrs["latency_ratio"] for trial in result.study.trials]
    assert result.trial.user_attrs["latency_ratio"] == min(latencies)
    goal, best, *_ = result.remarks
    assert "Goal not met: in its trial its latency is" in goal
    assert "more than 0.01x" in goal
    assert "best model so far" in best


def test_a_bound_kept_by_luck_only_is_missed_when_measured_again(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = QuantizationObjective.latency

    def slower_at_last(self: Any, model: bytes, *, repeats: int = 0) -> LatencyRatio:
        if not repeats:
            return measured(self, model)
        return LatencyRatio(2.0, 1.0, 2.0, 1.5, 2.5)

    monkeypatch.setattr(QuantizationObjective, "latency", slower_at_last)
    result = run(max_latency=1.2)
    assert [trial.constraints["latency"] <= 0 for trial in result.study.trials].count(True) > 0
    assert len(result.missed) == 1
    assert "measured again" in result.missed[0]
    assert any("SLOWER than the float model" in line for line in result.remarks)


def test_latency_here_is_no_reproach_to_a_model_for_another_device(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = LatencyRatio(2.0, 1.0, 2.0, 1.5, 2.5)
    monkeypatch.setattr(QuantizationObjective, "latency", lambda *a, **options: slow)
    elsewhere = dataclasses.replace(get_target("cpu"), name="elsewhere", measures_latency=False)
    (line,) = run(target=elsewhere).remarks
    assert "says nothing about target 'elsewhere'" in line


def test_a_bound_kept_by_luck_gives_way_to_the_next_trial(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = iter([1.5, 1.3, 1.0, 0.9])

    def latency(self: object, model: bytes, *, repeats: int = 0) -> LatencyRatio:
        ratio = next(again) if repeats else 1.0
        return LatencyRatio(ratio, 1.0, ratio, ratio - 0.1, ratio + 0.1)

    monkeypatch.setattr(QuantizationObjective, "latency", latency)
    result = run(max_latency=1.2)
    assert result.latency.ratio == 1.0
    assert result.goal_met
    assert list(again) == [0.9]
    first, _ = select(result.study, prefer="accuracy")
    assert result.trial.number != first.number


def test_where_only_luck_keeps_a_bound_accuracy_is_not_given_up_for_it(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least accurate trial alone kept the bound; measured again, it does not either."""
    trials = run(metric="sqnr_db").study.trials
    worst = min(trials, key=lambda trial: trial.values[0]).user_attrs["size_bytes"]

    def latency(self: object, model: bytes, *, repeats: int = 0) -> LatencyRatio:
        ratio = 1.0 if repeats else (0.7 if len(model) == worst else 0.9)
        return LatencyRatio(ratio, 1.0, ratio, ratio - 0.05, ratio + 0.05)

    monkeypatch.setattr(QuantizationObjective, "latency", latency)
    result = run(metric="sqnr_db", max_latency=0.8)
    kept = [trial for trial in result.study.trials if trial.constraints["latency"] <= 0]
    assert len(kept) == 1
    assert result.trial.values[0] > kept[0].values[0]
    assert not result.goal_met


def test_what_a_bound_on_latency_allows_is_spent_on_accuracy(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latency(self: object, model: bytes, *, repeats: int = 0) -> LatencyRatio:
        ratio = (len(model) / 20_000) ** 8  # the least noisy of the four is not the smallest
        return LatencyRatio(ratio, 1.0, ratio, 0.99 * ratio, 1.01 * ratio)

    monkeypatch.setattr(QuantizationObjective, "latency", latency)
    result = run(max_latency=10.0)
    most_accurate, fastest = (
        select(result.study, prefer=preference)[0].number for preference in ("accuracy", "latency")
    )
    assert most_accurate != fastest
    assert result.trial.number == most_accurate
    assert run(max_latency=10.0, prefer="latency").trial.number == fastest
    assert run(max_latency=10.0, max_accuracy_drop=1.0).trial.number == fastest


def test_too_few_inputs_to_split_are_reported(run, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    run(n_trials=1)
    assert "80 evaluation inputs are too few to hold half of them out" in caplog.text


def test_a_timeout_that_preparation_uses_up_leaves_one_trial(run) -> None:  # type: ignore[no-untyped-def]
    assert len(run(timeout=1e-6).study.trials) == 1
    assert (
        len(run(timeout=60.0, n_trials=None, space=SearchSpace({"clipping": ["kl"]})).pareto) == 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_trials": None}, "n_trials and timeout: give at least one"),
        ({"timeout": 0.0}, "timeout: 0.0 seconds is not positive"),
        ({"prefer": "beauty"}, "prefer 'beauty': use 'latency', 'size' or 'accuracy'"),
        ({"providers": ["AbacusExecutionProvider"]}, "AbacusExecutionProvider is not in this"),
        ({"providers": []}, r"providers: \[\] must be a list"),
        ({"metric": "sqnr_db", "max_accuracy_drop": 1.0}, "max_accuracy_drop: the float model"),
    ],
)
def test_mistakes_in_goals_and_budgets_are_found_before_the_search(  # type: ignore[no-untyped-def]
    run, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(**arguments)


def test_provider_options_reach_onnx_runtime(
    toy_model: Path, toy_inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    make = onnxruntime.InferenceSession

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs.get("providers"))
        return make(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    inputs = ArrayInputs(toy_inputs)
    provider = ("CPUExecutionProvider", {"enable_cpu_mem_arena": "0"})
    objective = QuantizationObjective(
        toy_model, calibration=inputs, evaluation=inputs, providers=[provider], cache=None
    )
    assert objective.float_evaluation.measurement.n == 80
    assert given[-1] == [provider]


def test_a_study_with_other_directions_is_refused(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    inputs = ArrayInputs(toy_inputs)
    objective = QuantizationObjective(
        toy_model,
        calibration=inputs,
        evaluation=inputs,
        objectives=["accuracy", "size"],
        cache=None,
    )
    study = optuna.create_study(direction="maximize")
    with pytest.raises(InputError, match=r"directions=\['maximize', 'minimize'\]"):
        objective.claim(study)
    optuna.create_study(directions=objective.directions).optimize(objective, n_trials=1)


def test_mistakes_are_found_on_the_first_input(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    class Broken(ArrayInputs):
        def batches(self, batch_size: int, indices: Any = None) -> Any:
            raise InputError("images/07.png: does not decode")

    totals: list[int] = []
    objective = QuantizationObjective(
        toy_model,
        calibration=Broken(toy_inputs),
        evaluation=ArrayInputs(toy_inputs),
        cache=None,
        progress=lambda stage, done, total: totals.append(total),
    )
    with pytest.raises(InputError, match=r"07\.png"):
        objective.prepare()
    assert totals == []  # nothing was measured before
    labelled = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs, labels=np.full(80, 10)),
        cache=None,
    )
    with pytest.raises(InputError, match="10"):
        labelled.prepare()
    assert "float_evaluation" not in labelled.__dict__


@pytest.fixture
def many_inputs() -> ArrayInputs:
    """Enough for trials to race."""
    rng = np.random.default_rng(2)
    return ArrayInputs(rng.standard_normal((300, 3, 16, 16)).astype(np.float32))


def test_latency_alone_can_be_the_objective(run, many_inputs: ArrayInputs) -> None:  # type: ignore[no-untyped-def]
    """Accuracy is measured in races all the same; their estimates are not the trial's value."""
    result = run(evaluation=many_inputs, objectives=["latency"], max_accuracy_drop=0.2)
    trials = result.study.trials
    assert [trial.value for trial in trials] == [t.user_attrs["latency_ratio"] for t in trials]
    assert all("rungs" not in trial.user_attrs for trial in trials)
    assert all("inputs_evaluated" in trial.user_attrs for trial in trials)
    kept = [trial for trial in trials if trial.constraints["accuracy_drop"] <= 0]
    assert result.trial.value == min(trial.value for trial in kept)


def test_constraints_are_expected_before_they_are_measured(
    toy_model: Path, many_inputs: ArrayInputs
) -> None:
    def features(mixed_precision: str = "none", **arguments: Any) -> dict[str, float]:
        objective = QuantizationObjective(
            toy_model,
            calibration=many_inputs,
            evaluation=many_inputs,
            space=SPACE,
            cache=None,
            **arguments,
        )
        return objective.features({"granularity": "channel", "mixed_precision": mixed_precision})

    plain = features()
    assert not [name for name in plain if name.startswith("prior:")]
    bounded = features(max_latency=0.5, max_size=10_000, max_accuracy_drop=0.01)
    assert {n for n in bounded if n.startswith("prior:")} == {"prior:latency", "prior:size"}
    assert bounded["prior"] == plain["prior"]
    twice = features(max_latency=1.0, max_size=20_000)
    assert bounded["prior:latency"] + 1.0 == pytest.approx(2.0 * (twice["prior:latency"] + 1.0))
    # Of 16 * 3 * 9, 16 * 9, 16 * 16 and 16 * 10 weights the first and the last stay in float.
    larger = features("first_last", max_size=10_000)["prior:size"] - bounded["prior:size"]
    assert larger == pytest.approx(3 * (16 * 3 * 9 + 16 * 10) / 10_000)
    fast = features(objectives=["latency"], max_accuracy_drop=0.01)
    assert fast["prior"] == pytest.approx(twice["prior:latency"] + 1.0)
    drop = 1.0 - plain["expected_agreement"]
    assert fast["prior:accuracy_drop"] == pytest.approx(drop - 0.01)
    several = features(objectives=["latency", "accuracy", "size"])
    assert several["prior"] == fast["prior"]
    assert several["prior_2"] == plain["prior"]
    small = features(objectives=["size"])
    assert several["prior_3"] == small["prior"]
    assert small["prior"] == pytest.approx((twice["prior:size"] + 1.0) * 20_000)


def test_nothing_is_expected_of_the_latency_on_a_device_that_is_not_here(
    toy_model: Path, many_inputs: ArrayInputs
) -> None:
    builder = Builder(
        load_float_model(toy_model),
        many_inputs.bind([InputSpec("input", (None, 3, 16, 16), np.dtype(np.float32))]),
        space=SPACE,
        target=get_target("tensorrt"),
        takes_batches=lambda: True,
        cache=None,
        progress=lambda stage, done, total: None,
    )
    assert np.isnan(builder.predict_latency(QuantizationConfig()))
    assert builder.predict_size(QuantizationConfig()) > 0
