"""Scales and zero points are read back from the built model and computed again, independently."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.quantization import quantizer as quantizer_module
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import Granularity
from optuna_quantune.quantization.config import MixedPrecision
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.config import WeightClipping
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.quantizer import CONFIG_KEY
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.quantization.weight_clipping import least_error_range


MakeQuantizer = Callable[[FloatModel, NDArray[np.float32]], Quantizer]
Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]

SCHEMES = get_args(Scheme)
ALL_96 = [
    QuantizationConfig(
        calibration_images=images,
        scheme=scheme,
        clipping=clipping,
        granularity=granularity,
        mixed_precision=mixed,
    )
    for images, scheme, clipping, granularity, mixed in itertools.product(
        (1, 32, "all"),
        SCHEMES,
        get_args(Clipping)[:2],
        get_args(Granularity),
        get_args(MixedPrecision),
    )
]
WEIGHTS = ["stem.weight", "depthwise.weight", "project.weight", "head.weight"]


class Graph:
    """What a built model says of itself."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.initializers = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}

    @cached_property
    def activations(self) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """Scale and zero point by tensor, from the QuantizeLinear nodes."""
        return {
            node.input[0]: (self.initializers[node.input[1]], self.initializers[node.input[2]])
            for node in self.proto.graph.node
            if node.op_type == "QuantizeLinear"
        }

    @cached_property
    def constants(self) -> dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any], int | None]]:
        """Integers, scale, zero point and axis by float name, from DequantizeLinear nodes."""
        return {
            node.input[0].removesuffix("_quantized"): (
                self.initializers[node.input[0]],
                self.initializers[node.input[1]],
                self.initializers[node.input[2]],
                next((a.i for a in node.attribute if a.name == "axis"), None),
            )
            for node in self.proto.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in self.initializers
        }

    def operators(self) -> list[str]:
        return [node.op_type for node in self.proto.graph.node]


def build(quantizer: Quantizer, **knobs: Any) -> Graph:
    return Graph(quantizer.quantize(QuantizationConfig(**knobs)).proto)


def is_power_of_two(values: NDArray[Any]) -> bool:
    return bool(np.all(np.frexp(values)[0] == 0.5))


def test_the_preset_has_96_configurations() -> None:
    assert len(set(ALL_96)) == 96


@pytest.mark.parametrize("config", ALL_96, ids=lambda c: "-".join(map(str, vars(c).values())))
def test_every_configuration_is_a_valid_model_that_runs_and_is_what_it_says(
    quantizer: Quantizer, toy_inputs: NDArray[np.float32], config: QuantizationConfig, run: Run
) -> None:
    graph = Graph(quantizer.quantize(config).proto)
    onnx.checker.check_model(graph.proto, full_check=True)
    outputs = run(graph.proto, toy_inputs[:4])
    assert outputs.shape == (4, 10)
    assert np.all(np.isfinite(outputs))

    for scale, zero_point in graph.activations.values():
        assert zero_point.dtype == np.uint8
        if config.scheme in ("symmetric", "symmetric_power2"):
            assert zero_point == 128
        if config.scheme == "symmetric_uint8":
            assert zero_point in (0, 128)
        assert scale.shape == ()
    scales = [scale for scale, _ in graph.activations.values()]
    scales += [scale for _, scale, _, _ in graph.constants.values()]
    assert all(is_power_of_two(scale) for scale in scales) == (config.scheme == "symmetric_power2")

    quantized = set(WEIGHTS)
    if config.mixed_precision == "first_last":
        quantized -= {"stem.weight", "head.weight"}
        float_weights = {"stem.weight", "head.weight", "stem.bias", "head.bias"}
        for name in float_weights:
            assert graph.initializers[name].dtype == np.float32
    for name in quantized:
        integers, scale, zero_point, axis = graph.constants[name]
        assert integers.dtype == np.int8
        if config.granularity == "channel":
            assert scale.shape == zero_point.shape == (integers.shape[0],)
            assert axis == 0
            assert not zero_point.any()
        else:
            assert scale.shape == zero_point.shape == ()
            assert axis is None
            assert config.scheme == "asymmetric" or zero_point == 0
    assert quantized | {f"{w.split('.')[0]}.bias" for w in quantized} == set(graph.constants)


@pytest.fixture(scope="module")
def float_activations(
    float_model: FloatModel, toy_inputs: NDArray[np.float32]
) -> Mapping[str, NDArray[np.float32]]:
    names = ["stem.relu", "depthwise.relu6", "project.out", "sum", "logits"]
    proto = onnx.ModelProto()
    proto.CopyFrom(float_model.proto)
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names[:-1]])
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    values = session.run(names, {"input": toy_inputs})
    return dict(zip(names, values, strict=True)) | {"input": toy_inputs}


# Of each activation the tensor that carries the Q/DQ pair in the model.
SITES = {
    "input": "input",
    "stem.out": "stem.relu",
    "depthwise.out": "depthwise.relu6",
    "project.out": "project.out",
    "sum": "sum",
}


def expected_scale(low: float, high: float, scheme: str) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "asymmetric" or (scheme == "symmetric_uint8" and low == 0.0):
        return (high - low) / 255
    scale = max(-low / 128, high / 127)
    return 2.0 ** math.ceil(math.log2(scale)) if scheme == "symmetric_power2" else scale


@pytest.mark.parametrize("images", [1, 32, "all"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_max_scales_are_those_of_the_first_inputs(
    quantizer: Quantizer,
    float_activations: Mapping[str, NDArray[np.float32]],
    scheme: str,
    images: int | str,
) -> None:
    graph = build(quantizer, scheme=scheme, clipping="max", calibration_images=images)
    for site, tensor in SITES.items():
        values = float_activations[tensor]
        values = values if images == "all" else values[: int(images)]
        expected = expected_scale(float(values.min()), float(values.max()), scheme)
        carrier = site if site in graph.activations else tensor
        assert float(graph.activations[carrier][0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kl_ranges_lie_strictly_inside_max_ranges_on_heavy_tailed_tensors(
    quantizer: Quantizer, scheme: str
) -> None:
    kl = build(quantizer, scheme=scheme, clipping="kl").activations
    maximum = build(quantizer, scheme=scheme, clipping="max").activations
    assert set(kl) == set(maximum)
    smaller = [float(kl[name][0]) < float(maximum[name][0]) for name in kl]
    assert all(float(kl[name][0]) <= float(maximum[name][0]) for name in kl)
    assert smaller[list(kl).index("input")]
    assert sum(smaller) >= len(smaller) // 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_integer_weights_are_the_float_weights_over_their_scale(
    quantizer: Quantizer, float_model: FloatModel, scheme: str, granularity: str
) -> None:
    graph = build(quantizer, scheme=scheme, granularity=granularity)
    for name in WEIGHTS:
        weight = float_model.weights[name].astype(np.float64)
        integers, scale, zero_point, _ = graph.constants[name]
        shape = (-1,) + (1,) * (weight.ndim - 1) if scale.ndim else ()
        restored = (integers.astype(np.float64) - zero_point.reshape(shape)) * scale.reshape(shape)
        assert np.all(np.abs(restored - weight) <= 0.5001 * scale.reshape(shape) + 1e-12)
        if scheme == "symmetric_power2":
            continue
        # The whole integer range is used: some weight of each scale lies at an end of it.
        ends = (integers == integers.dtype.type(127)) | (integers <= -127)
        reached = ends.any(axis=tuple(range(1, weight.ndim))) if scale.ndim else ends.any()
        assert np.all(reached)


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_biases_have_the_scale_of_the_accumulator(
    quantizer: Quantizer, float_model: FloatModel, granularity: str
) -> None:
    graph = build(quantizer, granularity=granularity)
    for layer, source in [("depthwise", "stem.out"), ("project", "depthwise.out")]:
        integers, scale, zero_point, _ = graph.constants[f"{layer}.bias"]
        weight_scale = graph.constants[f"{layer}.weight"][1]
        assert integers.dtype == np.int32
        assert not zero_point.any()
        np.testing.assert_allclose(scale, graph.activations[source][0] * weight_scale, rtol=1e-6)
        np.testing.assert_allclose(
            integers * scale, float_model.weights[f"{layer}.bias"], atol=float(np.max(scale))
        )


def test_a_bias_too_large_for_int32_enlarges_the_scale_of_its_weight(
    float_model: FloatModel, toy_statistics: CalibrationStatistics
) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(float_model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name == "project.weight":
            tiny = numpy_helper.to_array(tensor).copy()
            tiny[3] *= 1e-12
            tensor.CopyFrom(numpy_helper.from_array(tiny, tensor.name))
    weights = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    model = FloatModel(**{**vars(float_model), "proto": proto, "weights": weights})
    graph = build(Quantizer(model, toy_statistics), granularity="channel")
    integers, scale, _, _ = graph.constants["project.bias"]
    error = np.abs(integers * scale.astype(np.float64) - weights["project.bias"])
    assert np.all(error <= 0.5001 * scale)
    # Without the enlargement the third channel would saturate, 1e4 times too small.
    assert abs(integers[3]) > 2**29
    assert error[3] < 1e-6


def test_sums_of_products_and_a_large_bias_stay_within_int32(
    tmp_path: Path, make_quantizer: MakeQuantizer, run: Run
) -> None:
    """As of a folded normalization whose factor is next to nothing."""
    rng = np.random.default_rng(0)
    weight = 0.05 * rng.standard_normal((8, 64, 3, 3))
    weight[3] = rng.uniform(0.5e-6, 1e-6, (64, 3, 3))
    bias = 0.1 * rng.standard_normal(8)
    bias[3] = 2.0
    constants = {"w": weight, "b": bias, "head": rng.standard_normal((10, 8, 1, 1))}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w", "b"], ["c"], "conv"),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
            helper.make_node("Conv", ["r", "head"], ["y"], "head"),
        ],
        "folded",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 64, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10, 6, 6])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    path = tmp_path / "folded.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    inputs = rng.uniform(0.0, 1.0, (32, 64, 8, 8)).astype(np.float32)
    quantizer = make_quantizer(load_float_model(path), inputs)
    reference = run(quantizer.model.proto, inputs)
    for granularity in get_args(Granularity):
        proto = quantizer.quantize(QuantizationConfig(granularity=granularity)).proto
        assert sqnr_db(run(proto, inputs), reference) > 35.0


def test_a_float_bias_enlarges_it_too(
    float_model: FloatModel, toy_statistics: CalibrationStatistics
) -> None:
    """ONNX Runtime makes int32 of it when it loads the model."""
    tiny = {"project.weight": (1e-12 * float_model.weights["project.weight"]).astype(np.float32)}
    proto = onnx.ModelProto()
    proto.CopyFrom(float_model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in tiny:
            tensor.CopyFrom(numpy_helper.from_array(tiny[tensor.name], tensor.name))
    model = dataclasses.replace(float_model, proto=proto, weights=float_model.weights | tiny)
    config = QuantizationConfig(scheme="symmetric", fusion="on")
    plan = Quantizer(
        model, toy_statistics, representation=Representation("int8", float_bias=True)
    ).plan(config)
    (layer,) = (layer for layer in model.layers if layer.name == "project")
    step = plan.constants["project.weight"].scale * float(plan.activations[layer.input].scale)
    assert np.all(np.abs(model.weights["project.bias"]) < 2.0**31 * step)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_bias_of_weights_that_are_zero_keeps_its_value(
    float_model: FloatModel, toy_statistics: CalibrationStatistics, granularity: str
) -> None:
    """A pruned channel, and a whole pruned layer; their own ranges say nothing of steps."""
    pruned = {name: float_model.weights[name].copy() for name in ("project.weight", "stem.weight")}
    pruned["project.weight"][3] = 0.0
    pruned["stem.weight"][:] = 0.0
    proto = onnx.ModelProto()
    proto.CopyFrom(float_model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in pruned:
            tensor.CopyFrom(numpy_helper.from_array(pruned[tensor.name], tensor.name))
    model = dataclasses.replace(float_model, proto=proto, weights=float_model.weights | pruned)
    for scheme in ("asymmetric", "symmetric_power2"):
        graph = build(Quantizer(model, toy_statistics), granularity=granularity, scheme=scheme)
        for bias, kept in (("project.bias", 3), ("stem.bias", slice(None))):
            integers, scale, *_ = graph.constants[bias]
            np.testing.assert_allclose(
                (integers * scale)[kept], model.weights[bias][kept], rtol=1e-2
            )


def test_relu_and_clip_go_only_where_saturation_does_their_work(quantizer: Quantizer) -> None:
    assert not {"Relu", "Clip"} & set(build(quantizer, scheme="asymmetric").operators())
    assert not {"Relu", "Clip"} & set(build(quantizer, scheme="symmetric_uint8").operators())
    for scheme in ("symmetric", "symmetric_power2"):
        assert {"Relu", "Clip"} <= set(build(quantizer, scheme=scheme).operators())


def test_a_relu_stays_where_what_is_before_it_is_an_output(
    toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path, make_quantizer: MakeQuantizer
) -> None:
    proto = onnx.load(toy_model)
    shape = ("batch", 16, 16, 16)
    stem = helper.make_tensor_value_info("stem.out", onnx.TensorProto.FLOAT, shape)
    proto.graph.output.append(stem)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("stem."):  # never negative, so that the Relu does nothing
            values = np.abs(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "two_outputs.onnx")
    model = load_float_model(tmp_path / "two_outputs.onnx")
    built = build(make_quantizer(model, np.abs(toy_inputs)))
    onnx.checker.check_model(built.proto, full_check=True)
    assert built.operators().count("Relu") == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mixed", get_args(MixedPrecision))
def test_no_scheme_loses_a_relu(
    quantizer: Quantizer,
    float_model: FloatModel,
    toy_inputs: NDArray[np.float32],
    scheme: str,
    mixed: str,
    run: Run,
) -> None:
    reference = run(float_model.proto, toy_inputs)
    outputs = run(build(quantizer, scheme=scheme, mixed_precision=mixed).proto, toy_inputs)
    noise = np.mean(np.square(outputs - reference)) / np.mean(np.square(reference))
    # A lost Relu leaves less than 0 dB (facts of ONNX Runtime's quantizer); these keep over 15.
    assert -10 * np.log10(noise) > 15.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_and_uint8_storage_are_the_same_arithmetic(
    quantizer: Quantizer,
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
    scheme: str,
    run: Run,
) -> None:
    signed = Quantizer(
        float_model, toy_statistics, representation=Representation(activations="int8")
    )
    config = QuantizationConfig(scheme=scheme)  # type: ignore[arg-type]
    first, second = Graph(quantizer.quantize(config).proto), Graph(signed.quantize(config).proto)
    for name, (scale, zero_point) in first.activations.items():
        assert second.activations[name][0] == scale
        assert int(second.activations[name][1]) == int(zero_point) - 128
    step = float(first.activations["logits_QuantizeLinear_Input"][0])
    difference = np.abs(run(first.proto, toy_inputs) - run(second.proto, toy_inputs))
    # Different kernels may round a tie differently.
    assert np.mean(difference > 0.5 * step) < 0.02


def test_float_layers_leave_less_noise(
    quantizer: Quantizer, float_model: FloatModel, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    reference = run(float_model.proto, toy_inputs)

    def noise(mixed: str) -> float:
        built = build(quantizer, mixed_precision=mixed, granularity="tensor")
        outputs = run(built.proto, toy_inputs)
        return float(np.mean(np.square(outputs - reference)))

    assert noise("first_last") < noise("none")


def test_equal_models_have_equal_digests_and_others_do_not(
    quantizer: Quantizer, toy_statistics: CalibrationStatistics
) -> None:
    digests = {config: quantizer.quantize(config).digest for config in ALL_96}
    assert quantizer.quantize(ALL_96[5]).digest == digests[ALL_96[5]]
    # A few do coincide: powers of two are coarse, so that KL or fewer images change nothing.
    assert len(set(digests.values())) > 80
    assert len({digests[c] for c in ALL_96 if c.scheme == "asymmetric"}) == 24
    few = Quantizer(
        quantizer.model,
        dataclasses.replace(
            toy_statistics,
            sizes=(1, 20),
            segments={t: c[:2] for t, c in toy_statistics.segments.items()},
        ),
    )
    first = few.quantize(QuantizationConfig(calibration_images=32))
    second = few.quantize(QuantizationConfig(calibration_images="all"))
    assert first.digest == second.digest


def test_the_model_carries_its_configuration(quantizer: Quantizer) -> None:
    config = QuantizationConfig(scheme="symmetric", clipping="kl", calibration_images=32)
    entries = {e.key: e.value for e in quantizer.quantize(config).proto.metadata_props}
    assert entries[CONFIG_KEY] == config.to_json()


@pytest.mark.parametrize("images", [32, "all"])
@pytest.mark.parametrize("percent", ["99.9", "99.99", "99.999", "99.9999"])
def test_percentile_scales_are_quantiles_of_the_first_inputs(
    quantizer: Quantizer,
    float_activations: Mapping[str, NDArray[np.float32]],
    percent: str,
    images: int | str,
) -> None:
    graph = build(quantizer, clipping=f"percentile_{percent}", calibration_images=images)
    for site, tensor in SITES.items():
        values = float_activations[tensor]
        values = values if images == "all" else values[: int(images)]
        # Between two values any threshold leaves the same share inside; a bin is 0.8 % wide.
        smallest, largest = (
            sum(
                float(np.quantile(side, float(percent) / 100.0, method=method))
                for side in (-values[values < 0], values[values > 0])
                if side.size
            )
            for method in ("lower", "higher")
        )
        carrier = site if site in graph.activations else tensor
        scale = float(graph.activations[carrier][0])
        assert 0.992 * smallest <= 255 * scale <= 1.008 * largest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mse_scales_make_the_least_error_of_all_clippings(
    quantizer: Quantizer, float_activations: Mapping[str, NDArray[np.float32]], scheme: str
) -> None:
    def error(clipping: str, tensor: str, site: str) -> float:
        graph = build(quantizer, scheme=scheme, clipping=clipping)
        carrier = site if site in graph.activations else tensor
        scale, zero_point = (float(number) for number in graph.activations[carrier])
        values = float_activations[tensor].astype(np.float64)
        integers = np.clip(np.rint(values / scale) + zero_point, 0, 255)
        return float(np.mean(np.square((integers - zero_point) * scale - values)))

    gains = []
    for site, tensor in SITES.items():
        mse, maximum, kl = (error(clipping, tensor, site) for clipping in ("mse", "max", "kl"))
        # Rounding errors of these tensors differ from their expectation by a few percent.
        assert mse <= 1.03 * min(maximum, kl)
        gains.append(mse / maximum)
    assert min(gains) < 0.9


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_clipping_by_mse_moves_weights_closer(
    quantizer: Quantizer, float_model: FloatModel, scheme: str, granularity: str
) -> None:
    def error(graph: Graph, name: str) -> float:
        integers, scale, zero_point, _ = graph.constants[name]
        weight = float_model.weights[name].astype(np.float64)
        shape = (-1,) + (1,) * (weight.ndim - 1) if scale.ndim else ()
        restored = (integers.astype(np.float64) - zero_point.reshape(shape)) * scale.reshape(shape)
        return float(np.mean(np.square(restored - weight)))

    plain, clipped = (
        build(quantizer, scheme=scheme, granularity=granularity, weight_clipping=clipping)
        for clipping in get_args(WeightClipping)
    )
    changed = 0
    for name in WEIGHTS:
        changed += not np.array_equal(plain.constants[name][1], clipped.constants[name][1])
        assert error(clipped, name) <= error(plain, name) * (1 + 1e-6)
    # One range for many weights is mostly the best as it is; so is the next power of two.
    if granularity == "channel" and scheme != "symmetric_power2":
        assert changed == len(WEIGHTS)
    assert changed > 0 or (granularity == "tensor" and scheme == "symmetric_power2")
    assert plain.activations == clipped.activations


REPRESENTATIONS = {
    "in pairs": Representation(adds_in_pairs=True),
    "narrow": Representation(narrow_weights=True),
    "in pairs, narrow": Representation(adds_in_pairs=True, narrow_weights=True),
}


@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight_clipping", get_args(WeightClipping))
@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_weights_keep_to_the_integers_of_their_representation(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    name: str,
    weight_clipping: str,
    scheme: str,
    granularity: str,
) -> None:
    representation = REPRESENTATIONS[name]
    quantizer = Quantizer(float_model, toy_statistics, representation=representation)
    graph = build(
        quantizer, scheme=scheme, granularity=granularity, weight_clipping=weight_clipping
    )
    for weight in WEIGHTS:
        # What is added in pairs has 7 bits where it has a zero point, and otherwise other scales;
        # the kernel of depthwise convolutions adds products one by one.
        paired = representation.adds_in_pairs and weight != "depthwise.weight"
        bits = 7 if paired and (scheme, granularity) == ("asymmetric", "tensor") else 8
        largest = (1 << (bits - 1)) - 1
        lowest = -largest - (not representation.narrow_weights)
        integers = graph.constants[weight][0]
        assert integers.dtype == np.int8
        assert lowest <= integers.min() < integers.max() <= largest
        whole = not paired or bits == 7
        if whole and scheme != "symmetric_power2" and weight_clipping == "max":
            assert max(-int(integers.min()), int(integers.max())) >= largest
    assert {zero_point.dtype for _, zero_point in graph.activations.values()} == {np.dtype("u1")}


def test_only_some_operators_may_have_a_scale_for_each_channel(
    float_model: FloatModel, toy_statistics: CalibrationStatistics
) -> None:
    representation = Representation(per_channel=("Conv",), symmetric_weights=True)
    quantizer = Quantizer(float_model, toy_statistics, representation=representation)
    graph = build(quantizer, granularity="channel")
    for name in WEIGHTS:
        integers, scale, zero_point, axis = graph.constants[name]
        assert scale.ndim == (name != "head.weight")
        assert (axis is None) == (name == "head.weight")
        assert not zero_point.any()
    assert graph.constants["head.bias"][1].shape == ()
    onnx.checker.check_model(graph.proto, full_check=True)


def test_biases_can_stay_in_float(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
    run: Run,
) -> None:
    representation = Representation("int8", narrow_weights=True, float_bias=True)
    quantizer = Quantizer(float_model, toy_statistics, representation=representation)
    graph = build(quantizer, scheme="symmetric", fusion="on")
    onnx.checker.check_model(graph.proto, full_check=True)
    assert not {name for name in graph.constants if name.endswith("bias")}
    integers = {i.name: i for i in graph.proto.graph.initializer if i.data_type in (2, 3, 6)}
    assert {tensor.data_type for tensor in integers.values()} == {onnx.TensorProto.INT8}
    for layer in float_model.layers:
        (node,) = (node for node in graph.proto.graph.node if node.name == layer.name)
        assert layer.bias is not None
        np.testing.assert_array_equal(
            graph.initializers[node.input[2]], float_model.weights[layer.bias]
        )
    assert all(not zero_point for _, zero_point in graph.activations.values())
    reference = run(float_model.proto, toy_inputs)
    noise = np.mean(np.square(run(graph.proto, toy_inputs) - reference))
    assert -10 * np.log10(noise / np.mean(np.square(reference))) > 15.0


def test_ranges_of_weights_are_computed_once(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return least_error_range(*arguments, **options)

    monkeypatch.setattr(quantizer_module, "least_error_range", counted)
    quantizer = Quantizer(float_model, toy_statistics)
    for clipping in ("max", "kl", "mse"):
        build(quantizer, clipping=clipping, weight_clipping="mse")
    assert len(calls) == len(WEIGHTS)


def test_a_model_of_two_layers_is_not_left_in_float(
    make_quantizer: MakeQuantizer, tmp_path: Path
) -> None:
    make, value = helper.make_node, helper.make_tensor_value_info
    weights = {"first": np.ones((4, 6), np.float32), "last": np.ones((6, 3), np.float32)}
    graph = helper.make_graph(
        [
            make("MatMul", ["input", "first"], ["a"], "one"),
            make("Relu", ["a"], ["b"], "relu"),
            make("MatMul", ["b", "last"], ["y"], "two"),
        ],
        "two",
        [value("input", onnx.TensorProto.FLOAT, ["n", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "two.onnx")
    model = load_float_model(tmp_path / "two.onnx")
    quantizer = make_quantizer(model, np.ones((4, 4), np.float32))
    digests = {
        quantizer.quantize(QuantizationConfig(mixed_precision=kept)).digest
        for kept in ("none", "first_last")
    }
    assert len(digests) == 1
    assert quantizer.float_layers(QuantizationConfig(mixed_precision="first_last")) == ()
