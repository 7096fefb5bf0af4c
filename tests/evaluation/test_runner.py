from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx import TensorProto

from optuna_quantune import pipeline
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation import runner
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import ReaderInputs
from optuna_quantune.evaluation.runner import input_specs
from optuna_quantune.evaluation.runner import iterate
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.evaluation.runner import run
from optuna_quantune.evaluation.runner import why_one_at_a_time
from optuna_quantune.quantization.processor import saturates


WEIGHT = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(11, 3)).astype(np.float32)


def graph_bytes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(model.SerializeToString())


def tensor(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def linear_model(batch: int | str = "batch") -> bytes:
    """Logits x @ WEIGHT, and their doubles as a second output."""
    return graph_bytes(
        [
            helper.make_node("MatMul", ["input", "w"], ["logits"]),
            helper.make_node("Add", ["logits", "logits"], ["twice"]),
        ],
        [tensor("input", batch, 3)],
        [tensor("logits", batch, 5), tensor("twice", batch, 5)],
        [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )


@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 16])
@pytest.mark.parametrize("threads", [1, None])
def test_outputs_are_the_models_for_free_and_fixed_batch_axes(
    batch: int | str, batch_size: int | None, threads: int | None
) -> None:
    session = make_session(linear_model(batch), threads=threads)
    outputs = run(session, ArrayInputs(X), batch_size=batch_size)
    assert list(outputs) == ["logits", "twice"]
    np.testing.assert_allclose(outputs["logits"], X @ WEIGHT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["twice"], 2 * (X @ WEIGHT), rtol=1e-5, atol=1e-6)


def test_outputs_follow_the_order_of_indices() -> None:
    order = np.array([10, 3, 3, 0, 7, 1])
    outputs = run(make_session(linear_model()), ArrayInputs(X), indices=order, batch_size=4)
    np.testing.assert_allclose(outputs["logits"], (X @ WEIGHT)[order], rtol=1e-5, atol=1e-6)


def test_only_the_wanted_outputs_are_given() -> None:
    session = make_session(linear_model())
    assert list(run(session, ArrayInputs(X), outputs=["twice"])) == ["twice"]
    with pytest.raises(InputError, match="no output 'probabilities'; it has logits, twice"):
        run(session, ArrayInputs(X), outputs=["probabilities"])


def test_progress_counts_inputs_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    run(
        make_session(linear_model()),
        ArrayInputs(X),
        batch_size=4,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 11), (8, 11), (11, 11)]


def test_a_caller_can_stop_early() -> None:
    read: list[int] = []

    class Reader:
        def __init__(self) -> None:
            read.clear()

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            read.append(len(read))
            return {"input": X[:1]} if len(read) <= 1000 else None

    source = ReaderInputs(Reader, cache_bytes=0)
    threads = threading.active_count()
    batches = iterate(make_session(linear_model()), source, batch_size=2)
    indices, outputs = next(batches)
    assert indices.tolist() == [0, 1]
    assert outputs["logits"].shape == (2, 5)
    batches.close()  # type: ignore[attr-defined]  # a generator
    assert len(read) < 1000
    assert threading.active_count() == threads


@pytest.mark.parametrize(("threads", "side_by_side"), [(1, 3), (2, 1), (None, 1)])
def test_batches_run_side_by_side_on_the_cores_that_the_session_leaves(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, side_by_side: int
) -> None:
    meeting = threading.Barrier(side_by_side, timeout=10)
    lock = threading.Lock()
    running: list[int] = [0]

    class Session:
        """A session whose runs wait until as many run as should."""

        def __init__(self, session: onnxruntime.InferenceSession) -> None:
            self.session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, names: list[str], feed: dict[str, Any]) -> Any:
            with lock:
                running.append(running[-1] + 1)
            meeting.wait()
            time.sleep(0.005)  # time for one run too many to begin
            with lock:
                running.append(running[-1] - 1)
            return self.session.run(names, feed)

    for module in (runner, pipeline):
        monkeypatch.setattr(module, "available_cores", lambda: 3)
    session: Any = Session(make_session(linear_model(), threads=threads))
    assert len(run(session, ArrayInputs(X[:9]), batch_size=1)["logits"]) == 9
    assert max(running) == side_by_side


def test_several_inputs_of_several_types_are_fed_by_name() -> None:
    model = graph_bytes(
        [
            helper.make_node("Cast", ["ids"], ["float_ids"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["float_ids", "offset"], ["sum"]),
        ],
        [tensor("ids", "n", 2, kind=TensorProto.INT64), tensor("offset", "n", 2)],
        [tensor("sum", "n", 2)],
    )
    ids = np.arange(10).reshape(5, 2)
    offset = np.full((5, 2), 0.5)
    session = make_session(model)
    assert [spec.dtype for spec in input_specs(session)] == [np.int64, np.float32]
    outputs = run(session, ArrayInputs({"offset": offset, "ids": ids}))
    assert np.array_equal(outputs["sum"], (ids + offset).astype(np.float32))


def test_inputs_of_different_lengths_run_one_by_one() -> None:
    class Reader:
        def __init__(self) -> None:
            self.feeds = iter([{"x": np.ones((1, n), np.float32)} for n in (3, 5, 2)])

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.feeds, None)

    model = graph_bytes(
        [helper.make_node("ReduceSum", ["x", "axis"], ["y"])],
        [tensor("x", "n", "length")],
        [tensor("y", "n", 1)],
        [onnx.numpy_helper.from_array(np.array([1]), "axis")],
    )
    assert run(make_session(model), ReaderInputs(Reader))["y"].ravel().tolist() == [3, 5, 2]

    copy = graph_bytes(
        [helper.make_node("Identity", ["x"], ["y"])],
        [tensor("x", "n", "length")],
        [tensor("y", "n", "length")],
    )
    with pytest.raises(InputError, match="'y' changes its shape"):
        run(make_session(copy), ReaderInputs(Reader))


def test_a_model_that_takes_one_input_at_a_time_in_secret_is_explained() -> None:
    model = graph_bytes(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [tensor("x", "n", 3)],
        [tensor("y", 1, 3)],
        [onnx.numpy_helper.from_array(np.array([1, 3]), "shape")],
    )
    session = make_session(model)
    with pytest.raises(InputError, match=r"array inputs: the model fails on a batch of 2: "):
        run(session, ArrayInputs(X), batch_size=2)
    assert np.array_equal(run(session, ArrayInputs(X), batch_size=1)["y"], X)


def test_why_inputs_are_run_one_at_a_time_is_said() -> None:
    inputs = ArrayInputs(X)
    assert why_one_at_a_time(make_session(linear_model()), inputs, ["logits", "twice"]) is None
    assert why_one_at_a_time(make_session(linear_model(1)), inputs, ["logits"]) is None
    model = graph_bytes(
        [
            helper.make_node("ReduceMax", ["x"], ["largest"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "largest"], ["y"]),
            helper.make_node("Identity", ["x"], ["z"]),
        ],
        [tensor("x", "n", 3)],
        [tensor("y", "n", 3), tensor("z", "n", 3)],
    )
    session = make_session(model)
    assert why_one_at_a_time(session, inputs, ["z"]) is None
    assert why_one_at_a_time(session, inputs.subset([0]), ["y"]) is None
    assert "'y' is another one for two inputs" in str(why_one_at_a_time(session, inputs, ["y"]))


def test_an_output_without_batch_axis_is_an_error() -> None:
    model = graph_bytes(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [tensor("x", "n", 3)],
        [tensor("y")],
    )
    with pytest.raises(InputError, match="'y' .* no batch axis"):
        run(make_session(model), ArrayInputs(X))


def test_a_wrong_input_shape_is_an_error_before_anything_runs() -> None:
    with pytest.raises(InputError, match="wrong input shape for the model's input 'input'"):
        run(make_session(linear_model()), ArrayInputs(X[:, :2]))


def test_a_missing_or_broken_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.onnx: no such model file"):
        make_session(tmp_path / "gone.onnx")
    for name, content in {
        "truncated.onnx": linear_model()[:-40],
        "text.onnx": b"this is no model",
        "empty.onnx": b"",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match="ONNX Runtime cannot load it") as raised:
            make_session(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="model of 16 bytes: ONNX Runtime cannot load it"):
        make_session(b"this is no model")


def test_int8_before_a_reshape_is_loaded_in_the_latest_operator_sets() -> None:
    """ONNX Runtime 1.32 on x86-64 refuses the uint8 that it makes of it from opset 21 on."""
    constants = {"s": np.float32(0.1), "z": np.int8(3), "all": np.array([0, -1])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Reshape", ["d", "all"], ["r"]),
        helper.make_node("Softmax", ["r"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", "batch", 2, 3)],
        [tensor("y", "batch", 6)],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    for opset in (20, 21):
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )
        session = make_session(model.SerializeToString())
        (y,) = session.run(None, {"x": np.arange(-3.0, 3.0, dtype=np.float32).reshape(1, 2, 3)})
        exact = np.exp(np.arange(6.0))
        np.testing.assert_allclose(y[0], exact / exact.sum(), rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
def test_exact_products_do_not_saturate_on_any_processor(operator: str, shared: bool) -> None:
    """Without them an AVX2 processor adds pairs of products in int16: half of the sum is left."""
    size, tail = 64, [1, 1] if operator == "Conv" else []
    shape = [8, size, *tail] if operator == "Conv" else [size, 8]
    constants = {
        "w": np.full(shape, 127, dtype=np.int8),
        "ws": np.float32(1.0),
        "wz": np.int8(0),
        "s": np.float32(1.0),
        "z": np.uint8(0),
        "ys": np.float32(255.0 * 127 * size / 200),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["v"]),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node(operator, ["d", "v"], ["p"]),
        helper.make_node("QuantizeLinear", ["p", "ys", "z"], ["pq"]),
        helper.make_node("DequantizeLinear", ["pq", "ys", "z"], ["y"]),
    ]
    outputs = ["y"]
    if shared:  # a second layer with the same weight, which ONNX Runtime cannot widen twice
        again = {"q": "q2", "d": "d2", "p": "p2", "pq": "pq2", "y": "y2", "s": "ys"}
        nodes += [
            helper.make_node(
                node.op_type, [again.get(n, n) for n in node.input], [again[node.output[0]]]
            )
            for node in nodes[1:]
        ]
        outputs.append("y2")
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", "batch", size, *tail)],
        [tensor(name, "batch", 8, *tail) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()
    largest = {"x": np.full((4, size, *tail), 255.0, dtype=np.float32)}
    y = make_session(model, exact_products=True).run(["y"], largest)[0]
    np.testing.assert_allclose(y, 255.0 * 127 * size, rtol=1e-6)
    y = make_session(model).run(["y"], largest)[0]
    assert (y.max() < 0.6 * 255.0 * 127 * size) == saturates()


def test_16_bit_activations_stay_16_bit_in_a_matrix_product() -> None:
    """ONNX Runtime 1.32 would round them to 8 bits on the way."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 127, (64, 16)).astype(np.int8)
    constants = {
        "w": weight,
        "ws": np.float32(0.01),
        "wz": np.int8(0),
        "s": np.float32(1e-4),
        "z": np.uint16(32768),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["v"]),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], domain="com.microsoft"),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [tensor("x", "batch", 64)],
        [tensor("y", "batch", 16)],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = rng.uniform(-3.0, 3.0, (8, 64)).astype(np.float32)
    (y,) = make_session(model.SerializeToString()).run(None, {"x": x})
    exact = x @ (weight.astype(np.float32) * np.float32(0.01))
    assert np.abs(y - exact).max() < 1e-4 * 64


def test_an_execution_provider_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InputError, match="NoSuchProvider is not in this ONNX Runtime"):
        make_session(linear_model(), providers=["NoSuchProvider", "CPUExecutionProvider"])
    with pytest.raises(InputError, match="NoSuchProvider"):
        make_session(linear_model(), providers=[("NoSuchProvider", {"device_id": "0"})])


def test_sessions_do_not_spin_and_have_the_threads_asked_for() -> None:
    for threads, expected in ((1, 1), (3, 3), (None, 0)):
        options = make_session(linear_model(), threads=threads).get_session_options()
        assert options.intra_op_num_threads == expected
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
