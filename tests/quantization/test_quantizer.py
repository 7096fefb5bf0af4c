"""Scales and zero points are read back from the built model and computed again, independently."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import Granularity
from optuna_quantune.quantization.config import MixedPrecision
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.quantizer import CONFIG_KEY
from optuna_quantune.quantization.quantizer import Quantizer


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
        get_args(Clipping),
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
    assert abs(integers[3]) > 2**30
    assert error[3] < 1e-6


def test_relu_and_clip_go_only_where_saturation_does_their_work(quantizer: Quantizer) -> None:
    assert not {"Relu", "Clip"} & set(build(quantizer, scheme="asymmetric").operators())
    assert not {"Relu", "Clip"} & set(build(quantizer, scheme="symmetric_uint8").operators())
    for scheme in ("symmetric", "symmetric_power2"):
        assert {"Relu", "Clip"} <= set(build(quantizer, scheme=scheme).operators())


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
    signed = Quantizer(float_model, toy_statistics, activation_storage="int8")
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
        CalibrationStatistics((1, 20), {t: c[:2] for t, c in toy_statistics.segments.items()}, ""),
    )
    first = few.quantize(QuantizationConfig(calibration_images=32))
    second = few.quantize(QuantizationConfig(calibration_images="all"))
    assert first.digest == second.digest


def test_the_model_carries_its_configuration(quantizer: Quantizer) -> None:
    config = QuantizationConfig(scheme="symmetric", clipping="kl", calibration_images=32)
    entries = {e.key: e.value for e in quantizer.quantize(config).proto.metadata_props}
    assert entries[CONFIG_KEY] == config.to_json()
