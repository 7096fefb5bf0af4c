from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model


TENSORS = ["input", "stem.relu", "project.out", "logits"]


class Inputs:
    """Calibration inputs from an array; counts how many have been read."""

    def __init__(self, array: NDArray[np.float32], fingerprint: str = "inputs") -> None:
        self.array = array
        self.read = 0
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.array)

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        assert indices is not None
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            self.read += len(chosen)
            yield {"input": self.array[chosen]}

    def fingerprint(self) -> str:
        return self._fingerprint


@pytest.fixture
def model(toy_model: Path) -> FloatModel:
    return load_float_model(toy_model)


def collect(model: FloatModel, inputs: Inputs, cache: Path | None = None) -> CalibrationStatistics:
    return calibrate(model, inputs, TENSORS, sizes=(1, 32, "all"), cache=cache)


@pytest.mark.parametrize("images", [1, 32, "all"])
def test_every_nested_size_has_the_statistics_of_its_own_inputs(
    model: FloatModel, toy_inputs: NDArray[np.float32], images: int | str
) -> None:
    statistics = collect(model, Inputs(toy_inputs))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in TENSORS[1:3]])
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    first = toy_inputs[: len(toy_inputs) if images == "all" else int(images)]
    for tensor, values in zip(
        TENSORS[1:], session.run(TENSORS[1:], {"input": first}), strict=True
    ):
        histogram = statistics.histogram(tensor, images)
        assert histogram.total == values.size
        assert histogram.minimum == pytest.approx(values.min(), rel=1e-6)
        assert histogram.maximum == pytest.approx(values.max(), rel=1e-6)
        assert histogram.mean_square == pytest.approx(np.mean(np.square(values)), rel=5e-3)
    assert statistics.histogram("input", images).total == first.size


def test_sizes_beyond_the_number_of_inputs_mean_all_of_them(
    model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    statistics = collect(model, Inputs(toy_inputs[:20]))
    assert statistics.sizes == (1, 20)
    assert statistics.resolve(32) == statistics.resolve("all") == 20


def test_a_size_that_was_not_collected_is_named(
    model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    with pytest.raises(InputError, match="'calibration_images': 7 was not collected"):
        collect(model, Inputs(toy_inputs)).histogram("logits", 7)


def test_each_input_is_read_once_and_not_at_all_by_the_next_run(
    model: FloatModel, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    first, second = Inputs(toy_inputs), Inputs(toy_inputs)
    before = collect(model, first, tmp_path)
    after = collect(model, second, tmp_path)
    assert (first.read, second.read) == (len(toy_inputs), 0)
    for tensor in TENSORS:
        for old, new in zip(before.segments[tensor], after.segments[tensor], strict=True):
            np.testing.assert_array_equal(old.bins, new.bins)
            np.testing.assert_array_equal(old.counts, new.counts)
            assert (old.minimum, old.maximum) == (new.minimum, new.maximum)


def test_other_inputs_another_model_and_a_damaged_store_are_never_used(
    model: FloatModel, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    collect(model, Inputs(toy_inputs), tmp_path)
    other_inputs = Inputs(toy_inputs, fingerprint="other inputs")
    collect(model, other_inputs, tmp_path)
    assert other_inputs.read == len(toy_inputs)
    first, second = sorted(tmp_path.glob("*.npz"))
    content = {store: store.read_bytes() for store in (first, second)}
    damages = (b"", b"not a store", content[first][:-900], content[second])
    for damage in damages:
        first.write_bytes(damage)
        second.write_bytes(content[second])
        read = []
        for fingerprint in ("inputs", "other inputs"):
            again = Inputs(toy_inputs, fingerprint=fingerprint)
            collect(model, again, tmp_path)
            read.append(again.read)
        assert sorted(read) == [0, len(toy_inputs)]


def test_an_activation_that_is_not_finite_is_named(
    model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    poisoned = toy_inputs.copy()
    poisoned[40, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="activation 'input': not finite"):
        collect(model, Inputs(poisoned))


def test_a_store_that_cannot_be_written_is_named(
    model: FloatModel, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(InputError, match="calibration cache .*cannot be written"):
        collect(model, Inputs(toy_inputs), blocked / "cache")
