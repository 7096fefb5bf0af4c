"""GELU in the forms that exporters write it in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.gelu import find_gelus
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.representation import Representation


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]
Chain = list[tuple[str, list[str], str]]

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((16, 24)).astype(np.float32)
CONSTANTS = {"root": 2.0**0.5, "inverse": 0.5**0.5, "one": 1.0, "half": 0.5, "two": 2.0}

DIVIDED: Chain = [("Div", ["x", "root"], "a"), ("Erf", ["a"], "b"), ("Add", ["b", "one"], "c")]
MULTIPLIED: Chain = [
    ("Mul", ["inverse", "x"], "a"),
    ("Erf", ["a"], "b"),
    ("Add", ["one", "b"], "c"),
]
WRITTEN_OUT: dict[str, Chain] = {
    "torch": [*DIVIDED, ("Mul", ["x", "c"], "d"), ("Mul", ["d", "half"], "y")],
    "half first": [*MULTIPLIED, ("Mul", ["x", "half"], "d"), ("Mul", ["d", "c"], "y")],
    "half of the sum": [*DIVIDED, ("Mul", ["c", "half"], "d"), ("Mul", ["x", "d"], "y")],
    "divided by two": [*MULTIPLIED, ("Mul", ["c", "x"], "d"), ("Div", ["d", "two"], "y")],
}
OTHERS: dict[str, Chain] = {
    "another argument": [("Erf", ["x"], "b"), *DIVIDED[2:], *WRITTEN_OUT["torch"][3:]],
    "another summand": [
        *DIVIDED[:2],
        ("Add", ["b", "two"], "c"),
        *WRITTEN_OUT["torch"][3:],
    ],
    "another factor": [*DIVIDED, ("Mul", ["x", "c"], "d"), ("Mul", ["d", "two"], "y")],
    "squared": [*DIVIDED, ("Mul", ["c", "c"], "d"), ("Mul", ["d", "half"], "y")],
    "the argument once more": [
        *DIVIDED,
        ("Mul", ["x", "c"], "d"),
        ("Mul", ["d", "x"], "e"),
        ("Mul", ["e", "half"], "y"),
    ],
    "read elsewhere": [*WRITTEN_OUT["torch"][:-1], ("Sub", ["d", "b"], "y")],
    "nothing behind": [*DIVIDED[:2], ("Neg", ["b"], "y")],
}


def build(chain: Chain) -> onnx.ModelProto:
    """The chain from x to y between two linear layers."""
    value, make = helper.make_tensor_value_info, helper.make_node
    nodes = [make("MatMul", ["input", "first"], ["x"], "first")]
    nodes += [make(op, inputs, [output], f"gelu.{output}") for op, inputs, output in chain]
    nodes += [make("MatMul", ["y", "last"], ["output"], "last")]
    constants = {name: np.float32(number) for name, number in CONSTANTS.items()}
    constants |= {
        "first": RNG.standard_normal((24, 32)).astype(np.float32) / 3,
        "last": RNG.standard_normal((32, 10)).astype(np.float32) / 5,
    }
    graph = helper.make_graph(
        nodes,
        "model",
        [value("input", TensorProto.FLOAT, ["batch", 24])],
        [value("output", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def quantized(model: onnx.ModelProto, folder: Path, *, for_kernels: bool) -> onnx.ModelProto:
    onnx.save(model, folder / "model.onnx")
    prepared = load_float_model(folder / "model.onnx")
    wanted = required_activations(place(prepared))
    statistics = calibrate(prepared, ArrayInputs({"input": INPUTS}), wanted, sizes=("all",))
    representation = Representation(for_kernels=for_kernels)
    quantizer = Quantizer(prepared, statistics, representation=representation)
    proto = quantizer.quantize(QuantizationConfig()).proto
    onnx.checker.check_model(proto)
    return proto


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def error(proto: onnx.ModelProto, model: onnx.ModelProto, run: Run) -> float:
    return float(np.mean(np.square(run(proto, INPUTS) - run(model, INPUTS))))


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_it_is_found_in_every_form(form: str) -> None:
    (gelu,) = find_gelus(build(WRITTEN_OUT[form]).graph)
    assert (gelu.source, gelu.output) == ("x", "y")
    assert {node.name for node in gelu.nodes} == {f"gelu.{name}" for name in "abcdy"}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_something_else_is_not(form: str) -> None:
    assert find_gelus(build(OTHERS[form]).graph) == []


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_it_becomes_one_float_node_between_pairs(form: str, tmp_path: Path, run: Run) -> None:
    model = build(WRITTEN_OUT[form])
    plain = quantized(model, tmp_path, for_kernels=False)
    written = quantized(model, tmp_path, for_kernels=True)
    assert operators(plain)["Erf"] == 1
    assert operators(plain)["QuantizeLinear"] > 4  # the trap: a pair behind every product
    assert operators(written)["Erf"] == operators(written)["Mul"] == 0
    assert operators(written)["Gelu"] == 1
    assert operators(written)["QuantizeLinear"] == 4
    # With 8 bits the same function, and no more noise than with the roundings in between.
    assert error(written, model, run) < 1.2 * error(plain, model, run)
    assert error(written, model, run) < 1e-3 * float(np.mean(np.square(run(model, INPUTS))))


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_something_else_stays(form: str, tmp_path: Path, run: Run) -> None:
    model = build(OTHERS[form])
    plain, written = (quantized(model, tmp_path, for_kernels=k) for k in (False, True))
    # What stands between float nodes has no pairs (`islands.py`); the nodes are the same.
    left, there = operators(written), operators(plain)
    for pair in ("QuantizeLinear", "DequantizeLinear"):
        assert left.pop(pair) <= there.pop(pair)
    assert left == there
    assert error(written, model, run) < 1.2 * error(plain, model, run)


def test_onnx_runtime_does_not_find_it_between_pairs(tmp_path: Path) -> None:
    """Why it is written as one node: each reader of a pair gets a DequantizeLinear of its own."""
    proto = quantized(build(WRITTEN_OUT["torch"]), tmp_path, for_kernels=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    assert operators(onnx.load(tmp_path / "optimized.onnx"))["Gelu"] == 0
