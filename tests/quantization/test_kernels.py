"""Models before and after the rewriting are run side by side."""

from __future__ import annotations

from collections import Counter
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

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.kernels import adapt
from optuna_quantune.quantization.lint import lint_quantized
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.representation import Representation


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((6, 12, 8, 8)).astype(np.float32)


def build(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]], output: str
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "model",
        [value("input", onnx.TensorProto.FLOAT, ["batch", 12, 8, 8])],
        [value(output, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return onnx.shape_inference.infer_shapes(model)


def shuffled_block(*, shuffle_is_read_twice: bool = False) -> onnx.ModelProto:
    """Grouped, depthwise and grouped convolution, the channels shuffled before the last one."""
    make = helper.make_node
    constants: dict[str, NDArray[np.generic]] = {
        "apart": np.array([0, 3, 8, 8, 8]),
        "together": np.array([-1, 24, 8, 8]),
    }
    shapes = {"first": (24, 4, 1, 1), "depth": (24, 1, 3, 3), "last": (6, 8, 1, 1)}
    for name, shape in shapes.items():
        constants[f"{name}.weight"] = RNG.standard_normal(shape).astype(np.float32) / 3
        constants[f"{name}.bias"] = RNG.standard_normal(shape[0]).astype(np.float32)
    nodes = [
        make("Conv", ["input", "first.weight", "first.bias"], ["a"], name="first", group=3),
        make("Relu", ["a"], ["b"], name="relu"),
        make(
            "Conv",
            ["b", "depth.weight", "depth.bias"],
            ["c"],
            name="depth",
            group=24,
            pads=[1] * 4,
        ),
        make("Reshape", ["c", "apart"], ["d"], name="apart"),
        make("Transpose", ["d"], ["e"], name="swap", perm=[0, 2, 1, 3, 4]),
        make("Reshape", ["e", "together"], ["f"], name="together"),
        make("Conv", ["f", "last.weight", "last.bias"], ["g"], name="last", group=3),
    ]
    if shuffle_is_read_twice:
        nodes += [
            make("GlobalAveragePool", ["c"], ["h"], name="mean"),
            make("GlobalAveragePool", ["g"], ["i"], name="other"),
            make("Concat", ["h", "i"], ["j"], name="join", axis=1),
        ]
    return build(nodes, constants, nodes[-1].output[0])


def quantizers(model: onnx.ModelProto, folder: Path) -> tuple[Quantizer, Quantizer]:
    onnx.save(model, folder / "model.onnx")
    prepared = load_float_model(folder / "model.onnx")
    placement = place(prepared)
    statistics = calibrate(
        prepared,
        ArrayInputs({"input": INPUTS}),
        required_activations(placement),
        sizes=("all",),
    )
    plain, written = Representation(), Representation(for_kernels=True)
    return (
        Quantizer(prepared, statistics, representation=plain),
        Quantizer(prepared, statistics, representation=written),
    )


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def optimized(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a model, by operator."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return operators(onnx.load(folder / "optimized.onnx"))


def groups(proto: onnx.ModelProto) -> dict[str, int]:
    return {
        node.name: next((a.i for a in node.attribute if a.name == "group"), 1)
        for node in proto.graph.node
        if node.op_type == "Conv"
    }


@pytest.mark.parametrize("float_names", [(), ("depth",)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_shuffle_becomes_an_order_of_weights_and_changes_nothing(
    granularity: str, float_names: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    config = QuantizationConfig(granularity=granularity, float_layers=1)  # type: ignore[arg-type]
    before, after = quantizers(shuffled_block(), tmp_path)
    before.float_order = after.float_order = (float_names,)
    plain, written = before.quantize(config).proto, after.quantize(config).proto
    onnx.checker.check_model(written)
    assert operators(plain)["Transpose"] == 1
    assert not {"Reshape", "Transpose"} & set(operators(written))
    # The float kernel takes channels by fours.
    assert groups(written) == {"first": 1, "depth": 24 if float_names else 32, "last": 1}
    # Sums of float products may be taken in another order.
    tolerance = 1e-5 if float_names else 0.0
    np.testing.assert_allclose(run(written, INPUTS), run(plain, INPUTS), atol=tolerance)


@pytest.mark.parametrize(("channels", "left"), [(12, 2), (10, 1)])
def test_a_float_convolution_keeps_its_groups_unless_odd_channels_stand_before_it(
    channels: int, left: int, run: Run
) -> None:
    make, rng = helper.make_node, np.random.default_rng(4)
    shapes = {
        "first.weight": (channels, 12, 1, 1),
        "depth.weight": (channels, 1, 3, 3),
        "grouped.weight": (8, channels // 2, 3, 3),
        "grouped.bias": (8,),
    }
    weights = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    nodes = [
        make("Conv", ["input", "first.weight"], ["a"], name="first"),
        make("Conv", ["a", "depth.weight"], ["b"], name="depth", group=channels),
        make("Conv", ["b", "grouped.weight", "grouped.bias"], ["c"], name="grouped", group=2),
    ]
    model = build(nodes, weights, "c")
    expected = run(model, INPUTS)
    adapt(model, {"input": (1, 12, 8, 8)})
    # The float kernel takes channels by fours.
    assert groups(model) == {"first": 1, "depth": 12, "grouped": left}
    np.testing.assert_allclose(run(model, INPUTS), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("channels", "before", "left", "size"),
    [(64, 32, 2, 3), (96, 24, 3, 3), (24, 3, 1, 1), (160, 2, 2, 1)],
)
def test_narrow_groups_of_integers_become_fewer_and_change_nothing(
    channels: int,
    before: int,
    left: int,
    size: int,
    granularity: str,
    tmp_path: Path,
    run: Run,
) -> None:
    make, rng = helper.make_node, np.random.default_rng(4)
    shapes = {
        "first.weight": (channels, 12, 1, 1),
        "grouped.weight": (channels, channels // before, size, size),
        "grouped.bias": (channels,),
    }
    weights = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    nodes = [
        make("Conv", ["input", "first.weight"], ["a"], name="first"),
        make("Relu", ["a"], ["b"], name="relu"),
        make("Conv", ["b", "grouped.weight", "grouped.bias"], ["c"], name="grouped", group=before),
    ]
    config = QuantizationConfig(granularity=granularity)  # type: ignore[arg-type]
    plain, written = (
        quantizer.quantize(config).proto
        for quantizer in quantizers(build(nodes, weights, "c"), tmp_path)
    )
    onnx.checker.check_model(written)
    assert groups(plain)["grouped"] == before
    assert groups(written)["grouped"] == left
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))


def test_a_shuffle_whose_input_is_read_elsewhere_stays(tmp_path: Path, run: Run) -> None:
    before, after = quantizers(shuffled_block(shuffle_is_read_twice=True), tmp_path)
    plain = before.quantize(QuantizationConfig()).proto
    written = after.quantize(QuantizationConfig()).proto
    assert operators(written)["Transpose"] == 1
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))


def test_a_reshape_and_transpose_that_move_more_than_channels_stay(run: Run) -> None:
    model = shuffled_block()
    swap = next(node for node in model.graph.node if node.name == "swap")
    swap.attribute[0].ints[:] = [0, 1, 2, 4, 3]
    before = run(model, INPUTS)
    adapt(model, {"c": (1, 24, 8, 8)})
    assert operators(model)["Transpose"] == 1
    np.testing.assert_allclose(run(model, INPUTS), before, atol=1e-5)


def test_lrn_takes_no_powers(run: Run) -> None:
    node = helper.make_node("LRN", ["input"], ["out"], size=5, alpha=0.9, beta=0.75, bias=1.3)
    model = build([node], {}, "out")
    expected = run(model, 3 * INPUTS)
    adapt(model, {"input": (1, 12, 8, 8)})
    assert "LRN" not in operators(model)
    np.testing.assert_allclose(run(model, 3 * INPUTS), expected, rtol=1e-5)


def test_no_pair_is_moved_across_a_float_maxpool(tmp_path: Path, run: Run) -> None:
    weight = RNG.standard_normal((8, 12, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["a"], name="stem"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MaxPool", ["b"], ["c"], name="pool", kernel_shape=[2, 2]),
        helper.make_node("Conv", ["c", "last"], ["d"], name="last"),
    ]
    model = build(nodes, {"stem": weight, "last": weight[:, :8]}, "d")

    def pool_type(proto: onnx.ModelProto) -> int:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 3
        onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        pool = next(node for node in graph.node if node.op_type == "MaxPool")
        writer = next(node for node in graph.node if pool.input[0] in node.output)
        is_integer = writer.op_type == "QuantizeLinear"
        return onnx.TensorProto.UINT8 if is_integer else onnx.TensorProto.FLOAT

    before, after = quantizers(model, tmp_path)
    before.float_order = after.float_order = (("stem",),)
    config = QuantizationConfig(float_layers=1)
    plain, written = before.quantize(config).proto, after.quantize(config).proto
    assert pool_type(plain) == onnx.TensorProto.UINT8  # the trap
    assert pool_type(written) == onnx.TensorProto.FLOAT
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))


def test_a_float_head_does_not_wrap_every_convolution_in_transposes(
    tmp_path: Path, run: Run
) -> None:
    make = helper.make_node
    constants: dict[str, NDArray[np.generic]] = {}
    nodes = []
    stream = "input"
    for name in ("stem", "one", "two", "three"):
        constants[name] = RNG.standard_normal((12, 12, 3, 3)).astype(np.float32) / 10
        nodes.append(make("Conv", [stream, name], [f"{name}.out"], name=name, pads=[1] * 4))
        if name == "stem":
            nodes.append(make("Relu", ["stem.out"], ["stem.relu"], name="relu"))
            stream = "stem.relu"
        else:
            nodes.append(make("Add", [stream, f"{name}.out"], [f"{name}.sum"], name=f"{name}.add"))
            stream = f"{name}.sum"
    model = build(nodes, constants, stream)

    def transposes(proto: onnx.ModelProto) -> int:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return operators(onnx.load(tmp_path / "optimized.onnx"))["Transpose"]

    before, after = quantizers(model, tmp_path)
    before.float_order = after.float_order = (("stem",),)
    config = QuantizationConfig(float_layers=1)
    plain, written = before.quantize(config).proto, after.quantize(config).proto
    assert transposes(plain) >= 6  # the trap: two for each convolution
    assert transposes(written) <= 2
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))
    assert not any(f.rule == "equal-scales" for f in lint_quantized(written))


@pytest.mark.parametrize(
    ("attributes", "replaced"),
    [
        ({"kernel_shape": [2, 2], "strides": [2, 2]}, True),
        (
            {"kernel_shape": [3, 3], "strides": [2, 1], "pads": [1] * 4, "count_include_pad": 1},
            True,
        ),
        ({"kernel_shape": [3, 3], "pads": [1] * 4}, False),
        ({"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, False),
        ({"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, False),
    ],
)
def test_an_average_is_the_same_integers_from_a_convolution(
    attributes: dict[str, Any], replaced: bool, tmp_path: Path, run: Run
) -> None:
    make = helper.make_node
    nodes = [
        make("Conv", ["input", "weight"], ["a"], name="first"),
        make("AveragePool", ["a"], ["b"], name="average", **attributes),
    ]
    weight = RNG.standard_normal((12, 12, 1, 1)).astype(np.float32) / 3
    before, after = quantizers(build(nodes, {"weight": weight}, "b"), tmp_path)
    plain, written = (q.quantize(QuantizationConfig()).proto for q in (before, after))
    onnx.checker.check_model(written)
    assert operators(written)["AveragePool"] == (0 if replaced else 1)
    assert not any(f.rule == "equal-scales" for f in lint_quantized(written))
    scales = {i.name: i for i in written.graph.initializer}
    last = next(n for n in written.graph.node if "b" in n.output)
    step = float(numpy_helper.to_array(scales[last.input[1]]))
    # A mean halfway between two integers may become either.
    steps = np.rint((run(written, INPUTS) - run(plain, INPUTS)) / step)
    assert np.abs(steps).max() <= 1
    assert np.mean(steps != 0) <= (0.3 if attributes["kernel_shape"] == [2, 2] else 0.0)


@pytest.mark.parametrize(
    ("scheme", "slope", "replaced"),
    [
        ("asymmetric", 1 / 6, True),
        ("asymmetric", 0.02, True),  # does not saturate anywhere
        ("symmetric_uint8", 1 / 6, True),
        ("symmetric", 1 / 6, False),  # reaches down to -1
        ("symmetric_power2", 1 / 6, False),
    ],
)
@pytest.mark.parametrize("swish", [False, True])
def test_a_hard_sigmoid_is_the_same_integers_from_a_sum(
    scheme: str, slope: float, replaced: bool, swish: bool, tmp_path: Path, run: Run
) -> None:
    make = helper.make_node
    nodes = [
        make("Conv", ["input", "weight"], ["a"], name="first"),
        make("HardSigmoid", ["a"], ["b"], name="gate", alpha=slope, beta=0.5),
        *([make("Mul", ["a", "b"], ["c"], name="product")] if swish else []),
        make("Conv", ["c" if swish else "b", "weight"], ["d"], name="last"),
    ]
    weight = RNG.standard_normal((12, 12, 1, 1)).astype(np.float32)
    before, after = quantizers(build(nodes, {"weight": weight}, "d"), tmp_path)
    config = QuantizationConfig.from_dict({"scheme": scheme})
    plain, written = (q.quantize(config).proto for q in (before, after))
    onnx.checker.check_model(written)
    assert operators(written)["HardSigmoid"] == (0 if replaced else 1)
    assert optimized(written, tmp_path)["QLinearAdd"] == replaced
    used = {name for node in written.graph.node for name in node.input}
    outputs = {name for node in written.graph.node for name in node.output}
    assert outputs - used == {"d"}
    # A value halfway between two integers may become either, and each changes all channels a bit.
    difference = run(written, INPUTS) - run(plain, INPUTS)
    assert np.mean(difference != 0.0) < (0.05 if replaced else 1e-9)
    assert np.abs(difference).max() < 0.05 * np.abs(run(plain, INPUTS)).max()


def normalized(factors: NDArray[np.float64], *, relu: bool) -> onnx.ModelProto:
    """A normalization that no convolution can take in, because a Concat is before it."""
    make = helper.make_node
    names = ["gamma", "beta", "mean", "variance"]
    nodes = [
        make("Conv", ["input", "weight"], ["a"], name="first"),
        make("Concat", ["a", "input"], ["b"], name="join", axis=1),
        make("BatchNormalization", ["b", *names], ["c"], name="norm", epsilon=1e-3),
        *([make("Relu", ["c"], ["d"], name="relu")] if relu else []),
        make("Conv", ["d" if relu else "c", "last_weight"], ["e"], name="last"),
    ]
    constants = {
        "weight": RNG.standard_normal((12, 12, 1, 1)) / 3,
        "last_weight": RNG.standard_normal((4, 24, 1, 1)) / 3,
        "gamma": factors,
        "beta": RNG.standard_normal(24),
        "mean": RNG.standard_normal(24),
        "variance": RNG.uniform(0.5, 2.0, 24) + np.square(factors),
    }
    return build(nodes, {n: values.astype(np.float32) for n, values in constants.items()}, "e")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-30, 0.0])
def test_a_batch_normalization_is_the_same_integers_from_a_convolution(
    smallest: float,
    granularity: str,
    relu: bool,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = RNG.standard_normal(24)
    factors[:3] *= smallest
    _, quantizer = quantizers(normalized(factors, relu=relu), tmp_path)
    config = QuantizationConfig.from_dict({"granularity": granularity})
    written = quantizer.quantize(config).proto
    monkeypatch.setattr("optuna_quantune.quantization.kernels._scale_channels", lambda *_: None)
    plain = quantizer.quantize(config).proto
    onnx.checker.check_model(written)
    assert operators(plain)["BatchNormalization"] == 1
    assert operators(written)["BatchNormalization"] == 0
    assert optimized(plain, tmp_path)["QLinearConv"] == 2
    assert optimized(written, tmp_path)["QLinearConv"] == 3
    # A value halfway between two integers may become either, and each changes all channels a bit.
    difference = run(written, INPUTS) - run(plain, INPUTS)
    assert np.mean(difference != 0.0) < 0.05
    assert np.abs(difference).max() < 0.05 * np.abs(run(plain, INPUTS)).max()


def test_the_factors_of_normalizations_are_not_rounded(tmp_path: Path, run: Run) -> None:
    factors = RNG.standard_normal(24)
    factors[0] = 300.0  # with one scale for all, little is left of the others
    model = normalized(factors, relu=True)
    before, after = quantizers(model, tmp_path)
    plain, written = (q.quantize(QuantizationConfig()).proto for q in (before, after))
    initializers = [{i.name for i in proto.graph.initializer} for proto in (plain, written)]
    assert "gamma_quantized" in initializers[0]  # the trap
    assert not any(name.startswith(("gamma_", "beta_")) for name in initializers[1])
    reference = run(model, INPUTS)
    errors = [np.mean(np.square(run(proto, INPUTS) - reference)) for proto in (plain, written)]
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric_uint8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("float_names", [(), ("first",), ("last",)])
def test_channels_that_are_filled_up_change_nothing(
    granularity: str, scheme: str, float_names: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    config = QuantizationConfig(
        granularity=granularity,  # type: ignore[arg-type]
        scheme=scheme,  # type: ignore[arg-type]
        float_layers=1,
    )
    before, after = quantizers(shuffled_block(), tmp_path)
    before.float_order = after.float_order = (float_names,)
    plain, written = before.quantize(config).proto, after.quantize(config).proto
    onnx.checker.check_model(written, full_check=True)
    assert groups(written)["depth"] == 32
    computed = optimized(written, tmp_path)
    assert computed["QLinearConv"] == 3 - len(float_names)
    assert computed["Conv"] + computed["FusedConv"] == len(float_names)
    tolerance = 1e-5 if float_names else 0.0
    np.testing.assert_allclose(run(written, INPUTS), run(plain, INPUTS), atol=tolerance)


def test_channels_that_others_read_stay_as_they_are(tmp_path: Path, run: Run) -> None:
    before, after = quantizers(shuffled_block(shuffle_is_read_twice=True), tmp_path)
    plain, written = (q.quantize(QuantizationConfig()).proto for q in (before, after))
    assert groups(written)["depth"] == 24
    np.testing.assert_allclose(run(written, INPUTS), run(plain, INPUTS), atol=1e-5)


def test_a_convolution_of_one_channel_is_no_depthwise_one(tmp_path: Path, run: Run) -> None:
    nodes = [
        helper.make_node("Conv", ["input", "first"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "only"], ["b"], name="only"),
        helper.make_node("Conv", ["b", "last"], ["c"], name="last"),
    ]
    shapes = {"first": (1, 12, 1, 1), "only": (1, 1, 3, 3), "last": (5, 1, 1, 1)}
    weights: dict[str, NDArray[np.generic]] = {
        name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    before, after = quantizers(build(nodes, weights, "c"), tmp_path)
    plain, written = (q.quantize(QuantizationConfig()).proto for q in (before, after))
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(
    ("channels", "in_float", "made_dense"),
    [(6, False, True), (6, True, False), (8, False, False), (22, False, False)],
)
def test_a_few_odd_channels_that_others_read_are_multiplied_with_zeros(
    channels: int, in_float: bool, made_dense: bool, granularity: str, tmp_path: Path, run: Run
) -> None:
    """A unit of GhostNet: the depthwise convolution's input is a part of the result, too."""
    make = helper.make_node
    nodes = [
        make("Conv", ["input", "first"], ["a"], name="first"),
        make("Relu", ["a"], ["b"], name="relu"),
        make("Conv", ["b", "depth"], ["c"], name="depth", group=channels, pads=[1] * 4),
        make("Concat", ["b", "c"], ["d"], name="join", axis=1),
        make("Conv", ["d", "last"], ["e"], name="last"),
    ]
    shapes = {
        "first": (channels, 12, 1, 1),
        "depth": (channels, 1, 3, 3),
        "last": (4, 2 * channels, 1, 1),
    }
    weights: dict[str, NDArray[np.generic]] = {
        name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    before, after = quantizers(build(nodes, weights, "e"), tmp_path)
    before.float_order = after.float_order = (("depth",) if in_float else (),)
    config = QuantizationConfig.from_dict({"granularity": granularity, "float_layers": 1})
    plain, written = (q.quantize(config).proto for q in (before, after))
    onnx.checker.check_model(written, full_check=True)
    assert groups(written)["depth"] == (1 if made_dense else channels)
    np.testing.assert_array_equal(run(written, INPUTS), run(plain, INPUTS))
    if in_float:
        return
    # Dense ones are added in pairs where others are; zeros of a zero point of its own count, too.
    pairs = Representation(adds_in_pairs=True, for_kernels=True)
    saturating = Quantizer(after.model, after.statistics, representation=pairs)
    saturating.float_order = ()
    proto = saturating.quantize(config).proto
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    largest = np.abs(constants["depth_quantized"].astype(np.int64)).max()
    assert (largest <= 64) == (made_dense and granularity == "tensor")
    assert not any(f.rule == "saturating-int8" for f in lint_quantized(proto, vnni=False))


def cut_off_block(
    *, bounds: tuple[float, float] | None = None, twice: bool = False
) -> onnx.ModelProto:
    """Two convolutions with a Relu, or a Clip, between them."""
    # With these the first convolution's largest magnitude is negative, and less than twice the
    # largest positive value.
    make, rng = helper.make_node, np.random.default_rng(2)
    constants: dict[str, NDArray[np.generic]] = {
        "first.weight": rng.standard_normal((16, 12, 1, 1)).astype(np.float32),
        "last.weight": rng.standard_normal((6, 16, 1, 1)).astype(np.float32),
    }
    inputs = ["a"]
    if bounds is not None:
        constants |= dict(zip(("low", "high"), np.array(bounds, np.float32), strict=True))
        inputs += ["low", "high"]
    nodes = [
        make("Conv", ["input", "first.weight"], ["a"], name="first"),
        make("Relu" if bounds is None else "Clip", inputs, ["b"], name="cut"),
        make("Conv", ["b", "last.weight"], ["c"], name="last"),
    ]
    if twice:
        nodes += [
            make("Conv", ["a", "last.weight"], ["d"], name="other"),
            make("Add", ["c", "d"], ["e"], name="add"),
        ]
    return build(nodes, constants, nodes[-1].output[0])


@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_power2"])
@pytest.mark.parametrize("bounds", [None, (0.0, 3.0), (-1.5, 2.0)])
def test_integers_are_cut_off_where_a_symmetric_range_does_not_imply_it(
    scheme: Any, bounds: tuple[float, float] | None, tmp_path: Path, run: Run
) -> None:
    plain, written = quantizers(cut_off_block(bounds=bounds), tmp_path)
    config = QuantizationConfig(scheme=scheme)
    before, after = plain.quantize(config).proto, written.quantize(config).proto
    np.testing.assert_array_equal(run(after, INPUTS), run(before, INPUTS))
    types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
    (clip,) = (node for node in after.graph.node if node.name == "cut")
    assert clip.op_type == "Clip"
    assert {types[name] for name in clip.input[1:]} == {onnx.TensorProto.UINT8}
    assert operators(after)["QuantizeLinear"] == operators(before)["QuantizeLinear"] - 1
    found = optimized(after, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["DequantizeLinear"] == 1  # the output


@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_power2"])
def test_what_others_read_before_it_is_cut_off_stays(
    scheme: Any, tmp_path: Path, run: Run
) -> None:
    """Where its own range has the same steps (powers of two), and where it has others."""
    plain, written = quantizers(cut_off_block(twice=True), tmp_path)
    config = QuantizationConfig(scheme=scheme)
    before, after = plain.quantize(config).proto, written.quantize(config).proto
    np.testing.assert_array_equal(run(after, INPUTS), run(before, INPUTS))
    assert operators(after)["Clip"] == (scheme == "symmetric_power2")


def test_what_is_cut_off_stays_in_float_where_integers_would_not_do(
    tmp_path: Path, run: Run
) -> None:
    """With sixteen bits, and in a range that implies it."""
    plain, written = quantizers(cut_off_block(), tmp_path)
    implied = written.quantize(QuantizationConfig()).proto
    assert not {"Clip", "Relu"} & operators(implied).keys()
    wide = QuantizationConfig(scheme="symmetric", activation_bits=16)
    before, after = plain.quantize(wide).proto, written.quantize(wide).proto
    assert operators(before) == operators(after)
    assert operators(after)["Relu"] == 1
