"""Measures what the peers made, and writes the comparison.

    python -m benchmarks.collect_peers [TASKS RUNS]

RUNS is where the scripts of `benchmarks/peers` left their models and records. Every model is
measured on the inputs that nothing was chosen by, with its latency beside the float model's. The
means over models have `tune` and the rule of thumb of `benchmarks.live` beside them, which has the
same models, inputs and splits. Results go to `benchmarks/results/peers/`; without TASKS and RUNS
what was measured before is put together with the present results of `benchmarks.live`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks import machine
from benchmarks.finished_model import describe
from benchmarks.live_report import EXTENDED
from benchmarks.peers.task import Task


RESULTS = Path(__file__).parent / "results" / "peers"
LIVE = Path(__file__).parent / "results" / "live" / "summary.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="TASKS RUNS")
    arguments = parser.parse_args()
    if len(arguments.folders) not in (0, 2):
        parser.error("give TASKS and RUNS, or nothing")
    records = measured(*arguments.folders) if arguments.folders else known()
    write(records, RESULTS, pd.read_csv(LIVE))


def measured(tasks: Path, runs: Path) -> list[dict[str, Any]]:
    """What the peers left, with their models measured."""
    records = []
    for path in sorted(runs.glob("*.json")):
        record = json.loads(path.read_text()) | {"machine": machine.describe()}
        model = path.with_suffix(".onnx")
        if model.is_file():
            try:
                record |= describe(Task.load(tasks / record["model"]), model)
            except Exception as error:  # such as operators that ONNX Runtime does not have
                record["ended"] += f"; its model does not run here ({error})"[:300]
        records.append(record)
    return records


def known() -> list[dict[str, Any]]:
    """What was measured before."""
    return [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]


def write(records: list[dict[str, Any]], folder: Path, live: pd.DataFrame) -> None:
    """Writes runs.jsonl, README.md and one plot a model.

    Args:
        records: What the peers left, and what was measured of their models.
        folder: Where to.
        live: The summary of `benchmarks.live`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "runs.jsonl").write_text(lines + "\n")
    text = [
        "# Peers",
        "",
        "`python -m benchmarks.collect_peers TASKS RUNS`;",
        f"{machine.of_all(records)}.",
        "The runs of `benchmarks/peers`, each in its own environment.",
        "",
        "`best`: top-1 accuracy on the inputs that it chose by; `at`: seconds until that model",
        "was measured; `held out`: of that model, or of the one that the tool returned, on the",
        "other inputs, in points against float with the paired 95 % interval; `latency`: batch-1",
        "latency over float's in ONNX Runtime; `memory`: peak beyond the inputs; `install`: size",
        "of the environment; `load`: of the machine at the end.",
        "",
        *overall(records, live),
    ]
    for model in dict.fromkeys(record["model"] for record in records):
        chosen = [record for record in records if record["model"] == model]
        text += [
            f"## {model}",
            "",
            "| peer | models | seconds | best | at | held out, points | agreement | latency "
            "| size | memory | install | load | ended |",
            "| --- |" + " --- |" * 12,
            *(row(record) for record in chosen),
            "",
            f"![accuracy over time]({model}.png)",
            "",
        ]
        plot(chosen, folder / f"{model}.png")
    (folder / "README.md").write_text("\n".join(text))


def overall(records: list[dict[str, Any]], live: pd.DataFrame) -> list[str]:
    """Means over the models that each peer quantized, as Markdown."""
    found = pd.DataFrame(
        {
            "method": record["peer"],
            "model": record["model"],
            "points": 100 * record["difference"][0],
            "agreement": record["agreement_held_out"],
            "latency": record["latency_ratio"],
            "seconds": record["seconds"],
        }
        for record in records
        if "difference" in record
    )
    ours = live[live["model"].isin({record["model"] for record in records})].rename(
        columns={
            "held_out_points": "points",
            "latency_ratio": "latency",
            "whole_seconds": "seconds",
        }
    )
    names = {
        "quantune": "`tune`, preset `quantune`",
        EXTENDED: "`tune`, preset `extended`, no bound on latency",
        "rule of thumb": "rule of thumb",
    }
    ours = ours[ours["method"].isin(names)].replace({"method": names})
    rows = []
    for method, chosen in pd.concat([ours, found]).groupby("method", sort=False):
        latency = float(np.exp(np.log(chosen["latency"].astype(float)).mean()))
        rows.append(
            f"| {method} | {len(chosen)} | {chosen['points'].mean():.2f} "
            f"| {chosen['points'].min():.1f} | {chosen['agreement'].mean():.3f} "
            f"| {chosen['agreement'].min():.3f} | {latency:.2f} | {chosen['seconds'].sum():.0f} |"
        )
    return [
        "## All models",
        "",
        "Means over the models that a peer quantized (of the latency the geometric one), on the",
        "inputs that nothing was chosen by; `seconds` of all searches together. `tune` and the",
        "rule of thumb are those of [live](../live/README.md), which names its own machine:",
        "latencies and seconds depend on the processor.",
        "",
        "| | models | held out, points | worst | agreement | worst | latency | seconds |",
        "| --- |" + " --- |" * 7,
        *rows,
        "",
    ]


def row(record: dict[str, Any]) -> str:
    """One run as a line of Markdown."""
    cells = [record["peer"], str(len(record["accuracies"])), f"{record['seconds']:.0f}"]
    if record["accuracies"]:
        at, best = max(record["accuracies"], key=lambda pair: (pair[1], -pair[0]))
        cells += [f"{best:.4f}", f"{at:.0f}"]
    else:
        cells += ["-", "-"]
    if "difference" in record:
        value, low, high = (100 * end for end in record["difference"])
        cells += [
            f"{value:.2f} [{low:.2f}, {high:.2f}]",
            f"{record['agreement_held_out']:.3f}",
            f"{record['latency_ratio']:.2f}",
            f"{record['size_ratio']:.2f}",
        ]
    else:
        cells += ["-"] * 4
    cells += [f"{record['memory_mb']} MB", f"{record['install_mb']} MB"]
    cells += [str(record["load"]), record["ended"].replace("|", "/")]
    return f"| {' | '.join(cells)} |"


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Best accuracy over time of the runs on one model."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    for record in (r for r in records if r["accuracies"]):
        seconds, accuracies = np.array(record["accuracies"]).T
        axes.step(
            [*seconds, record["seconds"]],
            [*np.maximum.accumulate(accuracies), accuracies.max()],
            where="post",
            label=record["peer"],
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("best top-1 so far, selecting inputs")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
