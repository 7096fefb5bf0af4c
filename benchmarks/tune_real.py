"""`optuna-quantune tune` on real models: the commands, tables of trials and timings.

    python -m benchmarks.tune_real DATA [--models NAME ...] [--n-trials 10] [--space quantune]

DATA is a folder as in `benchmarks.catalogue`; the models are ones for ImageNet. Results go to
`benchmarks/results/tune_real/`: what the command printed, the trials as CSV, and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pandas as pd

from benchmarks import catalogue
from benchmarks import machine
from benchmarks.independent_check import top1


RESULTS = Path(__file__).parent / "results" / "tune_real"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=["squeezenet1_1", "mobilenetv2_1.0"])
    parser.add_argument("--n-trials", type=int, default=10)
    parser.add_argument("--space", default="quantune")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in catalogue.names(arguments.data, arguments.models):
        run(name, arguments)


def run(name: str, arguments: argparse.Namespace) -> None:
    """Tunes one model in a process of its own and keeps everything that it printed."""
    data: Path = arguments.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # The calibration images, which only need to be cropped, are prepared like the others.
        recipe = catalogue.preprocessing(name, data, "imagenet-val")
        (work / "preprocessing.json").write_text(json.dumps(recipe))
        for link in ("models", "imagenet-val", "imagenet-calibration"):
            (work / link).symlink_to(data / link)
        command = [
            *("optuna-quantune", "tune", str(catalogue.model_path(name, data).relative_to(data))),
            *("--calibration", "imagenet-calibration", "--evaluation", "imagenet-val"),
            *("--preprocessing", "preprocessing.json", "--n-trials", str(arguments.n_trials)),
            *(
                "--space",
                arguments.space,
                "--seed",
                str(arguments.seed),
                "--storage",
                "sqlite:///study.db",
            ),
            *("--source-studies", "none"),  # the records are of these very models
            *("--study-name", name, "--cache", "cache", "--output", f"{name}.int8.onnx"),
        ]
        # The command of this environment, also where it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        start = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=work,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode != 0:
            sys.exit(f"{name}: exit code {done.returncode}: {done.stderr}")
        checked = top1(
            str(work / f"{name}.int8.onnx"),
            str(work / "imagenet-val"),
            str(work / "preprocessing.json"),
        )
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{work}/study.db")
        label = name if arguments.space == "quantune" else f"{name}-{arguments.space}"
        write(label, command, done.stdout, checked, seconds, study)


def write(
    name: str,
    command: list[str],
    printed: str,
    checked: float,
    seconds: float,
    study: optuna.Study,
) -> None:
    """Writes the text, the trials and the plot of one run."""
    text = [
        f"# {name}",
        "",
        f"{machine.as_markdown(machine.describe())}.",
        "",
        "`python -m benchmarks.tune_real DATA` ran, in a folder with links to DATA and the",
        "model's `preprocessing.json` (its entry in `models.json`, `resize_short_side` null):",
        "",
        f"    {' '.join(command)}",
        "",
        f"It took {seconds:.0f} s of wall clock in all, calibration on 1,000 images included. It",
        "printed:",
        "",
        *(f"    {line}".rstrip() for line in printed.splitlines()),
        "",
        "`benchmarks/independent_check.py` (onnxruntime and numpy only) on the written file and",
        f"the same images: top-1 {checked:.4f}.",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
    complete = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    rows = [
        {
            "trial": trial.number,
            "value": trial.value,
            **trial.params,
            **{k: v for k, v in trial.user_attrs.items() if isinstance(v, int | float)},
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        for trial in complete
    ]
    frame = pd.DataFrame(rows)
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    axes.scatter(frame["trial"], frame["value"], zorder=3)
    axes.step(frame["trial"], frame["value"].cummax(), where="post", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("top-1 accuracy (inputs of the search)")
    axes.set_title(name)
    axes.legend()
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
