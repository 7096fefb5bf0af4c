"""Figures in the documents are those of the results: what is measured again is told again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "squeezenet1_1": "SqueezeNet 1.1",
    "mobilenetv2_1.0": "MobileNetV2",
    "shufflenetv1_0.5_g3": "ShuffleNet 0.5x",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "googlenet": "GoogLeNet",
    "cifar10_resnet20": "ResNet-20 (CIFAR-10)",
    "cifar10_resnet8": "ResNet-8 (CIFAR-10)",
}
PEERS = {
    "nncf_accuracy_control": "NNCF, control of the accuracy",
    "olive_tpe": "Olive, TPE",
    "quark_autosearch": "Quark, AutoSearchPro",
    "onnx_neural_compressor": "onnx-neural-compressor",
    "aimet_onnx": "AIMET, with and without equalization",
}


def document(path: str) -> str:
    """Its text in one line, so that it does not matter where lines are broken."""
    return " ".join((ROOT / path).read_text().split())


def accuracy(folder: str) -> list[dict[str, Any]]:
    lines = (RESULTS / folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def share(value: float) -> str:
    """As 0.5 is written there: .500."""
    return f"{value:.3f}".removeprefix("0")


def change(points: float) -> str:
    return f"{'gains' if points > 0 else 'loses'} {abs(points):.2f}"


@pytest.fixture(scope="module")
def live() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "live" / "summary.csv").set_index(["method", "model"])


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    text = document("README.md")
    for row in accuracy("accuracy"):
        name = NAMES[row["model"]] if row["space"] == "quantune" else ""
        difference, low, high = (100 * value for value in row["difference"])
        agreement, least, most = map(share, row["agreement"])
        cells = [
            name,
            f"`{row['space']}`",
            share(row["float_top1"]),
            share(row["top1"]),
            f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]",
            f"{agreement} [{least}, {most}]",
            f"{row['bytes'] / row['float_bytes']:.2f}x",
            f"{row['latency_1_thread'][0]:.2f}x",
        ]
        assert " ".join(f"| {' | '.join(cells)} |".split()) in text


def test_agreement_on_an_integer_only_accelerator_is_that_of_the_results() -> None:
    found = {
        (row["model"], row["space"]): share(row["agreement"][0])
        for row in accuracy("accuracy_vta")
    }
    mobilenet, shufflenet, efficientnet = (
        (found[model, "vta"], found[model, "extended"])
        for model in ("mobilenetv2_1.0", "shufflenetv1_0.5_g3", "efficientnet_lite0")
    )
    assert (
        f"leave MobileNetV2 with {mobilenet[0]} agreement, ShuffleNet with {shufflenet[0]} and "
        f"EfficientNet-Lite0 with {efficientnet[0]}; `--space extended` finds {mobilenet[1]}, "
        f"{shufflenet[1]} and {efficientnet[1]} there"
    ) in document("README.md")
    assert (
        f"take MobileNetV2 from {mobilenet[0]} to {mobilenet[1]} agreement with float and "
        f"ShuffleNet from {shufflenet[0]} to {shufflenet[1]}"
    ) in document("docs/guide.md")


def test_what_the_wall_clock_says_is_that_of_the_results(live: pd.DataFrame) -> None:
    exhaustive, ours = live.loc["exhaustive"], live.loc["quantune"]
    ties = exhaustive["whole_seconds"] / ours["tie_seconds"]
    wholes = exhaustive["whole_seconds"] / ours["whole_seconds"]
    tie, whole = (f"{np.exp(np.log(ratios).mean()):.0f}" for ratios in (ties, wholes))
    seconds = ours["whole_seconds"]
    readme, benchmarks = document("README.md"), document("benchmarks/README.md")
    assert f"took {seconds.min():.0f} to {seconds.max():.0f} seconds a model" in readme
    assert f"takes {whole} times as long in the geometric mean over eight models" in readme
    assert f"and {tie} times as long as `tune` until" in readme
    assert f"takes {tie} times as long, in the geometric mean ({ties.min():.0f} to" in benchmarks
    assert f"{ties.max():.0f}), as `tune` does" in benchmarks
    assert f"{whole} times as long as the whole of `tune`" in benchmarks
    points = ours["held_out_points"]
    assert f"{change(points.mean())} points of top-1 against float in the mean" in benchmarks
    assert f"and {-points.min():.1f} on the worst" in benchmarks
    extended = live.loc["quantune, extended"]
    points = extended["held_out_points"]
    assert f"{change(points.mean())} points in the mean and" in benchmarks
    assert f"loses {-points.min():.1f} on the worst, and agrees" in benchmarks
    assert f"on {100 * extended['agreement'].mean():.1f} % of the inputs in the mean" in benchmarks
    assert f"and {100 * extended['agreement'].min():.1f} % on the worst" in benchmarks


def test_the_table_of_peers_is_that_of_the_results() -> None:
    text = document("benchmarks/README.md")
    results = (RESULTS / "peers" / "README.md").read_text()
    rows = [line for line in results.split("## All models")[1].splitlines() if line[:2] == "| "]
    for row in rows[1:9]:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        cells = [share(float(c)) if re.fullmatch(r"0\.\d{3}", c) else c for c in cells]
        assert f"| {PEERS.get(name, name)} | {' | '.join(cells)} |" in text


def test_what_the_wall_clock_says_without_vnni_is_that_of_the_results() -> None:
    path = RESULTS / "live_without_vnni" / "summary.csv"
    found = pd.read_csv(path).set_index(["method", "model"])
    exhaustive, ours = found.loc["exhaustive"], found.loc["quantune"]
    extended, rule = found.loc["quantune, extended"], found.loc["rule of thumb"]
    ties = exhaustive["whole_seconds"] / ours["tie_seconds"]
    tie = f"{np.exp(np.log(ties).mean()):.0f}"
    text = " ".join(document("benchmarks/README.md").split())
    assert f"takes {tie} times as long ({ties.min():.0f} to {ties.max():.0f}) until a tie" in text
    assert (
        f"`tune` loses {-ours['held_out_points'].mean():.2f} points in the mean and "
        f"{-ours['held_out_points'].min():.1f} on the worst, with the preset `extended` "
        f"{-extended['held_out_points'].mean():.2f} in the mean and "
        f"{-extended['held_out_points'].min():.1f} on the worst, "
        f"at {100 * extended['agreement'].mean():.1f} % agreement in the mean and "
        f"{100 * extended['agreement'].min():.1f} % on the worst"
    ) in text
    assert (
        f"The rule of thumb loses {-rule['held_out_points'].mean():.2f} and "
        f"{-rule['held_out_points'].min():.1f}"
    ) in text


@pytest.mark.parametrize(
    "path",
    [
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"),
        *("benchmarks/peers/README.md", "docs/guide.md", "docs/lint.md", "docs/report.md"),
    ],
)
def test_links_lead_to_files(path: str) -> None:
    folder = (ROOT / path).parent
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]*)\)", document(path))]
    inside = [target for target in targets if target and not target.startswith("https://")]
    assert [target for target in inside if not (folder / target).exists()] == []
