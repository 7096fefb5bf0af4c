"""What leaving layers in float gains and costs, step by step of the knob ``float_layers``.

    python -m benchmarks.float_layers DATA [--models NAME ...] [--work FOLDER]

DATA is a folder as in `benchmarks.catalogue`. For each model and each number of steps the model is
built (all corrections, one scale for each channel), and measured: its latency over the float
model's with one thread, batch size 1, and its output noise and agreement with the float model on
256 calibration images that neither calibration nor the probe saw (of CIFAR-10 test images).
Beside the order of this project stands the one of layer-wise tools: layers one by one, each time
the one that takes most noise away for the time it adds, by the same estimates of both.

Results go to `benchmarks/results/float_layers/`: `results.csv`, a line for each model, order and
number of steps (what is there is not measured again), `README.md`, and a plot of both orders.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import pandas as pd

from benchmarks import catalogue
from benchmarks import machine
from benchmarks.predict import markdown
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.sensitivity import LONGEST_ORDER
from optuna_quantune.space import SearchSpace


RESULTS = Path(__file__).parent / "results" / "float_layers"
CONFIG: Final = {
    "clipping": "mse",
    "weight_clipping": "mse",
    "weight_rounding": "compensated",
    "zero_dead_weights": True,
    "bias_correction": True,
}
ORDERS = ("sets", "one by one")
LATENCY_REPEATS = 60
# Layer-wise orders go as far as this, in shares of the layers.
FARTHEST = 0.9
KEYS = ["model", "order", "steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "float_layers")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "results.csv"
    frame = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEYS)
    for name in catalogue.names(arguments.data, arguments.models):
        objective = objective_of(name, arguments.data, arguments.work)
        done = set(frame[KEYS].itertuples(index=False, name=None))
        for row in measured(name, objective, done):
            print(row, flush=True)
            frame = pd.concat([frame, pd.DataFrame([row])], ignore_index=True)
            frame.to_csv(file, index=False, float_format="%.5g")
        write(frame)


def objective_of(name: str, data: Path, work: Path) -> QuantizationObjective:
    """What builds and measures a model."""
    path, calibration, _ = catalogue.sources(name, data)
    choosing, _ = catalogue.choosing_and_validation(name, data)
    return QuantizationObjective(
        path,
        calibration=calibration,
        evaluation=choosing,
        metric="agreement",
        threads=1,
        cache=work,
        space=SearchSpace.preset("extended"),
    )


def measured(
    name: str, objective: QuantizationObjective, done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """A row for each order and number of steps that is not done."""
    for label, order in zip(ORDERS, (objective.float_order, one_by_one(objective)), strict=True):
        objective.quantizer.float_order = order
        for steps in range(len(order) + 1):
            if (name, label, steps) in done:
                continue
            knobs = {**CONFIG, "float_layers": steps}
            config = QuantizationConfig.from_dict(knobs)
            model = objective.quantize(config).proto.SerializeToString()
            found = objective.evaluate(model).measurement
            latency = objective.latency(model, repeats=LATENCY_REPEATS)
            yield {
                "model": name,
                "order": label,
                "steps": steps,
                "nodes": len(objective.quantizer.float_layers(config)),
                "latency": latency.ratio,
                "latency_low": latency.low,
                "latency_high": latency.high,
                "expected_latency": objective.expected_latency(knobs),
                "sqnr_db": found.sqnr_db,
                "predicted_sqnr_db": objective.features(knobs)["predicted_sqnr_db"],
                "agreement": found.agreement,
            }


def one_by_one(objective: QuantizationObjective) -> list[tuple[str, ...]]:
    """Steps of single layers, as many as go along the whole way in `LONGEST_ORDER` steps."""
    graph = objective.placed_graph
    noise, time = graph.noise(frozenset()), graph.time(frozenset())
    names: list[str] = []
    while len(names) < FARTHEST * len(graph.layers):
        names.append(
            max(graph.layers.difference(names), key=lambda n: _score(graph, names, n, noise, time))
        )
    ends = np.linspace(0, len(names), LONGEST_ORDER + 1).round().astype(int)
    parts = [tuple(names[i:j]) for i, j in zip(ends, ends[1:], strict=False)]
    return [part for part in parts if part]


def _score(
    graph: PlacedGraph, names: list[str], name: str, noise: float, time: float
) -> tuple[bool, float]:
    quieter, slower = graph.change(frozenset(names), frozenset([name]))
    quieter, slower = quieter / noise, slower / time
    return (True, quieter - slower) if slower <= 0.0 else (False, quieter / slower)


def write(frame: pd.DataFrame) -> None:
    """The table, and the plot of both orders."""
    from matplotlib import pyplot

    table = pd.DataFrame(
        {
            "model": row.model,
            "order": row.order,
            "steps": str(int(row.steps)),
            "nodes": str(int(row.nodes)),
            "latency": f"{row.latency:.2f} ({row.latency_low:.2f} to {row.latency_high:.2f})",
            "expected": f"{row.expected_latency:.2f}",
            "SQNR, dB": f"{row.sqnr_db:.1f}",
            "predicted": f"{row.predicted_sqnr_db:.1f}",
            "agreement, %": f"{100 * row.agreement:.1f}",
        }
        for row in frame.itertuples()
    )
    explanation = "\n\n".join(__doc__.split("\n\n")[2:-1])
    error = (frame.expected_latency - frame.latency).abs().mean()
    lines = [
        "# Layers in float, step by step",
        "",
        f"`python -m benchmarks.float_layers DATA`; {machine.as_markdown(machine.describe())}.",
        "",
        explanation,
        "",
        "Latencies with 95 % intervals, by order statistics of interleaved runs. Mean absolute",
        f"difference of expected and measured latency over all rows: {error:.3f}.",
        "",
        "![output noise by latency for both orders](float_layers.png)",
        "",
        *markdown(table),
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
    names = list(dict.fromkeys(frame.model))
    figure, axes = pyplot.subplots(2, -(-len(names) // 2), figsize=(14, 7), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for label, marker in zip(ORDERS, "ox", strict=True):
            rows = frame[(frame.model == name) & (frame.order == label)]
            axis.plot(rows.latency, rows.sqnr_db, marker, label=label)
        axis.set_title(name)
        axis.set_xlabel("latency over float's")
        axis.set_ylabel("output SQNR, dB")
        axis.legend()
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(RESULTS / "float_layers.png", dpi=90)


if __name__ == "__main__":
    main()
