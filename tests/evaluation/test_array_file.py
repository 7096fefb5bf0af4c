"""Inputs in .npy and .npz files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import InputSpec


ROWS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
CLASSES = np.array([0, 2, 1, 1, 0])


def test_a_file_gives_the_inputs_that_its_array_would(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    np.savez(tmp_path / "rows.npz", ROWS)
    np.savez_compressed(tmp_path / "named.npz", x=ROWS)
    specs = [InputSpec("x", (None, 3), ROWS.dtype)]
    for name, array in (("rows.npy", ROWS), ("rows.npz", ROWS), ("named.npz", {"x": ROWS})):
        source = as_input_source(tmp_path / name).bind(specs)
        (found,) = source.batches(5)
        np.testing.assert_array_equal(found["x"], ROWS)
        assert source.fingerprint() == ArrayInputs(array).bind(specs).fingerprint()


def test_several_inputs_go_by_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", x=ROWS, y=2 * ROWS, labels=CLASSES)
    source = as_input_source(str(tmp_path / "two.npz"))
    assert [spec.name for spec in source.specs] == ["x", "y"]
    np.testing.assert_array_equal(source.labels, CLASSES)


def test_labels_are_beside_the_inputs_or_in_their_own_file(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    np.savez(tmp_path / "rows.npz", x=ROWS, labels=CLASSES)
    np.save(tmp_path / "classes.npy", CLASSES[::-1])
    assert as_input_source(tmp_path / "rows.npy").labels is None
    np.testing.assert_array_equal(as_input_source(tmp_path / "rows.npz").labels, CLASSES)
    for name in ("rows.npy", "rows.npz"):
        for labels in (tmp_path / "classes.npy", CLASSES[::-1]):
            source = as_input_source(tmp_path / name, labels=labels)
            np.testing.assert_array_equal(source.labels, CLASSES[::-1])


def test_images_in_a_file_are_preprocessed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    recipe = {"mean": [0] * 3, "std": [255] * 3, "scale": 1, "channel_order": "RGB", "crop": 4}
    source = as_input_source(tmp_path / "images.npy", preprocessing=recipe)
    (found,) = source.batches(4)
    np.testing.assert_allclose(*found.values(), images.transpose(0, 3, 1, 2)[:, :, 1:5, 1:5] / 255)


def pickled(path: Path) -> None:
    np.save(path, np.array([{"code": print}], dtype=object), allow_pickle=True)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(ROWS))


def cut_short(path: Path) -> None:
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("write", [pickled, a_pickle, cut_short, lambda path: path.touch()])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_holds_no_numbers_is_an_error_that_names_it(
    write: Callable[[Path], Any], suffix: str, tmp_path: Path
) -> None:
    written, path = tmp_path / "written.npy", tmp_path / f"bad{suffix}"
    write(written)
    written.replace(path)
    with pytest.raises(InputError, match=f"bad{suffix}: is no file of numbers"):
        as_input_source(path)


def test_other_mistakes_are_errors_that_name_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    np.savez(tmp_path / "uneven.npz", x=ROWS, y=ROWS[:3])
    np.savez(tmp_path / "nothing.npz", labels=CLASSES)
    with pytest.raises(InputError, match=r"missing.npy: cannot read"):
        as_input_source(tmp_path / "missing.npy")
    (tmp_path / "rows.h5").touch()
    with pytest.raises(InputError, match=r"rows.h5: is a file, not a folder; .* .npz file"):
        as_input_source(tmp_path / "rows.h5")
    with pytest.raises(InputError, match=r"uneven.npz: the first axis .* 5 in 'x', 3 in 'y'"):
        as_input_source(tmp_path / "uneven.npz")
    with pytest.raises(InputError, match=r"nothing.npz: no inputs"):
        as_input_source(tmp_path / "nothing.npz")
    with pytest.raises(InputError, match=r"labels.csv: with arrays they are an .npy file"):
        as_input_source(tmp_path / "rows.npy", labels=tmp_path / "labels.csv")
    with pytest.raises(InputError, match=r"rows.npy: preprocessing takes uint8"):
        as_input_source(
            tmp_path / "rows.npy",
            preprocessing={"mean": [0], "std": [1], "scale": 1, "channel_order": "L"},
        )
