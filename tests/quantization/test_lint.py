"""Every rule meets its trap as ONNX Runtime itself sets it; models built here meet none."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.lint import channel_spread
from optuna_quantune.quantization.lint import Finding
from optuna_quantune.quantization.lint import lint_config
from optuna_quantune.quantization.lint import lint_model
from optuna_quantune.quantization.lint import lint_options
from optuna_quantune.quantization.lint import lint_quantized
from optuna_quantune.quantization.model import check_node_names
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.quantization.quantized_graph import load_quantized
from optuna_quantune.quantization.quantizer import Quantizer


Run = Callable[..., NDArray[np.float32]]
Quantize = Callable[..., onnx.ModelProto]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: NDArray[np.float32]) -> None:
        self._batches = iter([{"input": inputs}])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._batches, None)


@pytest.fixture
def quantize(tmp_path: Path, toy_inputs: NDArray[np.float32]) -> Quantize:
    """`quantize_static` with uint8 activations and per-channel int8 weights, or as asked."""

    def call(
        proto: onnx.ModelProto, inputs: NDArray[np.float32] = toy_inputs, **options: Any
    ) -> onnx.ModelProto:
        choices = {
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
        }
        path = tmp_path / "quantized.onnx"
        quantize_static(copy_of(proto), str(path), Reader(inputs), **(choices | options))
        return onnx.load(path)

    return call


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def with_constants(proto: onnx.ModelProto, values: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    changed = copy_of(proto)
    for tensor in changed.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return changed


def constants_of(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def single_layer(
    op_type: str, weight: NDArray[Any], channels: int = 4, **attributes: Any
) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["input", "weight"], ["out"], name="layer", **attributes)
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "single",
        [helper.make_tensor_value_info("input", float32, ["n", channels, 16, 16])],
        [helper.make_tensor_value_info("out", float32, ["n", None, None, None])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


def sqnr_db(reference: NDArray[np.float32], outputs: NDArray[np.float32]) -> float:
    return float(10 * np.log10((reference**2).mean() / ((reference - outputs) ** 2).mean()))


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric_uint8", "symmetric_power2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("mixed_precision", ["none", "first_last"])
def test_models_built_here_have_no_findings(
    quantizer: Quantizer, scheme: Any, granularity: Any, mixed_precision: Any
) -> None:
    config = QuantizationConfig(
        scheme=scheme, granularity=granularity, mixed_precision=mixed_precision
    )
    proto = quantizer.quantize(config).proto
    assert lint_quantized(proto, float_model=quantizer.model, vnni=True) == []


def test_the_toy_model_has_no_findings(float_model: FloatModel) -> None:
    assert lint_model(float_model) == []


@pytest.mark.parametrize("quant_format", [QuantFormat.QDQ, QuantFormat.QOperator])
def test_lost_activations_are_found(
    quantize: Quantize,
    float_model: FloatModel,
    toy_inputs: NDArray[np.float32],
    run: Run,
    quant_format: QuantFormat,
) -> None:
    reference = run(float_model.proto, toy_inputs)
    plain = quantize(float_model.proto, quant_format=quant_format)
    assert sqnr_db(reference, run(plain, toy_inputs)) > 25
    assert lint_quantized(plain, float_model=float_model, vnni=True) == []

    options = {"CalibTensorRangeSymmetric": True}
    lost = quantize(float_model.proto, quant_format=quant_format, extra_options=options)
    assert sqnr_db(reference, run(lost, toy_inputs)) < 10
    (finding,) = lint_quantized(lost, float_model=float_model, vnni=True)
    assert finding.rule == "lost-activation"
    assert "'stem_relu', 'depthwise_relu6'" in finding.message

    if quant_format == QuantFormat.QDQ:
        options["QDQKeepRemovableActivations"] = True
        kept = quantize(float_model.proto, extra_options=options)
        assert sqnr_db(reference, run(kept, toy_inputs)) > 20
        assert lint_quantized(kept, float_model=float_model, vnni=True) == []


def test_a_bias_that_does_not_fit_is_found(
    quantize: Quantize, float_model: FloatModel, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    weight, bias = (float_model.weights[f"project.{kind}"].copy() for kind in ("weight", "bias"))
    weight[3] *= 1e-9
    bias[3] = 5.0
    proto = with_constants(float_model.proto, {"project.weight": weight, "project.bias": bias})
    reference = run(proto, toy_inputs)

    widened = quantize(proto)
    assert sqnr_db(reference, run(widened, toy_inputs)) > 25
    assert lint_quantized(widened, vnni=True) == []

    cut = quantize(proto, extra_options={"QDQDisableWeightAdjustForInt32Bias": True})
    assert sqnr_db(reference, run(cut, toy_inputs)) < 20
    (finding,) = lint_quantized(cut, vnni=True)
    assert finding.rule == "bias-overflow"
    assert "'project'" in finding.message


def test_a_bias_scale_of_its_own_is_found(quantize: Quantize, float_model: FloatModel) -> None:
    proto = quantize(float_model.proto)
    scale = constants_of(proto)["stem.bias_quantized_scale"]
    odd = with_constants(proto, {"stem.bias_quantized_scale": 4 * scale})
    (finding,) = lint_quantized(odd, vnni=True)
    assert finding.rule == "bias-scale"
    assert "'stem'" in finding.message
    assert "in float" in finding.message


def test_different_zero_points_of_the_channels_of_a_weight_are_found(
    quantize: Quantize, float_model: FloatModel
) -> None:
    proto = quantize(float_model.proto)
    zero_points = np.arange(16, dtype=np.int8)
    uneven = with_constants(proto, {"stem.weight_zero_point": zero_points})
    (finding,) = lint_quantized(uneven, vnni=True)
    assert finding.rule == "weight-zero-point"
    assert "'stem'" in finding.message


def test_layers_that_are_computed_in_float_are_found(quantize: Quantize) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4, 4, 16, 16)).astype(np.float32)

    def findings(op_type: str, shape: tuple[int, ...], **options: Any) -> list[str]:
        model = single_layer(op_type, rng.standard_normal(shape))
        return rules(lint_quantized(quantize(model, inputs, **options), vnni=True))

    assert findings("Conv", (8, 4, 3, 3)) == []
    assert findings("MatMul", (16, 8)) == []
    assert findings("ConvTranspose", (4, 8, 3, 3)) == ["computed-in-float"]
    assert findings("MatMul", (4, 16, 8)) == ["computed-in-float"]
    wide = QuantType.QUInt16
    assert findings("Conv", (8, 4, 3, 3), activation_type=wide) == ["computed-in-float"]


def test_float_layers_that_onnx_runtime_quantizes_when_it_loads_a_model_are_found(
    quantize: Quantize, float_model: FloatModel, toy_inputs: NDArray[np.float32], run: Run
) -> None:
    proto = quantize(float_model.proto, nodes_to_exclude=["depthwise"])
    (finding,) = lint_quantized(proto, vnni=True)
    assert finding.rule == "quantized-when-loaded"
    assert "'depthwise'" in finding.message
    # The trap itself: the layer is not computed with the float weight that the file holds.
    outputs = [run(proto, toy_inputs)]
    outputs.append(run(proto, toy_inputs, without_optimizers=["WeightBiasQuantization"]))
    assert np.abs(outputs[0] - outputs[1]).max() > 0.0
    # What the message advises takes it away.
    depthwise = next(node for node in proto.graph.node if node.name == "depthwise")
    position = list(proto.graph.node).index(depthwise)
    proto.graph.node.insert(position, onnx.helper.make_node("Clip", [depthwise.input[0]], ["as"]))
    depthwise = next(node for node in proto.graph.node if node.name == "depthwise")
    depthwise.input[0] = "as"
    assert lint_quantized(proto, vnni=True) == []
    np.testing.assert_array_equal(run(proto, toy_inputs), outputs[1])


@pytest.mark.skipif(detect_vnni() is None, reason="the processor is not an x86-64 one")
def test_int8_activations_are_found_to_run_in_float_on_x86(
    quantize: Quantize, float_model: FloatModel
) -> None:
    proto = quantize(float_model.proto, activation_type=QuantType.QInt8)
    (finding,) = lint_quantized(proto, float_model=float_model, vnni=True)
    assert (finding.rule, finding.severity) == ("int8-activations", "info")
    assert "'depthwise'" in finding.message


def saturating_conv(
    activations: NDArray[np.uint8], weights: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A dot product exactly, and as VPMADDUBSW and VPADDD compute it: pairs saturate in int16."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    pairs = products.reshape(*products.shape[:-1], -1, 2).sum(axis=-1)
    return products.sum(axis=-1), np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=-1)


@pytest.mark.parametrize(
    ("options", "found"),
    [({}, True), ({"reduce_range": True}, False), ({"weight_type": QuantType.QUInt8}, False)],
)
def test_int8_weights_that_saturate_without_vnni_are_found(
    quantize: Quantize, options: dict[str, Any], found: bool
) -> None:
    rng = np.random.default_rng(0)
    weight = 0.9 + 0.2 * rng.random((8, 4, 3, 3))
    inputs = (0.5 + 0.5 * rng.random((4, 4, 16, 16))).astype(np.float32)
    proto = quantize(single_layer("Conv", weight), inputs, **options)
    integers = constants_of(proto)["weight_quantized"].reshape(8, -1)
    if integers.dtype == np.int8:
        largest = np.full(integers.shape[1], 255, dtype=np.uint8)
        exact, saturated = saturating_conv(largest, integers)
        assert bool(np.any(exact != saturated)) == found
    assert rules(lint_quantized(proto, vnni=False)) == ["saturating-int8"] * found
    assert lint_quantized(proto, vnni=True) == []


def test_depthwise_layers_do_not_saturate(quantize: Quantize) -> None:
    inputs = np.ones((1, 4, 16, 16), dtype=np.float32)
    depthwise = quantize(single_layer("Conv", np.ones((4, 1, 3, 3)), group=4), inputs)
    assert "saturating-int8" not in rules(lint_quantized(depthwise, vnni=False))
    # With two input channels in each group it is another kernel.
    pairs = quantize(
        single_layer("Conv", np.ones((4, 2, 3, 3)), 8, group=4), np.repeat(inputs, 2, axis=1)
    )
    assert "saturating-int8" in rules(lint_quantized(pairs, vnni=False))


def test_equal_scales_of_all_channels_are_found(quantize: Quantize, run: Run) -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (8, 4, 3, 3))
    weight[:, 0, 0, 0] = 1.0
    inputs = rng.standard_normal((4, 4, 16, 16)).astype(np.float32)
    model = single_layer("Conv", weight)
    channel, tensor = quantize(model, inputs), quantize(model, inputs, per_channel=False)
    np.testing.assert_array_equal(run(channel, inputs), run(tensor, inputs))
    (finding,) = lint_quantized(channel, vnni=True)
    assert (finding.rule, finding.severity) == ("equal-scales", "info")
    assert lint_quantized(tensor, vnni=True) == []


def changed_model(model: FloatModel, folder: Path, **weights: NDArray[np.float32]) -> FloatModel:
    named = {name.replace("_", "."): values for name, values in weights.items()}
    onnx.save(with_constants(model.proto, named), folder / "changed.onnx")
    return load_float_model(folder / "changed.onnx")


def test_a_channel_that_destroys_a_layer_under_one_scale_is_found(
    float_model: FloatModel,
    toy_inputs: NDArray[np.float32],
    quantize: Quantize,
    run: Run,
    tmp_path: Path,
) -> None:
    weight = float_model.weights["project.weight"].copy()
    ranges = np.abs(weight).max(axis=(1, 2, 3))
    weight *= (np.median(ranges) / ranges)[:, None, None, None]
    weight[5] *= 100.0
    assert channel_spread(weight, 0) == pytest.approx(100.0)
    pruned = np.concatenate([weight, np.zeros((3 * len(weight), *weight.shape[1:]), np.float32)])
    assert channel_spread(pruned, 0) == pytest.approx(100.0)
    assert channel_spread(np.zeros_like(weight), 0) == 1.0
    model = changed_model(float_model, tmp_path, project_weight=weight)
    (finding,) = lint_model(model)
    assert finding.rule == "wide-channel-spread"
    assert "'project'" in finding.message
    assert "100 times" in finding.message

    # All of the weight but channel 5 falls onto the integers -1, 0 and 1.
    integers = constants_of(quantize(model.proto, per_channel=False))["project.weight_quantized"]
    assert np.abs(np.delete(integers, 5, axis=0)).max() <= 2
    reference = run(model.proto, toy_inputs)
    tensor, channel = (
        sqnr_db(reference, run(quantize(model.proto, per_channel=p), toy_inputs))
        for p in (False, True)
    )
    assert channel > tensor


def test_large_weights_of_dead_channels_are_found(
    float_model: FloatModel,
    toy_inputs: NDArray[np.float32],
    quantize: Quantize,
    run: Run,
    tmp_path: Path,
) -> None:
    stem, bias, depthwise = (
        float_model.weights[name].copy()
        for name in ("stem.weight", "stem.bias", "depthwise.weight")
    )
    stem[4] = 0.0
    bias[4] = -0.1
    depthwise[4] = 64 * np.abs(depthwise).max()
    changes = {"stem_weight": stem, "stem_bias": bias}
    model = changed_model(float_model, tmp_path, **changes, depthwise_weight=depthwise)
    (finding,) = lint_model(model)
    assert finding.rule == "dead-channel"
    assert "'depthwise'" in finding.message
    assert "6.0 bits" in finding.message

    # The advice: nothing changes in float, and per-tensor quantization recovers.
    depthwise[4] = 0.0
    mended = changed_model(float_model, tmp_path, **changes, depthwise_weight=depthwise)
    assert lint_model(mended) == []
    reference = run(model.proto, toy_inputs)
    np.testing.assert_array_equal(run(mended.proto, toy_inputs), reference)
    before, after = (
        sqnr_db(reference, run(quantize(item.proto, per_channel=False), toy_inputs))
        for item in (model, mended)
    )
    assert after > before + 10

    # With a positive bias the channel is a constant that its reader needs.
    bias[4] = 0.1
    changes["stem_bias"] = bias
    depthwise[4] = 64 * np.abs(depthwise).max()
    alive = changed_model(float_model, tmp_path, **changes, depthwise_weight=depthwise)
    assert "dead-channel" not in rules(lint_model(alive))


def test_weight_clipping_gives_dead_channels_no_levels(
    float_model: FloatModel,
    make_quantizer: Callable[[FloatModel, NDArray[np.float32]], Quantizer],
    toy_inputs: NDArray[np.float32],
    run: Run,
    tmp_path: Path,
) -> None:
    stem, bias, depthwise = (
        float_model.weights[name].copy()
        for name in ("stem.weight", "stem.bias", "depthwise.weight")
    )
    stem[4], bias[4] = 0.0, -0.1
    depthwise[4] = 64 * np.abs(depthwise).max()
    changes = {"stem_weight": stem, "stem_bias": bias, "depthwise_weight": depthwise}
    model = changed_model(float_model, tmp_path, **changes)
    quantizer = make_quantizer(model, toy_inputs)
    reference = run(model.proto, toy_inputs)
    whole, clipped = (
        sqnr_db(
            reference,
            run(
                quantizer.quantize(
                    QuantizationConfig(granularity="tensor", weight_clipping=clipping)
                ).proto,
                toy_inputs,
            ),
        )
        for clipping in ("max", "mse")
    )
    assert clipped > whole + 10


def test_names_that_match_nothing_are_refused_where_onnx_runtime_ignores_them(
    quantize: Quantize, float_model: FloatModel
) -> None:
    plain = quantize(float_model.proto)
    ignored = quantize(float_model.proto, nodes_to_exclude=["Stem"])
    assert ignored.graph == plain.graph

    check_node_names(float_model, ["stem", "head"])
    with pytest.raises(InputError, match="no node 'Stem'; did you mean 'stem'"):
        check_node_names(float_model, ["head", "Stem"])
    with pytest.raises(InputError, match="no node 'Stem'"):
        place(float_model, float_nodes=["Stem"])


def test_many_nodes_are_one_finding(quantize: Quantize, float_model: FloatModel) -> None:
    proto = quantize(float_model.proto, activation_type=QuantType.QUInt16)
    (finding,) = lint_quantized(proto, vnni=True)
    assert "layers 'stem', 'depthwise', 'project' and 1 more" in finding.message
    assert "\n" not in finding.message


def test_only_quantized_models_are_loaded_for_lint(
    quantize: Quantize, toy_model: Path, tmp_path: Path
) -> None:
    assert load_quantized(toy_model) is None
    assert load_quantized(tmp_path / "nowhere.onnx") is None
    (tmp_path / "text.onnx").write_text("text")
    assert load_quantized(tmp_path / "text.onnx") is None
    for quant_format in (QuantFormat.QDQ, QuantFormat.QOperator):
        onnx.save(quantize(onnx.load(toy_model), quant_format=quant_format), tmp_path / "q.onnx")
        assert load_quantized(tmp_path / "q.onnx") is not None


def test_a_model_that_cannot_be_loaded_is_a_clear_error(
    quantize: Quantize, float_model: FloatModel
) -> None:
    proto = quantize(float_model.proto)
    next(node for node in proto.graph.node if node.op_type == "Conv").op_type = "NoSuchOperator"
    with pytest.raises(InputError, match="ONNX Runtime cannot load the quantized model"):
        lint_quantized(proto, vnni=True)


def test_knobs_without_effect_are_found(quantizer: Quantizer) -> None:
    built: list[QuantizationConfig] = []

    def digest(config: QuantizationConfig) -> str:
        built.append(config)
        return quantizer.quantize(config).digest

    assert lint_config(QuantizationConfig(), digest) == []
    config = QuantizationConfig(scheme="symmetric_power2", granularity="tensor", clipping="kl")
    assert lint_config(config, digest) == []
    # Powers of two are so coarse that no other range is better.
    config = QuantizationConfig(
        scheme="symmetric_power2", granularity="tensor", weight_clipping="mse"
    )
    (finding,) = lint_config(config, digest)
    assert (finding.rule, finding.severity) == ("knob-without-effect", "info")
    assert finding.message == "knob 'weight_clipping': 'mse' builds the very model that 'max' does"


def test_options_that_onnx_runtime_does_not_read_are_found(
    quantize: Quantize, float_model: FloatModel
) -> None:
    plain = quantize(float_model.proto)
    assert quantize(float_model.proto, extra_options={"ActivationSymetric": True}) == plain
    (finding,) = lint_options(extra_options={"ActivationSymetric": True})
    assert finding.rule == "unknown-option"
    assert "did you mean 'ActivationSymmetric'?" in finding.message
    assert lint_options(extra_options={"ActivationSymmetric": True}) == []


def test_asymmetric_weights_for_each_channel_are_found_to_be_symmetric(
    quantize: Quantize, float_model: FloatModel
) -> None:
    options = {"WeightSymmetric": False}
    assert quantize(float_model.proto, extra_options=options) == quantize(float_model.proto)
    assert rules(lint_options(per_channel=True, extra_options=options)) == [
        "option-without-effect"
    ]
    tensor = quantize(float_model.proto, per_channel=False, extra_options=options)
    assert tensor != quantize(float_model.proto, per_channel=False)
    assert lint_options(per_channel=False, extra_options=options) == []


def test_restricted_asymmetric_activations_are_found_to_need_uint8(
    quantize: Quantize, float_model: FloatModel
) -> None:
    options = {"ActivationRestrictedAsymmetric": True}
    for kind, found in ((QuantType.QInt8, True), (QuantType.QUInt8, False)):
        plain = quantize(float_model.proto, activation_type=kind)
        asked = quantize(float_model.proto, activation_type=kind, extra_options=options)
        assert (plain == asked) == found
        findings = lint_options(activation_type=kind, extra_options=options)
        assert rules(findings) == ["option-without-effect"] * found


def test_entropy_calibration_is_found_to_be_minimum_and_maximum(
    quantize: Quantize, float_model: FloatModel
) -> None:
    plain = quantize(float_model.proto)
    entropy = quantize(float_model.proto, calibrate_method=CalibrationMethod.Entropy)
    percentile = quantize(
        float_model.proto,
        calibrate_method=CalibrationMethod.Percentile,
        extra_options={"CalibPercentile": 99},
    )
    scales = [
        {name: values for name, values in constants_of(proto).items() if name.endswith("_scale")}
        for proto in (plain, entropy, percentile)
    ]
    np.testing.assert_allclose(scales[1]["input_scale"], scales[0]["input_scale"], rtol=0.02)
    assert scales[2]["input_scale"] < 0.9 * scales[0]["input_scale"]
    findings = lint_options(calibrate_method=CalibrationMethod.Entropy)
    assert rules(findings) == ["option-without-effect"]
    assert lint_options(calibrate_method=CalibrationMethod.Percentile) == []


def test_symmetric_ranges_are_found_to_lose_activations(
    quantize: Quantize, float_model: FloatModel
) -> None:
    options: dict[str, Any] = {"CalibTensorRangeSymmetric": True}
    operators = {
        node.op_type for node in quantize(float_model.proto, extra_options=options).graph.node
    }
    assert not {"Relu", "Clip"} & operators
    assert rules(lint_options(extra_options=options)) == ["lost-activation"]
    options["QDQKeepRemovableActivations"] = True
    operators = {
        node.op_type for node in quantize(float_model.proto, extra_options=options).graph.node
    }
    assert {"Relu", "Clip"} <= operators
    assert lint_options(extra_options=options) == []


def test_float_work_between_powers_of_two_is_found(
    quantizer: Quantizer, float_model: FloatModel
) -> None:
    proto = quantizer.quantize(QuantizationConfig(scheme="symmetric_power2")).proto
    assert lint_quantized(proto, float_model=float_model, vnni=True) == []
    odd = with_constants(proto, {"six": np.array(6.01, dtype=np.float32)})
    (finding,) = lint_quantized(odd, vnni=True)
    assert (finding.rule, finding.severity) == ("not-integer-only", "info")
    assert "'depthwise_relu6'" in finding.message
    assert "a bound is not an integer" in finding.message
