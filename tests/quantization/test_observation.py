"""Activations that are looked at in ONNX Runtime's memory, against all their values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.quantization import calibration
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import quantization_error
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.observation import Bounds
from optuna_quantune.quantization.observation import Observer
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.statistics import Accumulator
from optuna_quantune.quantization.statistics import Histogram


TENSORS = ["input", "relu", "signed", "logits"]
CHANNELS, WIDTH = 16, 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
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
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
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


def histogram_of(values: NDArray[np.float32]) -> Histogram:
    counted = Accumulator()
    counted.add(np.ascontiguousarray(values))
    return counted.counts().histogram()


def sorted_values(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sort(values.reshape(-1))


def test_with_step_1_every_value_is_seen(model: FloatModel, images: NDArray[np.float32]) -> None:
    batch = images[4:8]
    values = all_values(model, batch)
    steps = dict.fromkeys(TENSORS, 1)
    for found in Observer(model, TENSORS).observe({"input": batch}, steps=steps, bounds={}):
        assert (found.weight, found.tails.size) == (1, 0)
        np.testing.assert_allclose(
            sorted_values(found.sample), sorted_values(values[found.tensor]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("step", [3, 25])
def test_each_value_is_seen_beyond_the_bounds_and_every_nth_within(
    model: FloatModel, images: NDArray[np.float32], step: int
) -> None:
    batch = images[4:8]
    observer = Observer(model, TENSORS)
    seen = observer.observe({"input": batch}, steps=dict.fromkeys(TENSORS, 1), bounds={})
    whole = {found.tensor: found.sample.copy() for found in seen}
    bounds = {t: Bounds(*np.quantile(v, [0.01, 0.99]).tolist()) for t, v in whole.items()}
    bounds["relu"] = Bounds(None, bounds["relu"].upper)
    rest = dict.fromkeys(TENSORS, 0)
    for offset in range(step):
        for found in observer.observe(
            {"input": batch}, steps=dict.fromkeys(TENSORS, step), bounds=bounds, offset=offset
        ):
            exact, within = whole[found.tensor], bounds[found.tensor]
            lower = -np.inf if within.lower is None else np.float32(within.lower)
            outside = (exact > np.float32(within.upper)) | (exact < lower)
            np.testing.assert_array_equal(np.sort(found.tails), np.sort(exact[outside]))
            expected = exact[offset::step][~outside[offset::step]]
            np.testing.assert_array_equal(found.sample, expected)
            rest[found.tensor] += found.sample.size + (found.tails.size if offset == 0 else 0)
    # From all offsets together every value is seen once.
    assert rest == {tensor: values.size for tensor, values in whole.items()}


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("first", [0, 4])
def test_the_extremes_of_each_input_are_seen(
    model: FloatModel, images: NDArray[np.float32], first: int, bounded: bool
) -> None:
    batch = images[first : first + 3]
    values = all_values(model, batch)
    within = {t: Bounds(-0.5, float(np.quantile(v, 0.9))) for t, v in values.items()}
    within["relu"] = Bounds(None, within["relu"].upper)
    observer = Observer(model, TENSORS)
    for found in observer.observe(
        {"input": batch},
        steps=dict.fromkeys(TENSORS, 7),
        bounds=within if bounded else {},
        offset=2,
        inputs=len(batch),
    ):
        rows = values[found.tensor].reshape(len(batch), -1)
        lowest, highest = rows.min(axis=1), rows.max(axis=1)
        if bounded:
            lowest = np.minimum(lowest, within[found.tensor].lower or 0.0)
            highest = np.maximum(highest, within[found.tensor].upper)
        expected = np.stack([lowest, highest], axis=1)
        np.testing.assert_allclose(found.extremes, expected, rtol=1e-4, atol=1e-5)


def test_extremes_of_inputs_without_an_axis_of_their_own_are_those_of_all(
    model: FloatModel, images: NDArray[np.float32]
) -> None:
    batch = images[:1]
    observer = Observer(model, ["logits"])
    (found,) = observer.observe({"input": batch}, steps={"logits": 1}, bounds={}, inputs=3)
    logits = all_values(model, batch)["logits"]
    assert found.extremes.shape == (3, 2)
    for row in found.extremes:
        assert row.tolist() == pytest.approx([logits.min(), logits.max()], rel=1e-4)


@pytest.fixture(scope="module")
def statistics(model: FloatModel, images: NDArray[np.float32]) -> CalibrationStatistics:
    return calibrate(model, ArrayInputs({"input": images}), TENSORS, sizes=(1, 32, "all"))


@pytest.mark.parametrize("size", [1, 32, 150])
@pytest.mark.parametrize("tensor", ["input", "relu", "signed"])
def test_the_ranges_of_the_store_are_those_of_all_values(
    model: FloatModel,
    images: NDArray[np.float32],
    statistics: CalibrationStatistics,
    tensor: str,
    size: int,
) -> None:
    found = statistics.histogram(tensor, size)
    values = all_values(model, images[:size])[tensor]
    exact = histogram_of(values)
    assert found.maximum == pytest.approx(exact.maximum, rel=1e-6)
    assert found.minimum == pytest.approx(exact.minimum, rel=1e-6)
    assert found.total == pytest.approx(values.size, rel=0.01)
    for clipping in get_args(Clipping):
        for scheme in ("asymmetric", "symmetric_uint8"):
            if clipping == "kl":  # its divergence is flat: far thresholds are as good
                continue
            noise = [
                float(quantization_error(exact, choose_parameters(*ends, scheme)))
                for ends in (
                    choose_range(found, clipping, scheme),
                    choose_range(exact, clipping, scheme),
                )
            ]
            assert abs(10.0 * np.log10(noise[0] / noise[1])) < 0.1, clipping  # decibels


@pytest.mark.parametrize("share", [0.999, 0.9999, 0.99999, 0.999999])
@pytest.mark.parametrize("size", [32, 150])
def test_the_tails_are_counted_value_by_value_of_every_input(
    model: FloatModel,
    images: NDArray[np.float32],
    statistics: CalibrationStatistics,
    share: float,
    size: int,
) -> None:
    for tensor in ("relu", "signed"):
        values = all_values(model, images[:size])[tensor].reshape(-1)
        threshold = float(np.quantile(values[values > 0], share))
        found = statistics.histogram(tensor, size)
        beyond = [int((values > factor * threshold).sum()) for factor in (1.003, 0.997)]
        counted = found.counts[found.edges[1:] > threshold].sum()
        assert beyond[0] <= counted <= beyond[1]


@pytest.mark.parametrize("index", [0, 3, 66, 75, 85, 99])
def test_extremes_are_exact_whichever_input_they_come_from(
    model: FloatModel, images: NDArray[np.float32], index: int
) -> None:
    reaching = np.clip(images[:100], -3.0, 3.0)
    reaching[index, 1, 20, 20] = 90.0  # of one value in 700,000
    reaching[index, 2, 30, 30] = -80.0
    statistics = calibrate(model, ArrayInputs({"input": reaching}), TENSORS, sizes=("all",))
    values = all_values(model, reaching[index : index + 1])
    for tensor in ("input", "relu", "signed"):
        found = statistics.histogram(tensor, "all")
        assert found.maximum == pytest.approx(values[tensor].max(), rel=1e-5)
        assert found.minimum == pytest.approx(values[tensor].min(), rel=1e-5)


@pytest.mark.parametrize("kept", [7, 512])
def test_extremes_are_kept_of_each_of_the_first_inputs(
    model: FloatModel,
    images: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
    kept: int,
) -> None:
    monkeypatch.setattr(calibration, "_INPUTS_WITH_EXTREMES", kept)
    found = calibrate(model, ArrayInputs({"input": images}), TENSORS, sizes=(1, "all"))
    values = all_values(model, images)
    for tensor in TENSORS:
        extremes = found.extremes[tensor]
        assert extremes.shape == (min(kept, len(images)), 2)
        rows = values[tensor].reshape(len(images), -1)[:kept]
        largest, smallest = rows.max(axis=1), rows.min(axis=1)
        # None is said to reach less far than it does; and beyond the tails' beginning, not more.
        assert np.all(extremes[:, 1] >= largest - 1e-4)
        assert np.all(extremes[:, 0] <= smallest + 1e-4)
        far = largest > np.quantile(values[tensor], 0.999)
        np.testing.assert_allclose(extremes[far, 1], largest[far], rtol=1e-4, atol=1e-5)


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


def test_an_activation_that_joins_others_has_their_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = [(rng.standard_normal((5, 3, 1, 1)) * 0.5).astype(np.float32) for _ in range(2)]
    nodes = [
        helper.make_node("Conv", ["input", f"w{i}"], [f"part{i}"], kernel_shape=[1, 1])
        for i in range(2)
    ]
    nodes.append(helper.make_node("Concat", ["part0", "part1"], ["both"], axis=1))
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", channels, 8, 8])
        for name, channels in (("input", 3), ("both", 10))
    ]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "join", values[:1], values[1:], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    proto.ir_version = 10
    onnx.save(proto, tmp_path / "join.onnx")
    inputs = rng.standard_normal((10, 3, 8, 8)).astype(np.float32)
    tensors = ["both", "input", "part0", "part1"]
    statistics = calibrate(
        load_float_model(tmp_path / "join.onnx"),
        ArrayInputs({"input": inputs}),
        tensors,
        sizes=(1, "all"),
    )
    assert list(statistics.segments) == tensors
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    for size in (1, 10):
        exact = histogram_of(session.run(None, {"input": inputs[:size]})[0])
        found = statistics.histogram("both", size)
        of_inputs = statistics.extremes["both"][:size]
        assert of_inputs[:, 0].min() == pytest.approx(exact.minimum)
        assert of_inputs[:, 1].max() == pytest.approx(exact.maximum)
        assert found.total == exact.total
        assert found.minimum == pytest.approx(exact.minimum)
        assert found.maximum == pytest.approx(exact.maximum)
        assert found.mean_square == pytest.approx(exact.mean_square, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_of_all_that_is_not_finite_is_noticed(
    model: FloatModel, images: NDArray[np.float32], value: float
) -> None:
    poisoned = images[:100].copy()
    poisoned[77, 0, 31, 17] = value
    with pytest.raises(InputError, match="activation 'input': not finite"):
        calibrate(model, ArrayInputs({"input": poisoned}), TENSORS, sizes=("all",))


class Interrupted(ArrayInputs):
    """Inputs whose reading is interrupted by Ctrl-C."""

    stop_after = 0

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        for batch in super().batches(batch_size, indices):
            self.stop_after -= len(batch["input"])
            if self.stop_after < 0:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("stop_after", [6, 40, 120])
def test_a_pass_goes_on_with_the_same_tails_and_the_same_sample(
    model: FloatModel,
    images: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    monkeypatch.setattr(calibration, "_SAVE_SECONDS", 0.0)
    inputs = Interrupted({"input": images})
    inputs.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, inputs, TENSORS, sizes=(1, "all"), cache=tmp_path, workers=1)
    assert len(list(tmp_path.iterdir())) == 1
    whole = ArrayInputs({"input": images})
    resumed = calibrate(model, whole, TENSORS, sizes=(1, "all"), cache=tmp_path)
    expected = calibrate(model, whole, TENSORS, sizes=(1, "all"))
    for tensor in TENSORS:
        for one, other in zip(resumed.segments[tensor], expected.segments[tensor], strict=True):
            np.testing.assert_array_equal(one.bins, other.bins)
            np.testing.assert_array_equal(one.counts, other.counts)
            assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
        np.testing.assert_array_equal(resumed.extremes[tensor], expected.extremes[tensor])
