"""The demo's model and images are what DATA.md says, checked with ONNX Runtime and numpy alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType

from optuna_quantune.demo import DemoData
from optuna_quantune.demo import load_demo


@pytest.fixture(scope="module")
def demo() -> DemoData:
    return load_demo()


def model_inputs(demo: DemoData, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    recipe = demo.preprocessing
    scaled = images.astype(np.float64)[:, np.newaxis] * recipe["scale"]
    return np.asarray((scaled - recipe["mean"][0]) / recipe["std"][0], np.float32)


def top1(demo: DemoData, model: Path, count: int) -> float:
    """The share of the first `count` evaluation images that the model gets right, in percent."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = model_inputs(demo, demo.evaluation[:count])
    (logits,) = session.run(["logits"], {"input": inputs})
    return 100 * float(np.mean(logits.argmax(axis=1) == demo.evaluation_labels[:count]))


def test_images_are_bytes_of_the_size_that_the_model_takes(demo: DemoData) -> None:
    assert demo.calibration.shape == (512, 28, 28)
    assert demo.evaluation.shape == (2000, 28, 28)
    assert demo.calibration.dtype == demo.evaluation.dtype == np.uint8
    for images in (demo.calibration, demo.evaluation):
        assert images.min() == 0
        assert images.max() == 255
    assert demo.preprocessing["crop"] == 28
    assert demo.preprocessing["channel_order"] == "L"


def test_labels_index_the_class_names_and_every_class_is_there(demo: DemoData) -> None:
    assert demo.evaluation_labels.dtype == np.int64
    assert demo.evaluation_labels.shape == (len(demo.evaluation),)
    assert len(set(demo.class_names)) == 10
    counts = np.bincount(demo.evaluation_labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() >= 150


def test_no_image_is_there_twice_and_none_both_calibrates_and_evaluates(demo: DemoData) -> None:
    calibration = {image.tobytes() for image in demo.calibration}
    evaluation = {image.tobytes() for image in demo.evaluation}
    assert len(calibration) == len(demo.calibration)
    assert len(evaluation) == len(demo.evaluation)
    assert not calibration & evaluation


def test_model_and_images_are_small_enough_for_a_repository(demo: DemoData) -> None:
    folder = demo.model_path.parent
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 2_000_000


def test_graph_is_a_batch_norm_free_mobilenet_with_a_dynamic_batch(demo: DemoData) -> None:
    model = onnx.load(demo.model_path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    (graph_input,) = model.graph.input
    assert graph_input.name == "input"
    shape = graph_input.type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch"
    assert [dim.dim_value for dim in shape[1:]] == [1, 28, 28]
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    depthwise = [
        node
        for node in model.graph.node
        if any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    ]
    assert len(depthwise) >= 5
    assert {node.op_type for node in model.graph.node} == {
        "Add",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
        "Relu",
    }


def test_float_accuracy_is_the_one_that_the_data_page_states(demo: DemoData) -> None:
    page = (demo.model_path.parent / "DATA.md").read_text("utf-8")
    stated = re.search(r"Float top-1 on the 2,000 evaluation images: \*\*([\d.]+) %\*\*", page)
    assert stated is not None
    assert top1(demo, demo.model_path, len(demo.evaluation)) == pytest.approx(
        float(stated[1]), abs=0.5
    )


def test_quantization_hurts_per_tensor_and_not_per_channel(demo: DemoData, tmp_path: Path) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            inputs = model_inputs(demo, demo.calibration[:64])
            self.batches: Iterator[dict[str, NDArray[np.float32]]] = iter([{"input": inputs}])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self.batches, None)

    accuracy = {}
    for per_channel in (False, True):
        quantized = tmp_path / f"per_channel_{per_channel}.onnx"
        quantize_static(
            demo.model_path,
            quantized,
            Reader(),
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        accuracy[per_channel] = top1(demo, quantized, 1000)
    float_accuracy = top1(demo, demo.model_path, 1000)
    assert accuracy[False] < float_accuracy - 10
    assert accuracy[True] > float_accuracy - 3
