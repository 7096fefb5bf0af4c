"""A detector in miniature: two inputs, two outputs of different units, no classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune import ArrayInputs
from optuna_quantune import InputError
from optuna_quantune import QuantizationObjective
from optuna_quantune import SearchSpace
from optuna_quantune import tune
from optuna_quantune.quantization.config import QuantizationConfig


RNG = np.random.default_rng(7)
INPUTS = {
    "image": RNG.normal(size=(60, 3, 8, 8)).astype(np.float32),
    "size": RNG.uniform(100.0, 200.0, size=(60, 2)).astype(np.float32),
}
SPACE = SearchSpace(
    {
        "granularity": ["tensor", "channel"],
        "clipping": ["max", "kl"],
        "equalization": [False, True],
    }
)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of 3 anchors, and their boxes in units of the second input (pixels)."""

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["h1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["h1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["h2"], name="conv2", pads=[1] * 4),
        helper.make_node("Relu", ["h2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["features"], name="flatten"),
        helper.make_node("Gemm", ["features", "w3"], ["logits"], name="score", transB=1),
        helper.make_node("Sigmoid", ["logits"], ["scores"], name="sigmoid"),
        helper.make_node("Gemm", ["features", "w4"], ["offsets"], name="box", transB=1),
        helper.make_node("Concat", ["size", "size"], ["twice"], name="twice", axis=1),
        helper.make_node("Mul", ["offsets", "twice"], ["boxes"], name="scaled"),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [
            helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, 8, 8]),
            helper.make_tensor_value_info("size", onnx.TensorProto.FLOAT, ["n", 2]),
        ],
        [
            helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("boxes", onnx.TensorProto.FLOAT, ["n", 4]),
        ],
        [
            weight("w1", 8, 3, 3, 3),
            numpy_helper.from_array(np.full(8, 0.1, np.float32), "b1"),
            weight("w2", 8, 8, 3, 3),
            numpy_helper.from_array(np.full(8, 0.1, np.float32), "b2"),
            weight("w3", 3, 8),
            weight("w4", 4, 8),
        ],
    )
    path = tmp_path_factory.mktemp("models") / "detector.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def box_error(
    outputs: Mapping[str, NDArray[np.float32]], reference: Mapping[str, NDArray[np.float32]]
) -> float:
    """Mean distance of the boxes' corners in pixels."""
    return float(np.abs(outputs["boxes"] - reference["boxes"]).mean())


def run_model(model: Path | bytes, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model))
    names = ["scores", "boxes"]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_a_metric_of_the_users_is_minimized_over_all_outputs(
    detector: Path, tmp_path: Path
) -> None:
    result = tune(
        detector,
        calibration=ArrayInputs(INPUTS),
        evaluation=ArrayInputs(INPUTS),
        space=SPACE,
        metric=box_error,
        direction="minimize",
        n_trials=8,
        cache=None,
        output=tmp_path / "int8.onnx",
    )
    assert len(result.study.trials) == 8
    outputs, reference = run_model(tmp_path / "int8.onnx", INPUTS), run_model(detector, INPUTS)
    assert result.all_inputs.quantized.own == pytest.approx(
        box_error(outputs, reference), rel=1e-3
    )
    assert result.all_inputs.float_model.own == 0.0
    assert result.trial.value == min(trial.value for trial in result.study.trials)
    interval = result.all_inputs.difference
    assert interval is not None
    assert interval.low < interval.estimate < interval.high
    assert interval.estimate == pytest.approx(result.all_inputs.quantized.own)
    # Each output counts alike: the mean of their noise-to-signal ratios.
    ratios = [
        np.square(outputs[name] - reference[name]).sum() / np.square(reference[name]).sum()
        for name in outputs
    ]
    measured = result.all_inputs.quantized.sqnr_db
    assert measured == pytest.approx(-10 * np.log10(np.mean(ratios)), abs=0.05)
    assert result.all_inputs.quantized.agreement is None


def test_a_constant_among_the_outputs_is_left_out(detector: Path, tmp_path: Path) -> None:
    model = onnx.load(detector)
    anchors = numpy_helper.from_array(np.ones((5, 2), np.float32), "anchors")
    model.graph.node.append(helper.make_node("Constant", [], ["anchors"], value=anchors))
    given = list(model.graph.output)
    del model.graph.output[:]
    constant = helper.make_tensor_value_info("anchors", onnx.TensorProto.FLOAT, [5, 2])
    model.graph.output.extend([constant, *given])
    onnx.save(model, tmp_path / "anchors.onnx")
    seen = set()

    def scores(outputs: Mapping[str, NDArray[Any]], reference: object) -> float:
        seen.add(tuple(outputs))
        return float(outputs["scores"].mean())

    for metric in (None, scores):
        result = tune(
            tmp_path / "anchors.onnx",
            calibration=ArrayInputs(INPUTS),
            evaluation=ArrayInputs(INPUTS),
            metric=metric,
            space=SPACE,
            n_trials=1,
            cache=None,
            output=tmp_path / "int8.onnx",
        )
        assert result.metric.name == ("agreement" if metric is None else "scores")
    assert seen == {("scores", "boxes")}
    assert [o.name for o in onnx.load(tmp_path / "int8.onnx").graph.output][0] == "anchors"


def test_noise_is_predicted_for_several_outputs(detector: Path) -> None:
    objective = QuantizationObjective(
        detector,
        calibration=ArrayInputs(INPUTS),
        evaluation=ArrayInputs(INPUTS),
        space=SPACE,
        metric="sqnr_db",
        cache=None,
    )
    for params in ({"granularity": "tensor"}, {"granularity": "channel"}):
        predicted = objective.features(params)["predicted_sqnr_db"]
        measured = objective.evaluate(objective.quantize(QuantizationConfig(**params)).proto)
        assert measured.measurement.sqnr_db == pytest.approx(predicted, abs=3.0)


@pytest.mark.parametrize("inner", ["h1", "r1", "pooled"])
def test_an_output_may_be_read_by_what_comes_after_it(
    detector: Path, inner: str, tmp_path: Path
) -> None:
    """The probe runs only what is behind a disturbed tensor; outputs before it stay."""
    model = onnx.load(detector)
    model.graph.output.append(helper.make_empty_tensor_value_info(inner))
    path = tmp_path / "inner.onnx"
    onnx.save(model, path)
    inputs = ArrayInputs(INPUTS)
    objective = QuantizationObjective(
        path, calibration=inputs, evaluation=inputs, metric="sqnr_db", space=SPACE, cache=None
    )
    params = {"granularity": "channel", "clipping": "max", "equalization": False}
    quantized = objective.quantize(SPACE.config(params)).proto
    measured = objective.evaluate(quantized).measurement.sqnr_db
    assert objective.features(params)["predicted_sqnr_db"] == pytest.approx(measured, abs=4.0)


def test_the_inputs_of_the_search_and_their_indices_reach_the_metric(detector: Path) -> None:
    many = {name: np.concatenate([array] * 7) for name, array in INPUTS.items()}
    truth = run_model(detector, many)["boxes"]
    truth[::3] += 1.0  # what the float model gets wrong, too
    seen: list[NDArray[np.int64]] = []

    def true_box_error(
        outputs: Mapping[str, NDArray[np.float32]], reference: object, indices: NDArray[np.int64]
    ) -> float:
        seen.append(indices)
        return float(np.abs(outputs["boxes"] - truth[indices]).mean())

    result = tune(
        detector,
        calibration=ArrayInputs(INPUTS),
        evaluation=ArrayInputs(many),
        space=SPACE,
        metric=true_box_error,
        direction="minimize",
        n_trials=2,
        cache=None,
    )
    searched = set(seen[0].tolist())
    assert result.held_out is not None
    assert result.held_out.inputs == len(many["size"]) - len(searched) == 210
    held_out = np.array(sorted(set(range(420)) - searched))
    expected = np.abs(np.where(held_out % 3 == 0, 1.0, 0.0)).mean()
    assert result.held_out.float_model.own == pytest.approx(expected, rel=1e-3)


def test_a_loop_of_the_users_needs_no_evaluation_inputs(detector: Path) -> None:
    reference = run_model(detector, INPUTS)

    def closeness(session: onnxruntime.InferenceSession) -> float:
        (boxes,) = session.run(["boxes"], INPUTS)
        return -float(np.abs(boxes - reference["boxes"]).mean())

    result = tune(
        detector,
        calibration=ArrayInputs(INPUTS),
        space=SPACE,
        evaluate=closeness,
        n_trials=4,
        cache=None,
    )
    assert result.all_inputs.quantized.own == result.trial.value
    assert result.trial.value == max(trial.value for trial in result.study.trials)
    assert result.all_inputs.quantized.sqnr_db is None
    assert result.held_out is None
    assert result.trial.intermediate_values == {}


def test_a_loop_of_the_users_measures_outputs_without_a_batch_axis(
    detector: Path, tmp_path: Path
) -> None:
    model = onnx.load(detector)
    node = helper.make_node("ReduceMean", ["scores"], ["mean"], name="mean", keepdims=0)
    model.graph.node.append(node)
    model.graph.output.append(helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, []))
    onnx.save(model, tmp_path / "mean.onnx")
    result = tune(
        tmp_path / "mean.onnx",
        calibration=ArrayInputs(INPUTS),
        space=SPACE,
        evaluate=lambda session: float(session.run(["mean"], INPUTS)[0]),
        n_trials=1,
        cache=None,
    )
    assert result.all_inputs.quantized.own == result.trial.value


def test_a_metric_that_fails_is_found_before_the_search(detector: Path) -> None:
    def wrong(outputs: Any, reference: Any) -> float:
        return float(outputs["masks"].mean())

    def silent(session: Any) -> None:
        return None

    for arguments, message in (
        ({"metric": wrong}, "metric 'wrong': fails for the float model: KeyError: 'masks'"),
        (
            {"evaluate": silent},
            "metric 'silent': fails .*: ValueError: the metric gave None, not a number",
        ),
    ):
        objective = QuantizationObjective(
            detector,
            calibration=ArrayInputs(INPUTS),
            evaluation=ArrayInputs(INPUTS),
            space=SPACE,
            cache=None,
            **arguments,
        )
        with pytest.raises(InputError, match=message):
            objective.prepare()


def test_agreement_of_a_model_without_classes_is_refused_at_its_first_input(
    detector: Path, tmp_path: Path
) -> None:
    model = onnx.load(detector)
    del model.graph.output[0]  # the scores
    node = helper.make_node("Unsqueeze", ["boxes", "axis"], ["boxes_of_anchors"], name="anchors")
    model.graph.node.append(node)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("boxes_of_anchors", onnx.TensorProto.FLOAT, ["n", 1, 4])
    )
    onnx.save(model, tmp_path / "boxes.onnx")
    objective = QuantizationObjective(
        tmp_path / "boxes.onnx",
        calibration=ArrayInputs(INPUTS),
        evaluation=ArrayInputs(INPUTS),
        metric="agreement",
        cache=None,
    )
    with pytest.raises(InputError, match="need a classifier; give a metric of your own"):
        objective.prepare()


def test_top5_of_few_classes_is_refused_before_the_search(detector: Path) -> None:
    labels = np.zeros(len(INPUTS["size"]), np.int64)
    objective = QuantizationObjective(
        detector,
        calibration=ArrayInputs(INPUTS),
        evaluation=ArrayInputs(INPUTS, labels=labels),
        metric="top5",
        cache=None,
    )
    with pytest.raises(InputError, match="metric 'top5': the model has 3 classes"):
        objective.prepare()


def test_an_input_that_is_missing_is_named(detector: Path) -> None:
    only_images = ArrayInputs({"image": INPUTS["image"]})
    with pytest.raises(InputError, match="gives the inputs 'image', the model wants 'image', 's"):
        QuantizationObjective(detector, calibration=only_images, evaluation=only_images)
