from __future__ import annotations

import itertools
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

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.fusion import separate
from optuna_quantune.quantization.integer_only import float_nodes
from optuna_quantune.quantization.integer_only import FloatNode
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.space import SearchSpace


def quantizer_of(model: FloatModel, inputs: NDArray[np.float32], **options: Any) -> Quantizer:
    placement = place(model)
    tensors = required_activations(placement, separate(placement, model.proto.graph))
    source = ArrayInputs({"input": inputs})
    statistics = calibrate(model, source, tensors, sizes=(1, 32, "all"))
    return Quantizer(model, statistics, **options)


def power_of_two(values: NDArray[Any]) -> bool:
    return bool(np.all(np.frexp(values)[0] == 0.5))


@pytest.fixture(scope="module")
def vta(float_model: FloatModel, toy_inputs: NDArray[np.float32]) -> Quantizer:
    return quantizer_of(float_model, toy_inputs, representation=Representation("int8"))


@pytest.fixture(scope="module")
def integer_model(vta: Quantizer) -> onnx.ModelProto:
    return vta.quantize(QuantizationConfig(scheme="symmetric_power2", granularity="tensor")).proto


def changed(proto: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    found = [tensor for tensor in copy.graph.initializer if tensor.name in values]
    assert len(found) == len(values)
    for tensor in found:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


def constant(proto: onnx.ModelProto, name: str) -> NDArray[Any]:
    return next(numpy_helper.to_array(i) for i in proto.graph.initializer if i.name == name)


def test_all_configurations_of_the_vta_preset_are_integer_only(vta: Quantizer) -> None:
    space = SearchSpace.preset("vta")
    digests = {}
    for params in space.grid():
        quantized = vta.quantize(space.config(params))
        assert float_nodes(quantized.proto) == ()
        digests[tuple(params.values())] = quantized.digest
        # The same, looked at in another way: every float constant is a power of two or a bound.
        for tensor in quantized.proto.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and tensor.name not in ("zero", "six"):
                assert power_of_two(values), tensor.name
            if tensor.name.endswith("zero_point"):
                assert not values.any(), tensor.name
    # Powers of two are coarse, and some configurations coincide; but each knob tells some apart.
    for position, knob in enumerate(space):
        groups: dict[Any, set[str]] = {}
        for values, digest in digests.items():
            others = values[:position] + values[position + 1 :]
            groups.setdefault(others, set()).add(digest)
        varies = max(len(group) for group in groups.values()) > 1
        assert varies == (space[knob].single() is False), knob


def test_integers_alone_compute_what_the_model_computes(
    vta: Quantizer, toy_inputs: NDArray[np.float32]
) -> None:
    """The stem in int64 with shifts, beside ONNX Runtime's output for it."""
    proto = onnx.ModelProto()
    config = QuantizationConfig(scheme="symmetric_power2", granularity="tensor", fusion="on")
    proto.CopyFrom(vta.quantize(config).proto)
    quantize = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    names = [
        next(n.output[0] for n in quantize if n.input[0] == t) for t in ("input", "stem.relu")
    ]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    source, result = session.run(names, {"input": toy_inputs[:1]})

    weight, bias = (
        constant(proto, f"stem.{k}_quantized").astype(np.int64) for k in ("weight", "bias")
    )
    padded = np.pad(source[0].astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    sums = np.einsum("oikl,ihwkl->ohw", weight, windows) + bias[:, None, None]
    exponents = [
        np.log2(constant(proto, f"{tensor}_scale"))
        for tensor in ("input", "stem.weight", "stem.relu")
    ]
    shift = int(exponents[2] - exponents[0] - exponents[1])
    assert shift > 0
    half_to_even = ((sums >> shift) & 1) + (1 << (shift - 1)) - 1
    shifted = np.clip((np.maximum(sums, 0) + half_to_even) >> shift, -128, 127)
    np.testing.assert_array_equal(result[0], np.where(sums > 0, shifted, 0))


def test_what_is_no_shift_is_named(integer_model: onnx.ModelProto) -> None:
    assert float_nodes(integer_model) == ()

    def findings(name: str, value: NDArray[Any]) -> list[FloatNode]:
        return list(float_nodes(changed(integer_model, {name: value})))

    scale = constant(integer_model, "stem.relu_scale")
    found = findings("stem.relu_scale", np.asarray(1.1 * scale, dtype=np.float32))
    assert {node.op_type for node in found} >= {"QuantizeLinear", "DequantizeLinear"}
    assert {"its scale is not a power of two"} <= {node.reason for node in found}
    found = findings("stem.relu_zero_point", np.array(3, dtype=np.int8))
    assert {node.reason for node in found} == {"its zero point is not 0"}
    scale = constant(integer_model, "depthwise.bias_quantized_scale")
    (node,) = findings("depthwise.bias_quantized_scale", 2 * scale)
    assert node == FloatNode(
        "depthwise", "Conv", "the bias has another scale than input times weight", enclosed=True
    )
    (node,) = findings("six", np.array(6.01, dtype=np.float32))
    assert (node.name, node.reason) == ("depthwise_relu6", "a bound is not an integer")


def test_layers_in_float_and_divisions_are_named(
    float_model: FloatModel, toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    proto = onnx.load(toy_model)
    logits = proto.graph.output[0]
    softmax = helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax")
    lrn = helper.make_node("LRN", ["sum"], ["normal"], name="lrn", size=5)
    position = [node.name for node in proto.graph.node].index("pool")
    proto.graph.node[position].input[0] = "normal"
    proto.graph.node[position].attribute[0].ints[:] = [3, 3]  # 16 x 16 becomes 7 x 7
    proto.graph.node.insert(position, lrn)
    proto.graph.node.append(softmax)
    logits.name = "probabilities"
    onnx.save(proto, tmp_path / "odd.onnx")
    quantizer = quantizer_of(load_float_model(tmp_path / "odd.onnx"), toy_inputs)
    config = QuantizationConfig(scheme="symmetric_power2", granularity="tensor")
    found = {node.name: node for node in float_nodes(quantizer.quantize(config).proto)}
    assert found["lrn"].enclosed
    assert found["lrn"].reason == "not integer arithmetic"
    assert found["mean"].reason == "divides by 49"
    assert found["softmax"].reason == "not integer arithmetic"
    assert {"stem", "depthwise", "project", "add", "head"}.isdisjoint(found)

    mixed = QuantizationConfig(
        scheme="symmetric_power2", granularity="tensor", mixed_precision="first_last"
    )
    found = {node.name: node for node in float_nodes(quantizer.quantize(mixed).proto)}
    assert found["stem"].reason == "an operand is not quantized"


@pytest.mark.parametrize(
    "knobs",
    [
        {"scheme": scheme, "granularity": granularity}
        for scheme, granularity in itertools.product(
            ("asymmetric", "symmetric", "symmetric_uint8"), ("tensor", "channel")
        )
    ],
)
def test_other_schemes_are_not_integer_only(vta: Quantizer, knobs: dict[str, Any]) -> None:
    found = float_nodes(vta.quantize(QuantizationConfig(**knobs)).proto)
    assert sum(node.enclosed for node in found) > 10
