"""Models whose outputs are a selection: noise is measured on what they select from."""

from __future__ import annotations

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
from onnx import TensorProto

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.measurable_outputs import with_measurable_outputs
from optuna_quantune.quantization.model import load_float_model


make = helper.make_node
rng = np.random.default_rng(0)
inputs = rng.standard_normal((24, 3, 8, 8)).astype(np.float32)

# A feature map of 3 numbers at 64 places.
FEATURES = [
    make("Conv", ["x", "w1", "b1"], ["conv"], "stem", pads=[1] * 4),
    make("Relu", ["conv"], ["relu"], "relu"),
    make("Conv", ["relu", "w2"], ["map"], "head"),
]
# A detector of two classes: boxes and scores, of which a suppression chooses.
DETECTOR = [
    *FEATURES,
    make("Reshape", ["map", "places"], ["flat"], "flatten"),
    make("Sigmoid", ["flat"], ["probabilities"], "sigmoid"),
    make("Split", ["probabilities"], ["coordinates", "scores"], "split", axis=1, num_outputs=2),
    make("Transpose", ["coordinates"], ["boxes"], "transpose", perm=[0, 2, 1]),
    make("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "sure"], ["chosen"], "nms"),
    make("GatherND", ["scores", "chosen_scores"], ["y"], "take"),
]
DETECTOR.insert(-1, make("Mul", ["chosen", "keep"], ["chosen_scores"], "indices"))
CLASSES = [*FEATURES, make("ArgMax", ["map"], ["y"], "argmax", axis=1, keepdims=0)]


def save(
    nodes: list[onnx.NodeProto], path: Path, outputs: dict[str, int], *, channels: int = 6
) -> Path:
    constants: dict[str, NDArray[Any]] = {
        "w1": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "b1": rng.standard_normal(8).astype(np.float32),
        "w2": rng.standard_normal((channels, 8, 1, 1)).astype(np.float32),
        "w3": rng.standard_normal((1, 4)).astype(np.float32),
        "w4": rng.standard_normal((4, 2)).astype(np.float32),
        "places": np.array([1, 8, -1]),
        "most": np.array([20]),
        "overlap": np.array([0.5], np.float32),
        "sure": np.array([0.9], np.float32),
        "keep": np.array([1, 1, 1]),
    }
    used = {name for node in nodes for name in node.input}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "model",
        [value("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [value(name, dtype, None) for name, dtype in outputs.items()],
        [
            numpy_helper.from_array(array, name)
            for name, array in constants.items()
            if name in used
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def names(path: Path) -> list[str]:
    model = load_float_model(path)
    measured = with_measurable_outputs(model)
    assert measured.layers == model.layers
    assert [output.name for output in measured.outputs] == [
        output.name for output in measured.proto.graph.output
    ]
    assert len(measured.proto.graph.node) == len(model.proto.graph.node)
    return [output.name for output in measured.outputs]


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return save(DETECTOR, tmp_path / "detector.onnx", {"y": TensorProto.FLOAT}, channels=8)


def test_of_a_detector_boxes_and_scores_are_measured(detector: Path) -> None:
    assert set(names(detector)) == {"boxes", "scores"}


def test_outputs_that_are_no_selection_stay_and_come_first(tmp_path: Path) -> None:
    outputs = {"y": TensorProto.FLOAT, "map": TensorProto.FLOAT}
    path = save(DETECTOR, tmp_path / "detector.onnx", outputs, channels=8)
    assert names(path)[0] == "map"
    assert set(names(path)) == {"map", "boxes", "scores"}


def test_of_classes_their_scores_are_measured(tmp_path: Path) -> None:
    path = save(CLASSES, tmp_path / "classes.onnx", {"y": TensorProto.INT64})
    assert names(path) == ["map"]


def test_classes_beside_their_scores_change_nothing(tmp_path: Path) -> None:
    outputs = {"map": TensorProto.FLOAT, "y": TensorProto.INT64}
    model = load_float_model(save(CLASSES, tmp_path / "both.onnx", outputs))
    assert with_measurable_outputs(model) is model


def test_a_selection_by_shape_alone_is_none(tmp_path: Path) -> None:
    nodes = [
        *FEATURES,
        make("Shape", ["map"], ["shape"], "shape"),
        make("NonZero", ["shape"], ["axes"], "axes"),
        make("Squeeze", ["axes"], ["flat_axes"], "squeeze"),
        make("ReduceMean", ["map", "flat_axes"], ["y"], "mean"),
    ]
    model = load_float_model(save(nodes, tmp_path / "shape.onnx", {"y": TensorProto.FLOAT}))
    assert with_measurable_outputs(model) is model


def test_a_selection_within_a_branch_counts(tmp_path: Path) -> None:
    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output])

    nodes = [
        *FEATURES,
        make("ReduceMax", ["map"], ["largest"], "largest", keepdims=0),
        make("Greater", ["largest", "half"], ["is_large"], "is_large"),
        make("Flatten", ["map"], ["flat"], "flatten", axis=0),
        make("Greater", ["flat", "half"], ["mask2"], "compare"),
        make("Squeeze", ["mask2"], ["mask"], "squeeze"),
        make(
            "If",
            ["is_large"],
            ["y"],
            "if",
            then_branch=branch("some", make("Compress", ["map", "mask"], ["some"])),
            else_branch=branch("all", make("Identity", ["map"], ["all"])),
        ),
    ]
    nodes.insert(0, make("Constant", [], ["half"], value_float=0.5))
    path = save(nodes, tmp_path / "branch.onnx", {"y": TensorProto.FLOAT})
    assert "map" in names(path)
    assert "y" not in names(path)


def test_a_detector_is_searched_with_a_loop_of_ones_own(detector: Path) -> None:
    counts: list[int] = []

    def boxes_found(session: onnxruntime.InferenceSession) -> float:
        found = [len(session.run(None, {"x": x[None]})[0]) for x in inputs[:6]]
        counts.extend(found)
        return float(np.mean(found))

    objective = QuantizationObjective(
        detector, calibration=ArrayInputs(inputs), evaluate=boxes_found, cache=None
    )
    objective.prepare()
    assert len(set(counts)) > 1, "the number of boxes changes with the input"
    fine, coarse = (
        objective.features({**next(objective.space.grid()), "granularity": granularity})
        for granularity in ("channel", "tensor")
    )
    assert fine["weights_sqnr_db"] > coarse["weights_sqnr_db"] > 10
    study = optuna.create_study(direction="maximize")
    study.optimize(objective, n_trials=1)
    assert study.best_value > 0


def test_what_is_computed_behind_a_selection_has_no_noise(tmp_path: Path) -> None:
    nodes = [
        *DETECTOR[:-1],
        make("GatherND", ["scores", "chosen_scores"], ["taken"], "take"),
        make("Unsqueeze", ["taken", "last"], ["column"], "unsqueeze"),
        make("MatMul", ["column", "w3"], ["y"], "second_stage"),
    ]
    nodes.insert(0, make("Constant", [], ["last"], value_ints=[1]))
    path = save(nodes, tmp_path / "two_stages.onnx", {"y": TensorProto.FLOAT}, channels=8)
    objective = QuantizationObjective(
        path, calibration=ArrayInputs(inputs), evaluate=lambda session: 1.0, cache=None
    )
    noise = objective._builder.predict(QuantizationConfig()).weights
    assert [layer.name for layer in objective.model.layers] == ["stem", "head", "second_stage"]
    of_layers = [noise[layer.weight] for layer in objective.model.layers]
    assert of_layers[0] > 0 < of_layers[1]
    assert of_layers[2] == 0


def test_classes_need_a_metric_of_ones_own(tmp_path: Path) -> None:
    path = save(CLASSES, tmp_path / "classes.onnx", {"y": TensorProto.INT64})
    for metric in ("agreement", "sqnr_db"):
        with pytest.raises(InputError, match="give a metric of your own"):
            QuantizationObjective(
                path,
                calibration=ArrayInputs(inputs),
                evaluation=ArrayInputs(inputs),
                metric=metric,
                cache=None,
            )

    def same(classes: NDArray[np.int64], reference: NDArray[np.int64]) -> float:
        return float(np.mean(classes == reference))

    objective = QuantizationObjective(
        path,
        calibration=ArrayInputs(inputs),
        evaluation=ArrayInputs(inputs),
        metric=same,
        cache=None,
    )
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({**next(objective.space.grid()), "calibration_images": "all"})
    study.optimize(objective, n_trials=1)
    assert 0.9 < study.best_value <= 1.0
    assert study.best_trial.user_attrs["sqnr_db"] is None


def test_where_all_layers_are_behind_a_selection_one_error_says_so(tmp_path: Path) -> None:
    nodes = [
        make("NonZero", ["x"], ["places_of_x"], "nonzero"),
        make("Cast", ["places_of_x"], ["numbers"], "cast", to=TensorProto.FLOAT),
        make("Transpose", ["numbers"], ["rows"], "transpose"),
        make("MatMul", ["rows", "w4"], ["product"], "layer"),
        make("ArgMax", ["product"], ["y"], "argmax", axis=1),
    ]
    path = save(nodes, tmp_path / "selected.onnx", {"y": TensorProto.INT64})
    with pytest.raises(InputError, match="neither an output nor what an output is selected from"):
        QuantizationObjective(path, calibration=ArrayInputs(inputs), evaluate=lambda s: 1.0)
