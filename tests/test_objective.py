from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import optuna
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.dataset import ArrayFile
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import ReaderInputs
from optuna_quantune.goals import DROP_CONSTRAINT
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.space import SearchSpace


def outputs_of(model: Path | bytes, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    source = model if isinstance(model, bytes) else str(model)
    outputs: NDArray[np.float32] = onnxruntime.InferenceSession(source).run(
        None, {"input": inputs}
    )[0]
    return outputs


@pytest.fixture
def labels(toy_model: Path, toy_inputs: NDArray[np.float32]) -> NDArray[np.int64]:
    """What the float model says, wrong for every tenth input."""
    labels = outputs_of(toy_model, toy_inputs).argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 10
    return labels


@pytest.fixture
def objective(
    toy_model: Path, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> QuantizationObjective:
    return QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs[:40]),
        evaluation=ArrayInputs(toy_inputs, labels=labels),
        cache=None,
    )


def enqueued(objective: QuantizationObjective, **params: object) -> optuna.trial.FrozenTrial:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({**next(objective.space.grid()), **params})
    study.optimize(objective, n_trials=1)
    return study.trials[0]


def test_the_value_is_what_the_exported_file_measures(
    objective: QuantizationObjective,
    toy_model: Path,
    toy_inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    tmp_path: Path,
) -> None:
    trial = enqueued(objective, granularity="tensor", scheme="symmetric_power2")
    path = objective.export(trial, tmp_path / "int8.onnx")
    outputs, reference = outputs_of(path, toy_inputs), outputs_of(toy_model, toy_inputs)
    assert trial.value == np.mean(outputs.argmax(axis=1) == labels)
    attributes = trial.user_attrs
    assert attributes["agreement"] == np.mean(outputs.argmax(axis=1) == reference.argmax(axis=1))
    noise = np.sum(np.square(outputs - reference)) / np.sum(np.square(reference))
    assert attributes["sqnr_db"] == pytest.approx(-10 * np.log10(noise), abs=0.1)
    assert attributes["size_bytes"] == path.stat().st_size
    assert attributes["latency_ratio"] > 0


def test_without_labels_the_agreement_is_the_value(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs),
        cache=None,
    )
    trial = enqueued(objective)
    assert objective.metric == "agreement"
    assert trial.value == trial.user_attrs["agreement"]
    assert trial.user_attrs["top1"] is None


def test_every_value_of_the_corrections_builds_another_model_of_the_same_task(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    space = SearchSpace({"equalization": [False, True], "bias_correction": [False, True]})
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs[:40]),
        evaluation=ArrayInputs(toy_inputs),
        space=space,
        cache=None,
    )
    grid = {name: list(d.choices) for name, d in space.items()}  # type: ignore[attr-defined]
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.GridSampler(grid, seed=0)
    )
    study.optimize(objective)
    attributes = [trial.user_attrs for trial in study.trials]
    assert len({a["digest"] for a in attributes}) == 4
    assert len({a["prior"] for a in attributes}) == 4
    assert all(a["sqnr_db"] > 20.0 for a in attributes)


def test_a_configuration_that_builds_the_same_model_takes_the_earlier_result(
    toy_model: Path, toy_inputs: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs[:20]),  # so that 32 images are all images
        evaluation=ArrayInputs(toy_inputs),
        space=SearchSpace({"calibration_images": [32, "all"]}),
        cache=None,
    )
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"calibration_images": 32})
    study.optimize(objective, n_trials=1)
    monkeypatch.setattr(objective, "outputs", None)  # nothing may be run again
    study.enqueue_trial({"calibration_images": "all"})
    study.optimize(objective, n_trials=1)
    first, second = study.trials
    assert second.state == TrialState.COMPLETE
    assert second.value == first.value
    assert second.user_attrs["duplicate_of"] == 0
    assert second.user_attrs["config"]["calibration_images"] == "all"


def test_features_are_finite_numbers_and_the_prior_lies_in_the_unit_of_the_value(
    objective: QuantizationObjective,
) -> None:
    for params in objective.space.grid():
        features = objective.features(params)
        assert all(np.isfinite(value) for value in features.values())
        assert 0.0 <= features["prior"] <= objective.value(objective.float_evaluation)


def test_a_pruner_sees_intermediate_values_and_can_stop_a_trial(
    objective: QuantizationObjective,
) -> None:
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=2.0)
    )
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    whole = optuna.create_study(direction="maximize")
    whole.optimize(objective, n_trials=1)
    trial = whole.trials[0]
    assert trial.intermediate_values[80] == trial.value
    assert 5 <= len(trial.intermediate_values) <= 10


def test_a_bound_on_the_drop_is_a_constraint_of_the_trial(
    toy_model: Path, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64]
) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs, labels=labels),
        max_accuracy_drop=0.05,
        cache=None,
    )
    trial = enqueued(objective)
    assert trial.value is not None
    drop = objective.value(objective.float_evaluation) - trial.value
    assert trial.constraints[DROP_CONSTRAINT] == pytest.approx(drop - 0.05)


def test_a_study_of_another_task_is_refused(
    objective: QuantizationObjective, toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=1)
    other = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs[:30]),
        evaluation=ArrayInputs(toy_inputs),
        cache=None,
    )
    with pytest.raises(InputError, match="belongs to another model, other inputs"):
        study.optimize(other, n_trials=1)


def test_a_study_that_stopped_before_any_trial_is_anybodys(
    objective: QuantizationObjective, toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    study = optuna.create_study(direction="maximize")
    objective.claim(study)
    other = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs[:30]),
        evaluation=ArrayInputs(toy_inputs),
        cache=None,
    )
    other.claim(study)
    study.optimize(other, n_trials=1)
    with pytest.raises(InputError, match="belongs to another model"):
        objective.claim(study)


def test_a_configuration_that_cannot_be_run_fails_its_trial_and_says_why(
    objective: QuantizationObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective.prepare()

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("kernel not implemented")

    monkeypatch.setattr(objective, "quantize", broken)
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=1, catch=(RuntimeError,))
    assert study.trials[0].state == TrialState.FAIL
    assert "kernel not implemented" in study.trials[0].user_attrs["error"]


def test_a_float_model_near_chance_is_reported(
    toy_model: Path,
    toy_inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    caplog: pytest.LogCaptureFixture,
) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs, labels=(labels + 3) % 10),
        cache=None,
    )
    assert objective.float_evaluation.measurement.top1 == pytest.approx(0.0, abs=0.15)
    assert "preprocessing" in caplog.text


def test_a_float_model_that_predicts_one_class_is_reported(
    toy_model: Path, toy_inputs: NDArray[np.float32], caplog: pytest.LogCaptureFixture
) -> None:
    same = np.repeat(toy_inputs[:1], 30, axis=0)
    given = outputs_of(toy_model, same[:1]).argmax()
    for inputs, is_said in ((same, True), (toy_inputs, False)):
        caplog.clear()
        objective = QuantizationObjective(
            toy_model,
            calibration=ArrayInputs(toy_inputs),
            evaluation=ArrayInputs(inputs),
            cache=None,
        )
        _ = objective.float_evaluation
        assert (f"predicts class {given} for all 30 inputs" in caplog.text) == is_said


def test_outputs_that_are_no_numbers_are_named(
    toy_model: Path, toy_inputs: NDArray[np.float32], caplog: pytest.LogCaptureFixture
) -> None:
    def float_evaluation(inputs: NDArray[np.float32]) -> None:
        _ = QuantizationObjective(
            toy_model,
            calibration=ArrayInputs(toy_inputs),
            evaluation=ArrayInputs(inputs),
            cache=None,
        ).float_evaluation

    with pytest.raises(InputError, match="not a number .* for any evaluation input"):
        float_evaluation(np.full_like(toy_inputs, np.nan))
    one = toy_inputs.copy()
    one[5] = np.nan
    float_evaluation(one)
    assert f"for 1 of {len(one)} evaluation inputs, first for number 5" in caplog.text


def test_an_input_that_is_no_number_is_named_also_where_the_model_makes_one_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        imputing (float[N, 4] x) => (float[N, 3] scores) {
            is_missing = IsNaN(x)
            whole = Where(is_missing, mean, x)
            scores = MatMul(whole, w)
        }"""
    )
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    for name, values in (("w", weight), ("mean", np.float32(0.5))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    onnx.save(model, tmp_path / "imputing.onnx")
    inputs = rng.standard_normal((40, 4)).astype(np.float32)
    np.save(tmp_path / "calibration.npy", inputs)
    inputs[7, 2] = np.nan
    np.save(tmp_path / "inputs.npy", inputs)
    objective = QuantizationObjective(
        tmp_path / "imputing.onnx",
        calibration=tmp_path / "calibration.npy",
        evaluation=ArrayFile(tmp_path / "inputs.npy").subset(np.arange(5, 35)),
        cache=None,
    )
    assert np.isfinite(objective.float_evaluation.outputs).all()
    (warning,) = caplog.messages
    assert f"array file {tmp_path / 'inputs.npy'}" in warning
    assert "for 1 of 30 evaluation inputs, first for number 7" in warning


def test_a_fixed_batch_of_several_inputs_is_refused_at_once(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    model = onnx.load(toy_model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "four.onnx")
    with pytest.raises(InputError, match="input 'input' has a fixed batch of 4; export it with"):
        QuantizationObjective(
            tmp_path / "four.onnx",
            calibration=ArrayInputs(toy_inputs),
            evaluation=ArrayInputs(toy_inputs),
        )


def test_a_model_that_cannot_be_run_is_a_failed_trial_and_the_search_goes_on(
    objective: QuantizationObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = objective.latency

    def second_fails(model: bytes, **options: int) -> object:
        if len(study.trials) == 2:
            raise InputError("model of 10 bytes: ONNX Runtime cannot load it")
        return measure(model, **options)

    monkeypatch.setattr(objective, "latency", second_fails)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.BruteForceSampler(seed=0)
    )
    study.optimize(objective, n_trials=3, catch=(TrialFailure,))
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert "cannot load it" in study.trials[1].user_attrs["error"]


def test_an_export_does_not_overwrite_the_float_model(
    objective: QuantizationObjective, toy_model: Path
) -> None:
    trial = enqueued(objective)
    before = toy_model.read_bytes()
    with pytest.raises(InputError, match="is the float model, which would be lost"):
        objective.export(trial, toy_model)
    assert toy_model.read_bytes() == before


def add_mean_of_batch(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = "own"
    graph.node.append(helper.make_node("ReduceMean", ["own"], ["shared"], axes=[0], keepdims=1))
    graph.node.append(helper.make_node("Add", ["own", "shared"], ["logits"]))


def reshape_one_input(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array([1, 16]), "one"))
    flatten = next(node for node in graph.node if node.op_type == "Flatten")
    flatten.CopyFrom(helper.make_node("Reshape", ["mean", "one"], ["features"], name="flatten"))


@pytest.mark.parametrize("change", [add_mean_of_batch, reshape_one_input])
def test_a_model_that_two_inputs_at_once_confuse_is_run_one_input_at_a_time(  # type: ignore[no-untyped-def]
    toy_model: Path,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change,
) -> None:
    model = onnx.load(toy_model)
    change(model.graph)
    onnx.save(model, tmp_path / "free.onnx")
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    free, fixed = (
        QuantizationObjective(
            tmp_path / name,
            calibration=ArrayInputs(toy_inputs[:40]),
            evaluation=ArrayInputs(toy_inputs),
            space=SearchSpace({"equalization": [False, True], "bias_correction": [True]}),
            metric="sqnr_db",
            cache=None,
        )
        for name in ("free.onnx", "fixed.onnx")
    )
    for equalization in (False, True):
        ours, theirs = (enqueued(o, equalization=equalization) for o in (free, fixed))
        assert ours.state is TrialState.COMPLETE
        assert ours.value == pytest.approx(theirs.value, abs=0.01)
        assert ours.user_attrs["predicted_sqnr_db"] == pytest.approx(
            theirs.user_attrs["predicted_sqnr_db"], abs=0.01
        )
    assert caplog.text.count("Inputs are run one at a time") == 1


def test_a_model_that_takes_batches_is_run_in_batches(
    objective: QuantizationObjective, caplog: pytest.LogCaptureFixture
) -> None:
    assert objective.quantizer.model.takes_batches
    assert "one at a time" not in caplog.text


def test_labels_beyond_the_classes_are_named(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    labels = np.full(len(toy_inputs), 10)
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs, labels=labels),
        cache=None,
    )
    with pytest.raises(InputError, match="10"):
        objective.prepare()


@pytest.mark.parametrize("metric", ["top1", "agreement"])
@pytest.mark.parametrize("shape", [(80,), (80, 2)])
def test_labels_that_are_no_classes_are_refused_where_classes_are_needed(
    toy_model: Path, toy_inputs: NDArray[np.float32], metric: MetricName, shape: tuple[int, ...]
) -> None:
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs, labels=np.zeros(shape)),
        metric=metric,
        cache=None,
    )
    with pytest.raises(InputError, match="array of float64 .* a metric of your own"):
        objective.prepare()


def images_of_two_sizes(toy_model: Path, folder: Path) -> dict[str, Any]:
    """The toy model with free sizes, and inputs of two."""
    model = onnx.load(toy_model)
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.Clear()
    onnx.save(model, folder / "free.onnx")
    rng = np.random.default_rng(0)
    size = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value

    class Reader:
        def __init__(self) -> None:
            self.left = iter([rng.normal(size=(1, size, n, n)) for n in (12, 16) * 20])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image.astype(np.float32)}

    inputs = ReaderInputs(Reader())
    return {"model": folder / "free.onnx", "calibration": inputs, "evaluation": inputs}


def test_inputs_of_several_shapes_have_no_bias_correction(toy_model: Path, tmp_path: Path) -> None:
    task = images_of_two_sizes(toy_model, tmp_path)
    objective = QuantizationObjective(
        **task, space=SearchSpace.preset("extended"), metric="sqnr_db", cache=None
    )
    assert objective.space["bias_correction"] == CategoricalDistribution([False])
    assert enqueued(objective, weight_rounding="compensated").state is TrialState.COMPLETE
    with pytest.raises(InputError, match="'bias_correction': needs calibration inputs of one"):
        QuantizationObjective(**task, space=SearchSpace({"bias_correction": [True]}))


def test_what_cannot_be_built_fails_its_trial_alone(
    objective: QuantizationObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: object) -> None:
        raise InputError("knob 'scheme': not here")

    monkeypatch.setattr(objective, "quantize", refuse)
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=1, catch=(TrialFailure,))
    (trial,) = study.trials
    assert trial.state is TrialState.FAIL
    assert "knob 'scheme': not here" in trial.user_attrs["error"]


def test_latencies_of_other_threads_are_another_task(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    def fingerprint(**options: Any) -> str:
        inputs = ArrayInputs(toy_inputs)
        task = {"calibration": inputs, "evaluation": inputs, "cache": None}
        return QuantizationObjective(toy_model, **task, **options).fingerprint

    assert fingerprint(threads=1) == fingerprint(threads=2)
    one, two = (fingerprint(threads=threads, max_latency=0.9) for threads in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "top1"}, "metric 'top1': the evaluation inputs have no labels"),
        ({"metric": "f1"}, "metric 'f1': use one of top1, top5, agreement, sqnr_db"),
        ({"target": "abacus"}, "target 'abacus': unknown; use one of cpu"),
        ({"cache": __file__}, "cache .*test_objective.py: cannot be written"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop: -0.1 must not be negative"),
    ],
)
def test_mistakes_in_arguments_are_named(
    toy_model: Path, toy_inputs: NDArray[np.float32], arguments: dict[str, object], message: str
) -> None:
    inputs = ArrayInputs(toy_inputs)
    with pytest.raises(InputError, match=message):
        QuantizationObjective(toy_model, calibration=inputs, evaluation=inputs, **arguments)  # type: ignore[arg-type]


def test_inputs_of_another_shape_are_refused(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    good, bad = ArrayInputs(toy_inputs), ArrayInputs(toy_inputs[:, :, :8])
    with pytest.raises(InputError, match="input"):
        QuantizationObjective(toy_model, calibration=bad, evaluation=good)
    with pytest.raises(InputError, match="input"):
        QuantizationObjective(toy_model, calibration=good, evaluation=bad)


def test_the_target_decides_how_activations_are_stored(
    objective: QuantizationObjective, toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    signed = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs),
        target=dataclasses.replace(
            objective.target, representation=Representation(activations="int8")
        ),
        cache=None,
    )
    config = objective.space.config(next(objective.space.grid()))
    types = {i.data_type for i in signed.quantize(config).proto.graph.initializer}
    assert 2 not in types  # TensorProto.UINT8


def test_inputs_without_numbers_do_not_keep_the_others_from_being_raced(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    many = np.concatenate([toy_inputs] * 3) * np.float32(0.9)
    many[5] = np.nan
    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(many),
        metric="agreement",
        cache=None,
    )
    trial = enqueued(objective, granularity="channel", calibration_images="all")
    assert trial.state == TrialState.COMPLETE
    assert trial.value > 0.5
    assert 0.0 < trial.user_attrs["expected_agreement"] <= 1.0


@pytest.mark.parametrize("metric", ["sqnr_db", "own"])
def test_parts_of_the_inputs_are_measured_only_for_a_pruner_that_uses_it(
    toy_model: Path, toy_inputs: NDArray[np.float32], metric: str
) -> None:
    measured = []

    def own(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        measured.append(len(outputs))
        return float(np.abs(outputs - reference).max())

    objective = QuantizationObjective(
        toy_model,
        calibration=ArrayInputs(toy_inputs),
        evaluation=ArrayInputs(toy_inputs),
        metric=own if metric == "own" else "sqnr_db",
        batch_size=8,
        cache=None,
    )
    for pruner, some in ((RacingPruner(), False), (optuna.pruners.MedianPruner(), True)):
        study = optuna.create_study(direction="maximize", pruner=pruner)
        study.optimize(objective, n_trials=1)
        assert bool(study.trials[0].intermediate_values) == some
        assert metric != "own" or (set(measured) != {len(toy_inputs)}) == some


@pytest.mark.parametrize("labels", ["of another kind", "beyond the classes", "real", "vectors"])
def test_a_metric_of_ones_own_has_labels_of_its_own(
    toy_model: Path, toy_inputs: NDArray[np.float32], labels: str
) -> None:
    model = onnx.load(toy_model)
    if labels == "of another kind":  # one number for each input
        (head,) = (node for node in model.graph.node if node.op_type == "Gemm")
        for tensor in model.graph.initializer:
            if tensor.name in head.input[1:]:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor)[:1], tensor.name)
                )
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, toy_model.with_name("own.onnx"))
    given: NDArray[Any] = np.arange(len(toy_inputs)) + 7
    if labels == "real":
        given = np.linspace(0.0, 3.0, len(toy_inputs), dtype=np.float32)
    elif labels == "vectors":
        given = np.zeros((len(toy_inputs), 2), np.int64)

    def own(
        outputs: NDArray[np.float32], reference: NDArray[np.float32], labels: NDArray[Any]
    ) -> float:
        assert labels.dtype == given.dtype
        np.testing.assert_array_equal(labels, given[: len(labels)])
        return float(outputs.mean())

    for metric in (own, "sqnr_db"):
        objective = QuantizationObjective(
            toy_model.with_name("own.onnx"),
            calibration=ArrayInputs(toy_inputs),
            evaluation=ArrayInputs(toy_inputs, labels=given),
            metric=metric,  # type: ignore[arg-type]
            cache=None,
        )
        trial = enqueued(objective)
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs["top1"] is None
