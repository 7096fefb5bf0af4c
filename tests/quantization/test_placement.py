"""What stays of the Q/DQ pairs when nodes are kept in float, beside `quantize_static`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import save_tensors_data
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.calibrate import TensorsData

from optuna_quantune.errors import InputError
from optuna_quantune.quantization import placement
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import keep_float
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer


Run = Callable[..., NDArray[np.float32]]

LAYERS = ["stem", "depthwise", "project", "head"]
NODES = [*LAYERS, "add", "mean"]


def rounded_tensors(proto: onnx.ModelProto) -> set[str]:
    return {
        node.input[0].removesuffix("_QuantizeLinear_Input")
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


def excluded_by_onnxruntime(model: FloatModel, names: list[str], folder: Path) -> onnx.ModelProto:
    tensors = [name for node in model.proto.graph.node for name in node.output] + ["input"]
    value = TensorData(lowest=np.float32(0), highest=np.float32(1))
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(tensors, value))
    save_tensors_data(ranges, str(folder / "ranges.json"))
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    logging.disable(logging.WARNING)
    try:
        quantize_static(
            copy,
            str(folder / "excluded.onnx"),
            None,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=names,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=str(folder / "ranges.json"),
            extra_options={"QDQKeepRemovableActivations": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(folder / "excluded.onnx")


def with_float(quantizer: Quantizer, names: tuple[str, ...]) -> onnx.ModelProto:
    quantizer.float_order = (names,)
    try:
        return quantizer.quantize(QuantizationConfig(float_layers=1)).proto
    finally:
        quantizer.float_order = None


@pytest.mark.parametrize("names", [[name] for name in NODES] + [["stem", "head"]])
def test_pairs_stay_where_onnxruntime_leaves_them(
    float_model: FloatModel, names: list[str], tmp_path: Path
) -> None:
    ours = place(float_model, float_nodes=names).template
    theirs = excluded_by_onnxruntime(float_model, names, tmp_path)
    # Behind a float Add, and before a float mean, the MaxPool is a float one, too; so is the
    # Flatten before a float head.
    expected = rounded_tensors(theirs)
    if names == ["add"]:
        expected = expected - {"sum"} | {"pooled"}
    if names == ["mean"]:
        expected -= {"pooled"}
    if "head" in names:
        expected -= {"features"}
    assert rounded_tensors(ours) == expected


@pytest.mark.parametrize("size", [1, 2, 3])
def test_float_nodes_lose_no_accuracy_against_quantizing_them(
    quantizer: Quantizer, toy_inputs: NDArray[np.float32], run: Run, size: int
) -> None:
    reference = run(quantizer.model.proto, toy_inputs)

    def noise(names: tuple[str, ...]) -> float:
        outputs = run(with_float(quantizer, names), toy_inputs)
        return float(np.mean(np.square(outputs - reference)))

    everything_rounded = noise(())
    ratios = []
    for names in itertools.combinations(NODES, size):
        left = noise(names)
        assert left <= 1.1 * everything_rounded, names
        # Errors of two tensors may happen to cancel; on average less rounding is less noise.
        ratios += [left / noise(names[:i] + names[i + 1 :]) for i in range(size)]
    assert np.exp(np.mean(np.log(ratios))) < 0.95
    assert max(ratios) < 1.5


def test_a_model_that_is_float_altogether_is_the_float_model(
    quantizer: Quantizer,
    monkeypatch: pytest.MonkeyPatch,
    toy_inputs: NDArray[np.float32],
    run: Run,
) -> None:
    monkeypatch.setattr(Quantizer, "float_layers", lambda *_: tuple(NODES))
    proto = quantizer.quantize(QuantizationConfig()).proto
    assert not {node.op_type for node in proto.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    assert {i.name for i in proto.graph.initializer} >= set(quantizer.model.weights)
    np.testing.assert_array_equal(run(proto, toy_inputs), run(quantizer.model.proto, toy_inputs))


def test_a_float_node_reads_what_a_float_node_wrote_and_not_its_rounded_copy(
    quantizer: Quantizer,
) -> None:
    proto = with_float(quantizer, ("stem", "add"))
    readers = {node.name: list(node.input) for node in proto.graph.node}
    assert "stem.relu" in readers["add"]
    assert "stem.relu" in rounded_tensors(proto)  # for the depthwise layer
    assert readers["depthwise"][0] == "stem.relu_DequantizeLinear_Output"


def test_float_layers_have_their_own_weights_and_biases(quantizer: Quantizer) -> None:
    graph = with_float(quantizer, ("depthwise",)).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    node = next(node for node in graph.node if node.name == "depthwise")
    for name in node.input[1:]:
        np.testing.assert_array_equal(constants[name], quantizer.model.weights[name])


def test_the_last_layer_may_give_float_results_without_being_float(
    quantizer: Quantizer, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    whole = quantizer.quantize(QuantizationConfig()).proto
    proto = with_float(quantizer, ("logits",))
    assert rounded_tensors(whole) - rounded_tensors(proto) == {"logits"}
    assert {i.name for i in proto.graph.initializer} >= {"head.weight_quantized"}
    reference = run(quantizer.model.proto, toy_inputs)
    finer, coarser = run(proto, toy_inputs), run(whole, toy_inputs)
    assert np.mean((finer - reference) ** 2) < np.mean((coarser - reference) ** 2)


def test_names_that_match_nothing_are_refused(float_model: FloatModel) -> None:
    with pytest.raises(InputError, match="no node 'Stem'; did you mean 'stem'"):
        place(float_model, float_nodes=["Stem"])


def loaded(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[np.float64]],
    *,
    size: int,
    folder: Path,
) -> FloatModel:
    """A model from images of 4 x 8 x 8 values to images of 3 x size x size."""
    graph = helper.make_graph(
        nodes,
        "nodes",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 4, 8, 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["n", 3, size, size])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, folder / "model.onnx")
    return load_float_model(folder / "model.onnx")


def test_normalization_that_cannot_be_folded_is_quantized(
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    run: Run,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "scale": rng.uniform(0.5, 1.5, 4),
        "shift": rng.normal(size=4),
        "mean": rng.normal(size=4),
        "variance": rng.uniform(0.5, 1.5, 4),
        "weight": 0.2 * rng.normal(size=(3, 4, 3, 3)),
    }
    model = loaded(
        [
            helper.make_node("Relu", ["input"], ["rectified"], "relu"),
            helper.make_node(
                "BatchNormalization",
                ["rectified", "scale", "shift", "mean", "variance"],
                ["normalized"],
                "normalize",
            ),
            helper.make_node("Relu", ["normalized"], ["again"], "relu_again"),
            helper.make_node("Conv", ["again", "weight"], ["output"], "conv"),
        ],
        constants,
        size=6,
        folder=tmp_path,
    )
    inputs = rng.normal(size=(32, 4, 8, 8)).astype(np.float32)
    quantized = make_quantizer(model, inputs).quantize(QuantizationConfig()).proto
    assert "normalized" in rounded_tensors(quantized)
    reference = run(model.proto, inputs)
    noise = np.square(run(quantized, inputs) - reference).mean()
    assert 10 * np.log10(np.square(reference).mean() / noise) > 20


@pytest.mark.parametrize(("mode", "as_onnxruntime"), [("nearest", True), ("cubic", False)])
def test_what_interpolates_has_steps_of_its_own(
    mode: str,
    as_onnxruntime: bool,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    run: Run,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    constants = {
        "first": rng.normal(size=(4, 4, 3, 3)),
        "sizes": np.array([1, 1, 2, 2]),
        "second": rng.normal(size=(3, 4, 1, 1)),
    }
    model = loaded(
        [
            helper.make_node("Conv", ["input", "first"], ["before"], "conv"),
            helper.make_node("Relu", ["before"], ["rectified"], "relu"),
            helper.make_node("Resize", ["rectified", "", "sizes"], ["larger"], "up", mode=mode),
            helper.make_node("Conv", ["larger", "second"], ["output"], "last"),
        ],
        constants,
        size=12,
        folder=tmp_path,
    )
    inputs = rng.normal(size=(32, 4, 8, 8)).astype(np.float32)
    quantized = make_quantizer(model, inputs).quantize(QuantizationConfig()).proto
    steps = {n.input[0]: n.input[1] for n in quantized.graph.node if n.op_type == "QuantizeLinear"}
    assert (steps["larger"] == steps["before"]) is as_onnxruntime
    # Cubic interpolation of what is never negative is negative here and there.
    values = {tensor.name: tensor for tensor in quantized.graph.initializer}
    zero_point = steps["larger"].replace("_scale", "_zero_point")
    assert (numpy_helper.to_array(values[zero_point]) == 0) == as_onnxruntime
    reference = run(model.proto, inputs)
    noise = np.square(run(quantized, inputs) - reference).mean()
    assert 10 * np.log10(np.square(reference).mean() / noise) > 30


def test_a_float_layer_between_quantized_ones_stays_float_when_it_is_loaded(
    quantizer: Quantizer,
    monkeypatch: pytest.MonkeyPatch,
    toy_inputs: NDArray[np.float32],
    run: Run,
) -> None:
    monkeypatch.setattr(Quantizer, "float_layers", lambda *_: ("depthwise",))
    proto = quantizer.quantize(QuantizationConfig()).proto
    as_written = run(proto, toy_inputs, without_optimizers=["WeightBiasQuantization"])
    np.testing.assert_array_equal(run(proto, toy_inputs), as_written)


def two_branches(
    *, rectified: tuple[bool, bool] = (True, True), read_twice: bool = False
) -> onnx.ModelProto:
    """Two convolutions of the input, one with results ten times as large, joined and read."""
    rng = np.random.default_rng(0)
    constants = {
        "small.weight": 0.1 * rng.normal(size=(4, 3, 1, 1)),
        "large.weight": rng.normal(size=(4, 3, 1, 1)),
        "last.weight": rng.normal(size=(3, 8, 1, 1)),
    }
    nodes = []
    parts = []
    for name, relu in zip(("small", "large"), rectified, strict=True):
        nodes.append(helper.make_node("Conv", ["input", f"{name}.weight"], [name], name))
        if relu:
            nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"], f"{name}_relu"))
        parts.append(f"{name}.relu" if relu else name)
    nodes.append(helper.make_node("Concat", parts, ["joined"], "join", axis=1))
    nodes.append(helper.make_node("Conv", ["joined", "last.weight"], ["output"], "last"))
    outputs = [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])]
    if read_twice:
        nodes.append(helper.make_node("GlobalAveragePool", [parts[0]], ["mean"], "average"))
        outputs.append(
            helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, ["n", 4, 1, 1])
        )
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 3, 6, 6])],
        outputs,
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("rectified", "read_twice", "shared"),
    [
        ((True, True), False, True),
        ((False, False), False, True),
        ((True, False), False, False),  # the result's range has negative values, the Relu's none
        ((True, True), True, False),  # the other reader would meet coarser steps
    ],
)
def test_parts_of_a_concat_have_the_steps_of_its_result(
    rectified: tuple[bool, bool],
    read_twice: bool,
    shared: bool,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    tmp_path: Path,
) -> None:
    onnx.save(two_branches(rectified=rectified, read_twice=read_twice), tmp_path / "model.onnx")
    inputs = np.random.default_rng(1).normal(size=(32, 3, 6, 6)).astype(np.float32)
    quantizer = make_quantizer(load_float_model(tmp_path / "model.onnx"), inputs)
    proto = quantizer.quantize(QuantizationConfig()).proto
    scales = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    writers = {name: node for node in proto.graph.node for name in node.output}
    join = next(node for node in proto.graph.node if node.op_type == "Concat")
    behind = next(node for node in proto.graph.node if join.output[0] in node.input)
    result = scales[behind.input[1]]
    parts = [scales[writers[name].input[1]] for name in join.input]
    assert (parts[0] == result and parts[1] == result) == shared


def tied(folder: Path) -> Path:
    """A weight that is an operand, too, one of two layers, and biases of several shapes."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first", pads=[1] * 4),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "shared", "c"], ["d"], "second"),
        make("Conv", ["d", "shared"], ["e"], "third"),
        make("GlobalAveragePool", ["e"], ["p"], "pool"),
        make("Flatten", ["p"], ["f"], "flatten"),
        make("Gemm", ["f", "v", "row"], ["g"], "gemm"),
        make("MatMul", ["g", "operand"], ["h"], "matmul"),
        make("Add", ["h", "operand"], ["y"], "add"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, 5])],
        [
            *(constant("w", 6, 3, 3, 3), constant("b", 6), constant("shared", 6, 6, 1, 1)),
            *(constant("c", 6), constant("v", 6, 5), constant("row", 1, 5)),
            constant("operand", 5, 5),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "tied.onnx")
    return folder / "tied.onnx"


@pytest.mark.parametrize("which", ["toy", "tied"])
def test_two_channels_of_each_weight_tell_where_the_pairs_go(
    which: str, float_model: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = float_model if which == "toy" else load_float_model(tied(tmp_path))
    few = placement._with_two_channels(model)
    shapes = {tensor.name: list(tensor.dims) for tensor in few.graph.initializer}
    if which == "toy":
        assert {shape[0] for name, shape in shapes.items() if "weight" in name} == {2}
    else:
        assert shapes["w"] == [2, 3, 3, 3]
        assert shapes["shared"] == [2, 6, 1, 1]
        assert shapes["row"] == [2]
        assert shapes["operand"] == [5, 5]
    found = place(model)
    monkeypatch.setattr(placement, "_with_two_channels", lambda model: copy_of(model.proto))
    whole = place(model)
    assert found.template.SerializeToString(deterministic=True) == (
        whole.template.SerializeToString(deterministic=True)
    )
    assert (found.activations, found.constants) == (whole.activations, whole.constants)


def test_a_float_output_may_be_read_by_what_is_never_quantized(tmp_path: Path) -> None:
    """A Min reads what stands before the pair of the output as long as there is one."""
    images = [1, 3, 4, 4]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], "first"),
            helper.make_node("Tanh", ["a"], ["y"], "output"),
            helper.make_node("Min", ["y", "y"], ["m"], "reader"),
            helper.make_node("Conv", ["y", "w"], ["z"], "last"),
        ],
        "outputs",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, images)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, images) for name in "myz"],
        [numpy_helper.from_array(np.ones((3, 3, 1, 1), dtype=np.float32), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(proto, tmp_path / "model.onnx")
    model = load_float_model(tmp_path / "model.onnx")
    kept = keep_float(place(model), model, ["first", "last"]).template.graph
    written = {name for node in kept.node for name in node.output}
    (reader,) = (node for node in kept.node if node.name == "reader")
    assert set(reader.input) <= written


def test_a_model_without_integer_kernels_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], "layer", group=2)],
        "grouped",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 5, 5])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones(shape, dtype=np.float32), name)
            for name, shape in (("w", (4, 1, 2, 2)), ("b", (2,)))
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="nothing can be quantized"):
        place(load_float_model(tmp_path / "model.onnx"))


def test_what_onnxruntime_cannot_quantize_is_said(
    float_model: FloatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ValueError("The truth value is ambiguous.\nUse a.any()")

    monkeypatch.setattr(placement, "quantize_static", fail)
    with pytest.raises(InputError, match=r"cannot quantize it \(The truth value is ambiguous\.\)"):
        place(float_model)
