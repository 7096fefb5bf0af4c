from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader
from PIL import Image

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.dataset import ReaderInputs
from optuna_quantune.evaluation.preprocessing import Preprocessing


Arrays = dict[str, np.ndarray[Any, Any]]

FLOAT32 = np.dtype(np.float32)
GREY = Preprocessing(mean=(3.0,), std=(2.0,), scale=0.5, channel_order="L", crop=4)


def rows(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
    """Gives x and y in the given portions, and counts how often it was begun."""

    begun = 0

    def __init__(self, x: np.ndarray[Any, Any], portions: tuple[int, ...]) -> None:
        self.x, self.portions = x, portions
        self.rewind()
        Reader.begun += 1

    def rewind(self) -> None:
        starts = np.cumsum((0, *self.portions)).tolist()
        self.feeds: Iterator[Arrays] = iter(
            [
                {"x": self.x[a:b], "y": self.x[a:b] * 2}
                for a, b in zip(starts, starts[1:], strict=False)
            ]
        )

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


class OneWayReader:
    """Cannot be rewound, and fills one buffer again and again."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.rows = iter(x)
        self.buffer = np.empty_like(x[:1])

    def get_next(self) -> Arrays | None:
        row = next(self.rows, None)
        if row is None:
            return None
        self.buffer[:] = row
        return {"x": self.buffer, "y": self.buffer * 2}


X = rows(7)
TWO_INPUT_SOURCES: dict[str, Callable[[], InputSource]] = {
    "arrays": lambda: ArrayInputs({"x": X, "y": X * 2}),
    "factory": lambda: ReaderInputs(lambda: Reader(X, (2, 4, 1))),
    "rewinding reader": lambda: ReaderInputs(Reader(X, (7,))),
    "factory of one-way readers": lambda: ReaderInputs(lambda: OneWayReader(X)),
    "one-way reader": lambda: ReaderInputs(OneWayReader(X)),
    "subset": lambda: ArrayInputs({"x": X[::-1], "y": X[::-1] * 2}).subset([6, 5, 4, 3, 2, 1, 0]),
}


@pytest.fixture(params=TWO_INPUT_SOURCES)
def source(request: pytest.FixtureRequest) -> InputSource:
    return TWO_INPUT_SOURCES[request.param]()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_every_source_gives_the_same_batches_at_every_pass(
    source: InputSource, batch_size: int
) -> None:
    for _ in range(2):
        batches = list(source.batches(batch_size))
        assert [len(b["x"]) for b in batches] == [
            min(batch_size, 7 - start) for start in range(0, 7, batch_size)
        ]
        assert np.array_equal(np.concatenate([b["x"] for b in batches]), X)
        assert np.array_equal(np.concatenate([b["y"] for b in batches]), X * 2)


def test_every_source_follows_the_order_of_indices(source: InputSource) -> None:
    order = np.array([5, 0, 5, 6, 1])
    batches = list(source.batches(2, order))
    assert np.array_equal(np.concatenate([b["x"] for b in batches]), X[order])


def test_every_source_of_the_same_inputs_has_the_same_fingerprint(source: InputSource) -> None:
    assert source.fingerprint() == ArrayInputs({"x": X, "y": X * 2}).fingerprint()
    assert source.fingerprint() != ArrayInputs({"x": X, "y": X}).fingerprint()


def test_a_subset_has_the_fingerprint_of_its_inputs_alone(source: InputSource) -> None:
    subset = source.subset(np.array([4, 2]))
    assert len(subset) == 2
    alone = ArrayInputs({"x": X[[4, 2]], "y": X[[4, 2]] * 2})
    assert subset.fingerprint() == alone.fingerprint()
    assert np.array_equal(next(subset.batches(2, np.array([1])))["x"], X[[2]])


@pytest.mark.parametrize("indices", [[], [7], [-1], [[0]], [0.5]])
def test_wrong_indices_are_an_error(source: InputSource, indices: list[Any]) -> None:
    with pytest.raises(InputError, match="indices must be"):
        source.subset(indices)
    with pytest.raises(InputError, match="indices must be"):
        next(iter(source.batches(1, np.array(indices))))


def test_binding_checks_names_and_gives_the_models_order(source: InputSource) -> None:
    specs = [InputSpec("y", (None, 3), FLOAT32), InputSpec("x", (None, 3), FLOAT32)]
    assert list(next(source.bind(specs).batches(1))) == ["y", "x"]
    with pytest.raises(InputError, match="gives the inputs 'x', 'y', the model wants 'z'"):
        source.bind([InputSpec("z", (None, 3), FLOAT32)])


def test_binding_checks_shapes_and_types(source: InputSource) -> None:
    x = InputSpec("x", (None, 3), FLOAT32)
    with pytest.raises(
        InputError, match=r"wrong input shape .* 'y': float32 \(batch, 3\), .* \(batch, 4\)"
    ):
        source.bind([x, InputSpec("y", (None, 4), FLOAT32)])
    with pytest.raises(InputError, match=r"\(batch, 3\), the model wants float32 \(batch, 3, any"):
        source.bind([x, InputSpec("y", (None, 3, None), FLOAT32)])
    with pytest.raises(InputError, match=r"no axis for batches: put a Squeeze"):
        source.bind([x, InputSpec("y", (3,), FLOAT32)])
    with pytest.raises(InputError, match="wrong element type .* 'y': float32, .* int64"):
        source.bind([x, InputSpec("y", (None, 3), np.dtype(np.int64))])


def test_labels_go_with_the_inputs_of_a_subset() -> None:
    labels = [3, 1, 4, 1, 5, 9, 2]
    for source in (ArrayInputs(X, labels), ReaderInputs(Reader(X, (3, 4)), labels)):
        assert source.labels is not None
        assert source.labels.tolist() == labels
        subset = source.subset([6, 0]).labels
        assert subset is not None
        assert subset.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "2 labels for 7 inputs"),
        (["cat"] * 7, "array of <U3"),
        (5, r"shape \(\)"),
    ],
)
def test_labels_that_do_not_match_are_an_error(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ArrayInputs(X, labels)
    with pytest.raises(InputError, match=message):
        ReaderInputs(Reader(X, (7,)), labels)


def test_one_unnamed_array_takes_the_name_of_the_models_only_input() -> None:
    source = ArrayInputs(X.astype(np.float64))
    batch = next(source.bind([InputSpec("input", (None, 3), FLOAT32)]).batches(7))
    assert np.array_equal(batch["input"], X)
    assert batch["input"].dtype == np.float32
    with pytest.raises(InputError, match="gives one input, the model wants 2: 'a', 'b'"):
        source.bind([InputSpec(name, (None, 3), FLOAT32) for name in "ab"])


def test_arrays_without_inputs_or_with_different_lengths_are_an_error() -> None:
    with pytest.raises(InputError, match="no inputs"):
        ArrayInputs(np.empty((0, 3)))
    with pytest.raises(InputError, match="no inputs"):
        ArrayInputs({})
    with pytest.raises(InputError, match="7 in 'x', 2 in 'y'"):
        ArrayInputs({"x": X, "y": X[:2]})


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3)])
def test_uint8_images_are_cropped_and_normalised_like_files(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{index}.png")
    from_files = next(ImageFolder(tmp_path, preprocessing=GREY).batches(5))[""]
    source = ArrayInputs(images, preprocessing=GREY)
    assert source.specs[0].shape == (None, 1, 4, 4)
    assert np.array_equal(next(source.batches(5))[""], from_files)
    if images.ndim == 3:
        expected = (images[:, None, 1:5, 1:5] * 0.5 - 3) / 2
        np.testing.assert_allclose(from_files, expected, rtol=1e-6)


def test_preprocessing_is_for_uint8_images_and_uint8_images_need_it() -> None:
    with pytest.raises(InputError, match="preprocessing takes uint8 images"):
        ArrayInputs(rows(4).reshape(4, 3, 1), preprocessing=GREY)
    with pytest.raises(InputError, match="array inputs: the image has 3 x 4 pixels"):
        ArrayInputs(np.zeros((2, 4, 3), np.uint8), preprocessing=GREY)
    raw = ArrayInputs(np.zeros((2, 1, 4, 4), np.uint8))
    with pytest.raises(InputError, match="uint8 images need a preprocessing"):
        raw.bind([InputSpec("input", (None, 1, 4, 4), FLOAT32)])


def test_a_factory_is_streamed_and_makes_a_fresh_reader_for_every_pass() -> None:
    Reader.begun = 0
    source = ReaderInputs(lambda: Reader(X, (7,)), cache_bytes=0)
    assert Reader.begun == 1
    list(source.batches(2))
    list(source.batches(2))
    assert Reader.begun == 3
    Reader.begun = 0
    assert len(as_input_source(type("Fixed", (Reader,), {"__init__": _fixed_init}))) == 7
    assert Reader.begun == 1


def _fixed_init(self: Reader) -> None:
    Reader.__init__(self, X, (7,))


def test_two_passes_at_once_need_a_factory() -> None:
    factory = ReaderInputs(lambda: Reader(X, (1,) * 7), cache_bytes=0)
    one, two = factory.batches(1), factory.batches(1)
    assert np.array_equal(next(one)["x"], next(two)["x"])
    assert np.array_equal(next(one)["x"], X[[1]])
    shared = ReaderInputs(Reader(X, (1,) * 7), cache_bytes=0)
    one, two = shared.batches(1), shared.batches(1)
    next(one)
    next(two)
    with pytest.raises(InputError, match="two passes at the same time"):
        next(one)


def test_inputs_of_different_shapes_are_a_free_axis_and_cannot_share_a_batch() -> None:
    class Sentences:
        def __init__(self) -> None:
            self.feeds = iter([{"ids": np.ones((1, length), np.int64)} for length in (3, 5)])

        def get_next(self) -> Arrays | None:
            return next(self.feeds, None)

    source = ReaderInputs(Sentences)
    assert source.specs == (InputSpec("ids", (None, None), np.dtype(np.int64)),)
    assert [batch["ids"].shape for batch in source.batches(1)] == [(1, 3), (1, 5)]
    with pytest.raises(InputError, match="use batch_size=1"):
        next(source.batches(2))
    with pytest.raises(InputError, match=r"int64 \(batch, any\), .* int64 \(batch, 3\)"):
        source.bind([InputSpec("ids", (None, 3), np.dtype(np.int64))])


def test_an_input_that_is_a_single_number_is_refused() -> None:
    source = ArrayInputs({"x": X, "scale": np.ones(len(X), np.float32)})
    single = InputSpec("scale", (), np.dtype(np.float32))
    with pytest.raises(InputError, match="'scale' is a single number .* make it a constant"):
        source.bind([InputSpec("x", (None, *X.shape[1:]), X.dtype), single])


def test_the_fingerprint_tells_shapes_of_the_same_bytes_apart() -> None:
    def reader(shapes: list[tuple[int, ...]]) -> ReaderInputs:
        class Zeros:
            def __init__(self) -> None:
                self.feeds = iter([{"x": np.zeros(shape)} for shape in shapes])

            def get_next(self) -> Arrays | None:
                return next(self.feeds, None)

        return ReaderInputs(Zeros)

    one, other = reader([(1, 2, 3), (1, 3, 2)]), reader([(1, 3, 2), (1, 2, 3)])
    assert one.specs == other.specs
    assert one.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ([], "gives no inputs"),
        ([[1, 2]], "get_next.. gave a list"),
        ([X], "get_next.. gave a ndarray"),
        ([{"x": X, "y": X[:2]}], "same batch axis"),
        ([{"x": np.float32(1)}], "same batch axis"),
        ([{"x": X}, {"y": X}], "gives the inputs y after x"),
        ([{"x": X}, {"x": X.astype(np.float64)}], "float64 with 1 axes after float32"),
    ],
)
def test_a_reader_that_gives_nonsense_is_an_error(feeds: list[Any], message: str) -> None:
    class Given:
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with pytest.raises(InputError, match=message):
        ReaderInputs(Given)


def test_a_factory_that_gives_fewer_inputs_than_at_first_is_an_error() -> None:
    portions = iter([(7,), (2,)])
    source = ReaderInputs(lambda: Reader(X, next(portions)), cache_bytes=0)
    with pytest.raises(InputError, match="gave 7 inputs at first and fewer now"):
        list(source.batches(7))


def test_a_factory_that_shuffles_is_an_error_where_inputs_are_not_kept() -> None:
    orders = iter([X, X, X[[0, 1, 2, 3, 4, 6, 5]], X])
    source = ReaderInputs(lambda: Reader(next(orders), (7,)), cache_bytes=3 * 2 * X[0].nbytes)
    assert np.array_equal(next(source.batches(7))["x"], X)
    with pytest.raises(InputError, match="input 5 is another than at first; .* shuffling"):
        list(source.batches(7))
    assert len(list(source.batches(1, np.array([4, 0, 2])))) == 3


def test_what_is_kept_needs_no_pass() -> None:
    Reader.begun = 0
    source = ReaderInputs(lambda: Reader(X, (2, 5)), cache_bytes=4 * 2 * X[0].nbytes)
    for order in ([3, 0, 2], [1, 1]):
        (batch,) = source.batches(3, np.array(order))
        assert np.array_equal(batch["x"], X[order])
    assert Reader.begun == 1
    (batch,) = source.batches(7)
    assert np.array_equal(batch["y"], X * 2)
    assert Reader.begun == 2


def test_as_input_source_takes_every_kind(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    assert isinstance(as_input_source(tmp_path, preprocessing=GREY), ImageFolder)
    assert isinstance(as_input_source(str(tmp_path), preprocessing=GREY), ImageFolder)
    assert isinstance(as_input_source(X), ArrayInputs)
    assert isinstance(as_input_source({"x": X}), ArrayInputs)
    assert isinstance(as_input_source(Reader(X, (7,))), ReaderInputs)
    assert isinstance(as_input_source(lambda: Reader(X, (7,))), ReaderInputs)
    given = ArrayInputs(X)
    assert as_input_source(given) is given


def test_as_input_source_says_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot take inputs from a int"):
        as_input_source(3)
    with pytest.raises(InputError, match="cannot take inputs from a list: it has no get_next"):
        as_input_source(lambda: [])
    with pytest.raises(InputError, match="leave those arguments out"):
        as_input_source(ArrayInputs(X), labels=[0] * 7)
    with pytest.raises(InputError, match="labels must be the path"):
        as_input_source(tmp_path, labels=[0], preprocessing=GREY)
    with pytest.raises(InputError, match="goes with an image folder only"):
        as_input_source(X, labels="labels.csv")
    with pytest.raises(InputError, match="does not go with a calibration data reader"):
        as_input_source(Reader(X, (7,)), preprocessing=GREY)


def test_batch_size_must_be_positive(source: InputSource) -> None:
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        next(iter(source.batches(0)))
