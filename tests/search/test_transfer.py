"""What studies with QuantuneSampler learn from earlier studies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import IntDistribution
from scipy.stats import norm
from scipy.stats import rankdata

from optuna_quantune.errors import InputError
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.search.transfer import normal_scores
from optuna_quantune.search.transfer import Scale
from optuna_quantune.search.transfer import Transfer


optuna.logging.set_verbosity(optuna.logging.ERROR)

SPACE: dict[str, BaseDistribution] = {
    "scheme": CategoricalDistribution(["asymmetric", "symmetric", "power2"]),
    "clipping": CategoricalDistribution(["max", "kl", "mse"]),
    "granularity": CategoricalDistribution(["tensor", "channel"]),
    "layers": IntDistribution(0, 3),
}
GRID = [
    {"scheme": scheme, "clipping": clipping, "granularity": granularity, "layers": layers}
    for scheme in ("asymmetric", "symmetric", "power2")
    for clipping in ("max", "kl", "mse")
    for granularity in ("tensor", "channel")
    for layers in range(4)
]


def drop(params: Mapping[str, Any]) -> float:
    """A made-up loss of accuracy; least for asymmetric, mse, channel, 3."""
    loss = {"asymmetric": 0.0, "symmetric": 0.02, "power2": 0.1}[params["scheme"]]
    loss += {"max": 0.05, "kl": 0.02, "mse": 0.0}[params["clipping"]]
    loss += 0.3 if params["granularity"] == "tensor" else 0.0
    return float(loss + 0.01 * (3 - params["layers"]))


def recorded(
    value: Callable[[Mapping[str, Any]], float], direction: Any = "minimize", **extra: Any
) -> SourceStudy:
    return SourceStudy(
        name="recorded",
        direction=direction,
        params=tuple({**params, **extra} for params in GRID),
        values=tuple(value(params) for params in GRID),
        features=({},) * len(GRID),
    )


def regrets(
    sources: Sequence[optuna.Study | SourceStudy], seed: int, n_trials: int = 1, **kwargs: Any
) -> list[float]:
    """Regret of the best configuration after each trial of a study that minimises the drop."""
    sampler = QuantuneSampler(SPACE, source_studies=sources, seed=seed, **kwargs)
    study = optuna.create_study(sampler=sampler)
    for _ in range(n_trials):
        trial = study.ask(SPACE)
        study.tell(trial, drop(trial.params))
    values = [trial.values[0] for trial in study.trials]
    return list(np.minimum.accumulate(values))


def test_the_best_of_an_earlier_study_is_first() -> None:
    assert regrets([recorded(drop)], seed=0) == [0.0]


def test_values_on_another_scale_and_in_another_direction_tell_the_same() -> None:
    accuracy = recorded(lambda params: 80.0 - 100.0 * drop(params), "maximize")
    assert regrets([accuracy], seed=0) == [0.0]


def test_an_optuna_study_is_a_source() -> None:
    study = optuna.create_study(sampler=QuantuneSampler(SPACE, seed=0))
    for _ in range(40):
        trial = study.ask(SPACE)
        study.tell(trial, drop(trial.params))
    assert regrets([study], seed=0) == [0.0]


def test_an_attribute_beyond_any_float_is_no_feature() -> None:
    study = optuna.create_study()
    study.add_trial(optuna.create_trial(value=0.0, user_attrs={"hash": 10**400, "size": 3}))
    assert SourceStudy.from_study(study).features == ({"size": 3.0},)


def test_spaces_share_the_knobs_that_they_share() -> None:
    """The source lacks a knob, has one more, and values of a shared one that are unknown here."""
    source = SourceStudy(
        name="other space",
        direction="minimize",
        params=tuple(
            {"scheme": p["scheme"], "clipping": c, "granularity": p["granularity"], "bits": 8}
            for p in GRID
            for c in ("percentile", p["clipping"])
        ),
        values=tuple(drop(p) + off for p in GRID for off in (0.2, 0.0)),
        features=({},) * (2 * len(GRID)),
    )
    sampler = QuantuneSampler(SPACE, source_studies=[source], seed=0)
    first = optuna.create_study(sampler=sampler).ask(SPACE).params
    assert (first["scheme"], first["clipping"], first["granularity"]) == (
        "asymmetric",
        "mse",
        "channel",
    )


def test_sources_add_to_a_prior_what_it_misses() -> None:
    """The prior is blind to clipping, as it was in the sources; on other models, too."""

    def blind(params: Mapping[str, Any]) -> dict[str, float]:
        return {"prior": drop({**params, "clipping": "max"})}

    def source(factor: float) -> SourceStudy:
        return SourceStudy(
            name="recorded",
            direction="minimize",
            params=tuple(GRID),
            values=tuple(factor * drop(params) for params in GRID),
            features=tuple({"prior": factor * blind(params)["prior"]} for params in GRID),
        )

    sampler = QuantuneSampler(
        SPACE, features=blind, source_studies=[source(0.5), source(2.0)], seed=0
    )
    first = optuna.create_study(sampler=sampler).ask(SPACE).params
    assert drop(first) == 0.0


def test_sources_without_a_prior_leave_the_own_one_as_far_as_they_are_not_trusted() -> None:
    rng = np.random.default_rng(0)
    hostile = [
        dataclasses.replace(recorded(drop), values=tuple(rng.normal(size=len(GRID)).tolist()))
        for _ in range(3)
    ]
    prior = {"features": lambda params: {"prior": drop(params)}}
    assert regrets(hostile, seed=0, **prior) == [0.0]


def test_scores_are_ranks_whatever_the_scale() -> None:
    values = np.array([3.0, -np.inf, 7.0, 3.0, np.inf, 1e9])
    expected = norm.ppf((rankdata(values) - 0.5) / len(values))
    assert normal_scores(values, values) == pytest.approx(expected)
    # Beyond the reference there is no rank, but the order holds as far as there are ranks.
    assert np.all(np.diff(normal_scores(np.array([-9.0, 0.5, 1.5, 9.0]), np.arange(3.0))) >= 0)


def test_a_new_order_has_the_values_of_the_prior() -> None:
    prior = np.array([0.0, 0.1, 0.2, 50.0, 60.0])
    scores = np.array([0.3, -1.0, -2.0, 2.0, 1.0])
    scale = Scale.fit(scores, prior)
    assert scale is not None
    assert scale(scores) == pytest.approx([0.2, 0.1, 0.0, 60.0, 50.0])
    # Better than the best goes on; worse than the worst is as bad.
    assert scale(np.array([-3.0, 9.0])) == pytest.approx([-0.1, 60.0])


def test_what_a_prior_cannot_tell_apart_stays_in_the_order_of_the_scores() -> None:
    prior = np.repeat([0.0, 1.0, 5.0], 4)
    scores = np.random.default_rng(0).permutation(np.linspace(-2.0, 2.0, 12))
    scale = Scale.fit(scores, prior)
    assert scale is not None
    values = scale(np.sort(scores))[:-1]  # the last two are behind the last knot
    assert np.all(np.diff(values[:-1]) > 0.0)
    assert values.mean() == pytest.approx(prior.mean(), rel=0.2)


@pytest.mark.parametrize(
    ("scores", "prior"), [(np.arange(3.0), np.ones(3)), (np.ones(3), np.arange(3.0))]
)
def test_where_all_are_alike_there_is_no_scale(
    scores: NDArray[np.float64], prior: NDArray[np.float64]
) -> None:
    assert Scale.fit(scores, prior) is None


def test_a_prior_that_is_the_same_everywhere_leaves_the_choice_to_the_sources() -> None:
    first = regrets([recorded(drop)], seed=0, features=lambda params: {"prior": 0.5})
    assert first == [0.0]


def test_configurations_that_prior_and_sources_call_collapsed_are_not_tried_early() -> None:
    """Ranks alone do not tell a collapse from the next best one."""

    def collapsing(params: Mapping[str, Any]) -> float:
        return drop(params) if params["granularity"] == "channel" else 70.0

    source = replace(
        recorded(collapsing), features=tuple({"prior": collapsing(params)} for params in GRID)
    )
    rng = np.random.default_rng(0)
    for seed in range(5):
        sampler = QuantuneSampler(
            SPACE,
            features=lambda params: {"prior": collapsing(params)},
            source_studies=[source] * 3,
            seed=seed,
        )
        study = optuna.create_study(sampler=sampler)
        for _ in range(5):
            trial = study.ask(SPACE)
            # What tells good ones apart is lost in noise.
            study.tell(trial, collapsing(trial.params) + 0.05 * rng.standard_normal())
        assert max(trial.values[0] for trial in study.trials) < 1.0


def test_sources_whose_prior_was_right_leave_a_prior_as_it_is() -> None:
    """Values that collapse where the prior is large are no residual: ranks agree."""
    drops = [round(drop(params), 6) for params in GRID]
    encoding = SpaceEncoding(SPACE)
    inputs = encoding.tree_features(np.array([encoding.encode(params) for params in GRID]))
    collapsed = SourceStudy(
        name="collapsed",
        direction="minimize",
        params=tuple(GRID),
        values=tuple(float(np.exp(20.0 * value)) for value in drops),
        features=tuple({"prior": value} for value in drops),
    )
    prior = normal_scores(np.array(drops), np.array(drops))
    transfer = Transfer([collapsed, collapsed], encoding, ("prior",), 0)
    features = np.zeros((len(GRID), 1))
    assert transfer.guess(inputs, features, prior) == pytest.approx(prior, abs=1e-6)


def test_no_configurations_have_no_guesses(xgboost_34: None) -> None:
    encoding = SpaceEncoding(SPACE)
    inputs = encoding.tree_features(np.empty((0, encoding.n_params)))
    transfer = Transfer([recorded(drop)] * 2, encoding, (), None)
    assert transfer.guess(inputs, np.empty((0, 0)), None).shape == (0,)


def test_a_source_that_contradicts_the_others_lowers_the_trust_in_all() -> None:
    encoding = SpaceEncoding(SPACE)
    codes = np.array([encoding.encode(params) for params in GRID])
    inputs = encoding.tree_features(codes)
    nothing = np.empty((len(GRID), 0))

    def spread(*sources: SourceStudy) -> float:
        return float(np.std(Transfer(sources, encoding, (), None).guess(inputs, nothing, None)))

    like, unlike = recorded(drop), recorded(lambda params: -drop(params))
    assert spread(like, like) > 0.5
    assert spread(like, like, unlike) < 0.5 * spread(like, like)
    assert spread(like, unlike) == 0.0


@pytest.mark.parametrize("with_prior", [False, True], ids=["knobs", "prior"])
def test_a_hostile_source_costs_nothing_after_twelve_trials(with_prior: bool) -> None:
    """Values upside down: the mean regret is that of a cold search, within its own spread."""
    features = {"features": lambda p: {"prior": drop({**p, "layers": 0})}} if with_prior else {}
    hostile = [recorded(lambda params: -drop(params))] * 3
    misled = [regrets(hostile, seed, 12, **features)[-1] for seed in range(6)]
    cold = [regrets([], seed, 12, **features)[-1] for seed in range(6)]
    assert np.mean(misled) <= np.mean(cold) + 0.01


def test_a_source_with_hardly_any_trial_changes_nothing() -> None:
    tiny = SourceStudy("tiny", "minimize", (GRID[0],), (0.0,), ({},))
    assert regrets([tiny], seed=1, n_trials=6) == regrets([], seed=1, n_trials=6)


def unrelated() -> SourceStudy:
    return SourceStudy(
        name="unrelated",
        direction="minimize",
        params=tuple({"rounds": n, "scheme": "ternary"} for n in range(20)),
        values=tuple(float(n) for n in range(20)),
        features=({"seconds": 1.0},) * 20,
    )


@pytest.mark.parametrize(
    "nothing",
    [
        unrelated(),
        recorded(lambda params: 0.5),
        recorded(lambda params: float("inf")),
        recorded(lambda params: drop(params) * float("inf") if drop(params) else -float("inf")),
    ],
    ids=["other parameters", "one value", "all collapsed", "all infinite"],
)
def test_a_source_that_says_nothing_changes_nothing(nothing: SourceStudy) -> None:
    assert regrets([nothing], seed=1, n_trials=6) == regrets([], seed=1, n_trials=6)
    assert regrets([nothing], seed=1, features=lambda p: {"prior": drop(p)}) == [0.0]
    assert regrets([recorded(drop), nothing], 1, 4) == regrets([recorded(drop)], 1, 4)


def test_a_source_that_shares_a_feature_only_is_learned_from() -> None:
    source = SourceStudy(
        name="other knobs",
        direction="minimize",
        params=tuple({"id": n} for n in range(len(GRID))),
        values=tuple(drop(params) for params in GRID),
        features=tuple({"error": 7.0 * drop(params)} for params in GRID),
    )
    first = regrets([source], seed=0, features=lambda p: {"error": drop(p)})
    assert first[0] <= sorted(drop(params) for params in GRID)[3]


@pytest.mark.parametrize("target", ["minimize", "maximize"])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_prior_of_a_source_has_the_direction_of_its_values(direction: Any, target: Any) -> None:
    """All priors have one knob the wrong way round; the source shows it."""

    def estimate(params: Mapping[str, Any]) -> float:
        scheme = params["scheme"]
        swapped = {"asymmetric": "power2", "power2": "asymmetric"}.get(scheme, scheme)
        return drop({**params, "scheme": swapped})

    def seen(value: float, direction: str) -> float:
        return 1.0 - value if direction == "maximize" else value

    source = SourceStudy(
        name="recorded",
        direction=direction,
        params=tuple(GRID),
        values=tuple(seen(drop(params), direction) for params in GRID),
        features=tuple({"prior": seen(estimate(params), direction)} for params in GRID),
    )
    sampler = QuantuneSampler(
        SPACE,
        features=lambda p: {"prior": seen(estimate(p), target)},
        source_studies=[source, source],
        seed=0,
    )
    study = optuna.create_study(direction=target, sampler=sampler)
    assert drop(study.ask(SPACE).params) <= 0.02


def test_infinite_values_of_a_source_are_the_worst_or_best_there() -> None:
    def collapsed(params: Mapping[str, Any]) -> float:
        return float("inf") if params["granularity"] == "tensor" else drop(params)

    assert regrets([recorded(collapsed)], seed=0) == [0.0]


def test_a_source_that_does_not_fit_together_is_reported() -> None:
    with pytest.raises(InputError, match="broken"):
        SourceStudy("broken", "minimize", (GRID[0],), (0.0, 1.0), ({},))
    with pytest.raises(InputError, match="'min'"):
        SourceStudy("broken", "min", (), (), ())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NaN"):
        SourceStudy("broken", "minimize", (GRID[0],), (float("nan"),), ({},))
