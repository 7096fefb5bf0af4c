from __future__ import annotations

import os
import stat
from pathlib import Path

import onnx
import pytest

from optuna_quantune.errors import InputError
from optuna_quantune.output_file import check_writable
from optuna_quantune.output_file import write_model


def test_a_written_model_is_whole_and_readable_as_other_files_are(
    tmp_path: Path, toy_model: Path
) -> None:
    (tmp_path / "other").touch()
    model = onnx.load(toy_model)
    path = write_model(model, tmp_path / "model.onnx")
    assert onnx.load(path) == model
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "model.onnx")}
    assert len(modes) == 1


def test_files_of_other_threads_keep_their_modes_meanwhile(
    tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of new files is the process's: whoever changes it changes it for all threads."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("changed the mask"))
    assert write_model(onnx.load(toy_model), tmp_path / "model.onnx").exists()


def test_a_long_name_leaves_room_for_the_one_beside_it(tmp_path: Path, toy_model: Path) -> None:
    path = tmp_path / f"{'m' * 250}.onnx"
    assert write_model(onnx.load(toy_model), path).exists()


def test_a_link_stays_one(tmp_path: Path, toy_model: Path) -> None:
    path, link = tmp_path / "model.onnx", tmp_path / "newest.onnx"
    path.write_bytes(b"the old model")
    link.symlink_to(path.name)
    model = onnx.load(toy_model)
    assert write_model(model, link) == link
    assert link.is_symlink()
    assert onnx.load(path) == model


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_halfway_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, toy_model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old model")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        write_model(onnx.load(toy_model), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"the old model"


def test_where_no_model_can_be_written_is_known_before(tmp_path: Path) -> None:
    float_model = tmp_path / "float.onnx"
    check_writable(tmp_path / "model.onnx", float_model)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="is a folder"):
        check_writable(tmp_path, float_model)
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / "missing" / "model.onnx", float_model)


def test_the_float_model_is_never_written_over(tmp_path: Path) -> None:
    float_model, link = tmp_path / "float.onnx", tmp_path / "link.onnx"
    float_model.touch()
    link.symlink_to(float_model)
    for output in (float_model, link):
        with pytest.raises(InputError, match="is the float model, which would be lost"):
            check_writable(output, float_model)


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path, toy_model: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(InputError, match="is no file"):
        check_writable(tmp_path / "pipe.onnx", toy_model)
