"""Fixtures that several test modules share: a small CNN with what quantization meets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper


pytest.register_assert_rewrite("optuna.testing.pytest_samplers")


def build_toy_model(*, weight_spread: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """Conv-Relu, depthwise Conv-Clip(0, 6), linear Conv, Add, MaxPool, GlobalAveragePool, Gemm.

    `weight_spread` is the standard deviation of the log of the channels' scales: the larger it is,
    the more a single scale for a whole weight hurts.
    """
    rng = np.random.default_rng(seed)
    initializers: list[onnx.TensorProto] = []

    def constant(name: str, values: NDArray[np.float64]) -> str:
        initializers.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(
        name: str, source: str, cin: int, cout: int, kernel: int, groups: int
    ) -> onnx.NodeProto:
        fan_in = cin // groups * kernel * kernel
        weight = rng.standard_normal((cout, cin // groups, kernel, kernel)) / np.sqrt(fan_in)
        weight *= np.exp(weight_spread * rng.standard_normal((cout, 1, 1, 1)))
        return helper.make_node(
            "Conv",
            [
                source,
                constant(f"{name}.weight", weight),
                constant(f"{name}.bias", 0.1 * rng.standard_normal(cout)),
            ],
            [f"{name}.out"],
            name=name,
            kernel_shape=[kernel, kernel],
            pads=[kernel // 2] * 4,
            group=groups,
        )

    nodes = [
        conv("stem", "input", 3, 16, 3, 1),
        helper.make_node("Relu", ["stem.out"], ["stem.relu"], name="stem_relu"),
        conv("depthwise", "stem.relu", 16, 16, 3, 16),
        helper.make_node(
            "Clip",
            ["depthwise.out", constant("zero", np.array(0.0)), constant("six", np.array(6.0))],
            ["depthwise.relu6"],
            name="depthwise_relu6",
        ),
        conv("project", "depthwise.relu6", 16, 16, 1, 1),
        helper.make_node("Add", ["stem.relu", "project.out"], ["sum"], name="add"),
        helper.make_node(
            "MaxPool", ["sum"], ["pooled"], name="pool", kernel_shape=[2, 2], strides=[2, 2]
        ),
        helper.make_node("GlobalAveragePool", ["pooled"], ["mean"], name="mean"),
        helper.make_node("Flatten", ["mean"], ["features"], name="flatten"),
        helper.make_node(
            "Gemm",
            [
                "features",
                constant("head.weight", rng.standard_normal((10, 16))),
                constant("head.bias", 0.1 * rng.standard_normal(10)),
            ],
            ["logits"],
            name="head",
            transB=1,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "toy.onnx"
    onnx.save(build_toy_model(), path)
    return path


@pytest.fixture(scope="session")
def toy_inputs() -> NDArray[np.float32]:
    """Heavy-tailed inputs, shape (80, 3, 16, 16): the later ones reach further than the first."""
    rng = np.random.default_rng(1)
    scale = np.exp(0.8 * rng.standard_normal((80, 1, 1, 1)))
    scale[0] = 0.3
    return (rng.standard_normal((80, 3, 16, 16)) * scale).astype(np.float32)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and images, or a skip that says how to give one."""
    folder = Path(
        os.environ.get("OPTUNA_QUANTUNE_DATA", Path(__file__).parents[2] / "shared" / "data")
    )
    if not (folder / "models" / "models.json").is_file():
        pytest.skip(
            f"no real models and images in {folder}; set OPTUNA_QUANTUNE_DATA to a folder of them"
        )
    return folder
