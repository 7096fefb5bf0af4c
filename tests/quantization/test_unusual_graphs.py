"""Graphs that exporters write seldom: each is quantized about as well as any other."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.builder import Builder
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.graph import import_own_domain
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import get_target


make = helper.make_node
Constants = dict[str, NDArray[Any]]
Case = tuple[list[onnx.NodeProto], Constants]
SIZE = 8


def weights(**shapes: tuple[int, ...]) -> Constants:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def computed_clip() -> Case:
    """A Clip at the mean magnitude of the input, by which nothing is said about its range."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first", pads=[1] * 4),
        make("Abs", ["x"], ["size"], "abs"),
        make("ReduceMean", ["size"], ["mean"], "mean", keepdims=0),
        make("Clip", ["a", "zero", "mean"], ["c"], "clip"),
        make("Conv", ["c", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 3, 3), b=(8,), w2=(6, 8, 1, 1)) | {"zero": np.float32(0.0)}  # type: ignore[dict-item]


def average_beyond_the_border() -> Case:
    """Windows that stand out, which ONNX Runtime's integer kernel divides by another number."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first", pads=[1] * 4),
        make("Relu", ["a"], ["r"], "relu"),
        make(
            "AveragePool",
            ["r"],
            ["p"],
            "pool",
            kernel_shape=[3, 3],
            strides=[2, 2],
            ceil_mode=1,
            count_include_pad=1,
        ),
        make("Conv", ["p", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 3, 3), b=(8,), w2=(6, 8, 1, 1))


def dilated_average(*dilations: int) -> Callable[[], Case]:
    """As opset 19 knows them, unlike ONNX Runtime's integer kernel."""

    def case() -> Case:
        nodes = [
            make("Conv", ["x", "w", "b"], ["a"], "first", pads=[1] * 4),
            make(
                "AveragePool", ["a"], ["p"], "pool", kernel_shape=[2, 2], dilations=list(dilations)
            ),
            make("Conv", ["p", "w2"], ["y"], "last"),
        ]
        return nodes, weights(w=(8, 3, 3, 3), b=(8,), w2=(6, 8, 1, 1))

    return case


def window_beyond_the_image() -> Case:
    """The last of a pool, which shape inference counts and ONNX Runtime leaves out."""
    pool = {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1}
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("MaxPool", ["a"], ["p"], "pool", **pool),
        make("Conv", ["p", "v"], ["c"], "second"),
        make("Relu", ["c"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), v=(8, 8, 1, 1), w2=(6, 8, 1, 1))


def moved_through_the_batch() -> Case:
    """A Reshape that has no channel shuffle in it, though it reads like one."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Reshape", ["a", "apart"], ["d"], "apart"),
        make("Transpose", ["d"], ["e"], "swap", perm=[0, 2, 1, 3]),
        make("Reshape", ["e", "together"], ["f"], "together"),
        make("Conv", ["f", "w2"], ["y"], "last"),
    ]
    sizes = {"apart": np.array([2, -1, 2, SIZE * SIZE]), "together": np.array([1, 8, SIZE, SIZE])}
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1)) | sizes


def computed_slope() -> Case:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Conv", ["x", "w3"], ["s"], "slope"),
        make("PRelu", ["a", "s"], ["p"], "prelu"),
        make("Conv", ["p", "w2"], ["c"], "last"),
        make("Conv", ["s", "w4"], ["d"], "other"),
        make("Add", ["c", "d"], ["y"], "add"),
    ]
    constants = weights(w=(8, 3, 1, 1), b=(8,), w3=(8, 3, 1, 1), w2=(6, 8, 1, 1), w4=(6, 8, 1, 1))
    constants["w"] *= np.logspace(-1.0, 1.0, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    return nodes, constants


def small_weights_of_large_inputs() -> Case:
    """A channel that is a hundred thousand times as large as others, and made small again."""
    constants = weights(w=(8, 3, 1, 1), b=(8,), d=(8, 1, 3, 3), e=(8,), w2=(6, 8, 1, 1))
    constants["w"][2] *= 1e5
    constants["b"][2] = 0.0
    constants["d"][2] = np.abs(constants["d"][2]) * 1e-5
    constants["e"][2] = 0.0
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "d", "e"], ["c"], "depth", group=8, pads=[1] * 4),
        make("Relu", ["c"], ["q"], "again"),
        make("Conv", ["q", "w2"], ["y"], "last"),
    ]
    return nodes, constants


def computed_bias() -> Case:
    """A channel that has no weights and lives on a bias that is computed."""
    constants = weights(w=(8, 3, 1, 1), v=(8,), w2=(6, 8, 1, 1))
    constants["w"][2], constants["v"] = 0.0, np.abs(constants["v"]) + 2.0
    constants["w2"][:, 2] *= 4.0
    nodes = [
        make("ReduceMax", ["x"], ["m"], "max", keepdims=0),
        make("Mul", ["v", "m"], ["b"], "bias"),
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    return nodes, constants


def shuffled_before(*nodes: onnx.NodeProto) -> Callable[[], Case]:
    def case() -> Case:
        first = [
            make("Conv", ["x", "w", "b"], ["a"], "first"),
            make("Reshape", ["a", "apart"], ["d"], "apart"),
            make("Transpose", ["d"], ["e"], "swap", perm=[0, 2, 1, 3, 4]),
            make("Reshape", ["e", "together"], ["f"], "together"),
        ]
        sizes = {
            "apart": np.array([-1, 2, 4, SIZE, SIZE]),
            "together": np.array([-1, 8, SIZE, SIZE]),
        }
        factors = weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1), gamma=(8,), beta=(8,), mu=(8,))
        variance = {"var": np.linspace(0.5, 2.0, 8).astype(np.float32)}
        return [*first, *nodes, make("Conv", ["g", "w2"], ["y"], "last")], (
            factors | sizes | variance
        )

    return case


def split_output() -> Case:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Split", ["a"], ["s", "y"], "split", axis=1),
        make("Conv", ["s", "w2"], ["z"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 4, 1, 1))


def transposed_input() -> Case:
    nodes = [
        make("Reshape", ["x", "flat"], ["f"], "flat"),
        make("Gemm", ["f", "w"], ["g"], "first", transA=1),
        make("Relu", ["g"], ["r"], "relu"),
        make("Gemm", ["r", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(3, 8), w2=(8, 6)) | {"flat": np.array([3, -1])}


def one_weight_in_two_ways() -> Case:
    """Of a depthwise convolution, and of a dense one that has a single channel to read."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Conv", ["a", "d", "e"], ["c"], "depth", group=8, pads=[1] * 4),
        make("Conv", ["c", "v"], ["s"], "narrow"),
        make("Conv", ["s", "d"], ["t"], "dense"),
        make("Conv", ["t", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), d=(8, 1, 3, 3), e=(8,), v=(1, 8, 1, 1)) | (
        weights(w2=(6, 8, 1, 1))
    )


def computed_weights() -> Case:
    nodes = [
        make("Conv", ["x", "w"], ["a"], "first"),
        make("Flatten", ["a"], ["f"], "flat"),
        make("Reshape", ["x", "square"], ["s"], "square"),
        make("Gemm", ["f", "s", "b"], ["g"], "product"),
        make("Relu", ["g"], ["r"], "relu"),
        make("Gemm", ["r", "w2"], ["y"], "last"),
    ]
    square = {"square": np.array([SIZE * SIZE, -1])}
    return nodes, weights(w=(1, 3, 1, 1), b=(3,), w2=(3, 6)) | square


def grouped_transposed_convolution() -> Case:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("ConvTranspose", ["a", "t", "c"], ["d"], "up", group=2, strides=[2, 2]),
        make("Relu", ["d"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), t=(8, 4, 2, 2), c=(8,), w2=(6, 8, 1, 1))


def single_number() -> Case:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("ReduceMax", ["a"], ["m"], "max", keepdims=0),
        make("Mul", ["a", "m"], ["p"], "scale"),
        make("Conv", ["p", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))


def own_gelu() -> Case:
    """ONNX Runtime's own operator, behind which ONNX knows no types."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Gelu", ["a"], ["g"], "gelu", domain="com.microsoft"),
        make("Add", ["g", "a"], ["s"], "add"),
        make("Conv", ["s", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))


def of_unknown_rank() -> Case:
    """Behind the Scaler of a scikit-learn pipeline neither ONNX nor ONNX Runtime knows a shape."""
    scaler = make("Scaler", ["x"], ["a"], "scaler", domain="ai.onnx.ml", offset=[0.5], scale=[2.0])
    nodes = [
        scaler,
        make("Conv", ["a", "w", "b"], ["c"], "first"),
        make("Relu", ["c"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))


def summed_up() -> Case:
    """A mean with its axes as an attribute, which opset 18 does not know any more."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("ReduceMean", ["a"], ["m"], "mean", axes=[2, 3], keepdims=1),
        make("Conv", ["m", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))


def written_out_normalization() -> Case:
    """A layer normalization as exporters wrote it before opset 17, of values near 0."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("ReduceMean", ["a"], ["mean"], "mean", axes=[1]),
        make("Sub", ["a", "mean"], ["d"], "centre"),
        make("Mul", ["d", "d"], ["s"], "square"),
        make("ReduceMean", ["s"], ["v"], "variance", axes=[1]),
        make("Add", ["v", "small"], ["e"], "epsilon"),
        make("Sqrt", ["e"], ["q"], "root"),
        make("Div", ["d", "q"], ["n"], "divide"),
        make("Mul", ["n", "gamma"], ["m"], "factor"),
        make("Add", ["m", "beta"], ["o"], "offset"),
        make("Conv", ["o", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 1, 1), b=(8,), gamma=(8, 1, 1), beta=(8, 1, 1), w2=(6, 8, 1, 1))
    constants["w"] *= 1e-2
    constants["b"] *= 1e-4
    return nodes, constants | {"small": np.full(1, 1e-5, np.float32)}


def masked() -> Case:
    """Attention that does not look ahead: an infinity before the softmax, none behind it."""
    nodes = [
        make("MatMul", ["x", "w"], ["a"], "scores"),
        make("Where", ["mask", "a", "nothing"], ["s"], "where"),
        make("Softmax", ["s"], ["p"], "softmax", axis=-1),
        make("MatMul", ["p", "w2"], ["y"], "last"),
    ]
    mask = {"mask": np.tri(SIZE, dtype=np.bool_), "nothing": np.full(1, -np.inf, np.float32)}
    return nodes, weights(w=(SIZE, SIZE), w2=(SIZE, 6)) | mask


def far_masked(lowest: float) -> Callable[[], Case]:
    """The same with a number for the infinity, added in another form than it is made in."""

    def case() -> Case:
        nodes = [
            make("MatMul", ["x", "w"], ["a"], "scores"),
            make("Equal", ["x", "x"], ["all"], "equal"),
            make("And", ["all", "before"], ["some"], "and"),
            make("Cast", ["some"], ["seen"], "cast", to=TensorProto.FLOAT),
            make("Sub", ["one", "seen"], ["unseen"], "sub"),
            make("Mul", ["unseen", "lowest"], ["mask"], "mul"),
            make("Add", ["a", "mask"], ["s"], "add"),
            make("Softmax", ["s"], ["p"], "softmax", axis=-1),
            make("MatMul", ["p", "w2"], ["y"], "last"),
        ]
        constants = weights(w=(SIZE, SIZE), w2=(SIZE, 6))
        constants |= {"one": np.ones(1, np.float32), "lowest": np.full(1, lowest, np.float32)}
        return nodes, constants | {"before": np.tri(SIZE, dtype=np.bool_)}

    case.__name__ = f"masked_by_{lowest:.0e}"
    return case


def left_out() -> Case:
    """A recurrent node of which an input and an output are not given."""
    nodes = [
        make("Conv", ["x", "w"], ["a"], "first"),
        make("Reshape", ["a", "flat"], ["t"], "flatten"),
        make("LSTM", ["t", "u", "r", "", "", "h"], ["", "last"], "lstm", hidden_size=4),
        make("Squeeze", ["last", "axis"], ["z"], "squeeze"),
        make("Gemm", ["z", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(6, 3, 1, 1), u=(1, 16, SIZE), r=(1, 16, 4), h=(1, 1, 4), w2=(4, 6))
    return nodes, constants | {"flat": np.array([-1, 1, SIZE]), "axis": np.array([0])}


def constant_output() -> Case:
    """As the anchors of a detector."""
    anchors = numpy_helper.from_array(np.ones((1, 4), np.float32))
    nodes = [
        make("Conv", ["x", "w", "b"], ["y"], "first"),
        make("Constant", [], ["z"], "anchors", value=anchors),
    ]
    return nodes, weights(w=(6, 3, 1, 1), b=(6,))


def partly_half() -> Case:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Cast", ["a"], ["h"], "down", to=TensorProto.FLOAT16),
        make("Conv", ["h", "v"], ["c"], "half"),
        make("Cast", ["c"], ["f"], "up", to=TensorProto.FLOAT),
        make("Conv", ["f", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 1, 1), b=(8,), v=(8, 8, 1, 1), w2=(6, 8, 1, 1))
    return nodes, constants | {"v": constants["v"].astype(np.float16)}


def table_and_weight() -> Case:
    """Words that are looked up in what makes words again at the end."""
    nodes = [
        make("Conv", ["x", "w"], ["a"], "first"),
        make("Abs", ["a"], ["b"], "abs"),
        make("Cast", ["b"], ["words"], "cast", to=TensorProto.INT64),
        make("Gather", ["table", "words"], ["found"], "look_up"),
        make("ReduceMean", ["found"], ["mean"], "mean", axes=[1, 2, 3], keepdims=0),
        make("Gemm", ["mean", "table"], ["y"], "last", transB=1),
    ]
    constants = weights(w=(2, 3, 1, 1), table=(50, 6))
    constants["table"] *= np.logspace(0.0, 0.5, 50, dtype=np.float32)[:, None]
    return nodes, constants


def named_as_output() -> Case:
    nodes = [
        make("MatMul", ["x", "w"], ["a"], "first"),
        make("Relu", ["a"], ["r"], "relu"),
        make("MatMul", ["r", "w2"], ["y"], "y"),
    ]
    return nodes, weights(w=(SIZE, 16), w2=(16, 6))


def turned_input() -> Case:
    """A Gemm that is no layer and has a bias."""
    nodes = [
        make("Reshape", ["x", "flat"], ["f"], "flatten"),
        make("Gemm", ["f", "w", "b"], ["a"], "first", transA=1),
        make("Gemm", ["a", "w2", "d"], ["y"], "last"),
    ]
    constants = weights(w=(3, 8), b=(8,), w2=(8, 6), d=(6,))
    return nodes, constants | {"flat": np.array([3, SIZE * SIZE])}


def without_inputs() -> Case:
    nodes = [
        make("RandomUniform", [], ["n"], "noise", shape=[1, 8, SIZE, SIZE], low=1.0, high=1.0),
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Add", ["a", "n"], ["s"], "add"),
        make("Conv", ["s", "w2"], ["y"], "last"),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))


def constants_on_the_left() -> Case:
    """Factors of a MatMul that are no weights: the one on the left, and a stack of them."""
    nodes = [
        make("MatMul", ["x", "w"], ["a"], "first"),
        make("MatMul", ["left", "a"], ["b"], "filters"),
        make("MatMul", ["b", "stack"], ["c"], "stack"),
        make("MatMul", ["c", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(SIZE, SIZE), left=(5, SIZE), stack=(3, SIZE, SIZE), w2=(SIZE, 6))
    constants["left"] *= np.logspace(-1.0, 1.0, SIZE, dtype=np.float32)
    constants["stack"] *= np.logspace(-1.0, 1.0, SIZE, dtype=np.float32)[:, None]
    return nodes, constants


def without_batch() -> Case:
    """Outputs of which one has no axis for the batch and the other no axis at all."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Conv", ["a", "w2"], ["c"], "last"),
        make("Squeeze", ["c", "axis"], ["y"], "squeeze"),
        make("ReduceMean", ["c"], ["z"], "mean", keepdims=0),
    ]
    return nodes, weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1)) | {"axis": np.array([0])}


def logarithm() -> Case:
    """Of what rounding may bring down to 0."""
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first"),
        make("Mul", ["a", "a"], ["s"], "square"),
        make("Add", ["s", "small"], ["e"], "epsilon"),
        make("Conv", ["e", "one"], ["c"], "same", group=8),
        make("Abs", ["c"], ["p"], "positive"),
        make("Log", ["p"], ["l"], "log"),
        make("Conv", ["l", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))
    constants |= {"small": np.full(1, 1e-6, np.float32), "one": np.ones((8, 1, 1, 1), np.float32)}
    return nodes, constants


NORMALIZED = make(
    "BatchNormalization", ["f", "gamma", "beta", "mu", "var"], ["g"], "normalization"
)
AVERAGED = make("AveragePool", ["f"], ["g"], "pool", kernel_shape=[2, 2], strides=[2, 2])


@pytest.mark.parametrize(
    ("case", "target", "knobs"),
    [
        (computed_clip, "cpu", [{}]),
        (computed_clip, "arm64", [{}]),
        (average_beyond_the_border, "cpu", [{}, {"float_layers": 2}]),
        (window_beyond_the_image, "cpu", [{}]),
        (dilated_average(1, 1), "arm64", [{}]),
        (dilated_average(2, 2), "arm64", [{}]),
        (moved_through_the_batch, "cpu", [{}]),
        (computed_slope, "cpu", [{}, {"equalization": True}]),
        (small_weights_of_large_inputs, "cpu", [{"float_layers": 2, "zero_dead_weights": True}]),
        (computed_bias, "cpu", [{}, {"zero_dead_weights": True}]),
        (shuffled_before(NORMALIZED), "cpu", [{}, {"float_layers": 1}]),
        (shuffled_before(AVERAGED), "cpu", [{}, {"mixed_precision": "first_last"}]),
        (split_output, "cpu", [{}, {"equalization": True}]),
        (transposed_input, "cpu", [{}, {"bias_correction": True}]),
        (one_weight_in_two_ways, "cpu", [{}, {"weight_rounding": "compensated"}]),
        (computed_weights, "cpu", [{}, {"granularity": "tensor"}]),
        (grouped_transposed_convolution, "cpu", [{}, {"granularity": "tensor"}]),
        (single_number, "cpu", [{}]),
        (own_gelu, "cpu", [{}, {"granularity": "tensor"}]),
        (of_unknown_rank, "cpu", [{}, {"equalization": True, "bias_correction": True}]),
        (written_out_normalization, "cpu", [{}, {"granularity": "tensor"}]),
        (masked, "cpu", [{}, {"equalization": True}]),
        (far_masked(-3.4e38), "cpu", [{}, {"granularity": "tensor"}]),
        (far_masked(-1e9), "cpu", [{}, {"clipping": "kl"}]),
        (far_masked(-1e4), "arm64", [{}]),
        (left_out, "cpu", [{}]),
        (constant_output, "cpu", [{}, {"mixed_precision": "first_last"}]),
        (partly_half, "cpu", [{}, {"float_layers": 1}]),
        (table_and_weight, "cpu", [{}, {"granularity": "tensor"}]),
        (named_as_output, "cpu", [{}, {"float_layers": 1}]),
        (turned_input, "cpu", [{}, {"bias_correction": True}]),
        (without_inputs, "cpu", [{}, {"float_layers": 1}]),
        (constants_on_the_left, "cpu", [{}, {"granularity": "tensor"}]),
        (constants_on_the_left, "arm64", [{}]),
        (without_batch, "cpu", [{"clipping": "kl"}, {"granularity": "tensor"}]),
        (summed_up, "qnn", [{}, {"activation_bits": 16}]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_unusual_graph_is_quantized_as_well_as_any_other(
    case: Callable[[], Case], target: str, knobs: Sequence[dict[str, Any]], tmp_path: Path
) -> None:
    """The processor's optimized kernels give what unoptimized ones do, near the prediction."""
    path = save(*case(), tmp_path / "model.onnx")
    builder = builder_of(path, target)
    builder.prepare()
    expected = outputs(path)
    for chosen in knobs:
        config = QuantizationConfig(
            **({"calibration_images": "all", "granularity": "channel"} | chosen)
        )
        data = builder.quantize(config).proto.SerializeToString()
        noise = [
            decibels(outputs(data, optimized=optimized, target=target), expected)
            for optimized in (True, False)
        ]
        predicted = builder.predict(config).features()["predicted_sqnr_db"]
        assert min(noise) > 25.0, chosen
        assert noise[0] == pytest.approx(noise[1], abs=3.0), chosen
        assert noise[1] == pytest.approx(predicted, abs=6.0), chosen


@pytest.mark.parametrize("lowest", [-np.inf, -1e4])
def test_what_many_masks_do_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lowest: float
) -> None:
    nodes, constants, source = [], weights(w=(SIZE, SIZE), w2=(SIZE, 6)), "x"
    for layer in range(6):
        nodes += [
            make("MatMul", [source, "w"], [f"a{layer}"], f"scores{layer}"),
            make("Where", ["mask", f"a{layer}", "lowest"], [f"s{layer}"], f"where{layer}"),
            make("Softmax", [f"s{layer}"], [f"p{layer}"], f"softmax{layer}", axis=-1),
        ]
        source = f"p{layer}"
    nodes.append(make("MatMul", [source, "w2"], ["y"], "last"))
    constants |= {"mask": np.tri(SIZE, dtype=np.bool_), "lowest": np.full(1, lowest, np.float32)}
    builder_of(save(nodes, constants, tmp_path / "model.onnx"), "cpu").prepare()
    (message,) = [r.message for r in caplog.records if "as behind a mask" in r.message]
    assert "'s0', 's1', 's2', 's3' and 2 more" in message


@pytest.mark.parametrize("lowest", [-np.inf, -1e9])
def test_masks_stay_in_float_beside_float_layers(tmp_path: Path, lowest: float) -> None:
    """A position bias and a mask that are summed first, as in T5."""
    nodes = [
        make("MatMul", ["x", "w"], ["a"], "scores"),
        make("Equal", ["x", "x"], ["all"], "equal"),
        make("And", ["all", "before"], ["seen"], "and"),
        make("Where", ["seen", "zero", "lowest"], ["m"], "where"),
        make("Add", ["m", "bias"], ["both"], "both"),
        make("Add", ["a", "both"], ["s"], "add"),
        make("Softmax", ["s"], ["p"], "softmax", axis=-1),
        make("MatMul", ["p", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(SIZE, SIZE), w2=(SIZE, 6), bias=(SIZE, SIZE))
    constants |= {"zero": np.zeros(1, np.float32), "lowest": np.full(1, lowest, np.float32)}
    path = save(
        nodes, constants | {"before": np.tri(SIZE, dtype=np.bool_)}, tmp_path / "model.onnx"
    )
    builder = builder_of(path, "cpu")
    found = []
    for float_layers in range(1 + len(builder.float_order(equalized=False))):
        config = QuantizationConfig(calibration_images="all", float_layers=float_layers)
        data = builder.quantize(config).proto.SerializeToString()
        found.append(decibels(outputs(data), outputs(path)))
    assert len(found) > 1
    assert min(found) > 30.0
    assert np.all(np.diff(found) > -0.5)


def test_a_softmax_of_an_old_opset_takes_what_is_masked(tmp_path: Path) -> None:
    """ONNX's converter flattens before it: what is infinite is only moved on the way."""
    nodes, constants = masked()
    nodes[2].attribute[0].i = 2
    path = save(nodes, constants, tmp_path / "model.onnx", opset=11)
    assert any(n.op_type == "Flatten" for n in load_float_model(path).proto.graph.node)
    config = QuantizationConfig(calibration_images="all")
    data = builder_of(path, "cpu").quantize(config).proto.SerializeToString()
    assert decibels(outputs(data), outputs(path)) > 25.0


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min])
def test_a_mask_may_be_an_input_and_infinite_inputs_of_layers_are_named(
    tmp_path: Path, lowest: float
) -> None:
    nodes = [
        make("MatMul", ["x", "w"], ["a"], "scores"),
        make("Add", ["a", "m"], ["s"], "add"),
        make("Softmax", ["s"], ["p"], "softmax", axis=-1),
        make("MatMul", ["p", "w2"], ["y"], "last"),
    ]
    path = save(nodes, weights(w=(SIZE, SIZE), w2=(SIZE, 6)), tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.input.append(
        helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 1, SIZE, SIZE])
    )
    onnx.save(model, path)
    mask = np.where(np.tri(SIZE, dtype=np.bool_), np.float32(0.0), np.float32(lowest))
    masks = np.broadcast_to(mask, (len(inputs()), 1, SIZE, SIZE)).astype(np.float32)

    def prepared(x: NDArray[np.float32]) -> Builder:
        model = load_float_model(path)
        specs = [InputSpec(i.name, i.shape, i.dtype) for i in model.inputs]
        builder = Builder(
            model,
            ArrayInputs({"x": x, "m": masks}).bind(specs),
            space=SearchSpace.preset("quantune"),
            target=get_target("cpu"),
            takes_batches=lambda: True,
            cache=None,
            progress=lambda stage, done, total: None,
        )
        builder.prepare()
        return builder

    config = QuantizationConfig(calibration_images="all")
    assert prepared(inputs()).predict(config).features()["predicted_sqnr_db"] > 25.0
    wrong = inputs()
    wrong[3, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="activation 'x': not finite .* check the preprocessing"):
        prepared(wrong)


def test_parts_that_leave_together_have_steps_of_their_own(tmp_path: Path) -> None:
    """Boxes of hundreds of pixels and scores, as detectors give them in one tensor."""
    nodes = [
        make("Conv", ["x", "w"], ["b"], "boxes"),
        make("Conv", ["x", "v"], ["l"], "logits"),
        make("Sigmoid", ["l"], ["s"], "scores"),
        make("Mul", ["b", "stride"], ["d"], "stride"),
        make("Concat", ["d", "s"], ["j"], "join", axis=1),
        make("Transpose", ["j"], ["t"], "turn", perm=[0, 2, 3, 1]),
        make("Concat", ["t", "t"], ["y"], "levels", axis=1),
    ]
    constants = weights(w=(4, 3, 1, 1), v=(6, 3, 1, 1)) | {"stride": np.full(1, 200.0, np.float32)}
    path = save(nodes, constants, tmp_path / "model.onnx")
    builder = builder_of(path, "cpu")
    builder.prepare()
    data = builder.quantize(QuantizationConfig(calibration_images="all")).proto
    (found,), (expected,) = outputs(data.SerializeToString()), outputs(path)
    for part in (slice(4), slice(4, None)):
        assert decibels([found[..., part]], [expected[..., part]]) > 25.0


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_a_resize_of_an_old_opset_finds_its_places_as_before(
    tmp_path: Path, op: str, opset: int, mode: str
) -> None:
    nodes = [
        make("Conv", ["x", "w"], ["a"], "first"),
        make(op, ["a", "scales"], ["u"], "up", mode=mode),
        make("Conv", ["u", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 1, 1), w2=(6, 8, 1, 1))
    constants["scales"] = np.array([1.0, 1.0, 1.5, 3.0], np.float32)
    path = save(nodes, constants, tmp_path / "model.onnx", opset=opset)
    prepared = load_float_model(path).proto.SerializeToString()
    np.testing.assert_allclose(outputs(prepared)[0], outputs(path)[0], rtol=1e-4, atol=1e-5)


def test_an_output_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    nodes = [
        make("MatMul", ["x", "w"], ["s"], "layer"),
        make("SequenceConstruct", ["s"], ["y"], "sequence"),
    ]
    path = save(nodes, weights(w=(SIZE, 6)), tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(
        helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    )
    onnx.save(model, path)
    with pytest.raises(InputError, match="'y' is a sequence, no tensor; export the model without"):
        load_float_model(path)


def test_a_layer_named_as_an_output_is_told_from_it(tmp_path: Path) -> None:
    nodes, constants = named_as_output()
    orders = []
    for name in ("y", "y_MatMul"):
        nodes[-1].name = name
        builder = builder_of(save(nodes, constants, tmp_path / f"{name}.onnx"), "cpu")
        orders.append(builder.float_order(equalized=False))
    assert orders[0] == orders[1]


def test_predictions_are_numbers_where_rounding_makes_infinities(tmp_path: Path) -> None:
    builder = builder_of(save(*logarithm(), tmp_path / "model.onnx"), "cpu")
    whole = builder.predict(QuantizationConfig(calibration_images="all")).features()
    assert all(np.isfinite(number) for number in whole.values())
    rest = builder.predict(QuantizationConfig(calibration_images="all", float_layers=2)).features()
    assert rest["predicted_sqnr_db"] > whole["predicted_sqnr_db"] + 3.0


def test_what_is_no_number_at_the_output_is_named(tmp_path: Path) -> None:
    nodes = [
        make("Conv", ["x", "w"], ["a"], "first"),
        make("Log", ["a"], ["l"], "log"),
        make("Conv", ["l", "w2"], ["y"], "last"),
    ]
    path = save(nodes, weights(w=(8, 3, 1, 1), w2=(6, 8, 1, 1)), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="activation 'l': not finite"):
        builder_of(path, "cpu").prepare()


def test_nodes_in_any_order_are_taken_as_onnx_runtime_takes_them(tmp_path: Path) -> None:
    path = save(*masked(), tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node.reverse()
    onnx.save(model, tmp_path / "reversed.onnx")
    models = [load_float_model(file) for file in (path, tmp_path / "reversed.onnx")]
    assert len({frozenset(layer.name for layer in model.layers) for model in models}) == 1


def test_an_operator_that_is_not_known_and_weights_of_float16_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes, constants = own_gelu()
    path = save(nodes, constants, tmp_path / "model.onnx")
    model = onnx.load(path)
    model.graph.node[1].domain = model.opset_import[1].domain = "com.example"
    onnx.save(model, path)
    with pytest.raises(InputError, match="cannot prepare it .*com.example:Gelu"):
        load_float_model(path)
    assert not caplog.records

    nodes = [make("Cast", ["x"], ["h"], "cast", to=TensorProto.FLOAT16)]
    nodes.append(make("Conv", ["h", "w"], ["y"], "conv"))
    halves = np.ones((6, 3, 1, 1), np.float16)
    with pytest.raises(InputError, match="its weights are float16: give the float32 model"):
        load_float_model(save(nodes, {"w": halves}, tmp_path / "half.onnx"))


def test_bias_correction_says_that_it_needs_inputs_of_one_shape(tmp_path: Path) -> None:
    """Other knobs do not."""
    nodes = [make("Conv", ["x", "w", "b"], ["y"], "first", pads=[1] * 4)]
    path = save(nodes, weights(w=(6, 3, 3, 3), b=(6,)), tmp_path / "model.onnx", size=None)
    builder = builder_of(path, "cpu", OfTwoSizes)
    assert builder.quantize(QuantizationConfig(calibration_images="all"))
    with pytest.raises(InputError, match="bias_correction"):
        builder.quantize(QuantizationConfig(calibration_images="all", bias_correction=True))


def test_inputs_of_two_shapes_are_equalized_one_at_a_time(tmp_path: Path) -> None:
    nodes = [
        make("Conv", ["x", "w", "b"], ["a"], "first", pads=[1] * 4),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 3, 3), b=(8,), w2=(6, 8, 1, 1))
    path = save(nodes, constants, tmp_path / "model.onnx", size=None, batch=None)
    builder = builder_of(path, "cpu", OfTwoSizes)
    config = QuantizationConfig(calibration_images="all", equalization=True)
    assert builder.quantize(config)
    with pytest.raises(InputError, match="bias_correction"):
        builder.quantize(QuantizationConfig(calibration_images="all", bias_correction=True))


def test_what_is_computed_of_shapes_is_not_rounded(tmp_path: Path) -> None:
    """How far an image is padded, in real numbers, as where its size is divided by a stride."""
    nodes = [
        make("Shape", ["x"], ["shape"], "shape"),
        make("Gather", ["shape", "at"], ["size"], "size"),
        make("Cast", ["size"], ["s"], "real", to=TensorProto.FLOAT),
        make("Div", ["s", "stride"], ["q"], "divide"),
        make("Ceil", ["q"], ["c"], "ceil"),
        make("Mul", ["c", "stride"], ["m"], "multiply"),
        make("Add", ["m", "kernel"], ["k"], "add"),
        make("Sub", ["k", "s"], ["p"], "subtract"),
        make("Concat", ["zero"] * 6 + ["p", "p"], ["all"], "concat", axis=0),
        make("Cast", ["all"], ["pads"], "whole", to=TensorProto.INT64),
        make("Pad", ["x", "pads"], ["padded"], "pad"),
        make("Conv", ["padded", "w", "b"], ["a"], "first", strides=[3, 3]),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last"),
    ]
    constants = weights(w=(8, 3, 5, 5), b=(8,), w2=(6, 8, 1, 1))
    numbers = {"zero": 0.0, "stride": 3.0, "kernel": 2.0}
    constants |= {name: np.full(1, value, np.float32) for name, value in numbers.items()}
    constants["at"] = np.array([2])
    path = save(nodes, constants, tmp_path / "model.onnx", batch=None)
    builder = builder_of(path, "cpu")
    sites = builder.quantizer(equalized=False).placement(()).activations
    assert {site.tensor for site in sites} == {"x", "a", "r", "y"}
    for scheme in ("asymmetric", "symmetric_power2"):
        config = QuantizationConfig(calibration_images="all", scheme=scheme)
        data = builder.quantize(config).proto.SerializeToString()
        assert decibels(outputs(data), outputs(path)) > 25.0
        assert builder.predict(config).features()["predicted_sqnr_db"] > 25.0


def test_a_table_that_is_looked_up_by_places_is_stored_as_integers(tmp_path: Path) -> None:
    """What is computed of shapes alone stays in float, but for such a table of positions."""
    nodes = [
        make("Shape", ["x"], ["shape"], "shape"),
        make("Gather", ["shape", "at"], ["height"], "height"),
        make("Range", ["first", "height", "step"], ["places"], "places"),
        make("Gather", ["table", "places"], ["offsets"], "look up"),
        make("Add", ["x", "offsets"], ["s"], "add"),
        make("Conv", ["s", "w", "b"], ["a"], "first conv"),
        make("Relu", ["a"], ["r"], "relu"),
        make("Conv", ["r", "w2"], ["y"], "last conv"),
    ]
    constants = weights(table=(64, 1), w=(8, 3, 1, 1), b=(8,), w2=(6, 8, 1, 1))
    numbers = {"at": 2, "first": 0, "step": 1}
    constants |= {name: np.array(value) for name, value in numbers.items()}
    path = save(nodes, constants, tmp_path / "model.onnx", batch=None)
    placement = builder_of(path, "cpu").quantizer(equalized=False).placement(())
    assert placement.always_float == {"shape", "height", "places"}
    assert "table" in {site.tensor for site in placement.activations}


def save(
    nodes: list[onnx.NodeProto],
    constants: Constants,
    path: Path,
    size: int | None = SIZE,
    batch: int | None = 1,
    opset: int = 17,
) -> Path:
    value = helper.make_tensor_value_info
    others = [value("z", TensorProto.FLOAT, None)] if "z" in nodes[-1].output else []
    graph = helper.make_graph(
        nodes,
        "model",
        [value("x", TensorProto.FLOAT, [batch, 3, size, size])],
        [value("y", TensorProto.FLOAT, None), *others],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    dilated = any(n.op_type == "AveragePool" and "dilations" in str(n) for n in nodes)
    version = helper.make_opsetid("", 19 if dilated else opset)
    learning = [helper.make_opsetid("ai.onnx.ml", 3)]
    used = [opset for opset in learning if any(n.domain == opset.domain for n in nodes)]
    model = helper.make_model(graph, opset_imports=[version, *used], ir_version=10)
    import_own_domain(model)
    model = onnx.shape_inference.infer_shapes(model)
    if not model.graph.output[0].type.tensor_type.HasField("shape"):  # behind an own operator
        model.graph.output[0].CopyFrom(value("y", TensorProto.FLOAT, [1, 6, SIZE, SIZE]))
    onnx.save(model, path)
    return path


def inputs() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((24, 3, SIZE, SIZE)).astype(np.float32)


class OfTwoSizes(ArrayInputs):
    """Inputs of two heights, which cannot share a batch."""

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        assert batch_size == 1
        for number, batch in enumerate(super().batches(1, indices)):
            yield {"x": batch["x"][:, :, number % 2 :]}


def builder_of(path: Path, target: str, source: type[ArrayInputs] = ArrayInputs) -> Builder:
    model = load_float_model(path)
    specs = [InputSpec(i.name, i.shape, i.dtype) for i in model.inputs]
    return Builder(
        model,
        source({"x": inputs()}).bind(specs),
        space=get_target(target).restrict(SearchSpace.preset("extended")),
        target=get_target(target),
        takes_batches=lambda: True,
        cache=None,
        progress=lambda stage, done, total: None,
    )


def outputs(
    model: Path | bytes, *, optimized: bool = True, target: str = "cpu"
) -> list[NDArray[np.float32]]:
    """Every output for each input, one after the other."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if target != "cpu":  # what saturates on some processors is not for this one
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [
        np.stack(o)
        for o in zip(*(session.run(None, {"x": x[None]}) for x in inputs()), strict=True)
    ]


def decibels(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> float:
    ratios = [
        np.square(a - b, dtype=np.float64).mean() / np.square(b, dtype=np.float64).mean()
        for a, b in zip(found, expected, strict=True)
    ]
    return float(-10.0 * np.log10(np.mean(ratios)))
