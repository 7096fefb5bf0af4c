from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.preprocessing import Preprocessing


RECIPE: dict[str, Any] = {
    "resize_short_side": 20,
    "crop": 16,
    "interpolation": "bilinear",
    "mean": [10.0, 20.0, 30.0],
    "std": [2.0, 4.0, 8.0],
    "scale": 0.5,
    "channel_order": "RGB",
    "formula": "(x[0..255]*scale - mean)/std, channels in channel_order",
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def reference_crop(
    image: Image.Image, resize: int | None, crop: int, method: Image.Resampling
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The recipe with which the reference accuracies of the models were measured."""
    image = image.convert("RGB")
    w, h = image.size
    if resize and resize != min(w, h):
        s = resize / min(w, h)
        image = image.resize((max(resize, round(w * s)), max(resize, round(h * s))), method)
    w, h = image.size
    if (w, h) != (crop, crop):
        left, top = round((w - crop) / 2), round((h - crop) / 2)
        image = image.crop((left, top, left + crop, top + crop))
    return np.asarray(image)


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (20, 20), (23, 20), (21, 57), (9, 13)])
@pytest.mark.parametrize(
    ("interpolation", "method"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_resize_and_crop_follow_the_reference_recipe(
    size: tuple[int, int], interpolation: str, method: Image.Resampling
) -> None:
    image = picture(*size)
    recipe = Preprocessing.from_mapping(
        {**RECIPE, "interpolation": interpolation, "layout": "NHWC"}
    )
    expected = reference_crop(image, 20, 16, method)
    assert np.array_equal(recipe.pixels(image), expected)


def test_no_resize_crops_the_centre_of_the_image_as_it_is() -> None:
    image = picture(19, 18)
    recipe = Preprocessing.from_mapping(
        {**RECIPE, "resize_short_side": None, "interpolation": None, "layout": "NHWC"}
    )
    expected = reference_crop(image, None, 16, Image.Resampling.BILINEAR)
    assert np.array_equal(recipe.pixels(image), expected)


def test_crop_may_be_height_and_width() -> None:
    image = picture(40, 30)
    recipe = Preprocessing.from_mapping({**RECIPE, "resize_short_side": None, "crop": [10, 20]})
    assert recipe.pixel_shape == (3, 10, 20)
    assert np.array_equal(recipe.pixels(image).transpose(1, 2, 0), np.asarray(image)[10:20, 10:30])


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_each_channel_is_scaled_by_its_own_mean_and_std(order: str, layout: str) -> None:
    image = picture(16, 16)
    recipe = Preprocessing.from_mapping(
        {**RECIPE, "resize_short_side": None, "channel_order": order, "layout": layout}
    )
    inputs = recipe.normalize(recipe.pixels(image)[None])[0]
    rgb = np.asarray(image).astype(np.float64)
    for channel in range(3):
        source = rgb[:, :, channel if order == "RGB" else 2 - channel]
        expected = (source * 0.5 - RECIPE["mean"][channel]) / RECIPE["std"][channel]
        got = inputs[channel] if layout == "NCHW" else inputs[:, :, channel]
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert inputs.dtype == np.float32


def test_grey_models_get_one_channel() -> None:
    image = picture(16, 16)
    recipe = Preprocessing(mean=(0.0,), std=(1.0,), scale=1.0, channel_order="L", crop=16)
    assert np.array_equal(recipe.pixels(image), np.asarray(image.convert("L"))[None])


def test_an_image_smaller_than_the_crop_is_an_error_and_gets_no_black_border() -> None:
    recipe = Preprocessing.from_mapping({**RECIPE, "resize_short_side": None})
    with pytest.raises(InputError, match=r"15 x 30 pixels .* resize_short_side"):
        recipe.pixels(picture(15, 30))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": [1.0]}, "unknown key 'means'"),
        ({"mean": None}, "mean must be numbers"),
        ({"mean": [0.0, 0.0]}, "mean must have 3"),
        ({"std": [1.0, 0.0, 1.0]}, "std must not be zero"),
        ({"scale": "1/255"}, "scale must be numbers"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"channel_order": "RGBA"}, "channel_order must be one of RGB, BGR, L"),
        ({"layout": "CHW"}, "layout must be one of"),
        ({"interpolation": "cubic"}, "interpolation must be one of"),
        ({"interpolation": None}, "resize_short_side needs interpolation"),
        ({"crop": 0}, "crop must be at least 1"),
        ({"crop": [1, 2, 3]}, "crop must be a number or"),
        ({"crop": "224"}, "crop must be a whole number"),
        ({"resize_short_side": 0.5}, "resize_short_side must be a whole number"),
    ],
)
def test_a_wrong_recipe_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing.from_mapping({**RECIPE, **change})


@pytest.mark.parametrize("key", ["mean", "std", "scale", "channel_order"])
def test_what_has_no_safe_default_must_be_given(key: str) -> None:
    with pytest.raises(InputError, match=f"{key!r} is missing"):
        Preprocessing.from_mapping({k: v for k, v in RECIPE.items() if k != key})


def test_json_file_gives_the_same_recipe_as_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.json"
    path.write_text(json.dumps(RECIPE))
    assert Preprocessing.from_json(path) == Preprocessing.from_mapping(RECIPE)
    assert Preprocessing.of(str(path)) == Preprocessing.of(RECIPE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "is missing"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "preprocessing.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        Preprocessing.from_json(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_a_channel_are_not_cut_off(dtype: type) -> None:
    image = Image.fromarray(np.full((16, 16), 300, dtype=dtype))
    with pytest.raises(InputError, match="not of 8 bits a channel"):
        Preprocessing(mean=(0.0,), std=(1.0,), scale=1.0, channel_order="L").pixels(image)
