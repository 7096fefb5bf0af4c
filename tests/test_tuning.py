from __future__ import annotations

import importlib.metadata
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

from optuna_quantune import records
from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.plan import SearchPlan
from optuna_quantune.plan import split
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.space import SearchSpace
from optuna_quantune.studies import load_study
from optuna_quantune.tuning import tune
from optuna_quantune.tuning import TuningResult


GRID = list(SearchSpace.preset("quantune").grid())
EARLIER = SourceStudy("earlier", "maximize", tuple(GRID[:2]), (0.5, 0.7), ({}, {}))


@pytest.fixture
def labels(toy_model: Path, toy_inputs: NDArray[np.float32]) -> NDArray[np.int64]:
    session = onnxruntime.InferenceSession(str(toy_model))
    labels: NDArray[np.int64] = session.run(None, {"input": toy_inputs})[0].argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 10
    return labels


@pytest.fixture
def run(toy_model: Path, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64]):  # type: ignore[no-untyped-def]
    def run(**arguments: object) -> TuningResult:
        options: dict[str, object] = {
            "calibration": ArrayInputs(toy_inputs[:40]),
            "evaluation": ArrayInputs(toy_inputs, labels=labels),
            "n_trials": 4,
            "cache": None,
        }
        return tune(toy_model, **{**options, **arguments})  # type: ignore[arg-type]

    return run


def test_the_written_model_measures_what_the_result_says(  # type: ignore[no-untyped-def]
    run, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64], tmp_path: Path
) -> None:
    result = run(output=tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(str(result.path))
    outputs = session.run(None, {"input": toy_inputs})[0]
    assert result.all_inputs.quantized.top1 == np.mean(outputs.argmax(axis=1) == labels)
    assert result.quantized_bytes == result.path.stat().st_size
    assert result.held_out is None  # 80 inputs are too few to split
    assert len(result.study.trials) == 4


def test_held_out_inputs_take_no_part_in_the_search(  # type: ignore[no-untyped-def]
    run, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64], tmp_path: Path
) -> None:
    many, truth = np.concatenate([toy_inputs] * 5), np.concatenate([labels] * 5)
    many = many * np.linspace(0.5, 1.5, len(many), dtype=np.float32)[:, None, None, None]
    result = run(
        evaluation=ArrayInputs(many, labels=truth),
        n_trials=2,
        exact=True,
        output=tmp_path / "int8.onnx",
    )
    assert result.held_out is not None
    assert result.held_out.inputs == 200
    assert result.all_inputs.inputs == 400
    # Accuracy over all inputs is the mean of the two halves, each measured apart.
    selected = result.trial.user_attrs["top1"]
    assert result.trial.user_attrs["n"] == 200
    both = (selected + result.held_out.quantized.top1) / 2
    assert result.all_inputs.quantized.top1 == pytest.approx(both)
    interval = result.held_out.difference
    assert interval is not None
    assert interval.low <= interval.estimate <= interval.high


def test_without_a_study_name_the_same_call_goes_on_and_another_does_not(  # type: ignore[no-untyped-def]
    run, tmp_path: Path
) -> None:
    storage = str(tmp_path / "journal.log")
    first = run(n_trials=2, storage=storage).study
    again = run(n_trials=3, storage=storage).study
    other = run(n_trials=1, storage=storage, max_size=10**9).study
    assert first.study_name == again.study_name != other.study_name
    assert (len(again.trials), len(other.trials)) == (3, 1)


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "{}/journal.log"])
def test_the_same_call_again_goes_on_where_it_stopped(run, tmp_path: Path, storage: str) -> None:  # type: ignore[no-untyped-def]
    place = {"storage": storage.format(tmp_path), "study_name": "toy"}
    values = [trial.value for trial in run(n_trials=3, **place).study.trials]
    again = run(n_trials=5, **place)
    assert [t.number for t in again.study.trials] == [0, 1, 2, 3, 4]
    assert [trial.value for trial in again.study.trials[:3]] == values
    finished = run(n_trials=5, **place)
    assert len(finished.study.trials) == 5


def test_an_interrupted_search_writes_the_best_so_far_and_owes_the_trial(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"storage": f"sqlite:///{tmp_path}/study.db", "study_name": "toy"}
    calls = []

    def interrupt(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        calls.append(trial.number)
        if len(calls) == 2:
            monkeypatch.setattr(QuantizationObjective, "latency", pressing_ctrl_c)

    def pressing_ctrl_c(self: object, model: bytes) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    result = run(n_trials=6, callbacks=[interrupt], output=tmp_path / "int8.onnx", **place)
    assert result.interrupted
    assert result.path.is_file()
    states = [trial.state for trial in result.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    owed = result.study.trials[2].params
    resumed = run(n_trials=6, **place)
    assert not resumed.interrupted
    assert resumed.study.trials[3].params == owed
    assert resumed.study.trials[3].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "name", ["RandomSampler", "TPESampler", "GridSampler", "BruteForceSampler", "CmaEsSampler"]
)
def test_optuna_samplers_are_found_by_name(run, name: str) -> None:  # type: ignore[no-untyped-def]
    knobs = {"scheme": ["symmetric", "asymmetric"], "float_layers": IntDistribution(0, 2)}
    result = run(sampler=name, n_trials=2, space=SearchSpace(knobs))
    assert type(result.study.sampler).__name__ == name
    assert len(result.study.trials) == 2


def test_a_factory_from_a_module_in_the_current_folder_is_used(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_samplers.py").write_text(
        "import optuna\n"
        "def create(search_space, *, seed):\n"
        "    assert 'scheme' in search_space\n"
        "    return optuna.samplers.RandomSampler(seed=seed + 40)\n"
        "def broken(search_space, *, seed):\n"
        "    return 'no sampler'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    result = run(sampler="my_samplers:create", n_trials=1)
    assert isinstance(result.study.sampler, optuna.samplers.RandomSampler)
    for name, message in [
        ("my_samplers:broken", "gave a str, not a sampler"),
        ("my_samplers:nothing", "cannot be imported"),
        ("no_such_module:create", "cannot be imported"),
        ("Sampler", "unknown; use 'quantune', 'module:factory' or one of BruteForceSampler"),
        ("PartialFixedSampler", "unknown; use 'quantune'"),
    ]:
        with pytest.raises(InputError, match=message):
            run(sampler=name, n_trials=1)


def test_the_default_sampler_never_repeats_a_configuration(run) -> None:  # type: ignore[no-untyped-def]
    result = run(n_trials=12)
    assert isinstance(result.study.sampler, QuantuneSampler)
    params = [tuple(trial.params.values()) for trial in result.study.trials]
    assert len(set(params)) == 12


def test_an_exhausted_space_ends_the_search(run) -> None:  # type: ignore[no-untyped-def]
    result = run(n_trials=10, space=SearchSpace({"clipping": ["max", "kl"]}))
    assert len(result.study.trials) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": float("nan")}, "timeout: nan seconds is not positive"),
        ({"sampler": "os:getcwd"}, "sampler 'os:getcwd': fails when it is called .* TypeError"),
        ({"n_trials": 0}, "n_trials: 0 is not positive"),
        ({"output": "no/such/folder/x.onnx"}, "output no/such/folder/x.onnx: cannot be written"),
        ({"output": "/"}, "output /: is a folder"),
        ({"space": "quantum"}, "search space 'quantum'"),
        ({"storage": "nosuchdb://host/x"}, "storage nosuchdb://host/x: cannot be opened"),
        ({"seed": -1}, "seed: -1 is not between 0 and"),
        ({"source_studies": ["mobilenet"]}, "'mobilenet' is neither a study nor 'records'"),
        (
            {"source_studies": ["records", EARLIER], "sampler": "TPESampler"},
            "the sampler 'quantune' learns from them, not 'TPESampler'",
        ),
        ({"storage": "no/such/folder/journal.log"}, "storage no/such/folder/journal.log"),
    ],
)
def test_mistakes_are_found_before_the_search(run, arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        run(**arguments)


def test_the_first_trial_is_what_was_best_in_the_only_source_study(run) -> None:  # type: ignore[no-untyped-def]
    for granularity in ("tensor", "channel"):
        study = SourceStudy(
            name=granularity,
            direction="maximize",
            params=tuple(GRID),
            values=tuple(float(params["granularity"] == granularity) for params in GRID),
            features=({},) * len(GRID),
        )
        result = run(n_trials=1, source_studies=[study])
        assert result.trial.params["granularity"] == granularity


def test_the_records_are_learned_from_unless_others_are_given(
    run,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    seen: list[int] = []

    class Spy(QuantuneSampler):
        def __init__(self, *arguments: object, **options: Any) -> None:
            seen.append(len(options["source_studies"]))
            super().__init__(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("optuna_quantune.chosen_sampler.QuantuneSampler", Spy)
    shipped = len(records.source_studies())
    run(n_trials=1)
    run(n_trials=1, source_studies=[])
    run(n_trials=1, source_studies=["records", EARLIER])
    run(n_trials=1, objectives=["size"])
    assert seen == [shipped, 0, shipped + 1, 0]


def test_fully_convolutional_classifiers_are_tuned_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 3, 1, 1)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["h"], name="conv"),
        onnx.helper.make_node("GlobalAveragePool", ["h"], ["y"], name="pool"),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "fully_convolutional",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 4, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10, 1, 1])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    inputs = rng.standard_normal((40, 3, 4, 4)).astype(np.float32)
    labels = np.einsum("oc,ncij->no", weight[:, :, 0, 0], inputs).argmax(axis=1)
    result = tune(
        path,
        calibration=ArrayInputs(inputs),
        evaluation=ArrayInputs(inputs, labels=labels),
        n_trials=2,
        cache=None,
    )
    assert result.all_inputs.float_model.top1 == 1.0
    assert result.all_inputs.quantized.agreement >= 0.9
    assert result.all_inputs.difference is not None
    expected = (result.all_inputs.quantized.top1 or 0.0) - 1.0
    assert result.all_inputs.difference.estimate == pytest.approx(expected)


def test_a_study_with_other_choices_or_bounds_is_refused_and_stays_as_it_is(  # type: ignore[no-untyped-def]
    run, tmp_path: Path
) -> None:
    place = {"storage": str(tmp_path / "trials.log"), "study_name": "mine", "n_trials": 2}
    run(**place)
    before = (tmp_path / "trials.log").read_text().count("set_study_user_attr")
    plan = SearchPlan.of(load_study(place["storage"], "mine"))
    with pytest.raises(InputError, match="other choices of the knob 'clipping'"):
        run(**place, space="extended")
    fewer = dict(SearchSpace.preset("quantune"))
    del fewer["clipping"]
    with pytest.raises(InputError, match="other choices of the knob 'clipping'"):
        run(**place, space=SearchSpace(fewer))
    with pytest.raises(InputError, match="belongs to .* other objectives or bounds"):
        run(**place, max_size=100_000)
    assert (tmp_path / "trials.log").read_text().count("set_study_user_attr") == before
    assert SearchPlan.of(load_study(place["storage"], "mine")).space == plan.space
    assert len(run(**{**place, "n_trials": 3}).study.trials) == 3


def test_bounds_may_be_numbers_of_numpy(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    bounds = {"max_accuracy_drop": np.float32(0.5), "max_size": np.int64(10**6)}
    place = {"storage": str(tmp_path / "trials.log"), "study_name": "mine"}
    run(**place, **bounds, n_trials=1)
    assert SearchPlan.of(load_study(place["storage"], "mine")).max_size == 10**6


def test_arrays_and_files_are_inputs_as_they_are(  # type: ignore[no-untyped-def]
    run, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    np.savez(tmp_path / "inputs.npz", input=toy_inputs)
    of_array = run(calibration=toy_inputs, evaluation={"input": toy_inputs}, n_trials=2)
    of_file = run(calibration=tmp_path / "inputs.npz", evaluation=toy_inputs, n_trials=2)
    assert [t.value for t in of_array.study.trials] == [t.value for t in of_file.study.trials]
    with pytest.raises(InputError):
        run(calibration=3)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_label_that_no_class_has_is_found_before_the_search(  # type: ignore[no-untyped-def]
    run, toy_inputs: NDArray[np.float32], labels: NDArray[np.int64], held_out: bool
) -> None:
    inputs, truth = np.concatenate([toy_inputs] * 5), np.concatenate([labels] * 5)
    selecting, others = split(ArrayInputs(inputs), 0)
    assert selecting is not None
    truth[others[0] if held_out else selecting.positions[0]] = 10
    trials: list[optuna.trial.FrozenTrial] = []
    number = others[0] if held_out else selecting.positions[0]
    with pytest.raises(InputError, match=f"label 10 of input {number} "):
        run(
            evaluation=ArrayInputs(inputs, labels=truth),
            callbacks=[lambda study, trial: trials.append(trial)],
        )
    assert not trials


def test_a_metric_that_no_input_changes_has_no_interval(run) -> None:  # type: ignore[no-untyped-def]
    assert run(metric=lambda outputs, reference: 1.0, n_trials=1).all_inputs.difference is None


def test_onnxruntime_may_be_a_package_of_another_name(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another_build(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr("optuna_quantune.summary.version", of_another_build)
    versions = run(n_trials=1).summary.versions
    assert versions["onnxruntime"] == onnxruntime.__version__


def test_a_database_of_an_older_optuna_is_one_error(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    url = f"sqlite:///{tmp_path}/old.db"
    optuna.create_study(storage=url)
    with closing(sqlite3.connect(tmp_path / "old.db")) as database, database:
        database.execute("update alembic_version set version_num = 'v3.0.0.d'")
    with pytest.raises(InputError, match="old.db: cannot be opened .The runtime optuna version"):
        run(storage=url)


def test_a_metric_that_fails_on_parts_of_the_inputs_has_no_interval(  # type: ignore[no-untyped-def]
    run, caplog: pytest.LogCaptureFixture
) -> None:
    def whole(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        if len(outputs) < 80:
            raise ValueError("only one class present")
        return -float(np.abs(outputs - reference).mean())

    result = run(metric=whole, n_trials=2)
    assert result.all_inputs.difference is None
    assert "no interval: the metric fails on part of the inputs" in caplog.text
    assert [trial.state for trial in result.study.trials] == [TrialState.COMPLETE] * 2


def test_a_sampler_of_one_objective_is_refused_for_several(run) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="'CmaEsSampler': takes a single objective"):
        run(sampler="CmaEsSampler", objectives=("accuracy", "size"))


def test_a_sampler_whose_package_is_missing_is_refused_at_once(  # type: ignore[no-untyped-def]
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_quantune.chosen_sampler.find_spec", lambda name: None)
    with pytest.raises(InputError, match="'GPSampler': needs the package 'torch'"):
        run(sampler="GPSampler")


def test_a_metric_that_fails_for_the_final_model_is_one_error_and_the_model_is_there(  # type: ignore[no-untyped-def]
    run, toy_inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    many = np.concatenate([toy_inputs] * 5)

    def fails_on_all(outputs: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
        if len(outputs) == 400:
            raise ValueError("too many")
        return -float(np.abs(outputs - reference).mean())

    with pytest.raises(InputError, match="fails for the model of trial .* was written to .*int8"):
        run(evaluation=many, metric=fails_on_all, n_trials=2, output=tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").is_file()


def test_of_several_objectives_what_is_chosen_is_on_the_front(run) -> None:  # type: ignore[no-untyped-def]
    result = run(objectives=["accuracy", "latency", "size"], n_trials=8)
    assert result.trial.number in {trial.number for trial in result.pareto}


def test_predictions_before_the_first_trial_show_their_progress(run) -> None:  # type: ignore[no-untyped-def]
    stages: dict[str, list[tuple[int, int]]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if "evaluation" not in stages:
            stages.setdefault(stage, []).append((done, total))

    knobs = {"granularity": ["tensor", "channel"], "weight_rounding": ["nearest", "compensated"]}
    run(space=SearchSpace(knobs), n_trials=1, progress=progress)
    assert stages["predictions"] == [(done, 4) for done in range(5)]
    assert stages["layer inputs"] == [(done, 32) for done in range(1, 33)]


def test_an_exhausted_search_says_so_and_makes_no_further_trials(  # type: ignore[no-untyped-def]
    run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="optuna_quantune")
    space = SearchSpace({"granularity": ["tensor", "channel"]})
    place = {"storage": str(tmp_path / "trials.log"), "space": space, "study_name": "mine"}
    for n_trials in (5, 7):
        caplog.clear()
        assert len(run(**place, n_trials=n_trials).study.trials) == 2
        assert "all configurations of the space have been tried" in caplog.text
