"""16-bit activations: steps read from the model, noise measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.representation import Representation


Run = Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[np.float32]]


def steps(proto: onnx.ModelProto) -> dict[str, tuple[float, int, np.dtype[np.generic]]]:
    constants = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    return {
        node.input[1]: (
            float(constants[node.input[1]]),
            int(constants[node.input[2]]),
            constants[node.input[2]].dtype,
        )
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


def test_steps_are_the_range_over_65535(quantizer: Quantizer) -> None:
    wide = quantizer.quantize(QuantizationConfig(activation_bits=16)).proto
    narrow = steps(quantizer.quantize(QuantizationConfig()).proto)
    # The operators of opset 17 do not know 16 bits.
    pairs = [n for n in wide.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {node.domain for node in pairs} == {"com.microsoft"}
    onnx.checker.check_model(wide)
    for scale, (step, zero_point, dtype) in steps(wide).items():
        tensor = scale.removesuffix("_scale")
        histogram = quantizer.statistics.histogram(tensor, "all")
        span = max(histogram.maximum, 0.0) - min(histogram.minimum, 0.0)
        assert step == pytest.approx(span / 65535, rel=1e-6)
        assert step == pytest.approx(narrow[scale][0] * 255 / 65535, rel=1e-6)
        assert dtype == np.uint16
        assert zero_point * step == pytest.approx(-min(histogram.minimum, 0.0), abs=step)


@pytest.mark.parametrize("storage", ["uint8", "int8"])
def test_only_the_noise_of_the_weights_is_left(
    float_model: FloatModel,
    toy_statistics: CalibrationStatistics,
    toy_inputs: NDArray[np.float32],
    run: Run,
    storage: str,
) -> None:
    representation = Representation(activations=storage)  # type: ignore[arg-type]
    quantizer = Quantizer(float_model, toy_statistics, representation=representation)
    config = QuantizationConfig(activation_bits=16)
    outputs = run(quantizer.quantize(config).proto, toy_inputs)
    # The float model with the weights that the integers stand for.
    only_weights = onnx.ModelProto()
    only_weights.CopyFrom(float_model.proto)
    plan = quantizer.plan(config)
    errors = {
        layer.weight: quantizer.weight_error(layer, plan.constants[layer.weight])
        for layer in float_model.layers
    }
    for tensor in only_weights.graph.initializer:
        if tensor.name in errors:
            values = numpy_helper.to_array(tensor) + errors[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    expected = run(only_weights, toy_inputs)
    power = float(np.mean(expected**2))
    assert np.mean((outputs - expected) ** 2) < 1e-6 * power
    reference = run(float_model.proto, toy_inputs)
    assert np.mean((expected - reference) ** 2) > 1e-6 * power


def test_other_widths_are_refused() -> None:
    with pytest.raises(InputError, match="knob 'activation_bits': 4 is not one of 8, 16"):
        QuantizationConfig(activation_bits=4)  # type: ignore[arg-type]


def test_what_is_clipped_by_least_error_is_clipped_for_that_width(quantizer: Quantizer) -> None:
    """Beside 65,536 steps hardly anything is worth cutting off."""
    wide, narrow = (
        quantizer.plan(QuantizationConfig(activation_bits=bits, clipping="mse")).activations
        for bits in (16, 8)
    )
    spans = {
        name: (float(wide[name].scale) * 65535, float(narrow[name].scale) * 255) for name in wide
    }
    assert all(first >= 0.999 * second for first, second in spans.values())
    assert any(first > 1.1 * second for first, second in spans.values())
