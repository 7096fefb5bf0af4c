from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.preprocessing import Preprocessing


RECIPE = Preprocessing(
    mean=(1.0, 2.0, 3.0), std=(2.0, 2.0, 2.0), scale=1.0, channel_order="RGB", crop=8
)


def write_image(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> np.ndarray[Any, Any]:
    """Write a lossless image and give the model input that it must become."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    mean = np.array([1.0, 2.0, 3.0]).reshape(3, 1, 1)
    return np.asarray((pixels.transpose(2, 0, 1) - mean) / 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(["b/1.png", "a/2.png", "c.png", "a/1.png"]):
        write_image(tmp_path / name, seed)
    return tmp_path


def all_inputs(source: ImageFolder, batch_size: int = 3) -> np.ndarray[Any, Any]:
    return np.concatenate([batch[""] for batch in source.batches(batch_size)])


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text)
    return path


def test_without_labels_all_images_below_come(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")
    (folder / "._c.png").write_text("left behind by a file manager")
    source = ImageFolder(folder, preprocessing=RECIPE)
    names = [path.relative_to(folder).as_posix() for path in source.files]
    assert sorted(names) == ["a/1.png", "a/2.png", "b/1.png", "c.png"]
    assert source.labels is None
    seeds = {"b/1.png": 0, "a/2.png": 1, "c.png": 2, "a/1.png": 3}
    expected = [write_image(folder / name, seeds[name]) for name in names]
    np.testing.assert_allclose(all_inputs(source), np.stack(expected), rtol=1e-6)


def test_without_labels_or_subfolders_images_come_in_sorted_order(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(8)]
    for seed, name in enumerate(reversed(names)):
        write_image(tmp_path / name, seed)
    assert [path.name for path in ImageFolder(tmp_path, preprocessing=RECIPE).files] == names


def test_without_labels_the_first_images_are_of_all_subfolders(tmp_path: Path) -> None:
    for label in range(4):
        for number in range(25):
            write_image(tmp_path / f"class{label}" / f"{number}.png", number)
    files = ImageFolder(tmp_path, preprocessing=RECIPE).files
    first = [path.parent.name for path in files[:32]]
    assert all(3 <= first.count(f"class{label}") <= 14 for label in range(4))
    (tmp_path / "class1" / "7.png").unlink()
    fewer = ImageFolder(tmp_path, preprocessing=RECIPE).files
    assert list(fewer) == [path for path in files if path.exists()]


def test_labels_csv_says_which_files_there_are_and_in_which_order(folder: Path) -> None:
    write_csv(folder, "synset,label_index,file\nx,7,c.png\ny,0,a/2.png\n")
    source = ImageFolder(folder, preprocessing=RECIPE)
    assert [path.name for path in source.files] == ["c.png", "2.png"]
    assert source.labels is not None
    assert source.labels.tolist() == [7, 0]
    assert source.labels.dtype == np.int64
    np.testing.assert_allclose(
        all_inputs(source)[1], write_image(folder / "a/2.png", 1), rtol=1e-6
    )


def test_a_csv_elsewhere_may_name_files_relative_to_the_image_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_csv(tmp_path_factory.mktemp("labels"), "file,label_index\na/1.png,5\n")
    source = ImageFolder(folder, labels=path, preprocessing=RECIPE)
    assert source.files == (folder / "a/1.png",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'file'"),
        ("file,label\nc.png,1\n", "no column 'label_index'"),
        ("file,label_index\n", "no rows"),
        ("file,label_index\nc.png,1\na/1.png,cat\n", "line 3: label_index must be .* 'cat'"),
        ("file,label_index\nc.png,-1\n", "line 2: label_index"),
        ("file,label_index\nc.png\n", "line 2: label_index"),
        ("file,label_index\nc.png,1\ngone.png,1\n", r"1 of its 2 files are missing .*gone\.png"),
        ("file,label_index\nx.png,1\ny.png,1\n", r"none of its 2 files is there .*x\.png"),
        ("file,label_index\nc.png,1\nc.png,2\n", "listed twice"),
        ("file,label_index\nc.png,\udcff\n", "UTF-8"),
    ],
)
def test_labels_that_do_not_match_are_an_error(folder: Path, text: str, message: str) -> None:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message) as raised:
        ImageFolder(folder, preprocessing=RECIPE)
    assert str(path) in str(raised.value)


def test_a_missing_labels_file_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv: cannot read labels"):
        ImageFolder(folder, labels=folder / "gone.csv", preprocessing=RECIPE)


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such folder"):
        ImageFolder(tmp_path / "gone", preprocessing=RECIPE)
    with pytest.raises(InputError, match="no images"):
        ImageFolder(tmp_path, preprocessing=RECIPE)
    (tmp_path / "x.png").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        ImageFolder(tmp_path / "x.png", preprocessing=RECIPE)


def test_images_without_preprocessing_are_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="--preprocessing"):
        ImageFolder(folder)


@pytest.mark.parametrize("keep_bytes", [0, 100])
def test_an_image_that_does_not_decode_is_named_and_not_skipped(
    folder: Path, keep_bytes: int
) -> None:
    broken = folder / "a/2.png"
    broken.write_bytes(broken.read_bytes()[:keep_bytes])
    source = ImageFolder(folder, preprocessing=RECIPE)
    with pytest.raises(InputError, match="does not decode") as raised:
        all_inputs(source)
    assert str(broken) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_image_smaller_than_the_crop_is_named(folder: Path) -> None:
    write_image(folder / "b/1.png", 0, size=(8, 5))
    with pytest.raises(InputError, match=r"b/1\.png: the image has 5 x 8 pixels"):
        all_inputs(ImageFolder(folder, preprocessing=RECIPE))


def test_without_crop_all_images_must_have_the_size_of_the_first(folder: Path) -> None:
    whole = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0, channel_order="RGB")
    source = ImageFolder(folder, preprocessing=whole)
    assert source.specs[0].shape == (None, 3, 8, 8)
    write_image(folder / "c.png", 0, size=(9, 8))
    with pytest.raises(InputError, match=r"c\.png: .*\(3, 9, 8\).*set crop"):
        all_inputs(source)


def test_limit_takes_the_first_images_and_labels(folder: Path) -> None:
    write_csv(folder, "file,label_index\nc.png,7\na/2.png,3\nb/1.png,1\n")
    source = ImageFolder(folder, preprocessing=RECIPE, limit=2)
    assert len(source) == 2
    assert source.labels is not None
    assert source.labels.tolist() == [7, 3]
    with pytest.raises(InputError, match="limit"):
        ImageFolder(folder, preprocessing=RECIPE, limit=0)


@pytest.mark.parametrize(("images_in_cache", "decoded_again"), [(4, 0), (2, 2), (0, 4)])
def test_a_second_pass_decodes_only_what_the_bounded_cache_has_no_room_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, images_in_cache: int, decoded_again: int
) -> None:
    source = ImageFolder(folder, preprocessing=RECIPE, cache_bytes=images_in_cache * 3 * 8 * 8 + 1)
    first = all_inputs(source)
    opened: list[Path] = []
    real_open = Image.open

    def counting_open(path: Path) -> Image.Image:
        opened.append(path)
        return real_open(path)

    monkeypatch.setattr(Image, "open", counting_open)
    assert np.array_equal(all_inputs(source), first)
    assert len(opened) == decoded_again


def test_indices_choose_images_and_their_order(folder: Path) -> None:
    source = ImageFolder(folder, preprocessing=RECIPE)
    everything = all_inputs(source)
    batches = list(source.batches(2, np.array([3, 0, 3])))
    assert [len(batch[""]) for batch in batches] == [2, 1]
    assert np.array_equal(np.concatenate([b[""] for b in batches]), everything[[3, 0, 3]])


def test_fingerprint_depends_on_bytes_order_and_preprocessing_but_not_on_labels(
    folder: Path,
) -> None:
    def fingerprint(preprocessing: Preprocessing = RECIPE) -> str:
        return ImageFolder(folder, preprocessing=preprocessing).fingerprint()

    plain = fingerprint()
    assert plain == fingerprint()
    assert len(plain) == 64
    other = Preprocessing(mean=RECIPE.mean, std=RECIPE.std, scale=0.5, channel_order="RGB", crop=8)
    assert fingerprint(other) != plain
    files = ImageFolder(folder, preprocessing=RECIPE).files
    names = [path.relative_to(folder).as_posix() for path in files]
    for order, label in ((1, 0), (1, 9), (-1, 9)):
        rows = [f"{name},{label}\n" for name in names[::order]]
        write_csv(folder, "".join(["file,label_index\n", *rows]))
        assert (fingerprint() == plain) is (order == 1)
    (folder / "labels.csv").unlink()
    write_image(folder / "c.png", 99)
    assert fingerprint() != plain


def test_a_wrong_input_shape_names_the_folder_the_input_and_both_shapes(folder: Path) -> None:
    source = ImageFolder(folder, preprocessing=RECIPE)
    wanted = InputSpec("image", (None, 3, 16, 16), np.dtype(np.float32))
    with pytest.raises(InputError, match="wrong input shape") as raised:
        source.bind([wanted])
    message = str(raised.value)
    for part in (str(folder), "'image'", "(batch, 3, 8, 8)", "(batch, 3, 16, 16)", "crop"):
        assert part in message
    with pytest.raises(InputError, match="channel axis"):
        source.bind([InputSpec("image", (None, 8, 8, 3), np.dtype(np.float32))])


def test_binding_gives_the_models_name_and_float_type(folder: Path) -> None:
    source = ImageFolder(folder, preprocessing=RECIPE)
    bound = source.bind([InputSpec("image", (1, 3, None, None), np.dtype(np.float16))])
    batch = next(bound.batches(4))
    assert batch["image"].dtype == np.float16
    assert bound.fingerprint() == source.fingerprint()
    again = bound.bind([InputSpec("x", (None, 3, 8, 8), np.dtype(np.float32))])
    assert next(again.batches(1))["x"].dtype == np.float32


def test_links_to_folders_are_followed_once_and_hidden_folders_left_out(tmp_path: Path) -> None:
    for seed, name in enumerate(["here/a/1.png", "there/1.png", "here/.thumbnails/1.png"]):
        write_image(tmp_path / name, seed)
    (tmp_path / "here" / "b").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "back").symlink_to(tmp_path / "here")
    files = ImageFolder(tmp_path / "here", preprocessing=RECIPE).files
    names = [path.relative_to(tmp_path / "here").as_posix() for path in files]
    assert sorted(names) == ["a/1.png", "b/1.png"]
