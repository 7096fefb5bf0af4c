from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantized_graph import load_quantized
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations


def test_layers_are_listed_in_order_with_their_tensors(float_model: FloatModel) -> None:
    assert [layer.name for layer in float_model.layers] == ["stem", "depthwise", "project", "head"]
    depthwise = float_model.layers[1]
    assert (depthwise.input, depthwise.output) == ("stem.relu", "depthwise.out")
    assert (depthwise.weight, depthwise.bias) == ("depthwise.weight", "depthwise.bias")
    assert depthwise.channel_axis == 0


@pytest.mark.parametrize(("transposed", "axis"), [(0, 1), (1, 0)])
def test_channels_of_a_gemm_are_its_output_columns(
    tmp_path: Path, transposed: int, axis: int
) -> None:
    shape = (3, 5) if transposed else (5, 3)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
    path = save_graph(tmp_path, [node], {"w": np.ones(shape)}, [1, 5], [1, 3])
    assert load_float_model(path).layers[0].channel_axis == axis


def test_nodes_without_names_get_unique_ones(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"]),
        helper.make_node("Gemm", ["h", "w"], ["y"]),
    ]
    path = save_graph(tmp_path, nodes, {"w": np.eye(4)}, [1, 4], [1, 4])
    names = [layer.name for layer in load_float_model(path).layers]
    assert all(names)
    assert len(set(names)) == 2


def test_loading_leaves_logging_as_it_was(toy_model: Path) -> None:
    logging.disable(logging.CRITICAL)
    try:
        load_float_model(toy_model)
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)


def test_outputs_without_a_type_get_one(tmp_path: Path) -> None:
    """As many tools leave them that take inner tensors for outputs."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], name="layer")]
    path = save_graph(tmp_path, nodes, {"w": np.ones((4, 3))}, [1, 4], [1, 3])
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name="y"))
    onnx.save(model, path)
    (output,) = load_float_model(path).outputs
    assert (output.name, output.shape) == ("y", (1, 3))


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (1,), ()])
def test_a_bias_of_any_shape_that_spreads_has_one_axis(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """ONNX Runtime's quantization fails on the others."""
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer")
    bias = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape) + 1.0
    constants = {"w": np.ones((4, 3)), "b": bias}
    model = load_float_model(save_graph(tmp_path, [node], constants, [1, 4], [1, 3]))
    np.testing.assert_array_equal(model.weights["b"], np.broadcast_to(bias.reshape(-1), 3))
    place(model)


@pytest.mark.parametrize("shared", [False, True])
def test_factors_of_a_gemm_are_in_its_constants(tmp_path: Path, shared: bool) -> None:
    """ONNX Runtime multiplies the bias when it quantizes it, and says that the factor is 1."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first", alpha=0.5, beta=3.0),
        helper.make_node("Gemm", ["h", "w" if shared else "v", "b"], ["y"], name="last"),
    ]
    constants = {"w": rng.normal(size=(4, 4)), "v": rng.normal(size=(4, 4)), "b": np.ones(4)}
    path = save_graph(tmp_path, nodes, constants, ["n", 4], ["n", 4])
    model = load_float_model(path)
    assert [node.attribute[:] for node in model.proto.graph.node] == [[], []]
    inputs = rng.normal(size=(64, 4)).astype(np.float32)
    expected, prepared = (
        onnxruntime.InferenceSession(m).run(None, {"x": inputs})[0]
        for m in (str(path), model.proto.SerializeToString())
    )
    np.testing.assert_allclose(prepared, expected, rtol=1e-5)
    statistics = calibrate(
        model, ArrayInputs({"x": inputs}), required_activations(place(model)), sizes=("all",)
    )
    quantized = Quantizer(model, statistics).quantize(QuantizationConfig()).proto
    session = make_session(quantized.SerializeToString(), exact_products=True)
    difference = session.run(None, {"x": inputs})[0] - expected
    assert np.sum(difference**2) < 1e-3 * np.sum(expected**2)


@pytest.mark.parametrize("rank", [2, 3])
def test_one_matrix_for_all_of_a_batch_is_a_layer(tmp_path: Path, rank: int) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    shape: list[int | str] = [*(2, 5, 4)[-rank:]]
    constants = {"w": np.arange(12.0).reshape(1, 4, 3)}
    path = save_graph(tmp_path, nodes, constants, shape, [2, 5, 3] if rank == 3 else [1, 5, 3])
    if rank == 2:  # what the axis adds to the result is needed
        with pytest.raises(InputError, match="no quantizable layer"):
            load_float_model(path)
        return
    (layer,) = load_float_model(path).layers
    np.testing.assert_array_equal(load_float_model(path).weights[layer.weight], constants["w"][0])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model .*nowhere\.onnx: no such file"):
        load_float_model(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("content", [b"", b"This is not a model.", None])
def test_truncated_or_foreign_files_are_refused(
    tmp_path: Path, toy_model: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(toy_model.read_bytes()[:-500] if content is None else content)
    with pytest.raises(InputError, match=r"broken\.onnx: not a valid ONNX file") as caught:
        load_float_model(path)
    assert "\n" not in str(caught.value)


def test_weights_in_a_file_of_their_own_belong_to_the_model(
    toy_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "apart.onnx"
    onnx.save(
        onnx.load(toy_model), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    apart, whole = load_float_model(path), load_float_model(toy_model)
    np.testing.assert_equal(apart.weights, whole.weights)
    assert apart.file_bytes == path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    assert path.stat().st_size < whole.file_bytes == toy_model.stat().st_size
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"apart\.onnx: .*w\.bin"):
        load_float_model(path)


def test_what_an_exporter_notes_of_single_nodes_is_not_kept(
    toy_model: Path, tmp_path: Path
) -> None:
    noted = onnx.load(toy_model)
    helper.set_model_props(noted, {"author": "someone"})
    for node in noted.graph.node:
        node.metadata_props.add(key="stack_trace", value="File model.py, line 10 " * 50)
        node.doc_string = "File model.py, line 10 " * 50
    path = tmp_path / "noted.onnx"
    onnx.save(noted, path)
    bare, prepared = load_float_model(toy_model), load_float_model(path)
    assert prepared.proto.graph == bare.proto.graph
    assert {"author": "someone"}.items() <= {
        entry.key: entry.value for entry in prepared.proto.metadata_props
    }.items()


def test_quantized_models_are_refused(tmp_path: Path, quantizer: Quantizer) -> None:
    path = tmp_path / "int8.onnx"
    onnx.save(quantizer.quantize(QuantizationConfig()).proto, path)
    with pytest.raises(InputError, match="already quantized"):
        load_float_model(path)


def test_models_without_a_layer_to_quantize_are_refused(tmp_path: Path) -> None:
    path = save_graph(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {}, [1, 4], [1, 4])
    with pytest.raises(InputError, match="no quantizable layer"):
        load_float_model(path)
    scaler = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", scale=[2.0])
    path = save_graph(tmp_path, [scaler], {}, [1, 4], [1, 4])
    model = onnx.load(path)  # as trees are exported: with no operators of ONNX itself
    model.opset_import[0].domain, model.opset_import[0].version = "ai.onnx.ml", 3
    onnx.save(model, path)
    with pytest.raises(InputError, match="no quantizable layer"):
        load_float_model(path)


def test_old_opsets_are_converted_so_that_per_channel_scales_exist(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    constants = {"w": np.eye(4), "b": np.ones(4)}
    path = save_graph(tmp_path, [node], constants, [1, 4], [1, 4], opset=11)
    assert load_float_model(path).proto.opset_import[0].version >= 13


def test_constants_that_are_inputs_too_are_constants_only(tmp_path: Path) -> None:
    """As older exporters list them; the quantized model has no input of that name."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="layer"),
        helper.make_node("PRelu", ["h", "slope"], ["y"]),
    ]
    constants = {"w": np.eye(4), "slope": np.full(4, 0.5)}
    path = save_graph(tmp_path, nodes, constants, ["N", 4], ["N", 4])
    source = onnx.load(path)
    for tensor in source.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, tensor.dims)
        source.graph.input.append(value)
    onnx.save(source, path)
    model = load_float_model(path)
    inputs = ArrayInputs({"x": np.ones((4, 4), dtype=np.float32)})
    statistics = calibrate(model, inputs, required_activations(place(model)), sizes=["all"])
    quantized = Quantizer(model, statistics).quantize(QuantizationConfig()).proto
    assert [value.name for value in quantized.graph.input] == ["x"]


def test_a_layer_that_no_output_needs_is_no_layer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["y"], name="layer"),
        helper.make_node("Gemm", ["x", "w"], ["nothing"], name="dead"),
    ]
    path = save_graph(tmp_path, nodes, {"w": np.eye(4)}, [1, 4], [1, 4])
    assert [layer.name for layer in load_float_model(path).layers] == ["layer"]


@pytest.mark.parametrize(
    "suffix", ["_scale", "_zero_point", "_quantized", "_QuantizeLinear_Output"]
)
def test_tensors_may_have_the_names_that_quantization_gives(tmp_path: Path, suffix: str) -> None:
    """Even where a branch of an If reads one, and where the longer name is the input's."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(kind, [f"h{suffix}"], ["r"])],
            name,
            [],
            [helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, None)],
        )
        for name, kind in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", f"w{suffix}"], ["h"], name="first"),
        helper.make_node("Gemm", ["h", "v"], [f"h{suffix}"], name="second"),
        helper.make_node("ReduceMax", [f"h{suffix}"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "limit"], ["large"]),
        helper.make_node("If", ["large"], ["f"], **branches),
        helper.make_node("Gemm", ["f", "u"], ["y"], name="third"),
    ]
    rng = np.random.default_rng(0)
    constants = {name: rng.standard_normal((4, 4)) for name in ("w", "v", "u")}
    constants |= {f"w{suffix}": rng.standard_normal(4), "limit": np.array(0.5)}
    path = save_graph(tmp_path, nodes, constants, [1, 4], [1, 4])
    model = load_float_model(path)
    x = rng.standard_normal((16, 4)).astype(np.float32)
    statistics = calibrate(
        model, ArrayInputs({"x": x}), required_activations(place(model)), sizes=["all"]
    )
    quantized = Quantizer(model, statistics).quantize(QuantizationConfig()).proto
    found, expected = (
        np.concatenate(
            [make_session(data, exact_products=True).run(None, {"x": one[None]})[0] for one in x]
        )
        for data in (quantized.SerializeToString(), path.read_bytes())
    )
    assert np.square(found - expected).mean() < 1e-3 * np.square(expected).mean()


def test_an_input_and_an_output_may_not_have_such_names(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="layer")
    path = save_graph(tmp_path, [node], {"w": np.eye(4)}, [1, 4], [1, 4])
    source = onnx.load(path)
    source.graph.output[0].name = source.graph.node[0].output[0] = "x_scale"
    onnx.save(source, path)
    with pytest.raises(InputError, match="'x' and 'x_scale' are both inputs or outputs"):
        load_float_model(path)


def save_graph(
    folder: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    input_shape: list[int | str],
    output_shape: list[int | str],
    opset: int = 17,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, input_shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, output_shape)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def test_a_model_is_read_as_one_whatever_its_name_says(tmp_path: Path) -> None:
    for name in ("recipe.json", "model.textproto"):
        (tmp_path / name).write_text('{"mean": [0]}')
        with pytest.raises(InputError, match=f"{name}: not a valid ONNX file"):
            load_float_model(tmp_path / name)
        assert load_quantized(tmp_path / name) is None
