"""Options that several commands have, and what their texts are read into."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import get_args
from typing import TypeVar

import click

from optuna_quantune.chosen_sampler import RECORDS
from optuna_quantune.chosen_sampler import Source
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import as_input_source
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.importing import import_function
from optuna_quantune.objective import DEFAULT_CACHE
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.selection import Preference
from optuna_quantune.studies import load_study


Command = TypeVar("Command", bound=Callable[..., Any])


def _all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator; the last of them is the first one that `--help` shows."""

    def decorate(command: Command) -> Command:
        for option in options:
            command = option(command)
        return command

    return decorate


calibration_option = click.option(
    "--calibration",
    metavar="PATH",
    help="Inputs for calibration: a folder of images, or an .npy or .npz file of arrays.",
)
evaluate_option = click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="In place of --metric: called with an InferenceSession, gives a number.",
)
# Of a command that calibrates and evaluates.
split_options = _all_of(
    click.option(
        "--labels",
        metavar="FILE",
        help="Of a folder a CSV file with the columns file,label_index, labels.csv in it if that "
        "is there; of arrays an .npy file, the array 'labels' of an .npz file if that is there.",
    ),
    click.option("--evaluation", metavar="PATH", help="Inputs for evaluation, in the same way."),
    calibration_option,
)
# What inputs are made of, and how a model is run here.
input_options = _all_of(
    click.option(
        "--threads",
        type=click.IntRange(1),
        show_default="all cores",
        help="Threads of one inference when latency is measured, as the application will have "
        "them. Everything else uses all cores that the process may.",
    ),
    click.option(
        "--cache",
        default=DEFAULT_CACHE,
        show_default="the user's cache folder",
        help="Folder where calibration statistics are kept for the next run.",
    ),
    click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="ONNX Runtime execution provider with its options; several in order of "
        "preference. By default the target's.",
    ),
    click.option(
        "--data",
        metavar="MODULE:FUNCTION",
        help="In place of folders and files: FUNCTION('calibration') and FUNCTION('evaluation') "
        "give an array, arrays by input name, a calibration data reader or an InputSource.",
    ),
    click.option(
        "--preprocessing",
        metavar="JSON",
        help="JSON file of the images' preprocessing: mean, std, scale, channel_order, "
        "resize_short_side, crop, interpolation, layout.",
    ),
)
# What a sampler may learn from.
source_option = click.option(
    "--source-studies",
    default=RECORDS,
    metavar="NAMES",
    help="What the sampler learns from before the first trial, with commas between: studies of "
    "other models in the same storage, and 'records', those of the reference models that the "
    "package ships; 'none' for nothing.",
)
# The same with the target, which a study that is joined has already.
data_options = _all_of(
    click.option(
        "--target",
        default="cpu",
        help="Device that the model is made for: cpu, arm64, tensorrt, qnn or vta.",
    ),
    input_options,
)


def search_options(n_trials: int) -> Callable[[Command], Command]:
    """How a search goes, and what it leaves.

    Args:
        n_trials: The default number of trials.
    """
    return _all_of(
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            help="Seed of sampler and split.",
        ),
        click.option(
            "--exact",
            is_flag=True,
            help="Run every trial on all inputs, unless it can no longer be the best.",
        ),
        click.option(
            "--precision",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="X",
            help="A trial ends when its accuracy is certain to X (0.002 is 0.2 points, the "
            "half width of the 95 % interval). [default: 0.002, at least two inputs]",
        ),
        click.option(
            "--report",
            metavar="HTML",
            help="Write a report of the search: one HTML file with tables and figures.",
        ),
        click.option(
            "--study-name",
            show_default="of the model's name and what is searched",
            help="Name of the study in the storage.",
        ),
        click.option(
            "--storage",
            help="Database URL (sqlite:///x.db) or journal file; the same command again goes "
            "on where it stopped.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="No trial but the first begins later than this after the start.",
        ),
        click.option(
            "--n-trials",
            type=click.IntRange(1),
            default=n_trials,
            help="Trials in all, those already in the storage included.",
        ),
        click.option(
            "--sampler",
            default="quantune",
            help="'quantune', a class of optuna.samplers, or module:factory.",
        ),
        click.option(
            "--space",
            default="quantune",
            help="Preset (quantune, extended or vta), or JSON file of knobs and choices.",
        ),
    )


# What a search is for.
goal_options = _all_of(
    click.option(
        "--prefer",
        type=click.Choice(get_args(Preference)),
        show_default="accuracy (the least noise) under a bound on latency or size without one "
        "on accuracy; otherwise size where only size is a goal or the target is not timed here; "
        "otherwise latency",
        help="What decides among models that cannot be told from the best one.",
    ),
    click.option(
        "--max-size",
        type=click.IntRange(1),
        metavar="BYTES",
        help="Take the most accurate model whose file has at most so many bytes.",
    ),
    click.option(
        "--max-latency",
        type=click.FloatRange(0, min_open=True),
        metavar="RATIO",
        help="Take the most accurate model whose latency is at most RATIO times that of the "
        "float model (0.5 is twice as fast).",
    ),
    click.option(
        "--max-accuracy-drop",
        type=click.FloatRange(0),
        metavar="X",
        help="Take the fastest model that loses at most X (0.01 is one point).",
    ),
    click.option(
        "--objectives",
        default="accuracy",
        metavar="NAMES",
        help="What is optimised, with commas between: accuracy (the metric), latency, size. "
        "Several give a Pareto front.",
    ),
)


def read_evaluation(
    evaluate: str | None,
    path: str | None,
    data: str | None,
    preprocessing: str | None,
    labels: str | None,
) -> InputSource | None:
    """The evaluation inputs; None where a loop of the user's brings its own."""
    if evaluate is not None and path is None:
        return None
    return read_inputs("evaluation", path, data, preprocessing, labels=labels)


def read_inputs(
    split: str,
    path: str | None,
    data: str | None,
    preprocessing: str | None,
    *,
    labels: str | None = None,
) -> InputSource:
    """The inputs that the options ask for: a folder or file, or what a function gives."""
    if (path is None) == (data is None):
        raise InputError(f"--{split}: give a folder of images, or inputs by --data or in a file")
    if data is None:
        recipe = None if preprocessing is None else Preprocessing.from_json(preprocessing)
        return as_input_source(path, labels=labels, preprocessing=recipe)
    if labels is not None or preprocessing is not None:
        raise InputError("--data: its inputs bring their own labels and preprocessing")
    function = import_function(data, "--data")
    try:
        inspect.signature(function).bind(split)
    except TypeError as error:
        raise InputError(
            f"--data {data!r}: is called with 'calibration' or 'evaluation'; let it take that"
        ) from error
    try:
        return as_input_source(function(split))
    except InputError:
        raise
    except Exception as error:  # whatever a user's function, or the reader it gives, raises
        raise InputError(
            f"--data {data!r}: fails for {split!r}: {type(error).__name__}: {error}"
        ) from error


def read_sources(text: str, storage: str | None, study_name: str | None) -> list[Source]:
    """The earlier studies that `--source-studies` names."""
    found: list[Source] = []
    names = [name.strip() for name in text.split(",")] if text != "none" else []
    for name in names:
        if name == RECORDS:
            found.append(name)
        elif name == study_name:
            raise InputError(f"--source-studies {name!r}: is the study itself; name another")
        elif storage is None:
            raise InputError(f"--source-studies {name!r}: needs the --storage that it is in")
        else:
            found.append(load_study(storage, name))
    return found


def read_provider(text: str) -> Provider:
    """`NAME` or `NAME:key=value,...`."""
    name, colon, settings = text.partition(":")
    if not colon:
        return name
    pairs = [setting.partition("=") for setting in settings.split(",")]
    if not all(key and equals for key, equals, _ in pairs):
        raise InputError(f"--provider {text}: options must be KEY=VALUE with commas between")
    return name, {key: value for key, _, value in pairs}


def read_config(text: str) -> QuantizationConfig:
    """A configuration from JSON, or from a file of it."""
    try:
        knobs = json.loads(
            text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8-sig")
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {text}: neither a JSON object nor a file of one ({error})"
        ) from error
    if not isinstance(knobs, dict):
        raise InputError(f"--config {text}: must be a JSON object from knob to value")
    return QuantizationConfig.from_dict(knobs)
