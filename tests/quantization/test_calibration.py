from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization import calibration
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.calibration_store import load
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model


TENSORS = ["input", "stem.relu", "project.out", "logits"]


class Inputs:
    """Calibration inputs from an array; counts how many have been read."""

    def __init__(self, array: NDArray[np.float32], fingerprint: str = "inputs") -> None:
        self.array = array
        self.read = 0
        self.stop_after: int | None = None  # inputs that are read before Ctrl-C
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
            if self.stop_after is not None and self.read > self.stop_after:
                raise KeyboardInterrupt
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


def assert_same(found: CalibrationStatistics, expected: CalibrationStatistics) -> None:
    assert found.sizes == expected.sizes
    for tensor in TENSORS:
        for one, other in zip(found.segments[tensor], expected.segments[tensor], strict=True):
            np.testing.assert_array_equal(one.bins, other.bins)
            np.testing.assert_array_equal(one.counts, other.counts)
            assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
        np.testing.assert_array_equal(found.extremes[tensor], expected.extremes[tensor])


def progress_of(
    model: FloatModel, inputs: Inputs, cache: Path
) -> tuple[CalibrationStatistics, list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    statistics = calibrate(
        model,
        inputs,
        TENSORS,
        sizes=(1, 32, "all"),
        cache=cache,
        workers=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    return statistics, seen


@pytest.mark.parametrize("stop_after", [1, 20, 33, 50, 76])
def test_a_pass_stopped_by_ctrl_c_goes_on_where_it_was(
    model: FloatModel,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    monkeypatch.setattr(calibration, "_SAVE_SECONDS", 0.0)
    stopped = Inputs(toy_inputs)
    stopped.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        progress_of(model, stopped, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".npz"])
    resumed = Inputs(toy_inputs)
    statistics, seen = progress_of(model, resumed, tmp_path)
    assert seen == sorted(set(seen))
    assert seen[-1] == (80, 80)
    if stop_after >= 20:
        assert seen[0][0] >= max(1, stop_after - 48)  # what was being worked on is done again
        assert resumed.read <= 80 - seen[0][0] + 1
    assert_same(statistics, collect(model, Inputs(toy_inputs)))


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from optuna_quantune.quantization import calibration
from optuna_quantune.quantization.model import load_float_model

class Inputs:
    array = np.load(sys.argv[2])
    def __len__(self): return len(self.array)
    def fingerprint(self): return "inputs"
    def batches(self, batch_size, indices=None):
        for start in range(0, len(indices), batch_size):
            yield {"input": self.array[indices[start : start + batch_size]]}

def progress(done, total):
    if done > 45:
        os.kill(os.getpid(), signal.SIGKILL)

calibration._SAVE_SECONDS = 0.0
calibration.calibrate(
    load_float_model(sys.argv[1]), Inputs(), sys.argv[4].split(","),
    sizes=(1, 32, "all"), cache=Path(sys.argv[3]), workers=1, progress=progress,
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_pass_whose_process_was_killed_goes_on_where_it_was_saved(
    model: FloatModel, toy_model: Path, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    array, cache = tmp_path / "inputs.npy", tmp_path / "cache"
    np.save(array, toy_inputs)
    command = [sys.executable, "-c", KILLED, *map(str, (toy_model, array, cache))]
    command.append(",".join(TENSORS))
    package = Path(calibration.__file__).parents[2]
    process = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(package)}, timeout=120, check=False
    )
    assert process.returncode == -signal.SIGKILL
    inputs = Inputs(toy_inputs)
    statistics, seen = progress_of(model, inputs, cache)
    assert 30 <= seen[0][0] < 80
    assert inputs.read == 80 - seen[0][0] + 1  # the first input says again what is large
    assert_same(statistics, collect(model, Inputs(toy_inputs)))
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("complete", [True, False])
def test_a_store_damaged_anywhere_gives_the_right_statistics_or_none(
    model: FloatModel,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complete: bool,
) -> None:
    monkeypatch.setattr(calibration, "_SAVE_SECONDS", 0.0)
    inputs = Inputs(toy_inputs)
    if complete:
        collect(model, inputs, tmp_path)
    else:
        inputs.stop_after = 50
        with pytest.raises(KeyboardInterrupt):
            progress_of(model, inputs, tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    expected = collect(model, Inputs(toy_inputs))
    sound = load(path, expected.fingerprint, TENSORS, expected.sizes)
    assert sound is not None
    rng = np.random.default_rng(0)
    used = 0
    for _ in range(150):
        damaged = bytearray(content)
        if rng.random() < 0.2:
            del damaged[int(rng.integers(len(damaged))) :]
        else:
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        found = load(path, expected.fingerprint, TENSORS, expected.sizes)
        if found is None:
            continue
        used += 1  # the damage hit what npz does not need, dates for instance
        assert found.done == sound.done
        for tensor in TENSORS:
            for one, other in zip(found.segments[tensor], sound.segments[tensor], strict=True):
                np.testing.assert_array_equal(one.counts, other.counts)
                np.testing.assert_array_equal(one.bins, other.bins)
                assert (one.minimum, one.maximum) == (other.minimum, other.maximum)
            np.testing.assert_array_equal(found.extremes[tensor], sound.extremes[tensor])
    assert used < 75
    path.write_bytes(content[: len(content) // 2])
    statistics, seen = progress_of(model, Inputs(toy_inputs), tmp_path)
    assert seen[0] == (1, 80)
    assert_same(statistics, expected)


def test_others_can_read_a_store_as_any_file(
    model: FloatModel, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    collect(model, Inputs(toy_inputs), tmp_path)
    (store,) = tmp_path.iterdir()
    (tmp_path / "other").touch()
    assert store.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_writing_leaves_no_file_and_costs_nothing_but_the_store(
    model: FloatModel,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(file: object, **arrays: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    statistics = collect(model, Inputs(toy_inputs), tmp_path)
    assert_same(statistics, collect(model, Inputs(toy_inputs)))
    assert f"not kept for the next run: {tmp_path} cannot be written (No space" in caplog.text
    assert list(tmp_path.iterdir()) == []


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


def test_a_store_of_another_version_is_never_used(
    model: FloatModel,
    toy_inputs: NDArray[np.float32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = collect(model, Inputs(toy_inputs), tmp_path)
    monkeypatch.setattr(calibration, "STORE_VERSION", calibration.STORE_VERSION + 1)
    later = Inputs(toy_inputs)
    collect(model, later, tmp_path)
    assert later.read == len(toy_inputs)
    # One with the right fingerprint but with other arrays in it.
    monkeypatch.undo()
    path = tmp_path / f"calibration-{statistics.fingerprint[:32]}.npz"
    with np.load(path) as store:
        arrays = dict(store)
    for changed in ({"bins": arrays["bins"].astype(np.uint16)}, {"tails": arrays["tails"][:-1]}):
        np.savez_compressed(path, **(arrays | changed))
        again = Inputs(toy_inputs)
        assert_same(collect(model, again, tmp_path), statistics)
        assert again.read == len(toy_inputs)
    np.savez_compressed(path, **{name: arrays[name] for name in arrays if name != "tails"})
    assert load(path, statistics.fingerprint, TENSORS, statistics.sizes) is None


def test_an_activation_that_is_not_finite_is_named(
    model: FloatModel, toy_inputs: NDArray[np.float32]
) -> None:
    poisoned = toy_inputs.copy()
    poisoned[40, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="activation 'input': not finite"):
        collect(model, Inputs(poisoned))
