"""Activations large enough to be sampled: what is seen of them against all their values."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import quantization_error
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.observation import observe_whole
from optuna_quantune.quantization.observation import Observer
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.statistics import BINS
from optuna_quantune.quantization.statistics import count_into
from optuna_quantune.quantization.statistics import from_dense


TENSORS = ["input", "relu", "signed", "logits"]
CHANNELS, WIDTH = 16, 48


@pytest.fixture(scope="module", params=[17, 18])  # reductions changed in opset 18
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> FloatModel:
    """Conv-Relu-Conv on 48 x 48 pixels: one activation without negative values, one with."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((CHANNELS, c, 3, 3)) * 0.3 for c in (3, CHANNELS)]
    nodes = [
        helper.make_node("Conv", ["input", "w0"], ["conv"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Conv", ["relu", "w1"], ["signed"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["signed"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "large",
        [
            helper.make_tensor_value_info(
                "input", onnx.TensorProto.FLOAT, ["batch", 3, WIDTH, WIDTH]
            )
        ],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", CHANNELS])],
        [numpy_helper.from_array(w.astype(np.float32), f"w{i}") for i, w in enumerate(weights)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", request.param)])
    proto.ir_version = 10
    path = tmp_path_factory.mktemp("models") / "large.onnx"
    onnx.save(proto, path)
    return load_float_model(path)


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    """Heavy-tailed, shape (150, 3, 48, 48); some images reach further than others."""
    rng = np.random.default_rng(1)
    scale = np.exp(0.2 * rng.standard_normal((150, 1, 1, 1)))
    return (rng.standard_t(5, size=(150, 3, WIDTH, WIDTH)) * scale).astype(np.float32)


def all_values(model: FloatModel, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in ("relu", "signed"))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = ["relu", "signed", "logits"]
    return {"input": images} | dict(zip(names, session.run(names, {"input": images}), strict=True))


def observer_of(model: FloatModel, images: NDArray[np.float32]) -> Observer:
    return Observer(model, observe_whole(model, TENSORS, {"input": images[:1]}))


def test_extremes_and_tails_are_complete_and_the_sample_is_a_sample(
    model: FloatModel, images: NDArray[np.float32]
) -> None:
    batch = images[4:8]
    values = all_values(model, batch)
    seen = observer_of(model, images).observe({"input": batch}, offset=7, sample=512, weight=1)
    assert [found.tensor for found in seen] == TENSORS
    for found in seen:
        exact = values[found.tensor].reshape(-1)
        assert found.maximum == pytest.approx(exact.max(), rel=1e-6)
        if found.tensor == "logits":
            np.testing.assert_allclose(found.sample, values["logits"], rtol=1e-5, atol=1e-6)
            assert (found.weight, found.upper, found.lower) == (1, None, None)
            continue
        expected = exact[7 % found.weight :: found.weight]
        np.testing.assert_allclose(found.sample, expected, rtol=1e-4, atol=1e-4)
        assert 450 <= found.sample.size / len(batch) <= 1024
        assert found.upper is not None
        beyond = np.sort(exact[exact > found.upper.bound + 1e-4])
        assert beyond.size >= 60
        tail = np.sort(found.upper.values.reshape(-1))[-beyond.size :]
        np.testing.assert_allclose(tail, beyond, rtol=1e-4)
        if found.tensor == "relu":
            assert found.lower is None
            assert found.minimum == 0.0
            continue
        assert found.minimum == pytest.approx(exact.min(), rel=1e-6)
        assert found.lower is not None
        beyond = np.sort(exact[exact < found.lower.bound - 1e-4])
        assert beyond.size >= 60
        tail = np.sort(found.lower.values.reshape(-1))[: beyond.size]
        np.testing.assert_allclose(tail, beyond, rtol=1e-4)


def test_a_glance_gives_the_extremes(model: FloatModel, images: NDArray[np.float32]) -> None:
    batch = images[8:12]
    values = all_values(model, batch)
    for found in observer_of(model, images).glance({"input": batch}):
        assert found.maximum == pytest.approx(values[found.tensor].max(), rel=1e-6)
        if found.tensor != "relu":
            assert found.minimum == pytest.approx(values[found.tensor].min(), rel=1e-6)


@pytest.mark.parametrize("size", [32, 150])
@pytest.mark.parametrize("tensor", ["input", "relu", "signed"])
def test_the_ranges_of_the_store_are_those_of_all_values(
    model: FloatModel, images: NDArray[np.float32], tensor: str, size: int
) -> None:
    statistics = calibrate(model, ArrayInputs({"input": images}), TENSORS, sizes=(1, 32, "all"))
    found = statistics.histogram(tensor, size)
    values = all_values(model, images[:size])[tensor]
    dense = np.zeros(BINS, dtype=np.int64)
    count_into(dense, np.ascontiguousarray(values))
    exact = from_dense(dense, float(values.min()), float(values.max())).histogram()
    assert found.maximum == pytest.approx(exact.maximum, rel=1e-6)
    assert found.minimum == pytest.approx(exact.minimum, rel=1e-6)
    assert found.total == pytest.approx(values.size, rel=0.01 if size == 32 else 0.1)
    # Of 32 inputs the tails are complete; of 150 some stand for others.
    tolerance = 0.4 if size == 32 else 1.0  # decibels of quantization noise
    for clipping in get_args(Clipping):
        for scheme in ("asymmetric", "symmetric_uint8"):
            if clipping == "kl":  # its divergence is flat: far thresholds are as good
                continue
            if clipping == "percentile_99.9999" and size == 150:  # one or two values of all
                continue
            noise = [
                float(quantization_error(exact, choose_parameters(*ends, scheme)))
                for ends in (
                    choose_range(found, clipping, scheme),
                    choose_range(exact, clipping, scheme),
                )
            ]
            assert abs(10.0 * np.log10(noise[0] / noise[1])) < tolerance, clipping


@pytest.mark.parametrize("share", [0.9999, 0.99999, 0.999999])
def test_rare_values_of_small_sets_are_counted_one_by_one(
    model: FloatModel, images: NDArray[np.float32], share: float
) -> None:
    statistics = calibrate(model, ArrayInputs({"input": images[:32]}), TENSORS, sizes=(1, "all"))
    for tensor in ("relu", "signed"):
        values = all_values(model, images[:32])[tensor].reshape(-1)
        threshold = float(np.quantile(values, share))
        found = statistics.histogram(tensor, "all")
        beyond = [int((values > factor * threshold).sum()) for factor in (1.01, 0.99)]
        counted = found.counts[found.edges[1:] > threshold].sum()
        assert beyond[0] <= counted <= beyond[1]


@pytest.mark.parametrize("index", [0, 3, 66, 75, 85, 99])
def test_extremes_are_exact_whichever_input_they_come_from(
    model: FloatModel, images: NDArray[np.float32], index: int
) -> None:
    reaching = np.clip(images[:100], -3.0, 3.0)
    reaching[index, 1, 20, 20] = 90.0
    reaching[index, 2, 30, 30] = -80.0
    statistics = calibrate(model, ArrayInputs({"input": reaching}), TENSORS, sizes=("all",))
    values = all_values(model, reaching[index : index + 1])
    for tensor in ("input", "relu", "signed"):
        found = statistics.histogram(tensor, "all")
        assert found.maximum == pytest.approx(values[tensor].max(), rel=1e-5)
        assert found.minimum == pytest.approx(values[tensor].min(), rel=1e-5)


def test_the_store_does_not_grow_with_the_number_of_inputs(
    model: FloatModel, images: NDArray[np.float32], tmp_path: Path
) -> None:
    sizes = []
    for repeats in (1, 4):
        folder = tmp_path / str(repeats)
        inputs = ArrayInputs({"input": np.concatenate([images[:100]] * repeats)})
        calibrate(model, inputs, TENSORS, sizes=("all",), cache=folder)
        sizes.append(next(folder.iterdir()).stat().st_size)
    assert sizes[1] < 1.2 * sizes[0]
