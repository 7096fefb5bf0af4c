"""What nodes take with integers and in float, beside what the order of float layers rests on.

    taskset -c 1 python -m benchmarks.node_times [--estimate]

`optuna_quantune/quantization/node_time.py` estimates the time of a node from its shapes. Here it
is measured: a network of a few equal nodes is run in turns with one of more of them, and the
difference is shared out, so that neither the ends of a network nor a profiler are part of it. A
conversion is half of what it costs to leave one of the layers in float. Shapes are those of
published networks; one input, one thread. Results: `benchmarks/results/node_times/`, of processors
without VNNI in its folder `without_vnni`. `--estimate` measures nothing, and estimates anew beside
what was measured, after a change of the estimates.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import machine
from benchmarks.kernels import Block
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.node_time import conversion_time
from optuna_quantune.quantization.node_time import node_time
from optuna_quantune.quantization.node_time import sizes_of
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.representation import Representation


RESULTS = Path(__file__).parent / "results" / "node_times"
WITHOUT_VNNI = RESULTS / "without_vnni"
REPEATS = 200
# Equal nodes in the shorter and in the longer network; the second one is kept in float.
FEW, MORE = 3, 7
# The line of a result that names the machine.
HEADER = 2
IN_FLOAT = "node_1"
# Channels and height of the activations.
SHAPES = ((16, 32), (24, 56), (64, 56), (96, 112), (128, 28), (256, 14), (512, 7), (1024, 7))
# Longer than any that is published.
LONGEST = 2e9

NODES: dict[str, Callable[[Block, int], str]] = {
    "Conv 1x1": lambda block, channels: block.conv(channels, channels),
    "Conv 3x3": lambda block, channels: block.conv(channels, channels, 3),
    "Conv 3x3, depthwise": lambda block, channels: block.conv(
        channels, channels, 3, group=channels
    ),
    "Conv 3x3, groups of 8": lambda block, channels: block.conv(
        channels, channels, 3, group=channels // 8
    ),
    "Conv 1x1, Clip": lambda block, channels: _clipped(block, channels),
    "Add": lambda block, _: block.add("Add", "first"),
}


def _clipped(block: Block, channels: int) -> str:
    """A convolution and a ReLU6."""
    block.conv(channels, channels)
    ends = (block.constant(np.array(end, np.float32)) for end in (0.0, 6.0))
    return block.add("Clip", *ends)


def network(kind: str, shape: tuple[int, int], number: int) -> FloatModel:
    """So many equal nodes between two convolutions."""
    channels, size = shape
    block = Block(kind, (channels, size, size))
    block.conv(channels, channels)
    block.nodes[-1].output[0] = block.last = "first"
    for index in range(number):
        start = len(block.nodes)
        NODES[kind](block, channels)
        block.nodes[start].name = f"node_{index}"
    block.conv(channels, channels)
    return block.load()


def quantized(model: FloatModel, inputs: ArrayInputs, *in_float: str) -> bytes:
    """The network with integers, all but some nodes."""
    placement = place(model)
    counted = calibrate(model, inputs, required_activations(placement), sizes=("all",))
    quantizer = Quantizer(
        model, counted, representation=Representation(for_kernels=True), placement=placement
    )
    quantizer.float_order = (in_float,)
    proto = quantizer.quantize(QuantizationConfig(float_layers=len(in_float))).proto
    return bytes(proto.SerializeToString())


def measure(kind: str, shape: tuple[int, int]) -> dict[str, object]:
    """Microseconds of such a node and of a conversion, measured and estimated."""
    channels, size = shape
    values = np.random.default_rng(1).standard_normal((4, channels, size, size))
    inputs = ArrayInputs({"x": values.astype(np.float32)})
    few, more = (network(kind, shape, number) for number in (FEW, MORE))
    integers = quantized(few, inputs)

    def longer(first: bytes, second: bytes) -> float:
        """How much longer the second one takes."""
        slow, fast = (make_session(model, spinning=False) for model in (second, first))
        feeds = list(inputs.batches(1))
        found = latency_ratio(slow, fast, feeds, repeats=REPEATS)
        return 1e3 * (found.median_ms - found.reference_median_ms)

    def node(first: bytes, second: bytes) -> float:
        return longer(first, second) / (MORE - FEW)

    measured = {
        "float": node(few.proto.SerializeToString(), more.proto.SerializeToString()),
        "int8": node(integers, quantized(more, inputs)),
    }
    if kind != "Add":  # between integers it is computed with integers, whatever is wished
        mixed = longer(integers, quantized(few, inputs, IN_FLOAT))
        measured["conversion"] = (mixed + measured["int8"] - measured["float"]) / 2
    estimated = estimates(kind, shape, in_pairs=detect_vnni() is False)
    row: dict[str, object] = {"node": kind, "channels": channels, "size": size}
    for what, microseconds in measured.items():
        row[f"{what}, us"] = round(microseconds, 1)
        row[f"{what} estimated, us"] = estimated[what]
    return row


def estimates(kind: str, shape: tuple[int, int], *, in_pairs: bool) -> dict[str, float]:
    """Microseconds of such a node and of a conversion, estimated."""
    channels, size = shape
    few = network(kind, shape, FEW)
    (middle,) = (n for n in few.proto.graph.node if n.name == IN_FLOAT)
    estimate = functools.partial(
        node_time, middle, few, sizes_of(few.proto.graph), clipped=kind.endswith("Clip")
    )
    estimated = {
        "float": estimate("float"),
        "int8": estimate("int8", in_pairs=in_pairs),
        "conversion": conversion_time(float(channels * size * size)),
    }
    return {what: round(nanoseconds / 1e3, 1) for what, nanoseconds in estimated.items()}


def cases() -> list[tuple[str, tuple[int, int]]]:
    """Every node with every shape, but for the longest."""
    return [
        (kind, (channels, size))
        for kind in NODES
        for channels, size in SHAPES
        if kind != "Conv 3x3" or 9.0 * channels**2 * size**2 < LONGEST
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimate", action="store_true", help="only beside what was measured")
    if parser.parse_args().estimate:
        for folder in filter(Path.exists, (RESULTS, WITHOUT_VNNI)):
            estimate_again(folder)
        return
    folder = WITHOUT_VNNI if detect_vnni() is False else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write(
        folder,
        pd.DataFrame([measure(*case) for case in cases()]),
        f"`taskset -c 1 python -m benchmarks.node_times`; "
        f"{machine.as_markdown(machine.describe())}.",
    )


def estimate_again(folder: Path) -> None:
    """Beside what was measured, on the machine that it was measured on."""
    frame = pd.read_csv(folder / "node_times.csv")
    for index, row in frame.iterrows():
        case = row["node"], (row["channels"], row["size"])
        for what, value in estimates(*case, in_pairs=folder == WITHOUT_VNNI).items():
            if not pd.isna(row[f"{what}, us"]):
                frame.loc[index, f"{what} estimated, us"] = value
    write(folder, frame, (folder / "README.md").read_text().splitlines()[HEADER])


def write(folder: Path, frame: pd.DataFrame, header: str) -> None:
    """The table; `header` says with which command, and on which machine."""
    frame.to_csv(folder / "node_times.csv", index=False)
    errors = []
    for what in ("float", "int8", "conversion"):
        ratio = np.log2(frame[f"{what} estimated, us"] / frame[f"{what}, us"].clip(lower=0.5))
        errors.append(
            f"{what} {2 ** ratio.median():.2f} ({2 ** ratio.quantile(0.1):.2f} to "
            f"{2 ** ratio.quantile(0.9):.2f})"
        )
    cells = frame.astype(object).fillna("").astype(str).to_numpy().tolist()
    table = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    text = f"""# Estimated times of nodes

{header}

Microseconds of a node in the middle of a network, and of making floats of integers or integers of
floats there; medians of {REPEATS} runs in turns. Estimated over measured, median (10th to 90th
percentile): {"; ".join(errors)}.

{lines}
"""
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
