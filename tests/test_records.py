"""The records that the package ships."""

from __future__ import annotations

import optuna

from optuna_quantune import records
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.space import SearchSpace


SPACE = SearchSpace.preset("quantune")


def test_every_model_has_every_configuration_of_the_preset() -> None:
    grid = sorted(map(str, SPACE.grid()))
    for study in records.source_studies():
        assert sorted(map(str, study.params)) == grid


def test_measured_columns_are_no_features() -> None:
    measured = {"top1_gain", "top5_gain", "agreement", "sqnr_db"}
    for metric in records.METRICS:
        for study in records.source_studies(metric):
            assert not measured & study.features[0].keys()


def test_values_are_gains_on_the_float_model() -> None:
    for study in records.source_studies("top1"):
        assert -1.0 <= min(study.values) < 0.0
        assert max(study.values) < 0.05
        assert all(-1.0 <= features["prior"] <= 0.0 for features in study.features)


def test_a_family_is_left_out() -> None:
    everything = {study.name for study in records.source_studies("agreement")}
    others = {study.name for study in records.source_studies("agreement", without="ResNet")}
    assert everything - others == {"cifar10_resnet8", "cifar10_resnet20"}
    assert "family" not in records.source_studies()[0].features[0]


def test_nothing_is_known_of_other_metrics() -> None:
    assert records.source_studies("perplexity") == ()


def test_they_are_small() -> None:
    assert records.FILE.stat().st_size < 1_000_000


def test_the_first_trial_on_a_new_model_is_one_of_the_best_on_the_known_ones() -> None:
    sampler = QuantuneSampler(SPACE, source_studies=records.source_studies(), seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    first = study.ask(dict(SPACE)).params
    assert first["granularity"] == "channel"
    for known in records.source_studies():
        value = known.values[known.params.index(first)]
        assert value > max(known.values) - 0.03
