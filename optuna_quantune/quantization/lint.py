"""Warnings about a float or quantized model that ONNX Runtime would take without a word.

Each rule is a trap that was met and reproduced; `docs/lint.md` says for each what happens, why,
and what to do. One finding stands for all nodes that a rule applies to.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from typing import Final
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import QuantType

from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.dead_weights import live_weights
from optuna_quantune.quantization.graph import activation_bounds
from optuna_quantune.quantization.graph import constant_values
from optuna_quantune.quantization.integer_only import float_nodes
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.neighbours import adds_in_pairs
from optuna_quantune.quantization.neighbours import in_order
from optuna_quantune.quantization.neighbours import LARGEST_SUM
from optuna_quantune.quantization.neighbours import largest_sums
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.quantization.quantized_graph import Quantized
from optuna_quantune.quantization.quantized_graph import QuantizedGraph
from optuna_quantune.quantization.quantized_graph import QuantizedLayer


# Largest channel range over the median one from which on a single scale is said to destroy the
# layer: it leaves the median channel less than 16 of the 255 levels, so less than 4 bits.
WIDE_SPREAD: Final = 16.0
_NAMES_SHOWN: Final = 3
# What `quantize_static` of ONNX Runtime 1.32 reads of its `extra_options`.
_KNOWN_OPTIONS: Final = (
    "ActivationRestrictedAsymmetric",
    "ActivationSymmetric",
    "AddQDQPairToWeight",
    "BlockSize",
    "CalibMaxIntermediateOutputs",
    "CalibMovingAverage",
    "CalibMovingAverageConstant",
    "CalibPercentile",
    "CalibStridedMinMax",
    "CalibTensorRangeSymmetric",
    "DedicatedQDQPair",
    "DefaultTensorType",
    "EnableSubgraph",
    "ForceQuantizeNoInputCheck",
    "MatMulConstBOnly",
    "MinimumRealRange",
    "OpTypesToExcludeOutputQuantization",
    "QDQDisableWeightAdjustForInt32Bias",
    "QDQKeepRemovableActivations",
    "QDQOpTypePerChannelSupportToAxis",
    "QuantizeBias",
    "SmoothQuant",
    "SmoothQuantAlpha",
    "SmoothQuantFolding",
    "TensorQuantOverrides",
    "UseQDQContribOps",
    "WeightSymmetric",
    "extra.Sigmoid.nnapi",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is probably not what was wanted.

    Attributes:
        rule: Name of the rule, as in `docs/lint.md`.
        message: One line: the nodes concerned, what follows, and what to do.
        severity: ``warning`` where accuracy or speed is lost, ``info`` where that depends on the
            device, or where nothing but a choice is without effect.
    """

    rule: str
    message: str
    severity: Literal["info", "warning"] = "warning"


def lint_model(model: FloatModel) -> list[Finding]:
    """What will make a float model hard to quantize."""
    live = live_weights(model)
    return [*_wide_channel_spread(model, live), *_dead_channels(model, live)]


def lint_quantized(
    proto: onnx.ModelProto, *, float_model: FloatModel | None = None, vnni: bool | None = None
) -> list[Finding]:
    """What is wrong with a quantized model, whoever made it (Q/DQ or ``QOperator`` format).

    ONNX Runtime is asked which layers it computes in float: a session is made, nothing is run.

    Args:
        proto: The quantized model.
        float_model: What it was made from; without it, lost activations cannot be noticed.
        vnni: Whether the processor that the model is for has VNNI instructions (on x86-64); None
            asks this machine's.

    Raises:
        InputError: If ONNX Runtime cannot load the model.
    """
    graph = QuantizedGraph(proto)
    findings = [] if float_model is None else list(_lost_activations(graph, float_model))
    rules: tuple[Callable[[QuantizedGraph], Iterator[Finding]], ...] = (
        _bias_overflow,
        _bias_scale,
        _weight_zero_points,
        _computed_in_float,
        _quantized_when_loaded,
        _equal_scales,
        _no_shift,
    )
    findings += [finding for rule in rules for finding in rule(graph)]
    findings += _saturating_pairs(graph, detect_vnni() if vnni is None else vnni)
    return findings


def lint_config(
    config: QuantizationConfig, digest: Callable[[QuantizationConfig], str]
) -> list[Finding]:
    """Which knobs of a configuration change nothing in the model that it builds.

    Args:
        config: The configuration.
        digest: The canonical hash of the model that a configuration builds.
    """
    built, default = digest(config), QuantizationConfig()
    findings = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if value == usual or digest(dataclasses.replace(config, **{field.name: usual})) != built:
            continue
        findings.append(
            Finding(
                "knob-without-effect",
                f"knob {field.name!r}: {value!r} builds the very model that {usual!r} does",
                severity="info",
            )
        )
    return findings


def lint_options(
    *,
    per_channel: bool = False,
    activation_type: QuantType = QuantType.QInt8,
    calibrate_method: CalibrationMethod = CalibrationMethod.MinMax,
    extra_options: Mapping[str, Any] = MappingProxyType({}),
) -> list[Finding]:
    """What ONNX Runtime's ``quantize_static`` would do with its options without a word.

    Args:
        per_channel: As given to ``quantize_static``, like all others.
        activation_type: Type of the activations' integers.
        calibrate_method: How ranges are found.
        extra_options: Options by name.
    """
    findings = []
    for name in extra_options:
        if name not in _KNOWN_OPTIONS:
            (alike,) = difflib.get_close_matches(name, _KNOWN_OPTIONS, n=1, cutoff=0.0)
            findings.append(
                Finding(
                    "unknown-option",
                    f"option {name!r}: not read by ONNX Runtime, and ignored; did you mean "
                    f"{alike!r}?",
                )
            )
    symmetric = bool(extra_options.get("ActivationSymmetric"))

    def without_effect(option: str, reason: str) -> None:
        findings.append(Finding("option-without-effect", f"option {option!r}: {reason}"))

    if calibrate_method == CalibrationMethod.Entropy:
        without_effect(
            "calibrate_method=Entropy",
            "has as many bins as levels by default and returns minimum and maximum, as MinMax; "
            "use Percentile, or create_calibrator with more num_bins",
        )
    if per_channel and extra_options.get("WeightSymmetric") is False:
        without_effect("WeightSymmetric", "per-channel weights are symmetric all the same")
    if extra_options.get("ActivationRestrictedAsymmetric") and (
        activation_type != QuantType.QUInt8 or symmetric
    ):
        without_effect(
            "ActivationRestrictedAsymmetric",
            "only for uint8 activations that are not symmetric; use activation_type=QUInt8",
        )
    if (
        extra_options.get("CalibTensorRangeSymmetric")
        and not symmetric
        and not extra_options.get("QDQKeepRemovableActivations")
    ):
        findings.append(
            Finding(
                "lost-activation",
                "option 'CalibTensorRangeSymmetric': ranges with negative values make every Relu "
                "and Clip vanish; set QDQKeepRemovableActivations or ActivationSymmetric",
            )
        )
    return findings


def channel_spread(weight: NDArray[np.float32], channel_axis: int) -> float:
    """Largest range of an output channel over the median one, at least 1.

    Channels of zeros, as pruning leaves them, do not count: they need no steps.
    """
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    ranges = np.abs(weight).max(axis=others)
    ranges = ranges[ranges > 0.0]
    return float(ranges.max() / np.median(ranges)) if len(ranges) else 1.0


def _wide_channel_spread(
    model: FloatModel, live: dict[str, NDArray[np.float32]]
) -> Iterator[Finding]:
    spreads = {
        layer.name: channel_spread(live[layer.name], layer.channel_axis) for layer in model.layers
    }
    wide = [name for name, spread in spreads.items() if spread > WIDE_SPREAD]
    if wide:
        yield Finding(
            "wide-channel-spread",
            f"{_layers(wide)}: the largest channel reaches up to "
            f"{max(spreads[name] for name in wide):.0f} times as far as the median one, which has "
            "less than 4 bits left under a single scale; use one scale for each channel "
            "(granularity 'channel') or keep the layer in float",
        )


def _dead_channels(model: FloatModel, live: dict[str, NDArray[np.float32]]) -> Iterator[Finding]:
    bits: dict[str, float] = {}
    for layer in model.layers:
        reach, needed = np.abs(model.weights[layer.weight]).max(), np.abs(live[layer.name]).max()
        if needed > 0 and reach >= 2 * needed:
            bits[layer.name] = float(np.log2(reach / needed))
    if bits:
        yield Finding(
            "dead-channel",
            f"{_layers(list(bits))}: the largest weights meet inputs that are always 0 and cost a "
            f"single scale up to {max(bits.values()):.1f} bits for nothing; set them to 0 in the "
            "float model or use one scale for each channel (granularity 'channel')",
        )


def _lost_activations(graph: QuantizedGraph, model: FloatModel) -> Iterator[Finding]:
    constants = constant_values(model.proto.graph)
    nodes = [node for node in graph.proto.graph.node if node.op_type in ("Relu", "Clip")]
    there = {node.name for node in nodes} | {name for node in nodes for name in node.output}
    lost: list[str] = []
    for node in model.proto.graph.node:
        if node.op_type not in ("Relu", "Clip") or {node.name, node.output[0]} & there:
            continue
        parameters = graph.activations.get(node.output[0], graph.activations.get(node.input[0]))
        if parameters is None:
            continue
        limits = np.iinfo(parameters.zero_point.dtype)
        scale, zero_point = float(parameters.scale), int(parameters.zero_point)
        low, high = scale * (limits.min - zero_point), scale * (limits.max - zero_point)
        bounds = activation_bounds(node, constants)
        # Half a step is what rounding the zero point may move the ends by.
        slack = 0.5 * scale
        if bounds is None or low < bounds[0] - slack or high > bounds[1] + slack:
            lost.append(node.name)
    if lost:
        yield Finding(
            "lost-activation",
            f"{_nodes('activation', lost)}: removed by the quantizer, though the integers "
            "represent values that it cut off; quantize with QDQKeepRemovableActivations=True",
        )


def _bias_overflow(graph: QuantizedGraph) -> Iterator[Finding]:
    limits = np.iinfo(np.int32)
    full = [
        layer.name
        for layer in graph.layers
        if layer.bias is not None
        and layer.bias.dtype == np.int32
        and np.any((layer.bias == limits.min) | (layer.bias == limits.max))
    ]
    if full:
        yield Finding(
            "bias-overflow",
            f"{_layers(full)}: a bias does not fit into int32 and is cut off; enlarge the "
            "weights' scale of that channel (leave QDQDisableWeightAdjustForInt32Bias off)",
        )


def _bias_scale(graph: QuantizedGraph) -> Iterator[Finding]:
    odd = [layer.name for layer in graph.layers if _has_own_bias_scale(layer)]
    if odd:
        yield Finding(
            "bias-scale",
            f"{_layers(odd)}: the bias has another scale than input times weight, so that it "
            "cannot be added to the int32 sums and ONNX Runtime computes the layer in float; "
            "store the bias with the product of both scales",
        )


def _weight_zero_points(graph: QuantizedGraph) -> Iterator[Finding]:
    uneven = [layer.name for layer in graph.layers if _has_uneven_zero_points(layer)]
    if uneven:
        yield Finding(
            "weight-zero-point",
            f"{_layers(uneven)}: channels of the weight have different zero points, for which "
            "ONNX Runtime has no integer kernel, so that it computes the layer in float; use "
            "symmetric weights",
        )


def _computed_in_float(graph: QuantizedGraph) -> Iterator[Finding]:
    unexplained = [
        layer
        for layer in graph.computed_in_float
        if not _has_own_bias_scale(layer) and not _has_uneven_zero_points(layer)
    ]
    signed = [layer.name for layer in unexplained if _activation_dtype(layer) == np.int8]
    if signed:
        yield Finding(
            "int8-activations",
            f"{_layers(signed)}: ONNX Runtime on this machine computes layers with int8 "
            "activations in float between conversions, which takes longer than float layers; for "
            "x86-64 store activations as uint8 (all integers and zero points moved by 128)",
            severity="info",
        )
    wide = [
        layer.name
        for layer in unexplained
        if _activation_dtype(layer) in (np.dtype(np.int16), np.dtype(np.uint16))
    ]
    if wide:
        yield Finding(
            "computed-in-float",
            f"{_layers(wide)}: ONNX Runtime computes layers with 16-bit activations in float, "
            "which takes longer than float layers; use 8 bits unless the accuracy is worth it",
        )
    others = [
        f"{layer.name} ({layer.op_type})"
        for layer in unexplained
        if layer.name not in signed and layer.name not in wide
    ]
    if others:
        yield Finding(
            "computed-in-float",
            f"{_layers(others)}: stored as integers, but ONNX Runtime has no integer kernel for "
            "it as it stands and computes it in float between conversions, which takes longer "
            "than a float layer; quantize its input and output too, or leave it in float",
        )


def _quantized_when_loaded(graph: QuantizedGraph) -> Iterator[Finding]:
    if graph.quantized_when_loaded:
        yield Finding(
            "quantized-when-loaded",
            f"{_layers(graph.quantized_when_loaded)}: the weight is float, but behind a "
            "DequantizeLinear ONNX Runtime quantizes it with one scale when it loads the model; "
            "put a Clip without bounds between the two, or disable the optimizer "
            "WeightBiasQuantization",
        )


def _equal_scales(graph: QuantizedGraph) -> Iterator[Finding]:
    equal = [
        layer.name
        for layer in graph.layers
        if layer.weight.scale.size > 1
        and np.ptp(layer.weight.scale) == 0
        and not _is_of_ones(layer.weight)
    ]
    if equal:
        yield Finding(
            "equal-scales",
            f"{_layers(equal)}: all channels of the weight have the same scale, so that "
            "per-channel quantization is without effect there",
            severity="info",
        )


def _is_of_ones(weight: Quantized) -> bool:
    """Whether all integers are 1, or 0 to fill up, as of averages and copies: one scale does."""
    return weight.integers is not None and set(np.unique(weight.integers)) <= {0, 1}


def _no_shift(graph: QuantizedGraph) -> Iterator[Finding]:
    """Float work between integers, in a model whose scales are all powers of two."""
    scales = [layer.weight.scale for layer in graph.layers]
    scales += [parameters.scale for parameters in graph.activations.values()]
    if not scales or not all(np.all(np.frexp(scale)[0] == 0.5) for scale in scales):
        return
    found = [node for node in float_nodes(graph.proto) if node.enclosed]
    if found:
        reasons = ", ".join(dict.fromkeys(node.reason for node in found))
        yield Finding(
            "not-integer-only",
            f"{_nodes('node', [node.name for node in found])}: all scales are powers of two, but "
            f"an integer-only device cannot compute this with shifts ({reasons})",
            severity="info",
        )


def _saturating_pairs(graph: QuantizedGraph, vnni: bool | None) -> Iterator[Finding]:
    saturating = [layer.name for layer in graph.layers if not vnni and _may_saturate(layer)]
    if saturating:
        processor = "this processor has no VNNI" if vnni is False else "on x86-64 without VNNI"
        yield Finding(
            "saturating-int8",
            f"{_layers(saturating)}: {processor}, where ONNX Runtime adds pairs of uint8 x int8 "
            "products in int16 and large weights saturate; use 7-bit weights (reduce_range=True) "
            "or uint8 weights",
            severity="info" if vnni is None else "warning",
        )


def _may_saturate(layer: QuantizedLayer) -> bool:
    """Whether two products of uint8 activations and weights can leave int16 together.

    Weights of uint8 are widened first.
    """
    integers = layer.weight.integers
    assert integers is not None
    if _activation_dtype(layer) != np.uint8 or integers.dtype != np.int8:
        return False
    if not adds_in_pairs(layer.op_type, integers.shape, layer.groups):
        return False
    rows = in_order(integers.astype(np.int64), layer.op_type, layer.channel_axis)
    return bool(np.any(largest_sums(rows) > LARGEST_SUM))


def _has_own_bias_scale(layer: QuantizedLayer) -> bool:
    if layer.bias_scale is None or layer.input is None:
        return False
    product = layer.input.scale * layer.weight.scale
    return not np.allclose(layer.bias_scale, product, rtol=1e-3, atol=0)


def _has_uneven_zero_points(layer: QuantizedLayer) -> bool:
    return bool(np.any(layer.weight.zero_point != layer.weight.zero_point.flat[0]))


def _activation_dtype(layer: QuantizedLayer) -> np.dtype[Any] | None:
    return None if layer.input is None else layer.input.zero_point.dtype


def _layers(names: Sequence[str]) -> str:
    return _nodes("layer", names)


def _nodes(kind: str, names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{kind}{'s' * (len(names) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")
