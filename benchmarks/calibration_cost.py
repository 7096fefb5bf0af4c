"""What calibration costs for a whole space, and what its sampling loses.

    taskset -c 1 python -m benchmarks.calibration_cost DATA [--models NAME ...] [--images 512]

DATA is a folder as `benchmarks.catalogue` says. Every measurement is made in a process of its
own with one thread and is written when it is complete; an interrupted run goes on where it stopped
(delete a model's rows to measure it again). Results: `benchmarks/results/calibration_cost/`.
Seconds are processor seconds of the process, so that other work on the machine counts little; the
clock's are in the CSV file beside them.

- Time and peak memory until the ranges of all 96 configurations of `quantune` are known: our one
  pass, against ONNX Runtime's MinMax and Percentile calibrators called once for each set size, as
  their users do. ONNX Runtime's histogram calibrators keep all activations, so the Percentile
  calibrator is run on a few images only and extrapolated in proportion to their number.
- Plain float inference over the same images, before and behind each of our passes in the same
  process, in the batches that it is fastest with; medians of three rounds of either where a model
  is small.
- Our peak memory for 2,000 images, the same ones again and again.
- Ranges from the store against ranges from every single value: the change of the quantization
  noise in decibels, of all activations.

Images are decoded and prepared before the clock starts: that costs every method the same.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pandas as pd
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.calibrate import CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from benchmarks import catalogue
from benchmarks import machine
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.clipping import choose_range
from optuna_quantune.quantization.clipping import quantization_error
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.statistics import Histogram


RESULTS = Path(__file__).parent / "results" / "calibration_cost"
SIZES = (1, 32, 512)
MANY = 2000
# Rounds of float inference and calibration; no more are begun after so many seconds.
ROUNDS = 3
ROUND_SECONDS = 5.0
BATCHES = (1, 4, 16, 32)
# Images for the Percentile calibrator, which keeps about 60 MB for each with MobileNetV2.
PERCENTILE_IMAGES = 32
CLIPPINGS = (
    "percentile_99.9",
    "percentile_99.99",
    "percentile_99.999",
    "percentile_99.9999",
    "kl",
    "mse",
)
# Bins of the histograms of every single value: sign, exponent and 11 bits, a width of 0.05 %.
FINE_SHIFT = 12


class Held:
    """Prepared inputs in memory, from the first again when there are not enough."""

    def __init__(self, inputs: NDArray[np.float32], name: str, length: int) -> None:
        self.inputs, self.name, self.length = inputs, name, length

    def __len__(self) -> int:
        return self.length

    def batches(
        self, batch_size: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Gives the inputs in order."""
        order = np.arange(self.length) if indices is None else indices
        for start in range(0, len(order), batch_size):
            yield {self.name: self.inputs[order[start : start + batch_size] % len(self.inputs)]}

    def fingerprint(self) -> str:
        """Not used: nothing is stored."""
        return f"{self.length}"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The first inputs one by one, for ONNX Runtime."""

    def __init__(self, held: Held, images: int) -> None:
        self._batches = held.batches(1, np.arange(images))

    def get_next(self) -> dict[str, Any] | None:
        """Gives the next input, or None."""
        return next(self._batches, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--what", nargs="+", default=tuple(MEASUREMENTS), choices=MEASUREMENTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a process of its own does
    arguments = parser.parse_args()
    if arguments.measure:
        (name,) = arguments.models
        print(json.dumps(MEASUREMENTS[arguments.measure](name, arguments.data)))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in catalogue.names(arguments.data, arguments.models, demo=True):
        for what in arguments.what:
            if not is_done(name, what):
                record(name, what, arguments.data)
        report()


def record(name: str, what: str, data: Path) -> None:
    """One measurement in a process of its own; one that ends badly is recorded as that."""
    command = [sys.executable, "-m", "benchmarks.calibration_cost", str(data), "--measure", what]
    process = subprocess.run(
        [*command, "--models", name], stdout=subprocess.PIPE, text=True, check=False
    )
    lines = process.stdout.splitlines()
    found: dict[str, Any] = {"images": 0}
    if process.returncode == 0:
        found = json.loads(lines[-1])
    if what == "resolution" and "rows" in found:
        append(RESULTS / "resolution.csv", [{"model": name, **row} for row in found["rows"]])
    row = {
        "model": name,
        "what": what,
        "images": found["images"],
        "seconds": found.get("seconds"),
        "float_seconds": found.get("float_seconds"),
        "clock_seconds": found.get("clock_seconds"),
        "peak_mib": found.get("peak_mib"),
        "inputs_mib": found.get("inputs_mib"),
        "ended": "well" if process.returncode == 0 else f"with code {process.returncode}",
        "date": machine.describe()["date"],
    }
    append(RESULTS / "measurements.csv", [row])
    print(name, what, row["seconds"], row["peak_mib"], row["ended"], flush=True)


def ours(name: str, data: Path) -> dict[str, Any]:
    """One pass for all set sizes, with plain float inference around it, in turn."""
    model, held, tensors = prepared(name, data)
    session = make_session(model.path, threads=1)
    batch_size = min(BATCHES, key=lambda size: float_seconds(session, held, size, images=64))
    plain = [float_seconds(session, held, batch_size)]
    own: list[float] = []
    clock: list[float] = []
    while not own or (len(own) < ROUNDS and sum(own) < ROUND_SECONDS):
        watch = Watch()
        calibrate(model, held, tensors, sizes=(*SIZES[:2], "all"))
        own.append(watch.seconds())
        clock.append(watch.clock_seconds())
        plain.append(float_seconds(session, held, batch_size))
    return {
        "images": len(held),
        "seconds": statistics.median(own),
        "float_seconds": statistics.median(plain) if len(own) > 1 else statistics.mean(plain),
        "clock_seconds": statistics.median(clock),
        **memory(held),
    }


def many(name: str, data: Path) -> dict[str, Any]:
    """Our pass over many images, for its memory."""
    model, held, tensors = prepared(name, data, repeat_to=MANY)
    watch = Watch()
    calibrate(model, held, tensors, sizes=(*SIZES[:2], "all"))
    return {"images": len(held), **watch.read(), **memory(held)}


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._processor, self._clock = time.process_time(), time.perf_counter()

    def seconds(self) -> float:
        """Processor seconds of this process."""
        return time.process_time() - self._processor

    def clock_seconds(self) -> float:
        """Seconds of the clock."""
        return time.perf_counter() - self._clock

    def read(self) -> dict[str, float]:
        """Both, under their names in a row."""
        return {"seconds": self.seconds(), "clock_seconds": self.clock_seconds()}


def float_seconds(
    session: onnxruntime.InferenceSession, held: Held, batch_size: int, images: int | None = None
) -> float:
    """Processor seconds of plain float inference over the first, or all, images."""
    watch = Watch()
    for batch in held.batches(batch_size, np.arange(images or len(held))):
        session.run(None, batch)
    return watch.seconds()


def minmax(name: str, data: Path) -> dict[str, Any]:
    """ONNX Runtime's MinMax calibrator, once for each set size."""
    return onnxruntime_calibrator(name, data, CalibrationMethod.MinMax, SIZES)


def percentile(name: str, data: Path) -> dict[str, Any]:
    """ONNX Runtime's Percentile calibrator for a few images."""
    return onnxruntime_calibrator(name, data, CalibrationMethod.Percentile, (PERCENTILE_IMAGES,))


def onnxruntime_calibrator(
    name: str, data: Path, method: CalibrationMethod, sizes: tuple[int, ...]
) -> dict[str, Any]:
    model, held, _ = prepared(name, data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        onnx.save(model.proto, path)
        watch = Watch()
        for size in sizes:
            calibrator = create_calibrator(
                path,
                None,
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=method,
            )
            with contextlib.redirect_stdout(sys.stderr):
                calibrator.collect_data(Reader(held, min(size, len(held))))
                calibrator.compute_data()
            del calibrator
        seconds = watch.read()
    return {"images": sum(min(s, len(held)) for s in sizes), **seconds, **memory(held)}


def resolution(name: str, data: Path) -> dict[str, Any]:
    """Ranges from the store and from every value, and the noise that either makes."""
    model, held, tensors = prepared(name, data)
    counted = calibrate(model, held, tensors, sizes=(*SIZES[:2], "all"))
    rows = []
    for images, exact in every_value(model, held, tensors):
        for tensor in tensors:
            rows += compared(counted, exact[tensor], tensor, images)
    frame = pd.DataFrame(rows)
    summary = frame.groupby(["images", "clipping"], sort=False).agg(
        activations=("tensor", "nunique"),
        mean_db=("decibel", lambda d: d.abs().mean()),
        largest_loss_db=("decibel", "max"),
        largest_gain_db=("decibel", lambda d: -d.min()),
        mean_range=("range", lambda r: r.abs().mean()),
        largest_range=("range", lambda r: r.abs().max()),
    )
    return {"images": len(held), "rows": summary.reset_index().to_dict("records")}


def compared(
    counted: CalibrationStatistics, exact: Histogram, tensor: str, images: int
) -> list[dict[str, Any]]:
    """Change of the noise in dB, and of the range's width, for every clipping and scheme."""
    rows = []
    found = counted.histogram(tensor, images)
    for clipping in CLIPPINGS:
        for scheme in get_args(Scheme):
            if scheme == "symmetric_power2":  # rounds small differences away, or enlarges them
                continue
            ends = [choose_range(h, clipping, scheme) for h in (found, exact)]  # type: ignore[arg-type]
            noise = [
                float(quantization_error(exact, choose_parameters(*end, scheme))) for end in ends
            ]
            widths = [high - low for low, high in ends]
            if noise[1] > 0.0 and noise[0] > 0.0 and widths[1] > 0.0:
                rows.append(
                    {
                        "images": images,
                        "clipping": clipping,
                        "tensor": tensor,
                        "decibel": 10.0 * np.log10(noise[0] / noise[1]),
                        "range": widths[0] / widths[1] - 1.0,
                    }
                )
    return rows


def every_value(
    model: FloatModel, held: Held, tensors: list[str]
) -> Iterator[tuple[int, dict[str, Histogram]]]:
    """Histograms of all values with fine bins, at each set size."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inner = [tensor for tensor in tensors if tensor != held.name]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in inner)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    dense = {tensor: np.zeros(1 << (32 - FINE_SHIFT), dtype=np.int64) for tensor in tensors}
    stops = [stop for stop in range(len(held) + 1) if stop % 8 == 0 or stop in SIZES]
    for start, stop in itertools.pairwise(stops):
        (feed,) = held.batches(8, np.arange(start, stop))
        values = feed | dict(zip(inner, session.run(inner, feed), strict=True))
        for tensor in tensors:
            bits = np.ascontiguousarray(values[tensor]).reshape(-1).view(np.uint32)
            dense[tensor] += np.bincount(bits >> FINE_SHIFT, minlength=dense[tensor].size)
        if stop in SIZES:
            yield stop, {tensor: fine_histogram(dense[tensor]) for tensor in tensors}


def fine_histogram(dense: NDArray[np.int64]) -> Histogram:
    """Written for itself, not with the package's code."""
    bins = np.flatnonzero(dense).astype(np.uint32)
    counts = dense[bins].astype(np.float64)
    start = (bins << FINE_SHIFT).view(np.float32).astype(np.float64)
    stop = ((bins + 1) << FINE_SHIFT).view(np.float32).astype(np.float64)
    low, high = np.minimum(start, stop), np.maximum(start, stop)
    reach = max(abs(low.min()), abs(high.max()))
    negligible = np.maximum(np.abs(start), np.abs(stop)) <= reach * 2.0**-20
    zeros = float(counts[negligible].sum())
    low, high, counts = low[~negligible], high[~negligible], counts[~negligible]
    order = np.argsort(low)
    edges = np.column_stack([low[order], high[order]]).reshape(-1)
    filled = np.column_stack([counts[order], np.zeros(order.size)]).reshape(-1)[:-1]
    return Histogram(edges, filled, zeros, float(edges[0]), float(edges[-1]))


def prepared(
    name: str, data: Path, *, repeat_to: int | None = None
) -> tuple[FloatModel, Held, list[str]]:
    """The model, its calibration inputs in memory, and the activations to calibrate."""
    path, calibration, _ = catalogue.sources(name, data)
    model = load_float_model(path)
    bound = calibration.bind([InputSpec(i.name, i.shape, i.dtype) for i in model.inputs])
    (input_name,) = (spec.name for spec in model.inputs)
    inputs = np.concatenate(
        [batch[input_name] for batch in bound.batches(16, np.arange(min(len(bound), SIZES[-1])))]
    )
    held = Held(inputs, input_name, repeat_to or len(inputs))
    return model, held, required_activations(place(model))


def memory(held: Held) -> dict[str, float]:
    """Peak memory of this process, and how much of it are the inputs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"peak_mib": peak, "inputs_mib": held.inputs.nbytes / 2**20}


MEASUREMENTS = {
    "ours": ours,
    "minmax": minmax,
    "percentile": percentile,
    "many": many,
    "resolution": resolution,
}


def is_done(name: str, what: str) -> bool:
    path = RESULTS / "measurements.csv"
    if not path.is_file():
        return False
    with path.open() as file:
        return any((row["model"], row["what"]) == (name, what) for row in csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows, with the header before the first."""
    new = not path.is_file()
    with path.open("a") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def report() -> None:
    """Writes README.md from what is measured so far."""
    measured = pd.read_csv(RESULTS / "measurements.csv").drop_duplicates(
        ["model", "what"], keep="last"
    )
    costs = []
    for name in measured["model"].unique():
        rows = measured[measured["model"] == name]
        by = {row["what"]: row for row in rows.to_dict("records") if row["ended"] == "well"}
        if "ours" not in by:
            continue
        own = by["ours"]
        cells = [
            str(name),
            f"{own['seconds']:.1f}",
            f"{own['float_seconds']:.1f}",
            f"{own['seconds'] / own['float_seconds']:.2f}",
            f"{own['peak_mib']:.0f}",
            f"{by['many']['peak_mib']:.0f}" if "many" in by else "",
        ]
        if "minmax" in by and "percentile" in by:
            theirs = by["percentile"]
            scale = by["minmax"]["images"] / theirs["images"]
            seconds = by["minmax"]["seconds"] + scale * theirs["seconds"]
            grown = (
                (theirs["peak_mib"] - by["minmax"]["peak_mib"]) / theirs["images"] * own["images"]
            )
            cells += [
                f"{by['minmax']['seconds']:.1f}",
                f"{scale * theirs['seconds']:.0f}",
                f"{seconds / own['seconds']:.1f}",
                f"{theirs['peak_mib']:.0f}",
                f"{max(grown, 0.0) / 1024:.1f}",
            ]
        costs.append(cells)
    head = [
        "model",
        "ours, s",
        "float, s",
        "ours / float",
        "ours, MiB",
        f"ours, MiB, {MANY:,} images",
    ]
    head += ["MinMax, s", "Percentile, s*", "both / ours", "Percentile, MiB, 32 images"]
    head += ["Percentile, GiB, 512 images*"]
    failed = measured[measured["ended"] != "well"]
    lines = [
        "# Cost of calibration",
        "",
        f"`taskset -c 1 python -m benchmarks.calibration_cost DATA`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        "Processor seconds and peak memory until the ranges of all 96 configurations of",
        "`quantune` are known (set sizes 1, 32 and 512), one thread, each measurement in its own",
        "process; the prepared images (294 MiB for 512 ImageNet images) and the libraries are",
        "part of the memory. Float inference was run before and behind each of our passes in the",
        "same process, in the batches that it is fastest with, so that their ratio stands",
        "whatever else the machine did; do not compare seconds of different rows. ONNX Runtime's",
        "calibrators were run once for each set size and method. *The Percentile calibrator was",
        f"run on {PERCENTILE_IMAGES} images and extrapolated in proportion to the number of",
        "images: it keeps all activations.",
        "",
        *table(head, [cells + [""] * (len(head) - len(cells)) for cells in costs]),
    ]
    lines += [
        f"- {row['model']}, {row['what']}: ended {row['ended']}" for _, row in failed.iterrows()
    ]
    if (RESULTS / "resolution.csv").is_file():
        found = pd.read_csv(RESULTS / "resolution.csv").drop_duplicates(
            ["model", "images", "clipping"], keep="last"
        )
        lines += [
            "",
            "## What sampling loses",
            "",
            "Ranges from the store against ranges from every single value (histograms with bins",
            "of 0.05 %), for all activations and the schemes asymmetric, symmetric and",
            "symmetric_uint8: change of the quantization noise (rounding and clipping, of every",
            "value) in dB, the mean of its magnitude, the largest loss and the largest gain, and",
            "of the width of the range. A change beside a range of the same width is that of a",
            "zero point that was rounded the other way.",
            "",
            *table(
                ["model", "images", "clipping", "dB, mean", "loss", "gain", "width, mean"],
                [
                    [
                        str(row["model"]),
                        str(row["images"]),
                        str(row["clipping"]),
                        f"{row['mean_db']:.3f}",
                        f"{row['largest_loss_db']:.2f}",
                        f"{row['largest_gain_db']:.2f}",
                        f"{row['mean_range']:.2%}",
                    ]
                    for _, row in found.iterrows()
                ],
            ),
        ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


if __name__ == "__main__":
    main()
