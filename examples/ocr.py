"""A model that is no classifier: int8 text recognition (OCR), tuned by its character accuracy.

    pip install .
    pip install --no-deps rapidocr-onnxruntime==1.4.4
    python examples/ocr.py [--lines 400] [--trials 20] [--output ocr.int8.onnx]

The model is the text recognition of PP-OCRv4 (PaddleOCR, Apache 2.0) as the package
rapidocr-onnxruntime (Apache 2.0) carries it: an image of a line, 48 pixels high, becomes one
distribution over 6,625 characters for every 8 pixels. The lines are drawn here with the font that
comes with Pillow, so that the truth is known.

What is maximized is a function of this file: the share of characters that are read rightly. It
asks for the `indices` of the inputs, because the search sees one half of the lines only and the
result is reported on the other.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont
from rich.console import Console

from optuna_quantune import ArrayInputs
from optuna_quantune import tune
from optuna_quantune.report.console import config_lines
from optuna_quantune.report.console import result_table
from optuna_quantune.report.console import trials_table


HEIGHT, WIDTH = 48, 192
CALIBRATION_LINES = 128
WORDS = (
    "invoice",
    "total",
    "amount",
    "date",
    "order",
    "number",
    "street",
    "paid",
    "balance",
    "account",
    "customer",
    "delivery",
    "price",
    "quantity",
)


def main() -> None:
    """Draws lines, tunes the model on them and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--output", default="ocr.int8.onnx")
    arguments = parser.parse_args()
    model = recognition_model()
    alphabet = characters(model)
    calibration, _ = drawn_lines(CALIBRATION_LINES, seed=1)
    images, texts = drawn_lines(arguments.lines, seed=2)

    def character_accuracy(
        outputs: NDArray[np.float32], reference: NDArray[np.float32], indices: NDArray[np.int64]
    ) -> float:
        """Share of characters that are read rightly: one minus the character error rate."""
        truth = [texts[index] for index in indices]
        wrong = sum(map(edit_distance, read(outputs, alphabet), truth))
        return 1.0 - wrong / sum(map(len, truth))

    result = tune(
        model,
        calibration=ArrayInputs(calibration),
        evaluation=ArrayInputs(images),
        metric=character_accuracy,
        n_trials=arguments.trials,
        output=arguments.output,
    )
    console = Console(width=160)
    console.print(trials_table(result.study.trials, result.metric))
    console.print(config_lines(result))
    console.print(result_table(result))
    console.print("\n".join(result.remarks))


def recognition_model() -> Path:
    """The model file in the installed package, which is not imported: it would need OpenCV."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps rapidocr-onnxruntime==1.4.4")
    return Path(spec.submodule_search_locations[0]) / "models/ch_PP-OCRv4_rec_infer.onnx"


def characters(model: Path) -> list[str]:
    """What each class stands for; the first one is the blank of CTC, the last one the space."""
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    return ["", *metadata["character"].splitlines(), " "]


def drawn_lines(n: int, *, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """Lines of text with their truth: varied size, contrast, position, blur and noise.

    Returns:
        float32 inputs of shape (n, 3, 48, 192), -1 to 1, and the texts.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((n, 3, HEIGHT, WIDTH), np.float32)
    texts = []
    for image in images:
        text = f"{rng.choice(WORDS)} {rng.integers(10, 10_000)}"
        text = (str.capitalize, str.upper, str)[rng.integers(3)](text)
        paper, ink = rng.integers(170, 256), rng.integers(0, 110)
        line = Image.new("L", (WIDTH, HEIGHT), int(paper))
        font = ImageFont.load_default(size=int(rng.integers(17, 23)))
        left, top = int(rng.integers(2, 8)), int(rng.integers(4, 16))
        ImageDraw.Draw(line).text((left, top), text, fill=int(ink), font=font)
        line = line.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 1.3)))
        pixels = np.asarray(line, np.float32) + rng.normal(0.0, 12.0, (HEIGHT, WIDTH))
        image[:] = np.clip(pixels, 0, 255) / 127.5 - 1.0
        texts.append(text)
    return images, texts


def read(outputs: NDArray[np.float32], alphabet: Sequence[str]) -> list[str]:
    """The texts of CTC outputs of shape (n, steps, classes), the best class of every step."""
    texts = []
    for steps in outputs.argmax(axis=2):
        kept = steps[np.diff(steps, prepend=-1) != 0]  # a class that goes on is one character
        texts.append("".join(alphabet[index] for index in kept))
    return texts


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: characters to insert, delete or replace."""
    row: list[Any] = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return int(row[-1])


if __name__ == "__main__":
    main()
