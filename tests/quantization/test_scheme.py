from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.scheme import choose_parameters
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.scheme import widen_for_bias


def glow(low: float, high: float, scheme: str) -> tuple[float, int]:
    """Scale and offset by Glow's rules, one number at a time."""
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = -128, 127
    if scheme == "symmetric_uint8" and low >= 0:
        return high / 255, -128
    if scheme != "asymmetric":
        if low / qmin > high / qmax:
            high = low * qmax / qmin
        else:
            low = high * qmin / qmax
    scale = (high - low) / (qmax - qmin)
    if scheme == "symmetric_power2":
        scale = 2.0 ** math.ceil(math.log2(scale))
    return scale, 0 if scheme != "asymmetric" else round(qmin - low / scale)


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (-7.5, 2.0), (0.0, 6.0), (0.5, 2.0), (-4.0, -1.0), (-1.0, 1.0)]
)
def test_parameters_are_those_of_glow(scheme: Scheme, low: float, high: float) -> None:
    parameters = choose_parameters(low, high, scheme)
    scale, zero_point = glow(low, high, scheme)
    assert float(parameters.scale) == pytest.approx(scale, rel=1e-6)
    assert int(parameters.zero_point) == zero_point


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_zero_is_represented_exactly(scheme: Scheme) -> None:
    for low, high in [(-1.37, 3.01), (0.0, 2.2), (0.7, 1.9), (-5.0, -0.1)]:
        parameters = choose_parameters(low, high, scheme)
        zeros = np.zeros(3, dtype=np.float32)
        np.testing.assert_array_equal(parameters.dequantize(parameters.quantize(zeros)), zeros)


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_values_of_the_range_come_back_within_half_a_step(scheme: Scheme) -> None:
    values = np.linspace(-1.3, 2.9, 1001, dtype=np.float32)
    parameters = choose_parameters(-1.3, 2.9, scheme)
    error = np.abs(parameters.dequantize(parameters.quantize(values)) - values)
    # The asymmetric zero point is rounded, which may move an end by half a step more.
    assert error.max() <= float(parameters.scale) * 1.001
    assert np.median(error) <= 0.5 * float(parameters.scale)


def test_power_of_two_scales_are_exact_and_never_smaller() -> None:
    high = np.exp(np.random.default_rng(0).uniform(-10, 10, 500))
    power = choose_parameters(-high, high, "symmetric_power2").scale
    plain = choose_parameters(-high, high, "symmetric").scale
    mantissa, _ = np.frexp(power)
    np.testing.assert_array_equal(mantissa, np.float32(0.5))
    assert np.all(power >= plain)
    assert np.all(power < 2 * plain)


def test_a_scale_that_is_a_power_of_two_already_stays() -> None:
    assert choose_parameters(-0.25 * 128, 0.25 * 127, "symmetric_power2").scale == 0.25


def test_a_tensor_of_zeros_gets_a_usable_scale() -> None:
    for scheme in get_args(Scheme):
        assert choose_parameters(0.0, 0.0, scheme).scale > 0


def test_uint8_is_decided_for_each_tensor() -> None:
    parameters = choose_parameters([0.0, -1.0], [1.0, 1.0], "symmetric_uint8")
    np.testing.assert_array_equal(parameters.zero_point, [-128, 0])
    np.testing.assert_allclose(parameters.scale, [1 / 255, 1 / 127], rtol=1e-6)


@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_power2"])
def test_weight_scales_grow_until_the_bias_fits_into_int32(scheme: Scheme) -> None:
    weight = QuantizationParameters(
        np.array([2.0**-30, 2.0**-7], dtype=np.float32), np.zeros(2, dtype=np.int32)
    )
    bias = np.array([100.0, 1.0], dtype=np.float32)
    widened = widen_for_bias(weight, bias, 1e-3, scheme)
    integers = bias / (1e-3 * widened.scale.astype(np.float64))
    assert np.all(np.abs(integers) <= 2**31 - 1)
    assert widened.scale[0] > weight.scale[0]
    assert widened.scale[1] == weight.scale[1]
    if scheme == "symmetric_power2":
        assert np.frexp(widened.scale[0])[0] == 0.5
