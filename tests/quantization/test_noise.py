from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from scipy.stats import spearmanr

from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import Granularity
from optuna_quantune.quantization.config import MixedPrecision
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.noise import ADDITIVE
from optuna_quantune.quantization.noise import layer_error
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.noise import rounding_and_clipping_error
from optuna_quantune.quantization.noise import Saturation
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.statistics import Accumulator


@pytest.mark.parametrize("clip", [1.0, 2.5, 6.0])
@pytest.mark.parametrize("levels", [16, 255])
def test_expected_error_is_the_error_of_really_quantizing(clip: float, levels: int) -> None:
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    accumulator = Accumulator()
    accumulator.add(values)
    histogram = accumulator.counts().histogram()
    scale = 2 * clip / levels
    integers = np.clip(np.rint(values / scale), -(levels // 2), levels // 2)
    low, high = -scale * (levels // 2), scale * (levels // 2)
    rounding, cut_off = rounding_and_clipping_error(histogram, scale, low, high)
    clipping = sum(cut_off)
    assert rounding + clipping == pytest.approx(
        np.mean(np.square(integers * scale - values)), rel=0.03
    )
    above = np.mean(np.square(np.maximum(values - high, 0.0)))
    assert cut_off.above == pytest.approx(above, rel=0.03)
    assert (clipping > rounding) == (clip < 2.0 or (clip < 3.0 and levels == 255))


@pytest.mark.parametrize("scale", [0.5, 0.043, 0.0101])
def test_many_values_that_are_the_same_lose_what_one_loses(scale: float) -> None:
    values = np.repeat(np.array([0.72, -0.31, 0.2501], dtype=np.float32), [5000, 3000, 100])
    accumulator = Accumulator()
    accumulator.add(values)
    rounding, cut_off = rounding_and_clipping_error(
        accumulator.counts().histogram(), scale, -1.0, 1.0
    )
    exact = np.mean(np.square(np.rint(values / scale) * scale - values))
    # As far as the histogram tells where they are.
    assert rounding == pytest.approx(exact, rel=0.1, abs=0.02 * scale**2 / 12)
    assert cut_off == (0.0, 0.0)


def test_what_a_range_without_negative_values_cuts_off_is_no_rounding() -> None:
    values = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    accumulator = Accumulator()
    accumulator.add(values)
    scale = 0.5
    rounding, cut_off = rounding_and_clipping_error(
        accumulator.counts().histogram(), scale, 0.0, 15 * scale
    )
    error = scale * np.clip(np.rint(values / scale), 0, 15) - values
    assert rounding == pytest.approx(np.sum(np.square(error[values > 0])) / values.size, rel=0.03)
    below = np.sum(np.square(error[values < 0])) / values.size
    assert cut_off == (pytest.approx(below, rel=0.03), 0.0)


@pytest.mark.parametrize(
    ("op_type", "shape", "axis", "groups"),
    [
        ("Conv", (6, 4, 3, 3), 0, 1),
        ("Conv", (8, 1, 3, 3), 0, 8),
        ("Conv", (8, 2, 1, 1), 0, 4),
        ("Gemm", (5, 12), 0, 1),
        ("Gemm", (12, 5), 1, 1),
        ("MatMul", (12, 5), 1, 1),
    ],
)
def test_error_of_a_layer_is_the_error_of_really_running_it(
    op_type: str, shape: tuple[int, ...], axis: int, groups: int
) -> None:
    rng = np.random.default_rng(0)
    error = rng.standard_normal(shape).astype(np.float32)
    convolution = op_type == "Conv"
    channels = shape[1] * groups if convolution else shape[1 - axis]
    size = (256, channels, 12, 12) if convolution else (20_000, channels)
    offset = rng.uniform(0.0, 2.0, (channels, *(1 for _ in size[2:])))
    inputs = (rng.standard_normal(size) + offset).astype(np.float32)
    attributes = {"group": groups} if convolution else {}
    if op_type == "Gemm":
        attributes = {"transB": int(axis == 0)}
    node = onnx.helper.make_node(op_type, ["x", "w"], ["y"], **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(error, "w")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs = session.run(None, {"x": inputs})[0]
    others = tuple(i for i in range(inputs.ndim) if i != 1)
    layer = Layer("layer", op_type, "x", "y", "w", None, axis, groups)
    mean = inputs.mean(axis=others, dtype=np.float64)
    power = np.square(inputs, dtype=np.float64).mean(axis=others)
    varying, shift = layer_error(layer, error, mean, power)
    assert varying + shift == pytest.approx(float(np.mean(np.square(outputs))), rel=0.03)
    assert varying == pytest.approx(float(np.mean(outputs.var(axis=others))), rel=0.03)


def test_prediction_orders_configurations_as_measured_noise_does(
    quantizer: Quantizer,
    toy_inputs: NDArray[np.float32],
    toy_probe: Probe,
    run: Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    reference = run(quantizer.model.proto, toy_inputs)
    predicted, measured = [], []
    noise = NoiseModel(quantizer, toy_probe)
    for corrected, images, scheme, clipping, granularity, mixed in itertools.product(
        (False, True),
        (1, "all"),
        get_args(Scheme),
        get_args(Clipping),
        get_args(Granularity),
        get_args(MixedPrecision),
    ):
        config = QuantizationConfig(
            calibration_images=images,
            scheme=scheme,
            clipping=clipping,
            granularity=granularity,
            mixed_precision=mixed,
            bias_correction=corrected,
        )
        outputs = run(quantizer.quantize(config).proto, toy_inputs)
        error = np.mean(np.square(outputs - reference)) / np.mean(np.square(reference))
        measured.append(-10 * np.log10(error))
        predicted.append(noise.predict(config).features()["predicted_sqnr_db"])
    assert spearmanr(predicted, measured).statistic > 0.9
    # And in absolute terms, without any fit: decibels of two different quantities.
    assert np.median(np.abs(np.subtract(predicted, measured))) < 3.0


def test_float_layers_and_finer_scales_are_expected_to_be_less_noisy(
    quantizer: Quantizer, toy_probe: Probe
) -> None:
    noise = NoiseModel(quantizer, toy_probe)

    def total(**knobs: str | bool) -> float:
        return noise.predict(QuantizationConfig.from_dict(knobs)).total

    assert total(granularity="channel") < total(granularity="tensor")
    assert total(mixed_precision="first_last") < total(mixed_precision="none")
    assert total(scheme="asymmetric") < total(scheme="symmetric")
    assert total(scheme="symmetric") < total(scheme="symmetric_power2")
    assert total(bias_correction=True) < total(bias_correction=False)


def test_a_layer_left_in_float_contributes_nothing_and_the_others_as_before(
    quantizer: Quantizer, toy_probe: Probe
) -> None:
    noise = NoiseModel(quantizer, toy_probe)
    config = QuantizationConfig(granularity="tensor")
    whole = noise.predict_layers(config, ())
    for layer in quantizer.model.layers:
        partial = noise.predict_layers(config, (layer.name,))
        assert set(whole.weights) - set(partial.weights) == {layer.weight}
        assert all(partial.weights[name] == whole.weights[name] for name in partial.weights)
        assert all(partial.rounding[name] == whole.rounding[name] for name in partial.rounding)
        assert partial.total < whole.total


def test_prediction_orders_sets_of_float_layers_as_measured_noise_does(
    quantizer: Quantizer,
    toy_inputs: NDArray[np.float32],
    toy_probe: Probe,
    run: Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    names = [layer.name for layer in quantizer.model.layers]
    config = QuantizationConfig(granularity="tensor")
    reference = run(quantizer.model.proto, toy_inputs)
    noise = NoiseModel(quantizer, toy_probe)
    predicted, measured = [], []
    for size in range(len(names)):
        for chosen in itertools.combinations(names, size):
            quantizer.float_layers = lambda config, chosen=chosen: chosen  # type: ignore[method-assign]
            try:
                outputs = run(quantizer.quantize(config).proto, toy_inputs)
            finally:
                del quantizer.float_layers
            measured.append(np.mean(np.square(outputs - reference)))
            predicted.append(noise.predict_layers(config, chosen).total)
    assert spearmanr(predicted, measured).statistic > 0.9


def test_noise_beyond_the_signal_does_not_add_up() -> None:
    # Simulated where the sum was 10, which is what 100 times `ADDITIVE` is: it was 1.
    saturation = Saturation(linear=100 * ADDITIVE, total=0.1, confusion=0.5, gain=0.25)

    def predicted(weights: float) -> NoisePrediction:
        parts = {"a": weights / 2, "b": weights / 2}
        return NoisePrediction({"a": 0.01}, {"a": 0.02}, parts, {"a": 0.015}, 8.0, saturation)

    assert predicted(0.04).total == pytest.approx(0.07)
    assert predicted(9.97).total == pytest.approx(1.0)
    assert predicted(9.97).confusion == pytest.approx(0.5 * 9.985)
    assert predicted(9.97).highest_output == pytest.approx(8.0 / 0.25)
    # Half way, in decibels, half the decibels are gone.
    assert predicted(0.97).total == pytest.approx(np.sqrt(0.1))
    # Beyond the simulated one there is no more noise than in that.
    assert predicted(99.97).total == pytest.approx(1.0)
    assert predicted(99.97).confusion == pytest.approx(0.5 * 10.0, rel=1e-2)


def test_a_prediction_does_not_depend_on_those_before_it(
    quantizer: Quantizer, toy_probe: Probe
) -> None:
    configs = [
        QuantizationConfig(calibration_images=images, scheme=scheme, clipping="kl")
        for images in (1, "all")
        for scheme in get_args(Scheme)
    ]
    forwards, backwards = NoiseModel(quantizer, toy_probe), NoiseModel(quantizer, toy_probe)
    first = [forwards.predict(config) for config in configs]
    second = [backwards.predict(config) for config in reversed(configs)]
    assert first == second[::-1]


def test_schemes_and_granularities_are_simulated_and_all_else_if_asked(
    quantizer: Quantizer, toy_probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_quantune.quantization.noise.ADDITIVE", 0.0)
    configs = [
        QuantizationConfig(scheme=scheme, clipping=clipping, calibration_images=images)
        for scheme, clipping, images in itertools.product(
            get_args(Scheme), get_args(Clipping), (1, "all")
        )
    ]
    coarse, close = (NoiseModel(quantizer, toy_probe, closely=choice) for choice in (False, True))
    shared = {config: coarse.predict(config).saturation for config in configs}
    single = {config: close.predict(config).saturation for config in configs}
    assert len(set(single.values())) > len(set(shared.values()))
    clipped = [config for config in configs if mostly_cut_off(coarse.predict(config))]
    assert 0 < len(clipped) < len(configs)
    for config in configs:
        typical = replace(config, clipping="max", calibration_images="all")
        assert shared[config] == single[config if config in clipped else typical]


def mostly_cut_off(prediction: NoisePrediction) -> bool:
    return sum(prediction.clipping.values()) > 0.5 * prediction.linear


def residual_stream(blocks: int) -> onnx.ModelProto:
    """Convolutions that add little to what they read, so that each sum holds the same values."""
    rng = np.random.default_rng(0)
    nodes, constants, last = [], [], "input"
    for number in range(blocks):
        weight = 0.05 * rng.standard_normal((4, 4, 1, 1)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"weight_{number}"))
        nodes += [
            helper.make_node("Conv", [last, f"weight_{number}"], [f"conv_{number}"]),
            helper.make_node("Add", [last, f"conv_{number}"], [f"sum_{number}"]),
        ]
        last = f"sum_{number}"
    graph = helper.make_graph(
        nodes,
        "residual_stream",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, ["n", 4, 6, 6])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_cut_off_once_is_not_cut_off_again(
    tmp_path: Path,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    run: Callable[..., NDArray[np.float32]],
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual_stream(6), path)
    inputs = np.random.default_rng(1).standard_t(3, (64, 4, 6, 6)).astype(np.float32)
    quantizer = make_quantizer(load_float_model(path), inputs)
    feeds = [{"input": inputs[i : i + 1]} for i in range(16)]
    config = QuantizationConfig(clipping="percentile_99.9", granularity="channel")
    config = replace(config, calibration_images=1)
    found = NoiseModel(quantizer, probe(quantizer, feeds)).predict(config)
    assert mostly_cut_off(found)
    reference = run(quantizer.model.proto, inputs)
    outputs = run(quantizer.quantize(config).proto, inputs)
    measured = np.square(outputs - reference).sum() / np.square(reference).sum()
    assert found.linear > 2.0 * measured
    assert found.total == pytest.approx(measured, rel=0.4)


def test_what_is_cut_off_of_one_input_alone_confuses_less_than_its_power(
    float_model: FloatModel,
    toy_inputs: NDArray[np.float32],
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
) -> None:
    reaching = toy_inputs.copy()
    reaching[50] *= 20.0  # not one of the 32 that the ranges come from
    quantizer = make_quantizer(float_model, reaching)
    feeds = [{"input": toy_inputs[i : i + 1]} for i in range(8)]
    noise = NoiseModel(quantizer, probe(quantizer, feeds))
    found = noise.predict(QuantizationConfig(calibration_images=32, clipping="max"))
    cut_off = sum(found.clipping.values()) - sum(found.scaling.values())
    even = found.linear - sum(found.clipping.values())
    assert cut_off > 10.0 * even
    of_each = np.zeros(len(reaching))
    of_each[50] = len(reaching) * cut_off
    assert found.uneven.argmax() == 50
    assert found.confusing == pytest.approx(np.mean(np.sqrt(even + of_each)) ** 2, rel=0.1)
    assert found.confusing < 0.3 * (even + cut_off)
    # Ranges of all inputs cut nothing off.
    whole = noise.predict(QuantizationConfig(clipping="max"))
    assert len(whole.uneven) == 0
    assert whole.confusing == pytest.approx(whole.linear, rel=1e-3)


@pytest.mark.parametrize("activation", ["Identity", "Relu"])
@pytest.mark.parametrize("chosen", [(), ("second",), ("first", "second")])
def test_an_average_is_rounded_where_it_is_read_behind_a_flatten(
    activation: str,
    chosen: tuple[str, ...],
    tmp_path: Path,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    run: Callable[..., NDArray[np.float32]],
) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["input", "w1"], ["c1"], "first", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "second", pads=[1] * 4),
        helper.make_node(activation, ["c2"], ["r2"], "activation"),
        helper.make_node("AveragePool", ["r2"], ["a"], "average", kernel_shape=[8, 8]),
        helper.make_node("Flatten", ["a"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3"], ["logits"], "third"),
    ]
    weights = {
        "w1": rng.normal(0.0, 0.3, (8, 3, 3, 3)),
        "w2": rng.normal(0.0, 0.2, (32, 8, 3, 3)),
        "w3": rng.normal(0.0, 0.3, (32, 10)),
    }
    graph = helper.make_graph(
        nodes,
        "average",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value.astype(np.float32), n) for n, value in weights.items()],
    )
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    inputs = rng.standard_normal((64, 3, 8, 8)).astype(np.float32)
    quantizer = make_quantizer(load_float_model(path), inputs)
    noise = NoiseModel(quantizer, probe(quantizer, [{"input": x[None]} for x in inputs[:16]]))
    config = QuantizationConfig()
    predicted = noise.predict_layers(config, chosen).features()["predicted_sqnr_db"]
    reference = run(quantizer.model.proto, inputs)
    quantizer.float_layers = lambda config: chosen  # type: ignore[method-assign]
    outputs = run(quantizer.quantize(config).proto, inputs)
    assert predicted == pytest.approx(sqnr_db(outputs, reference), abs=1.5)


def normalized_blocks(blocks: int) -> onnx.ModelProto:
    """Each normalizes the sum of what it reads and of what two layers make of it."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["input", "w"], ["sum_0"], "embed")]
    values = {"w": rng.normal(0.0, 0.25, (16, 16)), "head": rng.normal(0.0, 0.25, (16, 5))}
    for i in range(blocks + 1):
        values |= {f"gain_{i}": rng.uniform(0.5, 1.5, 16), f"bias_{i}": rng.normal(0.0, 0.1, 16)}
        norm = [f"sum_{i}", f"gain_{i}", f"bias_{i}"]
        nodes.append(helper.make_node("LayerNormalization", norm, [f"n_{i}"], f"norm_{i}"))
        if i < blocks:
            values |= {f"up_{i}": rng.normal(0.0, 0.25, (16, 32))}
            values |= {f"down_{i}": rng.normal(0.0, 0.05, (32, 16))}
            nodes += [
                helper.make_node("MatMul", [f"n_{i}", f"up_{i}"], [f"h_{i}"], f"up_{i}"),
                helper.make_node("Relu", [f"h_{i}"], [f"r_{i}"], f"relu_{i}"),
                helper.make_node("MatMul", [f"r_{i}", f"down_{i}"], [f"d_{i}"], f"down_{i}"),
                helper.make_node("Add", [f"n_{i}", f"d_{i}"], [f"sum_{i + 1}"], f"add_{i}"),
            ]
    nodes.append(helper.make_node("MatMul", [f"n_{blocks}", "head"], ["logits"], "head"))
    graph = helper.make_graph(
        nodes,
        "normalized",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 6, 16])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 6, 5])],
        [numpy_helper.from_array(value.astype(np.float32), n) for n, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_float_nodes_read_as_it_is_counts_for_layers_that_read_it_rounded(
    tmp_path: Path,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    run: Callable[..., NDArray[np.float32]],
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(normalized_blocks(2), path)
    inputs = np.random.default_rng(1).standard_normal((64, 6, 16)).astype(np.float32)
    quantizer = make_quantizer(load_float_model(path), inputs)
    noise = NoiseModel(quantizer, probe(quantizer, [{"input": x[None]} for x in inputs[:16]]))
    config = QuantizationConfig()
    reference = run(quantizer.model.proto, inputs)
    floats = [n.name for n in quantizer.model.proto.graph.node if "norm" in n.name]
    floats += ["add_0", "add_1"]
    for others in ((), ("embed",), ("embed", "head", "logits")):
        chosen = (*floats, *others)
        found = noise.predict_layers(config, chosen)
        whole = noise.predict_layers(config, ())
        assert found.rounding["n_0"] < 0.5 * whole.rounding["n_0"]
        quantizer.float_layers = lambda config, chosen=chosen: chosen  # type: ignore[method-assign]
        outputs = run(quantizer.quantize(config).proto, inputs)
        del quantizer.float_layers
        measured = sqnr_db(outputs, reference)
        assert found.features()["predicted_sqnr_db"] == pytest.approx(measured, abs=1.0)
