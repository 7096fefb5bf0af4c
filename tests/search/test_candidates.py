from __future__ import annotations

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_quantune.search.candidates import emptiness
from optuna_quantune.search.candidates import enumerate_codes
from optuna_quantune.search.candidates import neighbours
from optuna_quantune.search.candidates import random_codes
from optuna_quantune.search.encoding import SpaceEncoding


MIXED: dict[str, BaseDistribution] = {
    "choice": CategoricalDistribution("abc"),
    "many": CategoricalDistribution(range(50)),
    "few_steps": IntDistribution(0, 5),
    "steps": IntDistribution(0, 1000),
    "share": FloatDistribution(0.0, 1.0),
    "only": IntDistribution(3, 3),
}


def test_neighbours_differ_in_one_parameter_and_stay_inside() -> None:
    encoding = SpaceEncoding(MIXED)
    start = random_codes(encoding, 1, np.random.RandomState(0))
    moved = neighbours(encoding, start, np.random.RandomState(1))
    assert ((moved != start).sum(axis=1) == 1).all()
    for row in moved:
        assert encoding.encode(encoding.decode(row)) is not None
    assert set(np.flatnonzero((moved != start).any(axis=0))) == set(range(6)) - {
        encoding.names.index("only")
    }


def test_whole_numbers_on_a_logarithmic_scale_are_drawn_and_moved_on_it() -> None:
    encoding = SpaceEncoding({"n": IntDistribution(1, 10**8, log=True)})
    drawn = 1 + random_codes(encoding, 4000, np.random.RandomState(0))[:, 0]
    assert drawn.min() == 1 <= drawn.max() <= 10**8
    for decade in range(8):
        share = np.mean((drawn >= 10**decade) & (drawn < 10 ** (decade + 1)))
        assert 0.1 < share < 0.15
    start = np.full((500, 1), 1e4 - 1)
    factors = (1 + neighbours(encoding, start, np.random.RandomState(1))[:, 0]) / 1e4
    assert factors.min() < 0.1
    assert factors.max() > 10
    assert 0.3 < np.mean(factors < 1) < 0.7
    lowest = neighbours(encoding, np.zeros((20, 1)), np.random.RandomState(2))
    assert lowest.min() == 1, "a move shorter than a step is a step"


def test_neighbours_of_small_parameters_are_all_other_values() -> None:
    encoding = SpaceEncoding({n: CategoricalDistribution(range(3)) for n in "ab"})
    moved = neighbours(encoding, np.array([[0.0, 2.0]]), np.random.RandomState(0))
    assert sorted(map(tuple, moved)) == [(0, 0), (0, 1), (1, 2), (2, 2)]


def test_a_greedy_design_covers_every_choice_before_it_repeats_one() -> None:
    encoding = SpaceEncoding({n: CategoricalDistribution(range(3)) for n in "abcd"})
    codes = enumerate_codes(encoding)
    features = encoding.kernel_features(codes)
    chosen = [40]
    while len(chosen) < 3:
        chosen.append(int(emptiness(features, features[chosen]).argmax()))
    for column in codes[chosen].T:
        assert len(set(column)) == 3


def test_a_measured_configuration_is_the_least_empty() -> None:
    encoding = SpaceEncoding({"x": FloatDistribution(0.0, 1.0)})
    codes = np.linspace(0.0, 1.0, 101)[:, None]
    features = encoding.kernel_features(codes)
    scores = emptiness(features, features[[20, 60]])
    assert set(np.argsort(scores)[:2]) == {20, 60}
    assert codes[scores.argmax(), 0] == 1.0
