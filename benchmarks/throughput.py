"""How fast evaluation is, and what each of its parts is worth.

    python -m benchmarks.throughput DATA [--model squeezenet1_1] [--images 300] [--repeats 5]

DATA is a folder as in `benchmarks.catalogue`; the model is one for ImageNet. Each figure is the
median of some repeats, the variants of a question in turn within each repeat, so that other work
on the machine hits them alike:

- decoding: a pass over the images with no, half of and all of them in the cache of uint8 pixels;
- batches: inputs of a run, one batch on each core;
- side by side: two evaluations in one process at the same time, sharing its cores or fighting for
  them, and the latency of a model that is measured meanwhile.

Results go to `benchmarks/results/throughput/`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd

from benchmarks import catalogue
from benchmarks import machine
from optuna_quantune.evaluation import image_folder
from optuna_quantune.evaluation import latency
from optuna_quantune.evaluation import runner
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.evaluation.runner import input_specs
from optuna_quantune.evaluation.runner import iterate
from optuna_quantune.evaluation.runner import make_session


RESULTS = Path(__file__).parent / "results" / "throughput"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
MODULES = (image_folder, latency, runner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="squeezenet1_1")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    bench = Bench(arguments.data, arguments.model, arguments.images)
    rows = []
    for repeat in range(arguments.repeats):
        for question, variants in bench.questions().items():
            for variant, measure in variants.items():
                rows.append(
                    {"repeat": repeat, "question": question, "variant": variant, **measure()}
                )
                print(rows[-1], flush=True)
        RESULTS.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(RESULTS / "repeats.csv", index=False, float_format="%.4f")
    write(pd.DataFrame(rows), arguments)


class Bench:
    """The model and the images, and what is measured of them.

    Args:
        data: The folder of models and images.
        name: The model.
        images: How many of them.
    """

    def __init__(self, data: Path, name: str, images: int) -> None:
        recipe = catalogue.preprocessing(name, data, "imagenet-val")
        self._recipe = Preprocessing.from_mapping(recipe)
        self._folder = data / "imagenet-val"
        self._images = images
        self._model = catalogue.model_path(name, data)
        self._session = make_session(self._model)
        self._specs = input_specs(self._session)
        self._pixels = sum(
            array[0].size for array in next(self._source(0).batches(1)).values()
        )  # bytes of one image as uint8
        self._cached = self._source(images * self._pixels)
        self._evaluate(self._cached)  # fills the cache

    def questions(self) -> dict[str, dict[str, Callable[[], dict[str, float]]]]:
        """By question and variant, what measures it."""
        return {
            "decoding": {
                f"{share:.0%} cached": partial(self._pass, share) for share in (0.0, 0.5, 1.0)
            },
            "batches": {
                f"{size}": partial(self._rate, partial(self._evaluate, self._cached, size))
                for size in BATCH_SIZES
            },
            "side by side": {
                "one alone": lambda: self._rate(lambda: self._evaluate(self._cached)),
                "two, sharing": lambda: self._together(contextlib.nullcontext()),
                "two, fighting": lambda: self._together(no_limit()),
                "latency meanwhile, sharing": lambda: self._spread(contextlib.nullcontext()),
                "latency meanwhile, fighting": lambda: self._spread(no_limit()),
            },
        }

    def _source(self, cache_bytes: int) -> ImageFolder:
        return ImageFolder(
            self._folder, preprocessing=self._recipe, limit=self._images, cache_bytes=cache_bytes
        )

    def _evaluate(self, source: ImageFolder, batch_size: int | None = None) -> None:
        for _ in iterate(self._session, source, batch_size=batch_size):
            pass

    def _pass(self, share: float) -> dict[str, float]:
        """A second pass over images of which a share is in the cache; nothing is run."""
        source = self._source(int(share * self._images * self._pixels))
        for _ in source.batches(4):
            pass

        def second() -> None:
            for _ in source.batches(4):
                pass

        return self._rate(second)

    def _rate(self, work: Callable[[], None], passes: int = 1) -> dict[str, float]:
        start = time.perf_counter()
        work()
        return {"images_per_second": passes * self._images / (time.perf_counter() - start)}

    def _together(self, limit: contextlib.AbstractContextManager[None]) -> dict[str, float]:
        def both() -> None:
            threads = [
                threading.Thread(target=self._evaluate, args=(self._cached,)) for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        with limit:
            return self._rate(both, passes=2)

    def _spread(self, limit: contextlib.AbstractContextManager[None]) -> dict[str, float]:
        """Latency of the model against itself while another evaluation goes on."""
        one, same = (make_session(self._model, threads=None) for _ in range(2))
        feeds = list(self._cached.bind(self._specs).subset([0]).batches(1))
        with limit:
            other = threading.Thread(target=self._evaluate, args=(self._cached,))
            other.start()
            ratio = latency.latency_ratio(one, same, feeds, repeats=20)
            other.join()
        return {"latency_ms": ratio.median_ms, "interval": ratio.high - ratio.low}


class _NoLimit:
    @contextlib.contextmanager
    def take(self, wanted: int | None = None) -> Iterator[None]:
        yield


@contextlib.contextmanager
def no_limit() -> Iterator[None]:
    """Evaluations as if each had the machine for itself."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "CORES", _NoLimit()))
        yield


def write(frame: pd.DataFrame, arguments: argparse.Namespace) -> None:
    lines = [
        "# Throughput of evaluation",
        "",
        f"`python -m benchmarks.throughput DATA --model {arguments.model} --images "
        f"{arguments.images} --repeats {arguments.repeats}`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        "Medians with the smallest and the largest of the repeats. The load average was "
        f"{os.getloadavg()[2]:.0f} at the end: other work shared the cores, and what counts are",
        "ratios within a table.",
    ]
    for question, rows in frame.groupby("question", sort=False):
        columns = [c for c in rows.columns[3:] if rows[c].notna().any()]
        lines += ["", f"## {str(question).capitalize()}", ""]
        lines += ["| variant | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
        lines += ["|" + " --- |" * (len(columns) + 1)]
        for variant, values in rows.groupby("variant", sort=False):
            cells = [cell(values[column].dropna().tolist()) for column in columns]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
