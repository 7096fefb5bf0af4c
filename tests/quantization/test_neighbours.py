"""Pairs of products: which weights meet in one, and that none of ours leaves int16."""

from __future__ import annotations

import itertools
from typing import Any
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import Granularity
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.config import WeightClipping
from optuna_quantune.quantization.config import WeightRounding
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.lint import lint_quantized
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.neighbours import fit
from optuna_quantune.quantization.neighbours import in_order
from optuna_quantune.quantization.neighbours import in_shape
from optuna_quantune.quantization.neighbours import largest_sums
from optuna_quantune.quantization.neighbours import least_scales
from optuna_quantune.quantization.processor import saturates
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.quantization.weight_rounding import WeightRounding as Rounding


IN_PAIRS = Representation(adds_in_pairs=True)


def worst_pair(row: NDArray[np.int64]) -> int:
    """The furthest that products of two neighbours with any uint8 get from zero in int16."""
    worst = 0
    for first, second in itertools.pairwise([*row, 0]):
        for sign in (1, -1):
            pair = max(sign * int(first), 0) + max(sign * int(second), 0)
            worst = max(worst, 255 * pair)
    return worst


@pytest.mark.parametrize(
    ("op_type", "shape", "axis"),
    [
        ("Conv", (4, 3, 5, 2), 0),
        ("QLinearConv", (4, 3, 5), 0),
        ("Conv", (2, 3, 2, 3, 4), 0),
        ("Gemm", (4, 6), 0),
        ("Gemm", (6, 4), 1),
        ("MatMul", (2, 6, 4), 2),
    ],
)
def test_neighbours_are_inputs_of_one_output_channel(
    op_type: str, shape: tuple[int, ...], axis: int
) -> None:
    weight = np.arange(np.prod(shape)).reshape(shape)
    rows = in_order(weight, op_type, axis)
    for channel, row in enumerate(rows):
        own = np.take(weight, channel, axis=axis)
        assert sorted(row) == sorted(own.reshape(-1))
        # The first neighbours are two input channels in the same place of the kernel.
        second = own[(1, *[0] * (own.ndim - 1))] if "Conv" in op_type else own.reshape(-1)[1]
        assert row[:2].tolist() == [own.reshape(-1)[0], second]
    assert np.array_equal(in_shape(rows, shape, op_type, axis), weight)


def test_rounded_to_the_nearest_weights_fit_by_their_scale_and_use_it() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 50, 500):
        rows = rng.standard_normal((200, length)).astype(np.float32)
        integers = np.rint(rows / least_scales(rows)[:, None]).astype(np.int64)
        worst = [worst_pair(row) for row in integers]
        assert max(worst) <= np.iinfo(np.int16).max
        assert min(worst) >= 255 * 126


def test_integers_that_do_not_fit_are_moved_as_little_as_they_must() -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(-128, 128, (100, 40)).astype(np.int32)
    small = rows // 2
    assert np.array_equal(fit(small), small)
    fitted = fit(rows)
    assert max(worst_pair(row) for row in fitted) <= np.iinfo(np.int16).max
    assert np.all(np.abs(fitted) <= np.abs(rows))
    assert np.all(fitted * rows >= 0)
    assert fit(np.array([[100, 40, 88, -90, -60]], np.int32)).tolist() == [[100, 28, 88, -90, -38]]


def largest_that_fit(rng: np.random.Generator, channels: int, length: int) -> NDArray[np.int64]:
    """Rows of large weights whose neighbours of one sign have the sum 128, or nearly."""
    rows = np.zeros((channels, length), dtype=np.int64)
    for row in rows:
        before = 0
        for place in range(length):
            low, high = max(-128, -128 - min(before, 0)), min(127, 128 - max(before, 0))
            before = row[place] = rng.choice([high, low, high // 2])
    return rows


def convolution(
    weight: NDArray[np.int64], inputs: NDArray[np.uint8], **attributes: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The outputs of an integer convolution on this processor, and the exact ones in 255 steps."""
    pads, group = attributes["pads"], attributes["group"]
    scale = np.float32(255.0 * np.abs(weight).sum(axis=tuple(range(1, weight.ndim))).max() / 120)
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "weight": weight.astype(np.int8),
        "weight_zero": np.int8(0),
        "scale": scale,
        "middle": np.uint8(128),
    }
    node = helper.make_node(
        "QLinearConv",
        ["x", "one", "zero", "weight", "one", "weight_zero", "scale", "middle"],
        ["y"],
        pads=pads,
        group=group,
    )
    float_node = helper.make_node("Conv", ["x", "w"], ["y"], pads=pads, group=group)
    results = []
    for kind, chosen in ((onnx.TensorProto.UINT8, node), (onnx.TensorProto.DOUBLE, float_node)):
        graph = helper.make_graph(
            [chosen],
            "g",
            [helper.make_tensor_value_info("x", kind, None)],
            [helper.make_tensor_value_info("y", kind, None)],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
            + [numpy_helper.from_array(weight.astype(np.float64), "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        if kind == onnx.TensorProto.UINT8:
            session = onnxruntime.InferenceSession(model.SerializeToString())
            results.append(session.run(None, {"x": inputs})[0].astype(np.int64))
        else:
            (exact,) = onnx.reference.ReferenceEvaluator(model).run(
                None, {"x": inputs.astype(np.float64)}
            )
            steps = np.rint((exact / np.float64(scale)).astype(np.float32)) + 128
            results.append(np.clip(steps, 0, 255).astype(np.int64))
    return results[0], results[1]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_products_of_weights_that_fit_are_exact_on_any_processor(
    dimensions: int, groups: int, kernel: int
) -> None:
    rng = np.random.default_rng(0)
    for inputs, outputs in itertools.product((2, 3, 5, 8, 17, 32), (4, 16)):
        taps = (kernel,) * dimensions
        rows = largest_that_fit(rng, outputs * groups, inputs * kernel**dimensions)
        shape = (outputs * groups, inputs, *taps)
        weight = in_shape(rows, shape, "Conv", 0)
        size = (2, inputs * groups, *(5,) * dimensions)
        x = rng.choice([255, 255, 254, 128, 0], size=size).astype(np.uint8)
        found, exact = convolution(weight, x, group=groups, pads=[kernel // 2] * 2 * dimensions)
        # Rounding of float32 may go the other way.
        assert np.abs(found - exact).max() <= 1


def test_weights_that_fit_in_another_order_saturate_where_products_are_added_in_pairs() -> None:
    rng = np.random.default_rng(0)
    weight = largest_that_fit(rng, 16, 8 * 9).reshape(16, 8, 3, 3)
    x = rng.choice([255, 255, 254, 128, 0], size=(2, 8, 7, 7)).astype(np.uint8)
    found, exact = convolution(weight, x, group=1, pads=[1] * 4)
    assert (np.abs(found - exact).max() > 1) == saturates()


@pytest.mark.parametrize("weight_rounding", get_args(WeightRounding))
@pytest.mark.parametrize("weight_clipping", get_args(WeightClipping))
@pytest.mark.parametrize("granularity", get_args(Granularity))
@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_no_pair_of_a_built_model_leaves_int16(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
    scheme: str,
    granularity: str,
    weight_clipping: str,
    weight_rounding: str,
) -> None:
    source = ArrayInputs({"input": toy_inputs})
    quantizer = Quantizer(
        float_model,
        toy_statistics,
        representation=IN_PAIRS,
        weight_rounding=Rounding(lambda: input_moments(float_model, source)),
    )
    config = QuantizationConfig.from_dict(
        {
            "scheme": scheme,
            "granularity": granularity,
            "weight_clipping": weight_clipping,
            "weight_rounding": weight_rounding,
        }
    )
    proto = quantizer.quantize(config).proto
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    plan = quantizer.plan(config)
    for layer in float_model.layers:
        integers = constants[f"{layer.weight}_quantized"].astype(np.int64)
        if layer.name == "depthwise":  # its kernel adds one by one
            if scheme != "symmetric_power2" and weight_clipping == "max":
                assert max(-integers.min(), integers.max()) >= 127
            continue
        rows = np.moveaxis(integers, layer.channel_axis, 0)
        rows = (np.moveaxis(rows, 1, -1) if layer.op_type == "Conv" else rows).reshape(
            len(rows), -1
        )
        worst = max(worst_pair(row) for row in rows)
        assert worst <= np.iinfo(np.int16).max
        if scheme != "symmetric_power2" and weight_clipping == "max":
            largest = max(-int(rows.min()), int(rows.max()))
            seven = plan.constants[layer.weight].zero_point.any()
            assert largest <= 64 if seven else max(worst / 255, largest) >= 126
    assert not any(f.rule == "saturating-int8" for f in lint_quantized(proto, vnni=False))


def test_neighbours_spare_most_of_the_bit() -> None:
    """Of random weights, where 7 bits make four times the error of 8."""
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    largest = np.abs(weight).max(axis=1)
    sums = largest_sums(weight)
    finer = least_scales(weight)
    assert np.all(finer >= largest / 127)
    share = np.mean(np.square(finer)) / np.mean(np.square(largest / 63))
    assert 0.25 < share < 0.5
    assert np.all(sums <= 2 * largest)
