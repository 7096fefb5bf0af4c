from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.equalization import EQUALIZATION_INPUTS
from optuna_quantune.quantization.equalization import equalize
from optuna_quantune.quantization.equalization import link_channels
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.quantizer import Quantizer


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]
MakeQuantizer = Callable[[FloatModel, NDArray[np.float32]], Quantizer]


class Builder:
    """A float model, node by node; the channels of its layers are of very different size."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.onnx"
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        values = self.rng.standard_normal(shape)
        values *= np.exp(1.5 * self.rng.standard_normal((shape[0], *[1] * (len(shape) - 1))))
        return self.constant(name, values.astype(np.float32))

    def conv(self, name: str, source: str, shape: tuple[int, ...], *, groups: int = 1) -> str:
        bias = self.constant(f"{name}.bias", self.rng.standard_normal(shape[0]).astype(np.float32))
        weight = self.weight(f"{name}.weight", shape)
        pads = [shape[-1] // 2] * 4
        self.add("Conv", [source, weight, bias], name, group=groups, pads=pads)
        return name

    def add(self, op_type: str, sources: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, sources, [output], name=output, **attributes))
        return output

    def load(self, output: str, shape: list[int | str]) -> FloatModel:
        graph = helper.make_graph(
            self.nodes,
            "built",
            [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape)],
            self.tensors,
        )
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), self.path)
        return load_float_model(self.path)


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((48, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    """What passes factors on: ReLU, depthwise, shuffle, addition, concatenation, pools, Gemm."""
    b = Builder(tmp_path_factory.mktemp("everything"))
    stem = b.add("Relu", [b.conv("stem", "input", (6, 3, 3, 3))], "stem.relu")
    grouped = b.add("Relu", [b.conv("grouped", stem, (6, 2, 1, 1), groups=3)], "grouped.relu")
    to_groups = b.constant("to_groups", np.array([0, 3, 2, 8, 8]))
    from_groups = b.constant("from_groups", np.array([0, 6, 8, 8]))
    split = b.add("Reshape", [grouped, to_groups], "split")
    mixed = b.add("Transpose", [split], "mixed", perm=[0, 2, 1, 3, 4])
    shuffled = b.add("Reshape", [mixed, from_groups], "shuffled")
    depthwise = b.conv("depthwise", shuffled, (6, 1, 3, 3), groups=6)
    project = b.conv("project", depthwise, (6, 6, 1, 1))
    joined = b.add("Add", [stem, project], "joined")
    side = b.add("LeakyRelu", [b.conv("side", joined, (4, 6, 1, 1))], "side.relu")
    both = b.add("Concat", [joined, side], "both", axis=1)
    pooled = b.add("MaxPool", [both], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    flat = b.add("Flatten", [b.add("AveragePool", [pooled], "mean", kernel_shape=[2, 2])], "flat")
    head = b.constant("head.weight", b.rng.standard_normal((10 * 9, 5)).astype(np.float32))
    b.add("Gemm", [flat, head, b.constant("head.bias", np.ones(5, np.float32))], "logits")
    return b.load("logits", ["n", 5])


def test_channels_are_followed_through_the_graph(everything: FloatModel) -> None:
    links = link_channels(everything)
    written, read = links.written, links.read
    free = np.concatenate([written[n] for n in ("stem", "grouped", "depthwise", "side")])
    assert len(set(free)) == 6 + 6 + 6 + 4
    assert 0 not in free
    assert np.all(written["logits_Gemm"] == 0)  # the model's output
    assert np.all(read["stem"] == 0)  # the model's input
    np.testing.assert_array_equal(read["grouped"], written["stem"])
    # Channels 0 1 | 2 3 | 4 5 of the three groups are read as 0 2 4 1 3 5.
    np.testing.assert_array_equal(read["depthwise"], written["grouped"][[0, 2, 4, 1, 3, 5]])
    np.testing.assert_array_equal(written["project"], written["stem"])  # joined by the addition
    both = np.concatenate([written["stem"], written["side"]])
    np.testing.assert_array_equal(read["logits_Gemm"], np.repeat(both, 9))


def test_the_float_function_stays_as_it_is_to_rounding(
    everything: FloatModel, images: NDArray[np.float32], run: Run
) -> None:
    equalized = equalize(everything, ArrayInputs({"input": images})).model
    others = 3.0 * np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    expected, found = run(everything.proto, others), run(equalized.proto, others)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert equalized.fingerprint != everything.fingerprint
    for layer in everything.layers:
        stored = {i.name: numpy_helper.to_array(i) for i in equalized.proto.graph.initializer}
        assert not np.allclose(stored[layer.weight], everything.weights[layer.weight], rtol=0.01)
        np.testing.assert_array_equal(stored[layer.weight], equalized.weights[layer.weight])


def test_moments_of_the_layers_inputs_follow_from_those_before(
    everything: FloatModel, images: NDArray[np.float32]
) -> None:
    source = ArrayInputs({"input": images})
    equalized = equalize(everything, source)
    before, after = input_moments(everything, source), input_moments(equalized.model, source)
    assert set(equalized.read) == set(before)
    for weight, factors in equalized.read.items():
        found, expected = before[weight].scaled(factors), after[weight]
        for one, other in ((found.power(), expected.power()), (found.mean, expected.mean)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
        assert (found.number, found.share) == (expected.number, expected.share)
        assert np.allclose(factors, 1.0) == (weight == "stem.weight")


def maxima(model: FloatModel, tensor: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values: NDArray[np.float32] = np.abs(session.run([tensor], {"input": inputs})[0])
    largest: NDArray[np.float32] = values.max(axis=(0, 2, 3))
    return largest


def test_channels_reach_more_alike_and_no_further(
    everything: FloatModel, images: NDArray[np.float32]
) -> None:
    equalized = equalize(everything, ArrayInputs({"input": images})).model
    used = images[:EQUALIZATION_INPUTS]
    for tensor in ("grouped.relu", "depthwise", "side"):
        before, after = maxima(everything, tensor, used), maxima(equalized, tensor, used)
        alive = before > 0.0
        assert np.ptp(np.log(after[alive])) < 0.75 * np.ptp(np.log(before[alive]))
    before, after = maxima(everything, "both", used), maxima(equalized, "both", used)
    assert after.max() == pytest.approx(before.max(), rel=1e-5)


def test_factors_are_the_root_of_weights_over_activations(
    tmp_path: Path, images: NDArray[np.float32]
) -> None:
    b = Builder(tmp_path)
    b.conv("second", b.add("Relu", [b.conv("first", "input", (8, 3, 3, 3))], "relu"), (4, 8, 1, 1))
    model = b.load("second", ["n", 4, 8, 8])
    equalized = equalize(model, ArrayInputs({"input": images})).model
    reach = maxima(model, "relu", images[:EQUALIZATION_INPUTS])
    weight = np.abs(model.weights["second.weight"][:, :, 0, 0])
    expected = np.sqrt((weight / weight.max(axis=1, keepdims=True)).max(axis=0) / reach)
    expected *= reach.max() / (reach * expected).max()
    found = equalized.weights["first.bias"] / model.weights["first.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(
        equalized.weights["second.weight"][:, :, 0, 0] * expected,
        model.weights["second.weight"][:, :, 0, 0],
        rtol=1e-5,
    )


def test_channels_of_a_clip_keep_their_size(
    float_model: FloatModel, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    equalized = equalize(float_model, ArrayInputs({"input": toy_inputs})).model
    # depthwise is read through Clip(0, 6) by project; stem and project are joined by an addition.
    links = link_channels(float_model)
    assert np.all(links.written["depthwise"] == 0)
    assert np.all(links.written["stem"] > 0)
    np.testing.assert_array_equal(
        equalized.weights["depthwise.bias"], float_model.weights["depthwise.bias"]
    )
    expected, found = run(float_model.proto, toy_inputs), run(equalized.proto, toy_inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_pool_over_places_of_several_channels_passes_no_factors_on(
    tmp_path: Path, images: NDArray[np.float32], run: Run
) -> None:
    """A pixel shuffle that is written out puts four channels into each window."""
    b = Builder(tmp_path)
    first = b.conv("first", "input", (12, 3, 3, 3))
    for number, sizes in enumerate([(0, 2, 2, 3, 8, 8), (0, 3, 16, 16)]):
        shape = b.constant(f"shape{number}", np.array(sizes))
        first = b.add("Reshape", [first, shape], f"shaped{number}")
        if not number:
            first = b.add("Transpose", [first], "turned", perm=[0, 3, 4, 1, 5, 2])
    mean = b.add("Flatten", [b.add("GlobalAveragePool", [first], "mean")], "flat")
    b.constant("head.weight", np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32))
    model = b.load(b.add("Gemm", [mean, "head.weight"], "head", transB=1), ["n", 5])
    equalized = equalize(model, ArrayInputs({"input": images})).model
    expected, found = run(model.proto, images), run(equalized.proto, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("barrier", ["Sigmoid", "Slice", "Mul", "If", "shared weight", "output"])
def test_what_does_not_pass_factors_on_leaves_its_channels_alone(
    tmp_path: Path, images: NDArray[np.float32], barrier: str, run: Run
) -> None:
    b = Builder(tmp_path)
    first = b.conv("first", "input", (3, 3, 3, 3))
    if barrier == "Sigmoid":
        first = b.add("Sigmoid", [first], "passed")
    elif barrier == "Slice":
        start, end = b.constant("start", np.array([0, 0])), b.constant("end", np.array([8, 8]))
        first = b.add("Slice", [first, start, end, b.constant("axes", np.array([2, 3]))], "passed")
    elif barrier == "Mul":
        first = b.add("Mul", [first, first], "passed")
    elif barrier == "If":  # whose branches read the tensor without naming it as an input
        zero = b.constant("zero", np.array(0.0, np.float32))
        positive = b.add("Greater", [b.add("ReduceMax", ["input"], "max", keepdims=0), zero], "p")
        branches = [
            helper.make_graph(
                [helper.make_node(op_type, [first], [f"{op_type}.out"], name=op_type)],
                op_type,
                [],
                [helper.make_tensor_value_info(f"{op_type}.out", onnx.TensorProto.FLOAT, None)],
            )
            for op_type in ("Exp", "Sin")
        ]
        passed = b.conv("other", first, (3, 3, 1, 1))
        b.add("If", [positive], "chosen", then_branch=branches[0], else_branch=branches[1])
        first = b.add("Sum", [passed, "chosen"], "passed")
    elif barrier == "shared weight":
        first = b.add("Conv", [first, "first.weight", "first.bias"], "passed", pads=[1] * 4)
    elif barrier == "output":
        b.conv("unused", first, (2, 3, 1, 1))
    second = first if barrier == "output" else b.conv("second", first, (5, 3, 1, 1))
    model = b.load(second, ["n", 3 if barrier == "output" else 5, 8, 8])
    equalized = equalize(model, ArrayInputs({"input": images})).model
    for name, values in model.weights.items():
        np.testing.assert_array_equal(equalized.weights[name], values)
    np.testing.assert_array_equal(run(equalized.proto, images), run(model.proto, images))


def test_a_channel_that_is_always_zero_is_left_alone(
    tmp_path: Path, images: NDArray[np.float32], run: Run
) -> None:
    b = Builder(tmp_path)
    b.conv("second", b.add("Relu", [b.conv("first", "input", (8, 3, 3, 3))], "relu"), (4, 8, 1, 1))
    values = {t.name: numpy_helper.to_array(t).copy() for t in b.tensors}
    values["first.bias"][2] = -1e6  # never positive
    values["second.weight"][:, 2] = 1e4
    b.tensors = [numpy_helper.from_array(v, n) for n, v in values.items()]
    model = b.load("second", ["n", 4, 8, 8])
    equalized = equalize(model, ArrayInputs({"input": images})).model
    assert maxima(model, "relu", images)[2] == 0.0
    assert equalized.weights["first.bias"][2] == model.weights["first.bias"][2]
    np.testing.assert_array_equal(
        equalized.weights["second.weight"][:, 2], model.weights["second.weight"][:, 2]
    )
    expected = run(model.proto, images)
    found = run(equalized.proto, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_quantization_after_it_is_less_noisy(
    everything: FloatModel, images: NDArray[np.float32], make_quantizer: MakeQuantizer, run: Run
) -> None:
    others = np.random.default_rng(4).standard_normal((64, 3, 8, 8)).astype(np.float32)
    reference = run(everything.proto, others)

    def noise(*, equalized: bool) -> float:
        model = (
            equalize(everything, ArrayInputs({"input": images})).model if equalized else everything
        )
        quantizer = make_quantizer(model, images)
        quantizer.equalized = equalized
        built = quantizer.quantize(QuantizationConfig(equalization=equalized))
        return float(np.mean(np.square(run(built.proto, others) - reference)))

    assert noise(equalized=True) < 0.5 * noise(equalized=False)


def test_a_quantizer_builds_only_what_its_model_is(quantizer: Quantizer) -> None:
    with pytest.raises(InputError, match="knob 'equalization': True, but this quantizer's model"):
        quantizer.quantize(QuantizationConfig(equalization=True))
