"""The command line: arguments in, results printed. What is done stands in `tuning.py`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import Final
from typing import get_args

import click
import onnx
import optuna
from rich.console import Console
from rich.logging import RichHandler

import optuna_quantune
from optuna_quantune import records
from optuna_quantune.cli_options import calibration_option
from optuna_quantune.cli_options import data_options
from optuna_quantune.cli_options import evaluate_option
from optuna_quantune.cli_options import goal_options
from optuna_quantune.cli_options import input_options
from optuna_quantune.cli_options import read_config
from optuna_quantune.cli_options import read_evaluation
from optuna_quantune.cli_options import read_inputs
from optuna_quantune.cli_options import read_provider
from optuna_quantune.cli_options import read_sources
from optuna_quantune.cli_options import search_options
from optuna_quantune.cli_options import source_option
from optuna_quantune.cli_options import split_options
from optuna_quantune.demo import load_demo
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import Direction
from optuna_quantune.evaluation.chosen_metric import MetricName
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.importing import import_function
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.output_file import check_writable
from optuna_quantune.output_file import write_model
from optuna_quantune.quantization.lint import Finding
from optuna_quantune.quantization.lint import lint_model
from optuna_quantune.quantization.lint import lint_quantized
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.quantized_graph import load_quantized
from optuna_quantune.report.console import config_lines
from optuna_quantune.report.console import finding_lines
from optuna_quantune.report.console import layers_table
from optuna_quantune.report.console import pareto_table
from optuna_quantune.report.console import result_table
from optuna_quantune.report.console import trial_line
from optuna_quantune.report.console import trials_table
from optuna_quantune.report.dashboard import note_result
from optuna_quantune.report.html import check_report
from optuna_quantune.report.html import write_report
from optuna_quantune.report.numbers import figure
from optuna_quantune.report.predictions import float_layers_table
from optuna_quantune.report.predictions import predict
from optuna_quantune.report.predictions import predictions_table
from optuna_quantune.report.progress import ProgressBars
from optuna_quantune.space import SearchSpace
from optuna_quantune.studies import FINISHED
from optuna_quantune.studies import load_study
from optuna_quantune.target import get_target
from optuna_quantune.target import Target
from optuna_quantune.tuning import ResultInterrupted
from optuna_quantune.tuning import tune
from optuna_quantune.tuning import TuningResult
from optuna_quantune.worker import work


# Wide enough for the table of trials where the width is not known (a file or a pipe).
_PLAIN_WIDTH: Final = 160
_PREDICTIONS_SHOWN: Final = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 when done, 2 on a user's mistake, 130 on Ctrl-C."""
    try:
        cli.main(args=arguments, prog_name="optuna-quantune", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        _fail(error.format_message())
    except InputError as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)


def _fail(message: str) -> None:
    click.echo(f"optuna-quantune: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(optuna_quantune.__version__)
def cli() -> None:
    """Finds the int8 configuration of a float ONNX model that loses the least accuracy."""


@cli.command("tune")
@click.argument("model")
@split_options
@click.option(
    "--metric",
    metavar="NAME",
    show_default="top1 with labels; without, agreement of a classifier, otherwise sqnr_db",
    help=f"What is maximized: {', '.join(get_args(MetricName))}, or MODULE:FUNCTION, which is "
    "called with the outputs of the int8 and of the float model and gives a number.",
)
@evaluate_option
@click.option(
    "--direction",
    type=click.Choice(get_args(Direction)),
    default="maximize",
    help="Which values of a FUNCTION of your own are better.",
)
@goal_options
@click.option("--output", metavar="PATH", show_default="MODEL.int8.onnx", help="Model to write.")
@source_option
@search_options(n_trials=20)
@data_options
def tune_command(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    labels: str | None,
    preprocessing: str | None,
    data: str | None,
    metric: str | None,
    evaluate: str | None,
    source_studies: str,
    storage: str | None,
    output: str | None,
    **options: Any,
) -> None:
    """Searches the best int8 configuration of MODEL and writes the model."""
    _tune(
        model,
        calibration=read_inputs("calibration", calibration, data, preprocessing),
        evaluation=read_evaluation(evaluate, evaluation, data, preprocessing, labels),
        metric=import_function(metric, "--metric") if metric and ":" in metric else metric,
        evaluate=None if evaluate is None else import_function(evaluate, "--evaluate"),
        source_studies=read_sources(source_studies, storage, options["study_name"]),
        storage=storage,
        output=output or _beside(model),
        **options,
    )


def _beside(model: str) -> str:
    """Where the int8 model is written when nothing is said."""
    path = Path(model)
    return str(path.parent / f"{path.stem}.int8.onnx")


@cli.command("worker")
@click.argument("model")
@click.option(
    "--storage", required=True, help="The study's database URL or journal file, as `tune` has it."
)
@click.option(
    "--study-name",
    show_default="the only study of the storage",
    help="Name of the study that `tune` began.",
)
@split_options
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="The function that the study measures by, if it is one of your own.",
)
@evaluate_option
@click.option(
    "--sampler",
    show_default="the study's",
    help="'quantune', a class of optuna.samplers, or module:factory.",
)
@click.option(
    "--n-trials",
    type=click.IntRange(1),
    show_default="what `tune` was asked for",
    help="Trials of the study in all.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="No trial begins later than this after the start.",
)
@source_option
@input_options
def worker_command(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    labels: str | None,
    preprocessing: str | None,
    data: str | None,
    metric: str | None,
    evaluate: str | None,
    source_studies: str,
    storage: str,
    providers: Sequence[str],
    **options: Any,
) -> None:
    """Takes part in the search of MODEL that `tune` began in a storage.

    What is searched stands in the study; the model and the inputs must be those of `tune`. Start
    as many workers as there are machines; `tune` writes the model.
    """
    own = 0

    def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal own
        own += 1
        progress.console.print(trial_line(trial), highlight=False)

    with _progress() as progress:
        study = work(
            model,
            calibration=read_inputs("calibration", calibration, data, preprocessing),
            evaluation=read_evaluation(evaluate, evaluation, data, preprocessing, labels),
            metric=None if metric is None else import_function(metric, "--metric"),
            evaluate=None if evaluate is None else import_function(evaluate, "--evaluate"),
            source_studies=read_sources(source_studies, storage, options["study_name"]),
            storage=storage,
            providers=[read_provider(text) for text in providers] or None,
            progress=progress,
            callbacks=[show],
            **options,
        )
    finished = len(study.get_trials(deepcopy=False, states=FINISHED))
    click.echo(f"Ran {own} of the {finished} trials of study {study.study_name!r}.")


@cli.command("report")
@click.option("--storage", required=True, help="The study's database URL or journal file.")
@click.option(
    "--study-name", show_default="the only study of the storage", help="Name of the study."
)
@click.option("--output", required=True, metavar="HTML", help="HTML file to write.")
def report_command(storage: str, study_name: str | None, output: str) -> None:
    """Writes a report of a study: one HTML file with tables and figures.

    It needs neither the model nor the inputs. A search that still runs is shown as it stands.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    click.echo(f"wrote {write_report(load_study(storage, study_name), output)}")


@cli.command("demo")
@click.option("--output", default="demo.int8.onnx", metavar="PATH", help="Model to write.")
@goal_options
@search_options(n_trials=20)
def demo_command(output: str, **options: Any) -> None:
    """Runs the whole job on a small model and images that come with the package.

    What the package knows of that very model, and of others of its family, is left out.
    """
    data = load_demo()
    others = records.source_studies(without=data.family)
    recipe = Preprocessing.from_mapping(data.preprocessing)
    _tune(
        str(data.model_path),
        calibration=ArrayInputs(data.calibration, preprocessing=recipe),
        evaluation=ArrayInputs(
            data.evaluation, labels=data.evaluation_labels, preprocessing=recipe
        ),
        source_studies=others if options["sampler"] == "quantune" else (),
        output=output,
        **options,
    )


@cli.command("quantize")
@click.argument("model")
@click.option(
    "--config",
    required=True,
    metavar="JSON",
    help='Knobs as JSON, or a file of it: \'{"scheme": "symmetric_uint8", "clipping": "kl"}\'. '
    "Knobs left out keep their default.",
)
@calibration_option
@click.option("--output", metavar="PATH", show_default="MODEL.int8.onnx", help="Model to write.")
@data_options
def quantize_command(
    model: str,
    config: str,
    calibration: str | None,
    preprocessing: str | None,
    data: str | None,
    output: str | None,
    **options: Any,
) -> None:
    """Builds one configuration of MODEL."""
    path = output or _beside(model)
    chosen = read_config(config)
    check_writable(path, model)
    with _progress() as progress:
        objective = _objective_without_evaluation(
            model,
            read_inputs("calibration", calibration, data, preprocessing),
            space=SearchSpace({"calibration_images": [chosen.calibration_images]}),
            progress=progress,
            **options,
        )
        objective.check(chosen)
        quantized = objective.quantize(chosen).proto
        write_model(quantized, path)
    click.echo(f"wrote {path} ({figure(Path(path).stat().st_size / 1e6)} MB)")
    _warn(_findings(quantized, objective.model, objective.target))


@cli.command("inspect")
@click.argument("model")
@click.option(
    "--calibration",
    metavar="PATH",
    help="Inputs for calibration, a folder of images or an .npy or .npz file: adds the predicted "
    "noise.",
)
@click.option(
    "--float-model",
    metavar="PATH",
    help="What a quantized MODEL was made from: finds activations that were lost.",
)
@click.option(
    "--space",
    default="quantune",
    help="Preset (quantune, extended or vta), or JSON file of knobs and choices, to predict.",
)
@data_options
def inspect_command(
    model: str,
    calibration: str | None,
    float_model: str | None,
    space: str,
    preprocessing: str | None,
    data: str | None,
    **options: Any,
) -> None:
    """Shows what stands out in MODEL, its layers, and which configurations promise least noise.

    Of a quantized MODEL, also one made by another tool, it shows what stands out.
    """
    console = _console()
    chosen = SearchSpace.load(space)
    get_target(options["target"])  # a mistake in what is not used now is a mistake all the same
    if (quantized := load_quantized(model)) is not None:
        source = None if float_model is None else load_float_model(float_model)
        _print_findings(console, lint_quantized(quantized, float_model=source))
        return
    if float_model is not None:
        raise InputError(f"--float-model: model {model} is not a quantized model")
    if calibration is None and data is None:
        loaded = load_float_model(model)
        console.print(layers_table(loaded))
        _print_findings(console, lint_model(loaded))
        return
    with _progress() as progress:
        objective = _objective_without_evaluation(
            model,
            read_inputs("calibration", calibration, data, preprocessing),
            space=chosen,
            progress=progress,
            **options,
        )
        least_noise = predict(objective)
    console.print(layers_table(objective.model))
    _print_findings(console, lint_model(objective.model))
    console.print(predictions_table(objective, least_noise, shown=_PREDICTIONS_SHOWN))
    if objective.target.knobs.get("float_layers") != (0,):
        console.print(float_layers_table(objective, least_noise))


def _objective_without_evaluation(
    model: str, inputs: InputSource, *, providers: Sequence[str], **options: Any
) -> QuantizationObjective:
    return QuantizationObjective(
        model,
        calibration=inputs,
        # Runs nothing, whatever the outputs are: nothing is measured.
        evaluate=lambda session: 0.0,
        providers=[read_provider(text) for text in providers] or None,
        **options,
    )


def _tune(
    model: str,
    *,
    calibration: InputSource,
    evaluation: InputSource | None,
    objectives: str,
    report: str | None,
    providers: Sequence[str] = (),
    **options: Any,
) -> None:
    console = _console()
    if report is not None:
        check_report(report)
    try:
        with _progress() as progress:
            total = options["n_trials"]

            def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
                progress.console.print(trial_line(trial), highlight=False)
                progress("trials", min(trial.number + 1, total), total)

            result = tune(
                model,
                calibration=calibration,
                evaluation=evaluation,
                objectives=[name.strip() for name in objectives.split(",")],  # type: ignore[misc]
                providers=[read_provider(text) for text in providers] or None,
                progress=progress,
                callbacks=[show],
                **options,
            )
    except ResultInterrupted as stop:
        try:
            _print_interrupted(console, stop, options["storage"])
        finally:
            _write_report(console, stop.study, report)
        raise
    if options["storage"] is not None:
        note_result(result.study, result.summary)
    try:
        _print_result(console, result)
    finally:  # also where nobody reads the tables to their end, as behind `| head`
        _write_report(console, result.study, report)
    if result.path is not None:
        _warn(_findings(onnx.load(result.path), result.float_model, result.target))


def _print_result(console: Console, result: TuningResult) -> None:
    console.print(trials_table(result.study.get_trials(deepcopy=False), result.metric))
    if result.pareto:
        console.print(pareto_table(result))
    console.print(f"\nChosen: trial {result.trial.number}")
    console.print(config_lines(result) + "\n", highlight=False)
    console.print(result_table(result))
    for line in result.remarks:
        console.print(line, highlight=False, style="bold")
    console.print(f"Wrote {result.path} after {result.seconds:.0f} s.", highlight=False)


def _write_report(console: Console, study: optuna.Study, path: str | None) -> None:
    if path is not None:
        console.print(f"Wrote {write_report(study, path)}.", highlight=False)


def _print_interrupted(console: Console, stop: ResultInterrupted, storage: str | None) -> None:
    """What there is when the search has ended and its result was not measured."""
    console.print(trials_table(stop.study.get_trials(deepcopy=False), stop.metric))
    lines = ["Interrupted after the search: its result was not measured."]
    if stop.path is not None:
        lines.append(f"The chosen model was written to {stop.path}.")
    if storage is None:
        lines.append("The same command begins anew; with --storage it goes on.")
    else:
        place = ["--storage", storage, "--study-name", stop.study.study_name]
        command = shlex.join(["optuna-quantune", "report", *place, "--output", "report.html"])
        lines.append(
            f"The same command again goes on from here; a report of the trials: {command}"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _print_findings(console: Console, findings: Sequence[Finding]) -> None:
    lines = finding_lines(findings) or ["Nothing stands out."]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _findings(
    quantized: onnx.ModelProto, float_model: FloatModel, target: Target
) -> list[Finding]:
    """What is wrong with a model for a target: only what runs here minds this processor."""
    vnni = True if target.is_elsewhere else None
    return lint_quantized(quantized, float_model=float_model, vnni=vnni)


def _warn(findings: Sequence[Finding]) -> None:
    for line in finding_lines(item for item in findings if item.severity == "warning"):
        click.echo(line, err=True)


def _console(*, stderr: bool = False) -> Console:
    # Names and paths may have brackets, which are no markup.
    console = Console(stderr=stderr, markup=False)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, markup=False, width=_PLAIN_WIDTH)


@contextlib.contextmanager
def _progress() -> Iterator[ProgressBars]:
    # Trials are printed as lines, those that fail with their reason: not with a traceback, too.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    console = _console(stderr=True)
    logger = logging.getLogger("optuna_quantune")
    logger.setLevel(logging.INFO)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logger.addHandler(handler)
    logger.propagate = False  # a handler of the root logger would print every line again
    try:
        with ProgressBars(console) as bars:
            yield bars
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


if __name__ == "__main__":
    main()
