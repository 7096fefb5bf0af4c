from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution

from optuna_quantune.errors import InputError
from optuna_quantune.search.candidates import enumerate_codes
from optuna_quantune.search.candidates import random_codes
from optuna_quantune.search.encoding import SpaceEncoding


MIXED: dict[str, BaseDistribution] = {
    "scheme": CategoricalDistribution(["symmetric", None, 3, True]),
    "images": IntDistribution(1, 100, log=True),
    "layers": IntDistribution(2, 10, step=2),
    "percentile": FloatDistribution(0.9, 1.0, step=0.025),
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "share": FloatDistribution(-1.0, 1.0),
    "only": IntDistribution(7, 7),
}


@pytest.mark.parametrize(
    "params",
    [
        {
            "scheme": None,
            "images": 1,
            "layers": 2,
            "percentile": 0.9,
            "rate": 1e-5,
            "share": -1.0,
            "only": 7,
        },
        {
            "scheme": True,
            "images": 100,
            "layers": 10,
            "percentile": 1.0,
            "rate": 1.0,
            "share": 1.0,
            "only": 7,
        },
        {
            "scheme": 3,
            "images": 37,
            "layers": 6,
            "percentile": 0.95,
            "rate": 0.02,
            "share": 0.3,
            "only": 7,
        },
    ],
)
def test_decoding_undoes_encoding(params: dict[str, Any]) -> None:
    encoding = SpaceEncoding(MIXED)
    codes = encoding.encode(params)
    assert codes is not None
    decoded = encoding.decode(codes)
    assert decoded == pytest.approx(params)
    assert {name: type(v) for name, v in decoded.items()} == {
        name: type(v) for name, v in params.items()
    }


def test_random_codes_decode_to_values_inside_the_distributions() -> None:
    encoding = SpaceEncoding(MIXED)
    for row in random_codes(encoding, 200, np.random.RandomState(0)):
        for name, value in encoding.decode(row).items():
            assert MIXED[name]._contains(MIXED[name].to_internal_repr(value))


def test_size_counts_configurations() -> None:
    assert SpaceEncoding(MIXED).size == math.inf
    finite = {k: d for k, d in MIXED.items() if k not in {"rate", "share"}}
    assert SpaceEncoding(finite).size == 4 * 100 * 5 * 5 * 1


def test_more_values_than_can_be_counted_are_reported() -> None:
    with pytest.raises(InputError, match="'n'"):
        SpaceEncoding({"n": IntDistribution(0, 2**63)})


def test_choices_that_compare_equal_have_one_code() -> None:
    encoding = SpaceEncoding({"c": CategoricalDistribution([0, "x", False, True])})
    assert encoding.size == 3
    codes = [encoding.encode({"c": choice}) for choice in (0, "x", False, True)]
    np.testing.assert_array_equal(np.concatenate(codes), [0, 1, 0, 2])  # type: ignore[arg-type]
    assert [encoding.decode(np.array([code]))["c"] for code in range(3)] == [0, "x", True]


def test_a_configuration_outside_the_space_has_no_codes() -> None:
    encoding = SpaceEncoding(
        {"n": IntDistribution(0, 4, step=2), "c": CategoricalDistribution("ab")}
    )
    assert encoding.encode({"n": 2}) is None
    assert encoding.encode({"n": 6, "c": "a"}) is None
    assert encoding.encode({"n": 1, "c": "a"}) is None
    assert encoding.encode({"n": 2, "c": "z"}) is None
    assert encoding.encode({"n": 2, "c": "b", "other": 1}) is not None


def test_the_order_in_which_parameters_are_listed_does_not_matter() -> None:
    codes = enumerate_codes(
        SpaceEncoding({"a": IntDistribution(0, 2), "b": IntDistribution(0, 1)})
    )
    swapped = SpaceEncoding({"b": IntDistribution(0, 1), "a": IntDistribution(0, 2)})
    np.testing.assert_array_equal(codes, enumerate_codes(swapped))


def test_enumeration_is_the_product_of_the_values_in_order() -> None:
    encoding = SpaceEncoding({"a": IntDistribution(0, 2), "b": CategoricalDistribution("xy")})
    codes = enumerate_codes(encoding)
    expected = [{"a": a, "b": b} for a, b in itertools.product(range(3), "xy")]
    assert [encoding.decode(row) for row in codes] == expected
    np.testing.assert_array_equal(encoding.flat_index(codes), np.arange(6))


def test_kernel_features_are_as_many_as_announced() -> None:
    encoding = SpaceEncoding(MIXED)
    codes = random_codes(encoding, 1, np.random.RandomState(0))
    assert encoding.kernel_features(codes).shape == (1, encoding.n_features)


def test_kernel_features_of_categorical_parameters_count_agreements() -> None:
    encoding = SpaceEncoding({n: CategoricalDistribution(range(3)) for n in "abcd"})
    codes = random_codes(encoding, 20, np.random.RandomState(0))
    features = encoding.kernel_features(codes)
    agreements = (codes[:, None, :] == codes[None, :, :]).sum(axis=2)
    np.testing.assert_allclose(features @ features.T, agreements, atol=1e-5)


@pytest.mark.parametrize(
    "distribution", [FloatDistribution(0.0, 1.0), IntDistribution(0, 200), IntDistribution(0, 9)]
)
def test_kernel_features_of_a_numerical_parameter_give_matern_similarity(
    distribution: BaseDistribution,
) -> None:
    encoding = SpaceEncoding({"x": distribution})
    codes = random_codes(encoding, 50, np.random.RandomState(0))
    x = encoding.positions(codes, 0)
    distance = np.sqrt(5.0) * np.abs(x[:, None] - x[None, :]) / 0.4
    matern = (1 + distance + distance**2 / 3) * np.exp(-distance)
    features = encoding.kernel_features(codes)
    np.testing.assert_allclose(features @ features.T, matern, atol=2e-3)


def test_positions_follow_the_logarithm_of_log_parameters() -> None:
    encoding = SpaceEncoding({"n": IntDistribution(1, 100, log=True)})
    codes = np.array([encoding.encode({"n": n}) for n in (1, 10, 100)])
    np.testing.assert_allclose(encoding.positions(codes, 0), [0.0, 0.5, 1.0])
