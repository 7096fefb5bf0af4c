"""The command line as a person meets it: exit codes, one line for a mistake, the files written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import optuna
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

from optuna_quantune import records
from optuna_quantune import target
from optuna_quantune.cli import main
from optuna_quantune.quantization import lint
from optuna_quantune.quantization.quantizer import CONFIG_KEY
from optuna_quantune.search.sources import SourceStudy


RECIPE = {
    "mean": [127.5, 127.5, 127.5],
    "std": [50.0, 50.0, 50.0],
    "scale": 1.0,
    "channel_order": "RGB",
    "crop": 16,
}


CHOICES = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}


class SingleBatch(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: NDArray[np.float64]) -> None:
        self._batches = iter([{"input": inputs.astype(np.float32)}])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return ((images.astype(np.float32) - 127.5) / 50.0).transpose(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path: Path, toy_model: Path) -> Path:
    """A folder with model.onnx, images/ with labels.csv, recipe.json; also the current folder."""
    (tmp_path / "model.onnx").write_bytes(toy_model.read_bytes())
    (tmp_path / "images").mkdir()
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(toy_model))
    labels = session.run(None, {"input": normalized(images)})[0].argmax(axis=1)
    lines = ["file,label_index"]
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.png")
        lines.append(f"{index:02}.png,{label}")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def call(folder: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(folder)
    try:
        main([*arguments, "--cache", "cache"])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


TUNE = (
    *("tune", "model.onnx", "--calibration", "images", "--evaluation", "images"),
    *("--preprocessing", "recipe.json", "--n-trials", "3"),
)


def test_tune_writes_the_model_whose_accuracy_it_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, *TUNE, "--output", "out.onnx", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(folder / "out.onnx"))
    files = sorted((folder / "images").glob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    predictions = session.run(None, {"input": normalized(images)})[0].argmax(axis=1)
    labels = [
        int(line.split(",")[1]) for line in (folder / "images/labels.csv").read_text().split()[1:]
    ]
    row = next(line for line in printed.splitlines() if "top-1" in line)
    float_top1, int8_top1 = (float(number) for number in re.findall(r"\d\.\d{4}", row)[:2])
    assert float_top1 == 1.0
    assert int8_top1 == pytest.approx(np.mean(predictions == labels), abs=5e-5)
    assert "Wrote out.onnx" in printed


def save_arrays(folder: Path) -> None:
    """The images of `folder`, as they are and as the model reads them, with their labels."""
    files = sorted((folder / "images").glob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    lines = (folder / "images/labels.csv").read_text().split()[1:]
    labels = np.array([int(line.split(",")[1]) for line in lines])
    np.savez(folder / "inputs.npz", input=normalized(images), labels=labels)
    np.save(folder / "pixels.npy", images)
    np.save(folder / "labels.npy", labels)


def test_arrays_in_a_file_make_the_model_that_their_images_make(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_arrays(folder)
    recipe, written = ("--preprocessing", "recipe.json"), []
    for inputs in (("images", *recipe), ("pixels.npy", *recipe), ("inputs.npz",)):
        arguments = ("quantize", "model.onnx", "--config", "{}", "--calibration", *inputs)
        assert call(folder, *arguments, monkeypatch=monkeypatch) == 0
        written.append((folder / "model.int8.onnx").read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize(
    "options",
    [
        ("--evaluation", "inputs.npz"),
        ("--evaluation", "pixels.npy", "--labels", "labels.npy", "--preprocessing", "recipe.json"),
    ],
)
def test_tune_takes_arrays_in_files(
    folder: Path,
    options: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_arrays(folder)
    arguments = ("tune", "model.onnx", "--calibration", options[1], *options, "--n-trials", "2")
    assert call(folder, *arguments, monkeypatch=monkeypatch) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "top-1" in line)
    assert "1.0000" in row  # of the float model, whose predictions the labels are
    assert (folder / "model.int8.onnx").is_file()


def test_quantize_builds_the_configuration_that_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = '{"scheme": "symmetric_power2", "clipping": "kl", "calibration_images": 5}'
    arguments = ("quantize", "model.onnx", "--config", config, "--calibration", "images")
    code = call(folder, *arguments, "--preprocessing", "recipe.json", monkeypatch=monkeypatch)
    assert code == 0
    model = onnx.load(folder / "model.int8.onnx")
    written = json.loads({e.key: e.value for e in model.metadata_props}[CONFIG_KEY])
    assert (written["scheme"], written["calibration_images"]) == ("symmetric_power2", 5)


def test_inspect_shows_layers_and_with_images_the_predicted_noise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "inspect", "model.onnx", monkeypatch=monkeypatch) == 0
    layers = capsys.readouterr().out
    assert all(name in layers for name in ("stem", "depthwise", "project", "head"))
    assert "predicted" not in layers
    images = ("--calibration", "images", "--preprocessing", "recipe.json")
    assert call(folder, "inspect", "model.onnx", *images, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "predicted SQNR dB" in printed
    assert "Layers to leave in float" in printed
    vta = ("--target", "vta", "--space", "vta")
    assert call(folder, "inspect", "model.onnx", *images, *vta, monkeypatch=monkeypatch) == 0
    assert "in float" not in capsys.readouterr().out


def test_inspect_shows_the_findings_of_a_float_and_of_a_quantized_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(folder / "model.onnx")
    weight = next(item for item in model.graph.initializer if item.name == "project.weight")
    values = numpy_helper.to_array(weight).copy()
    values[5] *= 1000.0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "spread.onnx")
    assert call(folder, "inspect", "spread.onnx", monkeypatch=monkeypatch) == 0
    assert "[wide-channel-spread]" in capsys.readouterr().out

    monkeypatch.setattr(lint, "detect_vnni", lambda: True)
    for symmetric, expected in ((False, "Nothing stands out."), (True, "[lost-activation]")):
        reader = SingleBatch(np.random.default_rng(0).standard_normal((8, 3, 16, 16)))
        options = {"CalibTensorRangeSymmetric": symmetric}
        quantize_static(
            folder / "model.onnx", folder / "q.onnx", reader, extra_options=options, **CHOICES
        )
        arguments = ("inspect", "q.onnx", "--float-model", "model.onnx")
        assert call(folder, *arguments, monkeypatch=monkeypatch) == 0
        assert expected in capsys.readouterr().out
    assert (
        call(folder, "inspect", "model.onnx", "--float-model", "x", monkeypatch=monkeypatch) == 2
    )
    assert "--float-model" in capsys.readouterr().err


def test_quantize_and_tune_warn_of_the_model_that_they_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", "model.onnx", "--config", "{}", "--calibration", "images")
    recipe = ("--preprocessing", "recipe.json")
    monkeypatch.setattr(target, "detect_vnni", lambda: True)  # 8-bit weights on any processor
    for vnni, warned in ((True, False), (None, False), (False, True)):
        monkeypatch.setattr(lint, "detect_vnni", lambda vnni=vnni: vnni)
        assert call(folder, *arguments, *recipe, monkeypatch=monkeypatch) == 0
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith("warning: layers 'stem'") for line in lines) == warned
        assert any("[saturating-int8]" in line for line in lines) == warned
    # Another device has other products, whatever this processor does.
    assert call(folder, *arguments, *recipe, "--target", "qnn", monkeypatch=monkeypatch) == 0
    assert "saturating" not in capsys.readouterr().err
    # Whichever trial is the fastest, its model has layers that may saturate.
    space = {"scheme": ["asymmetric"], "calibration_images": [8, "all"]}
    (folder / "space.json").write_text(json.dumps(space))
    assert call(folder, *TUNE, "--space", "space.json", monkeypatch=monkeypatch) == 0
    assert "[saturating-int8]" in capsys.readouterr().err


def quantized(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("quantize", "model.onnx", "--config", "{}", "--calibration", "images")
        call(folder, *arguments, "--preprocessing", "recipe.json", monkeypatch=patch)
    (folder / "model.int8.onnx").rename(folder / "model.onnx")


def without_layers(folder: Path) -> None:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    other = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [other])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")


def recipe(**changes: object):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        (folder / "recipe.json").write_text(json.dumps({**RECIPE, **changes}))

    return change


def labels_file(text: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / "images/labels.csv").write_text(text)


def storage_with(study: str):  # type: ignore[no-untyped-def]
    def make(folder: Path) -> None:
        storage = JournalStorage(JournalFileBackend(str(folder / "s.log")))
        optuna.create_study(storage=storage, study_name=study)

    return make


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda f: (f / "model.onnx").unlink(), (), "model.onnx: no such file"),
        (lambda f: (f / "model.onnx").write_bytes(b"text"), (), "model.onnx: not a valid ONNX"),
        (
            lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:2000]),
            (),
            "model.onnx: not a valid ONNX",
        ),
        (quantized, (), "already quantized"),
        (without_layers, (), "no quantizable layer"),
        (lambda f: (f / "images/07.png").write_bytes(b"not a png"), (), "07.png"),
        (labels_file("file,label_index\nmissing.png,1\n"), (), "missing.png"),
        (labels_file("name,label\n00.png,1\n"), (), "labels.csv"),
        (labels_file("file,label_index\n00.png,77\n"), (), "77"),
        (recipe(crop=8), (), "input"),
        (recipe(gamma=2.2), (), "gamma"),
        (lambda f: (f / "recipe.json").write_text("{"), (), "recipe.json"),
        (None, ("--calibration", "nowhere"), "nowhere"),
        (None, ("--space", "quantum"), "'quantum'"),
        (None, ("--sampler", "NoSampler"), "'NoSampler'"),
        (None, ("--target", "abacus"), "'abacus'"),
        (None, ("--metric", "f1"), "metric 'f1': use one of top1"),
        (None, ("--n-trials", "0"), "--n-trials"),
        (None, ("--output", "no/such/folder/x.onnx"), "no/such/folder/x.onnx"),
        (None, ("--output", "images"), "images: is a folder"),
        (None, ("--output", "model.onnx"), "model.onnx: is the float model"),
        (None, ("--storage", "no/such/folder/x.log"), "no/such/folder/x.log"),
        (None, ("--no-such-option",), "--no-such-option"),
        (None, ("--source-studies", "records,earlier"), "'earlier': needs the --storage"),
        (
            None,
            ("--source-studies", "x", "--storage", "s.log", "--study-name", "x"),
            "is the study",
        ),
        (storage_with("other"), ("--source-studies", "earlier", "--storage", "s.log"), "'other'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(  # type: ignore[no-untyped-def]
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    if damage is not None:
        damage(folder)
        capsys.readouterr()
    assert call(folder, *TUNE, *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("optuna-quantune: ")
    assert len(error.strip().splitlines()) == 1
    assert not list(folder.glob("*.int8.onnx"))


def test_tune_and_worker_learn_from_studies_of_the_storage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ("--storage", "studies.log")
    options = (*storage, "--output", "out.onnx", "--study-name")
    assert call(folder, *TUNE, *options, "earlier", monkeypatch=monkeypatch) == 0
    learning = ("--source-studies", "earlier,records")
    assert call(folder, *TUNE, *options, "later", *learning, monkeypatch=monkeypatch) == 0
    join = ("worker", *TUNE[1:-2], "--n-trials", "4", *storage, "--study-name", "later", *learning)
    capsys.readouterr()
    assert call(folder, *join, monkeypatch=monkeypatch) == 0
    assert "Ran 1 of the 4 trials of study 'later'" in capsys.readouterr().out


def test_the_demo_leaves_out_what_is_known_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def stop(*_: object, source_studies: Sequence[SourceStudy], **options: object) -> None:
        given.extend(study.name for study in source_studies)
        raise KeyboardInterrupt

    monkeypatch.setattr("optuna_quantune.cli.tune", stop)
    known = {study.name for study in records.source_studies()}
    for sampler, wanted in (
        ("quantune", known - {"demo", "mobilenetv2_1.0"}),
        ("TPESampler", set()),
    ):
        given.clear()
        with pytest.raises(SystemExit):
            main(["demo", "--sampler", sampler])
        assert set(given) == wanted


def test_a_folder_in_place_of_a_model_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, "tune", ".", *TUNE[2:], monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "optuna-quantune: model .: no such file\n"


def test_ctrl_c_in_a_trial_and_a_trial_that_fails_are_no_tracebacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "stopping.py").write_text(
        "import itertools\n"
        "calls = itertools.count()\n"
        "def value(session):\n"
        "    call = next(calls)  # of the float model, of three trials, of the result\n"
        "    if call == 1:\n"
        "        raise ArithmeticError('no value here')\n"
        "    if call == 3:\n"
        "        raise KeyboardInterrupt\n"
        "    return 1.0\n"
    )
    monkeypatch.syspath_prepend(folder)
    arguments = ("tune", "model.onnx", "--calibration", "images", "--evaluate", "stopping:value")
    code = call(folder, *arguments, "--preprocessing", "recipe.json", monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert code == 0
    assert "The search was interrupted" in printed.out
    assert "no value here" in printed.err
    assert "Traceback" not in printed.err


def test_ctrl_c_in_the_first_trial_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "stopping_early.py").write_text(
        "import itertools\n"
        "calls = itertools.count()\n"
        "def value(session):\n"
        "    if next(calls) == 1:  # after the float model\n"
        "        raise KeyboardInterrupt\n"
        "    return 0.75\n"
    )
    monkeypatch.syspath_prepend(folder)
    arguments = ("tune", "model.onnx", "--calibration", "images", "--preprocessing", "recipe.json")
    own = ("--evaluate", "stopping_early:value")
    assert call(folder, *arguments, *own, monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (folder / "model.int8.onnx").exists()


def test_ctrl_c_after_the_last_trial_leaves_the_trials_the_model_and_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    (folder / "stopping_late.py").write_text(
        "import itertools\n"
        "calls = itertools.count()\n"
        "def value(session):\n"
        "    if next(calls) == 3:  # after the float model and two trials\n"
        "        raise KeyboardInterrupt\n"
        "    return 0.75\n"
    )
    monkeypatch.syspath_prepend(folder)
    arguments = (
        "tune",
        "model.onnx",
        "--calibration",
        "images",
        "--evaluate",
        "stopping_late:value",
    )
    storage = ("--storage", "sqlite:///kept.db", "--study-name", "toy", "--n-trials", "2")
    recipe = ("--preprocessing", "recipe.json", "--report", "report.html")
    assert call(folder, *arguments, *storage, *recipe, monkeypatch=monkeypatch) == 130
    printed = capsys.readouterr().out
    assert printed.count("0.7500") == 2
    assert "not measured" in printed
    assert "report --storage sqlite:///kept.db --study-name toy" in printed
    assert "model.int8.onnx" in printed
    onnx.checker.check_model(onnx.load(folder / "model.int8.onnx"))
    assert "Best so far" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"clippng": "kl"}', "unknown knob 'clippng'"),
        ('{"clipping": "kll"}', "knob 'clipping': 'kll'"),
        ('{"activation_bits": 8.0}', "knob 'activation_bits': 8.0 is not one of 8, 16"),
        ('{"float_layers": 50}', "knob 'float_layers': 50 is more than there are "),
        (
            '{"float_layers": 50, "equalization": true}',
            "knob 'float_layers': 50 is more than there are ",
        ),
        ('{"calibration_images": 25}', "knob 'calibration_images': 25 is more than the 24 "),
        ("{", "--config"),
        ("[1]", "--config"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_mistakes_in_a_configuration_are_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
    message: str,
) -> None:
    inputs = ("--calibration", "images", "--preprocessing", "recipe.json")
    arguments = ("quantize", "model.onnx", "--config", config, *inputs)
    assert call(folder, *arguments, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_the_installed_command_has_no_traceback_for_a_missing_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optuna_quantune.cli", "inspect", "nowhere.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr == "optuna-quantune: model nowhere.onnx: no such file\n"
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["demo", "tune", "quantize", "inspect"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: optuna-quantune {command}")
    for line in re.findall(r"^  (--[a-z-]+).*\n?(?:      .*)?", text, flags=re.M):
        assert line


def test_a_worker_says_how_many_trials_it_ran_and_a_wrong_storage_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, *TUNE, "--storage", "journal.log", monkeypatch=monkeypatch) == 0
    worker = ("worker", *TUNE[1:-2])
    more = ("--storage", "journal.log", "--n-trials", "5")
    assert call(folder, *worker, *more, monkeypatch=monkeypatch) == 0
    assert "Ran 2 of the 5 trials of study 'model-" in capsys.readouterr().out
    for wrong, message in (
        (("--storage", "other.log"), "storage other.log: there is no file other.log"),
        ((*more, "--study-name", "other"), "study 'other': is not there; the storage's studies"),
    ):
        assert call(folder, *worker, *wrong, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_reports_are_written_by_tune_and_of_a_study(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    storage = ("--storage", "sqlite:///study.db", "--study-name", "toy")
    code = call(folder, *TUNE, *storage, "--report", "own.html", monkeypatch=monkeypatch)
    assert code == 0
    assert "Wrote own.html." in capsys.readouterr().out
    for arguments in (("--output", "a.html", *storage), ("--output", "b.html", *storage[:2])):
        monkeypatch.setattr(sys, "argv", ["optuna-quantune", "report", *arguments])
        main()
    assert "wrote b.html" in capsys.readouterr().out
    for name in ("own.html", "a.html", "b.html"):
        page = (folder / name).read_text(encoding="utf-8")
        assert "Quantization of model.onnx" in page
        assert "Chosen configuration" in page


def test_a_report_is_written_also_where_nobody_reads_the_tables(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    read, write = os.pipe()
    os.close(read)  # as `| head` does
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert call(folder, *TUNE, "--report", "own.html", monkeypatch=monkeypatch) == 1
    assert "Chosen configuration" in (folder / "own.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("no/such/folder/x.html", "report no/such/folder/x.html: cannot be written"),
        ("model.onnx", "report model.onnx: must end with .html"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_search(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    report: str,
    message: str,
) -> None:
    model = (folder / "model.onnx").read_bytes()
    assert call(folder, *TUNE, "--report", report, monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "trial" not in captured.out + captured.err
    assert (folder / "model.onnx").read_bytes() == model
    assert not (folder / "model.int8.onnx").exists()


def test_a_study_in_a_storage_has_its_result_in_the_dashboards_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    storage = ("--storage", "sqlite:///study.db", "--study-name", "toy")
    assert call(folder, *TUNE, *storage, monkeypatch=monkeypatch) == 0
    study = optuna.load_study(study_name="toy", storage="sqlite:///study.db")
    assert "# Quantization of model.onnx" in dashboard.get_note(study)


def test_brackets_in_names_and_messages_are_no_markup(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "flaky_metric.py").write_text(
        "calls = []\n"
        "def flaky(outputs, reference):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        raise ValueError('broken [/x] output')\n"
        "    return 1.0\n"
    )
    model = onnx.load("model.onnx")
    model.graph.node[0].name = "block[/conv]"
    onnx.save(model, "mo[v1]del.onnx")
    main(["inspect", "mo[v1]del.onnx"])
    assert "block[/conv]" in capsys.readouterr().out
    arguments = ["--preprocessing", "recipe.json", "--calibration", "images"]
    arguments += ["--evaluation", "images", "--metric", "flaky_metric:flaky", "--n-trials", "3"]
    main(["tune", "mo[v1]del.onnx", *arguments])
    out, err = capsys.readouterr()
    assert "Wrote mo[v1]del.int8.onnx" in out
    assert "broken [/x] output" in out + err


_HALF_WRITTEN = (
    "its last line is half written, as after a crash; remove that line, and the rest goes on"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "is a file, and no journal of Optuna"),
        ("[1, 2]\n", "is a file, and no journal of Optuna"),
        ("SQLite format 3\0", "is a database of SQLite; give sqlite:///{storage}"),
        ('{"op_code": 0, "worker_id": "x"}\n{"op_co', _HALF_WRITTEN),
    ],
)
def test_a_file_that_is_no_whole_journal_stays_as_it_is(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = folder / "trials.log"
    storage.write_text(text)
    images = ["--calibration", str(folder / "images"), "--evaluation", str(folder / "images")]
    images += ["--preprocessing", str(folder / "recipe.json")]
    model = str(folder / "model.onnx")
    for command in (
        ["tune", model, *images, "--storage", str(storage)],
        ["report", "--storage", str(storage), "--output", str(folder / "r.html")],
    ):
        with pytest.raises(SystemExit):
            main(command)
        reason = message.format(storage=storage)
        assert capsys.readouterr().err == f"optuna-quantune: storage {storage}: {reason}\n"
    assert storage.read_text() == text


def test_mistakes_in_a_module_of_ones_own_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "absent.py").write_text("open('no such file')\n")
    for name, message in (
        ("./wrong.py:f", "give the module's name, without folder and .py"),
        ("wrong:f", "cannot be imported (SyntaxError: "),
        ("absent:f", "cannot be imported (FileNotFoundError: "),
    ):
        images = ["--calibration", "images", "--evaluation", "images", "--metric", name]
        with pytest.raises(SystemExit):
            main(["tune", "model.onnx", *images, "--preprocessing", "recipe.json"])
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_quantize_and_inspect_take_models_without_any_real_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.node.append(helper.make_node("ArgMax", ["logits"], ["class"], axis=1))
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["n", 1])
    )
    onnx.save(model, folder / "model.onnx")
    images = ("--calibration", "images", "--preprocessing", "recipe.json")
    quantize = ("quantize", "model.onnx", "--config", "{}", *images)
    assert call(folder, *quantize, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert call(folder, "inspect", "model.onnx", *images, monkeypatch=monkeypatch) == 0
    assert "predicted SQNR dB" in capsys.readouterr().out


@pytest.mark.parametrize("mistake", [("--space", "quantum"), ("--target", "abacus")])
def test_inspect_names_a_mistake_also_in_what_it_does_not_use(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: tuple[str, str],
) -> None:
    assert call(folder, "inspect", "model.onnx", *mistake, monkeypatch=monkeypatch) == 2
    assert repr(mistake[1]) in capsys.readouterr().err
