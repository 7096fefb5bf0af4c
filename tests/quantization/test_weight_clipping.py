from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.weight_clipping import least_error_range


RNG = np.random.default_rng(0)
_DRAWN = {
    "dense": RNG.standard_normal((8, 16, 3, 3)),
    "depthwise": RNG.standard_normal((32, 1, 3, 3)),
    "heavy-tailed": RNG.laplace(size=(32, 64, 3, 3)),
    "positive": RNG.random((8, 16)),
    "zeros": np.zeros((4, 4)),
}
WEIGHTS = {name: weight.astype(np.float32) for name, weight in _DRAWN.items()}


def errors(
    weight: NDArray[np.float32],
    low: object,
    high: object,
    scheme: Scheme,
    axis: int | None,
    bits: int = 8,
) -> NDArray[np.float64]:
    """Squared error of each output channel."""
    parameters = choose_parameters(low, high, scheme, bits=bits)  # type: ignore[arg-type]
    restored = parameters.dequantize(parameters.quantize(weight, axis), axis)
    squares = np.square(restored.astype(np.float64) - weight).reshape(len(weight), -1)
    sums: NDArray[np.float64] = squares.sum(axis=1)
    return sums


def whole_range(weight: NDArray[np.float32], axis: int | None) -> tuple[object, object]:
    others = None if axis is None else tuple(range(1, weight.ndim))
    return weight.min(axis=others), weight.max(axis=others)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("name", WEIGHTS)
def test_no_channel_loses_more_than_with_its_whole_range(
    name: str, scheme: Scheme, axis: int | None
) -> None:
    weight = WEIGHTS[name]
    chosen = errors(weight, *least_error_range(weight, scheme, axis=axis), scheme, axis)
    whole = errors(weight, *whole_range(weight, axis), scheme, axis)
    if axis is None:
        chosen, whole = chosen.sum(), whole.sum()
    assert np.all(chosen <= whole * (1 + 1e-4) + 1e-12)


def test_each_channel_has_the_least_error_of_a_brute_force_search() -> None:
    weight = WEIGHTS["dense"]
    low, high = least_error_range(weight, "symmetric", axis=0)
    found = errors(weight, low, high, "symmetric", 0)
    reach = np.abs(weight).max(axis=(1, 2, 3))
    shares = np.linspace(0.7, 1.15, 46)
    brute = np.min([errors(weight, -s * reach, s * reach, "symmetric", 0) for s in shares], axis=0)
    assert np.all(found <= 1.05 * brute)


def test_nine_weights_of_a_depthwise_channel_find_a_grid_that_suits_them() -> None:
    weight = WEIGHTS["depthwise"]
    chosen = errors(weight, *least_error_range(weight, "symmetric", axis=0), "symmetric", 0)
    whole = errors(weight, *whole_range(weight, 0), "symmetric", 0)
    assert chosen.sum() < 0.6 * whole.sum()


def test_channels_are_chosen_apart() -> None:
    weight = WEIGHTS["dense"]
    low, high = least_error_range(weight, "symmetric", axis=0)
    alone = [least_error_range(weight[i : i + 1], "symmetric", axis=0) for i in range(len(weight))]
    assert low.shape == high.shape == (8,)
    # Another number of candidates is tried when there are fewer weights.
    np.testing.assert_allclose(high, [h[0] for _, h in alone], rtol=0.2)
    swapped = least_error_range(np.moveaxis(weight, 0, 1), "symmetric", axis=1)
    np.testing.assert_array_equal(swapped[1], high)


def test_fewer_bits_clip_more() -> None:
    weight = WEIGHTS["heavy-tailed"]
    ends = [least_error_range(weight, "symmetric", bits=bits)[1] for bits in (4, 6, 8)]
    assert ends[0] < ends[1] < ends[2]
    chosen = errors(weight, -ends[0], ends[0], "symmetric", None, bits=4).sum()
    whole = errors(weight, *whole_range(weight, None), "symmetric", None, bits=4).sum()
    assert chosen < 0.5 * whole
