"""Pairs, scales and zero points are read from the built models, ranges from the float model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import Fusion
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.fusion import separate
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]


def quantizer_of(model: FloatModel, inputs: NDArray[np.float32]) -> Quantizer:
    placement = place(model)
    tensors = required_activations(placement, separate(placement, model.proto.graph))
    statistics = calibrate(model, ArrayInputs({"input": inputs}), tensors, sizes=("all",))
    return Quantizer(model, statistics)


@pytest.fixture(scope="module")
def every_range(float_model: FloatModel, toy_inputs: NDArray[np.float32]) -> Quantizer:
    return quantizer_of(float_model, toy_inputs)


def build(quantizer: Quantizer, fusion: Fusion) -> onnx.ModelProto:
    return quantizer.quantize(
        QuantizationConfig(scheme="symmetric_power2", granularity="tensor", fusion=fusion)
    ).proto


def quantized_scales(proto: onnx.ModelProto) -> dict[str, float]:
    constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    return {
        node.input[0]: float(constants[node.input[1]])
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


def float_values(model: FloatModel, inputs: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    names = [name for node in model.proto.graph.node for name in node.output]
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in known
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return dict(zip(names, session.run(names, {"input": inputs}), strict=True))


def test_every_node_has_a_pair_and_a_range_of_its_own_without_fusion(
    every_range: Quantizer, float_model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    scales = quantized_scales(build(every_range, "off"))
    computed = ["stem.out", "stem.relu", "depthwise.out", "depthwise.relu6", "project.out", "sum"]
    assert {*computed, "input", "pooled", "mean"} <= set(scales)
    values = float_values(float_model, toy_inputs)
    for tensor in computed:
        low, high = min(float(values[tensor].min()), 0.0), float(values[tensor].max())
        assert scales[tensor] == 2.0 ** math.ceil(math.log2(max(-low / 128, high / 127)))


def test_fusion_leaves_one_pair_behind_a_layer_and_what_follows_it(
    every_range: Quantizer, float_model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    proto = build(every_range, "on")
    scales = quantized_scales(proto)
    assert set(scales) & {"stem.out", "depthwise.out", "project.out"} == set()
    assert {"stem.relu", "depthwise.relu6", "sum"} <= set(scales)
    readers = {name: node.op_type for node in proto.graph.node for name in node.input}
    assert readers["stem.out"] == "Relu"
    assert readers["depthwise.out"] == "Clip"
    assert readers["project.out"] == "Add"
    off = quantized_scales(build(every_range, "off"))
    assert all(off[tensor] == scale for tensor, scale in scales.items() if tensor in off)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    assert not {f"{name}_scale" for name in ("stem.out", "project.out")} & initializers


def test_the_three_placements_are_three_models_that_run(
    every_range: Quantizer, float_model: FloatModel, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    reference = run(float_model.proto, toy_inputs)
    errors, digests = {}, set()
    for fusion in ("off", "runtime", "on"):
        config = QuantizationConfig(scheme="symmetric_power2", granularity="tensor", fusion=fusion)
        quantized = every_range.quantize(config)
        onnx.checker.check_model(quantized.proto, full_check=True)
        digests.add(quantized.digest)
        errors[fusion] = float(np.mean(np.square(run(quantized.proto, toy_inputs) - reference)))
    assert len(digests) == 3
    # Every further requantization adds its rounding error.
    assert errors["on"] < errors["runtime"] < errors["off"]


def test_only_one_operand_of_an_addition_is_the_accumulator(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    proto = onnx.load(toy_model)
    add = next(node for node in proto.graph.node if node.op_type == "Add")
    first, second = onnx.NodeProto(), onnx.NodeProto()
    conv = next(node for node in proto.graph.node if node.name == "project")
    first.CopyFrom(conv)
    first.name, first.input[0], first.output[0] = "shortcut", "stem.relu", "shortcut.out"
    second.CopyFrom(helper.make_node("Relu", ["sum"], ["sum.relu"], name="sum_relu"))
    add.input[0] = "shortcut.out"
    position = list(proto.graph.node).index(add)
    proto.graph.node.insert(position, first)
    proto.graph.node.insert(position + 2, second)
    pool = next(node for node in proto.graph.node if node.op_type == "MaxPool")
    pool.input[0] = "sum.relu"
    onnx.save(proto, tmp_path / "residual.onnx")
    model = load_float_model(tmp_path / "residual.onnx")
    scales = quantized_scales(build(quantizer_of(model, toy_inputs), "on"))
    assert len({"project.out", "shortcut.out"} & set(scales)) == 1
    # The Relu behind the Add is fused, too.
    assert "sum" not in scales
    assert "sum.relu" in scales
