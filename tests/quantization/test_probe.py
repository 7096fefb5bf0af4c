from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.disturbance import DisturbableModel
from optuna_quantune.quantization.disturbance import Values
from optuna_quantune.quantization.joint import joint_error
from optuna_quantune.quantization.joint import JointNoise
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.probe import GainOfStep
from optuna_quantune.quantization.probe import Probe
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations


def two_layers(
    folder: Path,
    first: NDArray[np.float32],
    second: NDArray[np.float32],
    inputs: NDArray[np.float32],
    batch: str | int = "n",
    length: tuple[str, ...] = (),
    between: str = "Identity",
) -> Quantizer:
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], name="first"),
        helper.make_node(between, ["h"], ["a"], name="between"),
        helper.make_node("MatMul", ["a", "second"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *length, len(first)])],
        [
            helper.make_tensor_value_info(
                "y", onnx.TensorProto.FLOAT, [batch, *length, second.shape[1]]
            )
        ],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "linear.onnx")
    prepared = load_float_model(folder / "linear.onnx")
    tensors = required_activations(place(prepared))
    statistics = calibrate(prepared, ArrayInputs({"x": inputs}), tensors, sizes=("all",))
    return Quantizer(prepared, statistics)


def one_by_one(inputs: NDArray[np.float32], number: int) -> list[dict[str, NDArray[np.float32]]]:
    return [{"x": inputs[i : i + 1]} for i in range(number)]


def test_gains_of_a_linear_model_are_those_of_its_matrices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((400, 300)).astype(np.float32) / 20
    second = rng.standard_normal((300, 500)).astype(np.float32)
    inputs = rng.standard_normal((64, 400)).astype(np.float32)
    found = probe(two_layers(tmp_path, first, second, inputs), one_by_one(inputs, 8))
    expected = {"x": first @ second, "h": second, "y": np.eye(500)}
    for tensor, matrix in expected.items():
        # A rounding error of power 1 in every input gives each output the squared norm of its
        # column: errors of different values have nothing to do with each other.
        gain = np.mean(np.square(matrix).sum(axis=0))
        assert len(found.rounding_gain[tensor].steps) == 3
        np.testing.assert_allclose(found.rounding_gain[tensor].gains, gain, rtol=0.1)
    outputs = inputs[:8] @ first @ second
    assert found.output_power == pytest.approx(np.mean(np.square(outputs)), rel=1e-3)


def test_gain_of_a_layer_is_that_of_an_error_which_it_alone_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((30, 30)).astype(np.float32) / 3
    second = rng.standard_normal((30, 20)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["h"], name="first"),
            helper.make_node("Sub", ["x", "h"], ["s"], name="difference"),
            helper.make_node("MatMul", ["s", "second"], ["y"], name="second"),
        ],
        "residual",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 30])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 20])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "residual.onnx")
    prepared = load_float_model(tmp_path / "residual.onnx")
    inputs = rng.standard_normal((256, 30)).astype(np.float32)
    tensors = required_activations(place(prepared))
    statistics = calibrate(prepared, ArrayInputs({"x": inputs}), tensors, sizes=("all",))
    found = probe(Quantizer(prepared, statistics), one_by_one(inputs, 64))
    alone = np.mean(np.square(first @ second).sum(axis=0))
    assert found.layer_gain["x"] == {"first": pytest.approx(alone, rel=0.1)}
    everywhere = np.mean(np.square((np.eye(30) - first) @ second).sum(axis=0))
    assert found.rounding_gain["x"].gains[0] == pytest.approx(everywhere, rel=0.1)


def test_noise_of_a_weight_is_that_of_running_the_model_with_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(rng.standard_normal(30)).astype(np.float32)
    first = rng.standard_normal((40, 30)).astype(np.float32) * spread
    second = rng.standard_normal((30, 20)).astype(np.float32) / spread[:, None]
    inputs = rng.standard_normal((64, 40)).astype(np.float32)
    quantizer = two_layers(tmp_path, first, second, inputs)
    found = probe(quantizer, one_by_one(inputs, 8))
    constants = quantizer.plan(QuantizationConfig(granularity="tensor")).constants
    wrong = {
        layer.weight: quantizer.model.weights[layer.weight]
        + quantizer.weight_error(layer, constants[layer.weight])
        for layer in quantizer.model.layers
    }
    exact = inputs[:8] @ first @ second
    errors = {
        "first": inputs[:8] @ wrong["first"] @ second - exact,
        "second": inputs[:8] @ first @ wrong["second"] - exact,
    }
    for weight, error in errors.items():
        assert found.weight_noise[weight] == pytest.approx(np.mean(np.square(error)), rel=1e-3)


def test_inputs_of_several_lengths_are_not_put_into_one_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 30, 30)).astype(np.float32)
    inputs = rng.standard_normal((8, 5, 30)).astype(np.float32)
    quantizer = two_layers(tmp_path, first, second, inputs, length=("t",))
    feeds = [{"x": inputs[i : i + 1, : 2 + i % 3]} for i in range(8)]
    config = QuantizationConfig(granularity="tensor")
    several = JointNoise(quantizer, quantizer.model, feeds).of_weights(config).total
    flat = {"x": np.concatenate([feed["x"] for feed in feeds], axis=1)}
    assert several == pytest.approx(
        JointNoise(quantizer, quantizer.model, [flat]).of_weights(config).total
    )


@pytest.mark.parametrize("batch", ["n", 1])
def test_weights_that_drown_the_signal_are_measured_together(
    tmp_path: Path, batch: str | int
) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(4.0 * rng.standard_normal(30)).astype(np.float32)
    first = rng.standard_normal((40, 30)).astype(np.float32) * spread
    second = rng.standard_normal((30, 20)).astype(np.float32) / spread[:, None]
    inputs = rng.standard_normal((64, 40)).astype(np.float32)
    quantizer = two_layers(tmp_path, first, second, inputs, batch)
    joint = JointNoise(quantizer, quantizer.model, one_by_one(inputs, 8))
    config = QuantizationConfig(granularity="tensor", scheme="symmetric")
    constants = quantizer.plan(config).constants
    wrong = [
        quantizer.model.weights[layer.weight]
        + quantizer.weight_error(layer, constants[layer.weight])
        for layer in quantizer.model.layers
    ]
    exact = inputs[:8] @ first @ second
    found = inputs[:8] @ wrong[0] @ wrong[1]
    ratio = np.mean(np.square(found - exact)) / np.mean(np.square(exact))
    assert joint.of_weights(config).total == pytest.approx(ratio, rel=1e-3)


def test_a_drowned_configuration_is_predicted_from_its_simulation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(4.0 * rng.standard_normal(30)).astype(np.float32)
    first = rng.standard_normal((40, 30)).astype(np.float32) * spread
    second = rng.standard_normal((30, 20)).astype(np.float32) / spread[:, None]
    inputs = rng.standard_normal((32, 40)).astype(np.float32)
    drowned = two_layers(tmp_path, first, second, inputs)
    noise = NoiseModel(drowned, probe(drowned, one_by_one(inputs, 32)))
    config = QuantizationConfig(granularity="tensor", scheme="symmetric")
    prediction = noise.predict(config)
    constants = drowned.plan(config).constants
    wrong = [
        drowned.model.weights[layer.weight] + drowned.weight_error(layer, constants[layer.weight])
        for layer in drowned.model.layers
    ]

    def rounded(tensor: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        parameters = drowned.activation_parameters(tensor, config)
        return parameters.dequantize(parameters.quantize(values))

    found = rounded("y", rounded("h", rounded("x", inputs) @ wrong[0]) @ wrong[1])
    exact = inputs @ first @ second
    measured = np.mean(np.square(found - exact)) / np.mean(np.square(exact))
    assert prediction.linear > 1.5 * measured  # the plain sum is wrong
    assert prediction.total == pytest.approx(measured, rel=0.02)


def test_what_is_left_of_a_signal_is_told_from_what_confuses_it() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((8, 1, 4000))
    noise = rng.standard_normal((8, 1, 4000))
    found = 0.5 * exact + 0.1 * noise + rng.standard_normal((8, 1, 1))
    error = joint_error([[x] for x in found], [[x] for x in exact])
    assert error.gain == pytest.approx(0.5, rel=0.01)
    # A tenth beside a signal of one half is a fifth.
    assert error.confusion == pytest.approx(0.2**2, rel=0.02)
    assert error.total == pytest.approx(np.mean(np.square(found - exact)), rel=0.02)
    silent = joint_error([[x] for x in noise], [[x] for x in exact])
    assert silent.confusion > 1e3
    found[0, 0, 0] = -np.inf  # a logarithm of what was rounded to 0
    infinite = joint_error([[x] for x in found], [[x] for x in exact])
    assert infinite.total > 1e3
    assert infinite.confusion > 1e3


def test_moments_are_those_of_the_inputs_of_each_layer(
    toy_probe: Probe, toy_inputs: NDArray[np.float32]
) -> None:
    first = toy_inputs[:8].astype(np.float64)
    np.testing.assert_allclose(
        toy_probe.channel_mean["stem"], first.mean(axis=(0, 2, 3)), atol=1e-6
    )
    np.testing.assert_allclose(
        toy_probe.channel_power["stem"], np.square(first).mean(axis=(0, 2, 3)), rtol=1e-6
    )
    assert toy_probe.channel_mean["head"].shape == (16,)


def test_a_tensor_that_is_always_zero_gains_nothing(tmp_path: Path) -> None:
    inputs = np.ones((2, 4), dtype=np.float32)
    zeros, ones = np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)
    found = probe(two_layers(tmp_path, zeros, ones, inputs), one_by_one(inputs, 1))
    assert found.rounding_gain["h"].at(0.1) == 0.0
    assert found.clipping_gain["h"] == (0.0, 0.0)


def test_a_channel_that_is_never_active_bears_no_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 200)).astype(np.float32)
    second = rng.standard_normal((200, 400)).astype(np.float32)
    first[:, :100] = 0.0  # these channels of h are always 0,
    second[:100] *= 1e4  # and what follows would amplify noise in them
    inputs = rng.standard_normal((16, 300)).astype(np.float32)
    found = probe(two_layers(tmp_path, first, second, inputs), one_by_one(inputs, 4))
    # Per unit of mean power over all values the active half bears twice the power.
    expected = 2 * np.mean(np.square(second[100:]).sum(axis=0))
    np.testing.assert_allclose(found.rounding_gain["h"].gains, expected, rtol=0.15)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "symmetric_power2"])
def test_values_that_inputs_have_in_common_are_rounded_to_the_same_side(
    scheme: Scheme, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 400)).astype(np.float32)
    inputs[:, :300] = 0.3047  # a background, which the sum of all values is sensitive to
    second = np.ones((400, 8), dtype=np.float32)
    quantizer = two_layers(tmp_path, np.eye(400, dtype=np.float32), second, inputs)
    found = probe(quantizer, one_by_one(inputs, 64))
    config = QuantizationConfig(scheme=scheme)
    parameters = quantizer.activation_parameters("h", config)
    error = parameters.dequantize(parameters.quantize(inputs)) - inputs
    measured = np.mean(np.square(error.sum(axis=1))) / found.output_power
    predicted = NoiseModel(quantizer, found).predict(config).rounding["h"]
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_gain_lies_between_those_of_the_next_steps() -> None:
    found = GainOfStep.of({0.1: 4.0, 0.4: 1.0, 0.2: 0.0})
    assert found.at(0.2) == pytest.approx(2.0)
    assert (found.at(0.01), found.at(1.0)) == (pytest.approx(4.0), pytest.approx(1.0))
    assert GainOfStep.of({0.1: 0.0}).at(0.1) == 0.0


def test_clipping_is_probed_with_a_range_that_clips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    second = np.ones((64, 8), dtype=np.float32)  # a sum: errors of one sign add up
    inputs = np.abs(rng.standard_t(2, (200, 64))).astype(np.float32)
    worst = np.argsort(-inputs.max(axis=1))
    inputs = inputs[worst]
    quantizer = two_layers(tmp_path, np.eye(64, dtype=np.float32), second, inputs)
    found = probe(quantizer, one_by_one(inputs, 1))
    error = np.clip(inputs[:1], *quantizer.clipping_ranges()["h"]) - inputs[:1]
    assert np.any(error)
    expected = np.square(error.sum()) / np.mean(np.square(error))
    assert found.clipping_gain["h"].above == pytest.approx(expected, rel=1e-3)
    # All outputs are the same sum: what is lost of it is lost of all of them.
    assert found.clipping_scaling["h"].above == pytest.approx(1.0, abs=1e-6)


def test_what_is_cut_off_counts_at_the_end_where_it_means_something(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    identity = np.eye(64, dtype=np.float32)
    half = (4.0 * rng.standard_t(2, (100, 64))).astype(np.float32)
    inputs = np.concatenate([half, -half])
    quantizer = two_layers(tmp_path, identity, identity, inputs, between="HardSwish")
    found = probe(quantizer, one_by_one(inputs, 64))
    low, high = quantizer.clipping_ranges()["h"]
    assert inputs.min() < low < -3.0
    assert 3.0 < high < inputs.max()
    # HardSwish is 0 below -3, and changes nothing above 3.
    assert found.clipping_gain["h"] == (0.0, pytest.approx(1.0, rel=1e-3))
    config = QuantizationConfig(scheme="symmetric_uint8", clipping="kl")
    predicted = NoiseModel(quantizer, found).predict(config).clipping["h"]
    lost = np.mean(np.square(np.maximum(inputs - high, 0.0)))
    assert predicted == pytest.approx(lost / found.output_power, rel=0.02)


def test_clipping_counts_as_scaling_as_far_as_a_line_explains_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    identity = np.eye(64, dtype=np.float32)
    inputs = np.abs(rng.standard_t(2, (200, 64))).astype(np.float32)
    inputs = inputs[np.argsort(-inputs.max(axis=1))]
    quantizer = two_layers(tmp_path, identity, identity, inputs)
    found = probe(quantizer, one_by_one(inputs, 1))
    value = inputs[0].astype(np.float64)
    error = np.clip(value, *quantizer.clipping_ranges()["h"]) - value
    line = np.stack([np.ones(64), value], axis=1)
    explained = line @ np.linalg.lstsq(line, error)[0]
    share = np.mean(np.square(explained)) / np.mean(np.square(error))
    assert 0.1 < share < 0.999
    assert found.clipping_scaling["h"].above == pytest.approx(share, rel=1e-3)


def test_inputs_that_share_runs_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((40, 30)).astype(np.float32)
    second = rng.standard_normal((30, 20)).astype(np.float32)
    # Of different powers, and not all with values that are clipped.
    inputs = rng.standard_t(2, (32, 40)).astype(np.float32) * np.linspace(0.1, 3.0, 32)[:, None]
    feeds = one_by_one(inputs.astype(np.float32), 32)[::4]
    quantizer = two_layers(tmp_path, first, second, inputs.astype(np.float32))
    monkeypatch.setattr("optuna_quantune.quantization.probe._BATCH_VALUES", 3 * (40 + 30 + 20))
    sizes = sizes_of_runs(monkeypatch)
    together = probe(quantizer, feeds)
    assert sizes == [1, 3, 3, 2]
    sizes.clear()
    quantizer.model = quantizer.model.one_at_a_time()
    apart = probe(quantizer, feeds)
    assert sizes == [1] * 8
    assert_same(together, apart)


def test_inputs_of_a_convolutional_network_share_runs(
    toy_probe: Probe,
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
) -> None:
    feeds = [{"input": toy_inputs[i : i + 1]} for i in range(8)]
    assert_same(toy_probe, probe(Quantizer(float_model.one_at_a_time(), toy_statistics), feeds))


@pytest.mark.parametrize(
    ("begin", "end", "is_shared"),
    [
        (
            helper.make_node("ReduceMean", ["x"], ["beside"], axes=[0]),
            helper.make_node("Identity", ["beside"], ["level"]),
            False,
        ),
        (
            helper.make_node("SplitToSequence", ["x"], ["beside"], axis=1),
            helper.make_node("ConcatFromSequence", ["beside"], ["level"], axis=1),
            True,
        ),
        (
            helper.make_node("Shape", ["x"], ["beside"]),
            helper.make_node("ConstantOfShape", ["beside"], ["level"]),
            True,
        ),
    ],
    ids=["mean", "sequence", "shape"],
)
def test_inputs_share_runs_where_all_that_is_looked_at_is_known_of_each(
    begin: onnx.NodeProto,
    end: onnx.NodeProto,
    is_shared: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    layers = []
    for number in range(8):
        read = f"h{number - 1}" if number else "x"
        layers.append(helper.make_node("MatMul", [read, f"w{number}"], [f"h{number}"]))
    shape = ["n", 30]
    graph = helper.make_graph(
        [begin, *layers, end, helper.make_node("Add", ["h7", "level"], ["y"])],
        "beside",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(rng.normal(0.0, 0.2, (30, 30)).astype(np.float32), f"w{i}")
            for i in range(8)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "beside.onnx")
    prepared = load_float_model(tmp_path / "beside.onnx")
    inputs = rng.standard_normal((8, 30)).astype(np.float32)
    alone = prepared.one_at_a_time()
    tensors = required_activations(place(prepared))
    statistics = calibrate(alone, ArrayInputs({"x": inputs}), tensors, sizes=("all",))
    sizes = sizes_of_runs(monkeypatch)
    found = probe(Quantizer(prepared, statistics), one_by_one(inputs, 8))
    assert sizes == ([1, 8] if is_shared else [1, 8, *[1] * 7])  # it was tried
    assert_same(found, probe(Quantizer(alone, statistics), one_by_one(inputs, 8)))


def test_inputs_that_do_not_stand_one_behind_another_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens come first, as in PyTorch's attention, or share an axis with inputs; a constant."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Transpose", ["x"], ["tokens_first"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["tokens_first", "w0"], ["h0"], "first"),
        helper.make_node("Reshape", ["h0", "flat"], ["rows"], "flatten"),
        helper.make_node("Gemm", ["rows", "w1"], ["h1"], "second"),
        helper.make_node("Relu", ["h1"], ["relu"], "relu"),
        helper.make_node("Reshape", ["relu", "apart"], ["h2"], "unflatten"),
        helper.make_node("Transpose", ["h2"], ["inputs_first"], perm=[1, 0, 2]),
        helper.make_node("Shape", ["x"], ["shape"], "shape", start=1, end=2),
        helper.make_node("Cast", ["shape"], ["length"], "cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["inputs_first", "length"], ["h3"], "mean"),
        helper.make_node("MatMul", ["h3", "w2"], ["h4"], "third"),
        helper.make_node("ReduceSum", ["h4", "axis"], ["y"], "sum", keepdims=0),
    ]
    constants = {
        **{f"w{n}": rng.normal(0.0, 0.3, (12, 12)).astype(np.float32) for n in range(3)},
        "flat": np.array([-1, 12]),
        "apart": np.array([5, -1, 12]),
        "axis": np.array([1]),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tokens",
        [value("x", onnx.TensorProto.FLOAT, ["n", 5, 12])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 12])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "tokens.onnx")
    prepared = load_float_model(tmp_path / "tokens.onnx")
    inputs = rng.standard_t(3, (8, 5, 12)) * np.linspace(0.2, 2.0, 8)[:, None, None]
    inputs = inputs.astype(np.float32)
    alone = prepared.one_at_a_time()
    tensors = required_activations(place(prepared))
    statistics = calibrate(alone, ArrayInputs({"x": inputs}), tensors, sizes=("all",))
    sizes = sizes_of_runs(monkeypatch)
    found = probe(Quantizer(prepared, statistics), one_by_one(inputs, 8))
    assert sizes == [1, 8]
    assert_same(found, probe(Quantizer(alone, statistics), one_by_one(inputs, 8)))


def sizes_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes down how many inputs share each undisturbed run from now on."""
    sizes: list[int] = []
    start = DisturbableModel.start

    def counted(self: DisturbableModel, feed: Values) -> Values:
        sizes.append(len(feed["x"]))
        return start(self, feed)

    monkeypatch.setattr(DisturbableModel, "start", counted)
    return sizes


def assert_same(found: Probe, expected: Probe) -> None:
    assert found.output_power == pytest.approx(expected.output_power, rel=1e-5)
    assert list(found.rounding_gain) == list(expected.rounding_gain)
    assert list(found.layer_gain) == list(expected.layer_gain)
    for tensor, gains in found.layer_gain.items():
        assert gains == pytest.approx(expected.layer_gain[tensor], rel=1e-3)
    for tensor, gain in found.rounding_gain.items():
        np.testing.assert_array_equal(gain.steps, expected.rounding_gain[tensor].steps)
        np.testing.assert_allclose(gain.gains, expected.rounding_gain[tensor].gains, rtol=1e-4)
    for name in (
        "clipping_gain",
        "clipping_scaling",
        "weight_noise",
        "channel_mean",
        "channel_power",
    ):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_simulations_of_a_large_network_have_more_inputs_than_its_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_quantune.quantization.probe._VALUE_BUDGET", 0)
    inputs = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    identity = np.eye(4, dtype=np.float32)
    queue, probed = iter(one_by_one(inputs, 32)), []
    probe(
        two_layers(tmp_path, identity, identity, inputs),
        queue,
        progress=lambda done, total: probed.append((done, total)),
    )
    assert probed[-1] == (4, 4)
    assert len(list(queue)) == 32 - 8
