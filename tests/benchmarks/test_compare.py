"""The machinery of `benchmarks.compare`, on a small made-up table and against known statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest

from optuna_quantune.selection import pack
from optuna_quantune.space import SearchSpace


pytest.importorskip("matplotlib", reason="needs the extra 'benchmarks'")

from benchmarks import compare
from benchmarks import foreknowledge
from benchmarks import ranking
from benchmarks import replay
from benchmarks import runs
from benchmarks import tables
from benchmarks.compare_report import write
from benchmarks.replay import Run
from benchmarks.scores import against_the_best
from benchmarks.scores import among_the_best
from benchmarks.scores import interval_of_mean
from benchmarks.scores import score
from benchmarks.tables import Table


optuna.logging.set_verbosity(optuna.logging.ERROR)

INPUTS = 200


def make_table(name: str, seed: int, family: str = "toy") -> Table:
    """Accuracies that add up from the knobs; rows 2n and 2n + 1 of the scheme build one model."""
    rng = np.random.default_rng(seed)
    space = SearchSpace.preset("quantune")
    effects = {(k, v): rng.random() for k, d in space.items() for v in d.choices}  # type: ignore[attr-defined]
    rows: list[dict[str, Any]] = []
    for params in space.grid():
        share = sum(effects[item] for item in params.items()) / len(space)
        correct = rng.random(INPUTS) < share
        rows.append(
            {
                **{name: str(value) for name, value in params.items()},
                "top1": correct.mean(),
                "latency_ratio": 0.5,
                "latency_ms": 2.0,
                "build_seconds": 0.25,
                "evaluate_seconds": 4.0,
                "predicted_sqnr_db": 30 * share,
                "expected_agreement": share,
                "prior": share,
                "digest": f"{len(rows) // 2}",
                "correct": pack(correct),
            }
        )
    shared = {
        "model": name,
        "family": family,
        "inputs": INPUTS,
        "layers": 10 + seed,
        "parameters": 1000,
        "top1": 0.9,
    }
    return Table(name, pd.DataFrame(rows), shared)


@pytest.fixture
def three_tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    families = {"cifar10_resnet8": "ResNet", "cifar10_resnet20": "ResNet", "squeezenet1_1": "S"}
    made = {
        name: make_table(name, seed, family)
        for seed, (name, family) in enumerate(families.items())
    }
    monkeypatch.setattr(tables, "complete", lambda: list(made))
    monkeypatch.setattr(tables, "load", lambda name: made[name])
    monkeypatch.setattr(tables, "family", lambda name: made[name].family)
    for cached in (replay.recorded_features, replay.as_study, replay.as_record):
        cached.cache_clear()
    return made


def a_run(rows: tuple[int, ...], notion: replay.Notion = "exact") -> Run:
    return Run("t", "digest", "random", notion, 0, rows, tuple(1000.0 for _ in rows))


def test_an_exact_run_ends_with_the_best_and_lasts_for_the_horizon(
    three_tables: dict[str, Table],
) -> None:
    table = three_tables["squeezenet1_1"]
    best = table.rows["top1"].max()
    for seed in range(4):
        run = replay.replay(table, "random_without_replacement", seed, "exact")
        found = [table.rows["top1"][row] == best for row in run.rows]
        assert len(run.rows) >= replay.HORIZON
        assert any(found)
        assert len(run.rows) == max(replay.HORIZON, found.index(True) + 1)
        assert len(run.milliseconds) == len(run.rows)


def test_a_sampler_sees_one_half_of_the_inputs_and_is_judged_by_the_other(
    three_tables: dict[str, Table],
) -> None:
    table = three_tables["squeezenet1_1"]
    seen, hidden = replay.halves(table, 3)
    assert np.allclose((seen + hidden) / 2, table.rows["top1"])
    run = replay.replay(table, "tpe", 3, "half")
    assert len(run.rows) == replay.HORIZON
    result = score(table, run)
    chosen = max(run.rows, key=lambda row: seen[row])
    exhaustive = hidden[np.isclose(seen, seen.max())].mean()
    assert result.regret[-1] == pytest.approx(100 * (exhaustive - hidden[chosen]))


def test_regret_and_seconds_are_looked_up_in_the_table(three_tables: dict[str, Table]) -> None:
    table = three_tables["squeezenet1_1"]
    values = table.rows["top1"].to_numpy()
    order = np.argsort(values)
    worst, best = int(order[0]), int(order[-1])
    twin = worst ^ 1  # has the digest of the worst
    run = Run(
        table.name,
        replay.digest(table, "x"),
        "x",
        "exact",
        0,
        (worst, twin, worst, best),
        (1e3,) * 4,
    )
    result = score(table, run)
    incumbent = np.maximum.accumulate(values[[worst, twin, worst, best]])
    assert result.regret[:4] == pytest.approx(100 * (values[best] - incumbent))
    assert np.all(result.regret[3:] == 0)
    # Build, 25 runs of 2 ms and of 4 ms (float), evaluation, and the second of the sampler.
    measured = 0.25 + 25 * (2.0 + 4.0) / 1e3 + 4.0 + 1.0
    known = 0.25 + 1.0
    assert result.seconds == pytest.approx([measured, known, known, measured])
    trials, seconds, reached = result.trials_within(0.1)
    assert (trials, reached) == (4, True)
    assert seconds == pytest.approx(2 * (measured + known))
    assert result.trials_to_tie()[2]
    assert result.repeats() == 0.25
    assert result.overhead_ms() == 1000.0


def test_a_run_that_never_gets_there_counts_with_one_trial_more_than_there_are(
    three_tables: dict[str, Table],
) -> None:
    table = three_tables["squeezenet1_1"]
    worst = int(table.rows["top1"].argmin())
    run = Run(table.name, replay.digest(table, "x"), "x", "exact", 0, (worst,) * 96, (0.0,) * 96)
    trials, seconds, reached = score(table, run).trials_within(0.1)
    assert (trials, reached) == (97, False)
    assert seconds == pytest.approx(96 * 0.25 + 4.15)


def test_no_model_is_a_source_for_its_own_family(three_tables: dict[str, Table]) -> None:
    assert replay.source_names(three_tables["cifar10_resnet8"]) == ["squeezenet1_1"]
    assert replay.source_names(three_tables["cifar10_resnet20"]) == ["squeezenet1_1"]
    both = ["cifar10_resnet8", "cifar10_resnet20"]
    assert replay.source_names(three_tables["squeezenet1_1"]) == both


def test_a_recorded_table_says_its_family() -> None:
    assert tables.family("demo") == tables.load("mobilenetv2_1.0").family == "MobileNet"
    assert tables.family("cifar10_resnet8") == tables.family("cifar10_resnet20") == "ResNet"


def test_runs_are_made_anew_when_what_the_sampler_saw_has_changed(
    three_tables: dict[str, Table],
) -> None:
    table, other = three_tables["cifar10_resnet8"], three_tables["squeezenet1_1"]
    names = ("random", "quantune+features", "quantune_published+transfer", "quantune+transfer")

    def digests() -> dict[str, str]:
        return {name: replay.digest(table, name) for name in names}

    def changed(before: dict[str, str]) -> set[str]:
        return {name for name, value in digests().items() if value != before[name]}

    before = digests()
    runs_before = [replay.replay(table, "random", 0, "half")]
    assert compare.up_to_date(runs_before, three_tables) == runs_before
    table.rows["prior"] += 0.1
    assert changed(before) == {"quantune+features", "quantune+transfer"}
    before = digests()
    other.rows["prior"] += 0.1
    assert changed(before) == {"quantune+transfer"}
    before = digests()
    other.rows["top1"] *= 0.5
    assert changed(before) == {"quantune+transfer", "quantune_published+transfer"}
    before = digests()
    table.rows["top1"] *= 0.5
    assert changed(before) == set(names)
    assert compare.up_to_date(runs_before, three_tables) == []


def test_a_table_as_a_study_has_all_its_trials(three_tables: dict[str, Table]) -> None:
    study = replay.as_study("squeezenet1_1")
    assert len(study.trials) == 96
    assert study.best_value == three_tables["squeezenet1_1"].rows["top1"].max()
    assert all("prior" in trial.user_attrs for trial in study.trials)


def test_runs_are_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    first, second = a_run((3, 1, 3)), a_run((95,), "half")
    assert runs.load(path) == []
    runs.append(path, first)
    runs.append(path, second)
    assert runs.load(path) == [first, second]
    runs.write(path, [second])
    assert runs.load(path) == [second]


def test_only_missing_runs_are_made(
    three_tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    made = compare.missing_runs(three_tables, ["random"], 0, [])
    assert len(made) == 6
    assert runs.load(tmp_path / "runs.csv")[-1].rows == made[-1].rows
    assert compare.missing_runs(three_tables, ["random"], 0, made[1:])[0].rows == made[0].rows
    assert compare.missing_runs(three_tables, ["random"], 0, made) == []


def test_a_sampler_that_cannot_be_made_is_left_out_and_said(
    three_tables: dict[str, Table],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare.missing_runs(three_tables, ["no_such_sampler"], 0, []) == []
    assert "no_such_sampler" in capsys.readouterr().err


def test_the_report_ranks_and_draws(three_tables: dict[str, Table], tmp_path: Path) -> None:
    names = ["random_without_replacement", "grid_lexicographic", "quantune+features", "qmc"]
    scores = [
        score(table, replay.replay(table, name, seed, notion))
        for name in names
        for table in three_tables.values()
        for notion in replay.NOTIONS
        for seed in range(2)
    ]
    table = three_tables["squeezenet1_1"]
    partial = score(table, replay.replay(table, "tpe", 0))
    write(three_tables, [*scores, partial], tmp_path)
    for file in ("ranking", "regret_exact", "regret_half"):
        assert (tmp_path / f"{file}.png").stat().st_size > 5000
        assert (tmp_path / f"{file}.svg").stat().st_size > 5000
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert len(summary) == len(names) * len(three_tables) * 2
    text = (tmp_path / "README.md").read_text()
    for name in names:
        assert f"| {name} |" in text
    assert "| tpe |" not in text, "it has not run on every table"
    ours, qmc = (
        np.mean(
            [
                s.regret[2] / (100 * np.ptp(three_tables[s.run.table].rows["top1"]))
                for s in scores
                if (s.run.sampler, s.run.notion) == (name, "exact")
            ]
        )
        for name in ("quantune+features", "qmc")
    )
    paired = text.split("| minus quantune+features |")[1].split("\n\n")[0]
    cell = next(line for line in paired.splitlines() if line.startswith("| qmc |")).split("|")[2]
    assert float(cell.split()[0]) == pytest.approx(100 * (qmc - ours), abs=5e-4)


def test_an_oracle_of_the_other_half_is_judged_as_a_run_is(three_tables: dict[str, Table]) -> None:
    table = three_tables["squeezenet1_1"]
    seen, hidden = replay.inputs_of_halves(table, 3)
    assert sorted([*seen, *hidden]) == list(range(INPUTS))
    correct = table.all_correct
    order = foreknowledge.order_of_oracle(table, 3)
    assert sorted(order) == list(range(len(correct)))
    assert np.all(np.diff(correct[order][:, hidden].sum(axis=1)) <= 0)
    regret = foreknowledge.regret_on_the_seen_half(table, 3, order)
    lead = correct[:, seen].mean(axis=1).max() - correct[order[:3]][:, seen].mean(axis=1).max()
    assert regret[2] == pytest.approx(100 * lead)
    assert regret[-1] == 0
    best, worst = (int(f(correct[:, seen].sum(axis=1))) for f in (np.argmax, np.argmin))
    assert not foreknowledge.is_told_apart(table, 3, best)
    assert foreknowledge.is_told_apart(table, 3, worst)


def test_the_oracle_stands_beside_ours(three_tables: dict[str, Table]) -> None:
    half = [
        Run(name, "", sampler, "half", 0, tuple(range(start, start + 25)), (1.0,) * 25)
        for name in three_tables
        for sampler, start in (("quantune", 0), ("gp", 50))
    ]
    text = "\n".join(foreknowledge.section(three_tables, half, ["quantune"], (1, 3)))
    expected = np.mean(
        [foreknowledge.regret_on_the_seen_half(t, 0, range(3))[2] for t in three_tables.values()]
    )
    cells = next(line for line in text.splitlines() if line.startswith("| quantune |")).split("|")
    assert float(cells[3]) == pytest.approx(expected, abs=0.005)
    assert f"| {foreknowledge.ORACLE} |" in text
    assert "| gp |" not in text


def test_ranks_are_those_of_a_worked_example() -> None:
    """Demšar (2006), table 6: four classifiers on 14 data sets; CD at 5 % is 1.25."""
    ranks_of_data_sets = np.array(
        [
            [4, 3, 2, 1],
            [1, 2, 3, 4],
            [4, 1, 2, 3],
            [4, 1, 3, 2],
            [4, 2, 3, 1],
            [1, 2.5, 4, 2.5],
            [3, 2, 4, 1],
            [2.5, 2.5, 4, 1],
            [4, 3, 2, 1],
            [2.5, 2.5, 2.5, 2.5],
            [4, 2.5, 1, 2.5],
            [3, 2, 4, 1],
            [4, 1, 2, 3],
            [3, 1, 4, 2],
        ]
    )
    names = ["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"]
    result = ranking.rank(names, 10.0 * ranks_of_data_sets)
    ranks = dict(zip(result.names, result.mean_ranks, strict=True))
    assert ranks["C4.5"] == pytest.approx(3.143, abs=1e-3)
    assert ranks["C4.5+m"] == pytest.approx(2.000, abs=1e-3)
    assert ranks["C4.5+cf"] == pytest.approx(2.893, abs=1e-3)
    assert ranks["C4.5+m+cf"] == pytest.approx(1.964, abs=1e-3)
    assert result.critical_difference == pytest.approx(1.25, abs=5e-3)
    assert result.friedman_p < 0.05
    assert ranking.cliques(result) == [(0, 3)]


def test_holm_multiplies_the_smallest_p_value_most() -> None:
    corrected = ranking.holm(np.array([0.01, 0.04, 0.03, 0.5]))
    assert corrected == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_signed_rank_test_of_equal_runs_finds_nothing() -> None:
    values = np.arange(9.0)
    assert ranking.signed_rank_p_value(values, values) == 1.0
    assert ranking.signed_rank_p_value(values + 1 + values / 10, values) < 0.01


def test_sign_flips_count_tables_not_runs() -> None:
    """Three tables that agree leave 2 of 8 sign changes; a large one among small ones counts."""
    assert ranking.sign_flip_p_value(np.array([1.0, 2.0, 3.0])) == 0.25
    assert ranking.sign_flip_p_value(np.array([-1.0] * 8)) == 2 / 256
    assert ranking.sign_flip_p_value(np.array([1.0, -1.0])) == 1.0
    assert ranking.sign_flip_p_value(np.array([9.0, 1.0, -1.0])) == 0.75


def test_interval_is_about_seeds_within_tables() -> None:
    """Tables may differ as they like; equal seeds leave no uncertainty."""
    blocks = [np.full((5, 2), 1.0), np.full((5, 2), 9.0)]
    low, mean, high = interval_of_mean(blocks)
    assert np.all(low == mean)
    assert np.all(high == mean)
    assert mean == pytest.approx([5.0, 5.0])
    rng = np.random.default_rng(0)
    low, mean, high = interval_of_mean([rng.normal(size=(400, 1))])
    assert high[0] - low[0] == pytest.approx(2 * 1.96 / 20, rel=0.15)


def equal_table(accuracies: list[float], seed: int) -> Table:
    rng = np.random.default_rng(seed)
    correct = rng.random((len(accuracies), 1000)) < np.array(accuracies)[:, None]
    frame = pd.DataFrame({"top1": correct.mean(axis=1), "correct": [pack(row) for row in correct]})
    return Table("made_up", frame, {"inputs": 1000})


def test_a_configuration_is_among_the_best_by_a_test_that_knows_of_the_96() -> None:
    """Of 50 tables of equals, a test against the winner alone tells many first rows apart."""
    rejected = [among_the_best(equal_table([0.8] * 30, seed), 0) < 0.05 for seed in range(50)]
    alone = [against_the_best(equal_table([0.8] * 30, seed), 0)[2].low > 0 for seed in range(50)]
    assert sum(rejected) <= 7  # at most 2.5 expected
    assert sum(alone) > 7  # a quarter


def test_a_worse_configuration_is_not_among_the_best() -> None:
    table = equal_table([0.7, *[0.8] * 29], 0)
    assert among_the_best(table, 0) < 0.01
    assert among_the_best(table, int(table.rows["top1"].argmax())) > 0.5
