"""How much of an error reaches the output: measured once, on the float model.

One graph serves everything: behind each tensor stands an addition whose second operand is an input
of the graph, a single zero unless that tensor is disturbed, and the weights are inputs too. What
is injected are the errors that quantization really makes, one tensor or weight at a time. White
noise of the same power would not do: a depthwise weight with one scale for channels of different
sizes loses whole channels, which the next layer amplifies again (in MobileNetV2 up to 130 times
more than white noise there), and what clipping cuts off is biased and correlated. The errors are
small, so that the answer grows with their power.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Final
from typing import get_args

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.session import make_session


# Inputs that the probes are spread over.
PROBE_INPUTS: Final = 8
# The configuration whose weights are injected: one scale for a weight shows which channels the
# model cannot spare. What other scales leave of the error follows from the weights; probing those
# with one scale for each channel too took a quarter more runs and predicted no better.
PROBED: Final = QuantizationConfig(granularity="tensor")
# Values computed for all probes together. Of a large network each tensor is probed on one input,
# of a small one on all.
_VALUE_BUDGET: Final = 300_000_000
# Share of the largest magnitudes that is clipped of a tensor which its range does not clip.
_CLIPPED_SHARE: Final = 1e-3


@dataclass(frozen=True)
class Probe:
    """What the float model does to errors. All powers are mean squares of a value.

    Attributes:
        rounding_gain: For each tensor the power at the output for a power of 1 of the error that
            rounding makes in it.
        clipping_gain: The same for the error that clipping makes.
        clipping_scaling: For each tensor the share of that power, 0 to 1, which only scales the
            output and so changes no prediction.
        weight_noise: For each weight (by name) the power at the output when it alone is quantized
            as `PROBED` says.
        all_weights_noise: For each scheme the power at the output when all weights are quantized
            at once as `PROBED` says but for the scheme. Empty unless the powers of `weight_noise`
            add up to more than the output's own: then that sum cannot be what all do together.
        channel_mean: For each layer (by name) the mean of each channel of its input.
        channel_power: For each layer the mean square of each channel of its input.
        output_power: Mean square of an output value.

    Of a model with several outputs, an output value is one that is divided by the root mean square
    of its output on the first input, so that each output counts alike.
    """

    rounding_gain: Mapping[str, float]
    clipping_gain: Mapping[str, float]
    clipping_scaling: Mapping[str, float]
    weight_noise: Mapping[str, float]
    all_weights_noise: Mapping[Scheme, float]
    channel_mean: Mapping[str, NDArray[np.float64]]
    channel_power: Mapping[str, NDArray[np.float64]]
    output_power: float


def probe(
    quantizer: Quantizer,
    inputs: Sequence[dict[str, NDArray[Any]]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Measures what errors of activations and weights do to the output.

    Args:
        quantizer: Of the float model; its steps, ranges and weights are the ones injected.
        inputs: A few inputs of batch size 1, by name.
        progress: Called after every input with the inputs done and the inputs in all.

    Raises:
        InputError: If an output changes its shape with a little noise.
    """
    model, ranges = quantizer.model, quantizer.clipping_ranges()
    tensors = list(ranges)
    steps = _steps(quantizer)
    weights = _weights(quantizer, PROBED)
    observed = list(dict.fromkeys([*tensors, *(layer.input for layer in model.layers)]))
    watching = make_session(_with_outputs(model, observed))
    disturbed = _DisturbedModel(model, tensors)
    rounding, clipping, tail, single = _Gains(), _Gains(), _Gains(), _Gains()
    moments = _Moments(model.layers)
    output_power: list[float] = []
    for number, feed in enumerate(inputs):
        values = _observe(watching, observed, feed)
        moments.add(values)
        output_power.append(disturbed.start(feed))
        repeats = _repeats(2 * len(tensors) + len(weights), values, len(inputs))

        def due(index: int, number: int = number, repeats: int = repeats) -> bool:
            return (number - index) % len(inputs) < repeats

        for index, tensor in enumerate(tensors):
            if not due(index):
                continue
            value = values[tensor]
            limit = np.quantile(np.abs(value), 1.0 - _CLIPPED_SHARE)
            for gains, error in (
                (rounding, _rounding_error(value, steps[tensor])),
                (clipping, np.clip(value, *ranges[tensor]) - value),
                (tail, np.clip(value, -limit, limit) - value),
            ):
                if np.any(error) and not (gains is tail and tensor in clipping):
                    gains.add(tensor, _power(error), *disturbed.change({_operand(tensor): error}))
        for index, (name, weight) in enumerate(weights.items()):
            if due(index):
                single.add(name, 1.0, *disturbed.change({name: weight}))
        if progress is not None:
            progress(number + 1, len(inputs))
    power = float(np.mean(output_power))
    weight_noise = {name: single.gain(name) for name in weights}
    drowned = sum(weight_noise.values()) > power
    for tensor in tensors:
        clipping.fall_back(tensor, tail, rounding)
    return Probe(
        rounding_gain={tensor: rounding.gain(tensor) for tensor in tensors},
        clipping_gain={tensor: clipping.gain(tensor) for tensor in tensors},
        clipping_scaling={tensor: clipping.scaling(tensor) for tensor in tensors},
        weight_noise=weight_noise,
        all_weights_noise=_all_weights_noise(quantizer, disturbed, inputs) if drowned else {},
        channel_mean=moments.mean(),
        channel_power=moments.power(),
        output_power=power,
    )


def _steps(quantizer: Quantizer) -> dict[str, float]:
    """For each activation the step of its integers when nothing is clipped."""
    config = QuantizationConfig(equalization=quantizer.equalized)
    return {
        tensor: float(quantizer.activation_parameters(tensor, config).scale)
        for tensor in quantizer.statistics.segments
    }


def _weights(quantizer: Quantizer, config: QuantizationConfig) -> dict[str, NDArray[np.float32]]:
    """Every weight as a configuration quantizes it, by name."""
    parameters = quantizer.plan(replace(config, equalization=quantizer.equalized)).constants
    return {
        layer.weight: quantizer.model.weights[layer.weight]
        + quantizer.weight_error(layer, parameters[layer.weight])
        for layer in quantizer.model.layers
        if layer.weight in parameters
    }


def _all_weights_noise(
    quantizer: Quantizer,
    disturbed: _DisturbedModel,
    inputs: Sequence[dict[str, NDArray[Any]]],
) -> dict[Scheme, float]:
    schemes: tuple[Scheme, ...] = get_args(Scheme)
    sets = {scheme: _weights(quantizer, replace(PROBED, scheme=scheme)) for scheme in schemes}
    powers: dict[Scheme, list[float]] = {scheme: [] for scheme in schemes}
    for feed in inputs:
        disturbed.start(feed)
        for scheme, weights in sets.items():
            powers[scheme].append(disturbed.change(weights)[0])
    return {scheme: float(np.mean(values)) for scheme, values in powers.items()}


def _rounding_error(value: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    error: NDArray[np.float32] = np.rint(value / np.float32(step)) * np.float32(step) - value
    return error


class _DisturbedModel:
    """The float model with errors in its tensors, compared with itself without."""

    def __init__(self, model: FloatModel, tensors: Sequence[str]) -> None:
        self._session = make_session(_with_additions(model, tensors))
        self._names = [spec.name for spec in model.outputs if spec.dtype.kind == "f"]
        self._zeros = {_operand(tensor): np.zeros(1, dtype=np.float32) for tensor in tensors}
        self._feed: dict[str, NDArray[Any]] = {}
        self._reference: list[NDArray[np.float32]] = []
        self._scales: list[float] = []

    def start(self, feed: dict[str, NDArray[Any]]) -> float:
        """Runs an input undisturbed; gives the power of the output."""
        self._feed = feed | self._zeros
        self._reference = self._session.run(self._names, self._feed)
        self._scales = self._scales or _scales(self._reference)
        return _joint_power(self._reference, self._scales)

    def change(self, disturbance: dict[str, NDArray[np.float32]]) -> tuple[float, float]:
        """Runs the input again with `disturbance` among its inputs.

        Returns:
            Power of what changes in the output, and of that part of it which only scales the
            first output's differences from their mean.
        """
        outputs = self._session.run(self._names, self._feed | disturbance)
        change = _differences(self._names, outputs, self._reference)
        power = _joint_power(change, self._scales)
        first = _power(change[0])
        share = _scaling(change[0], self._reference[0]) / first if first > 0.0 else 0.0
        return power, power * share


def _scaling(change: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Power of the part of `change` that shifts all values alike or scales them."""
    change, reference = change.astype(np.float64), reference.astype(np.float64)
    shift = float(np.mean(change))
    centered = reference - reference.mean()
    spread = float(np.mean(np.square(centered)))
    common = float(np.mean(change * centered))
    return shift**2 + (common**2 / spread if spread > 0.0 else 0.0)


class _Gains:
    """Error power in and out of each tensor, summed over inputs.

    The gain is the ratio of the sums: an input that is hardly clipped says as little about it as
    it will contribute.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._sums

    def add(self, tensor: str, power_in: float, power_out: float, scaling_out: float) -> None:
        powers = np.array([power_in, power_out, scaling_out])
        self._sums[tensor] = self._sums.get(tensor, np.zeros(3)) + powers

    def fall_back(self, tensor: str, *others: _Gains) -> None:
        """Takes over what the first of `others` knows of a tensor that was not added here."""
        for other in others:
            if tensor not in self and tensor in other:
                self._sums[tensor] = other._sums[tensor]

    def gain(self, tensor: str) -> float:
        """Power out for a power of 1 in; 0 of a tensor that bore no error."""
        if tensor not in self:
            return 0.0
        power_in, power_out, _ = self._sums[tensor]
        return float(power_out / power_in)

    def scaling(self, tensor: str) -> float:
        """Share of the power out that only scales the output."""
        if tensor not in self or self._sums[tensor][1] == 0.0:
            return 0.0
        return float(self._sums[tensor][2] / self._sums[tensor][1])


def _power(values: NDArray[np.float32]) -> float:
    return float(np.mean(np.square(values, dtype=np.float64)))


def _scales(outputs: Sequence[NDArray[np.float32]]) -> list[float]:
    """What makes the outputs comparable; one output is left as it is."""
    if len(outputs) == 1:
        return [1.0]
    return [1.0 / np.sqrt(_power(output) or 1.0) for output in outputs]


def _joint_power(outputs: Sequence[NDArray[np.float32]], scales: Sequence[float]) -> float:
    powers = [scale**2 * _power(output) for output, scale in zip(outputs, scales, strict=True)]
    return float(np.mean(powers))


def _differences(
    names: Sequence[str],
    disturbed: Sequence[NDArray[np.float32]],
    reference: Sequence[NDArray[np.float32]],
) -> list[NDArray[np.float32]]:
    for name, after, before in zip(names, disturbed, reference, strict=True):
        if after.shape != before.shape:
            raise InputError(
                f"the model's output {name!r} changes its shape with a little noise, from "
                f"{before.shape} to {after.shape}; cut the model before the step that selects "
                "(a non-maximum suppression, for instance)"
            )
    return [after - before for after, before in zip(disturbed, reference, strict=True)]


class _Moments:
    """Running first and second moments of each channel of each layer's input."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._sums: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._count = 0

    def add(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        self._count += 1
        for layer in self._layers:
            value = values[layer.input]
            channel = 1 if layer.op_type in ("Conv", "ConvTranspose") else value.ndim - 1
            others = tuple(axis for axis in range(value.ndim) if axis != channel)
            mean = value.mean(axis=others, dtype=np.float64)
            power = np.square(value, dtype=np.float64).mean(axis=others)
            before = self._sums.get(layer.name, (np.zeros_like(mean), np.zeros_like(mean)))
            self._sums[layer.name] = before[0] + mean, before[1] + power

    def mean(self) -> dict[str, NDArray[np.float64]]:
        return {name: sums[0] / self._count for name, sums in self._sums.items()}

    def power(self) -> dict[str, NDArray[np.float64]]:
        return {name: sums[1] / self._count for name, sums in self._sums.items()}


def _repeats(probes: int, values: Mapping[str, NDArray[np.float32]], inputs: int) -> int:
    """How many of the inputs each probe is made on."""
    one_run = sum(value.size for value in values.values())
    return int(np.clip(_VALUE_BUDGET // (probes * one_run), 1, inputs))


def _operand(tensor: str) -> str:
    return f"{tensor}__error"


def _with_outputs(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in known)
    return proto


def _with_additions(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with ``tensor + tensor__error`` in place of each of `tensors`.

    Weights are inputs of the graph that need not be given.
    """
    source = model.proto
    wanted = set(tensors)
    given = {value.name for value in source.graph.input}
    disturbed = {tensor: f"{tensor}__disturbed" for tensor in tensors}
    nodes: list[onnx.NodeProto] = []

    def addition(tensor: str) -> onnx.NodeProto:
        return onnx.helper.make_node("Add", [tensor, _operand(tensor)], [disturbed[tensor]])

    nodes.extend(addition(spec.name) for spec in model.inputs if spec.name in wanted)
    for original in source.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        for position, name in enumerate(node.input):
            node.input[position] = disturbed.get(name, name)
        nodes.append(node)
        nodes.extend(addition(name) for name in node.output if name in wanted)
    # A probed output of the model keeps its name for what is read from outside.
    outputs = {value.name for value in source.graph.output} & wanted
    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name in outputs:
                    names[position] = f"{name}__original"
                elif name.removesuffix("__disturbed") in outputs:
                    names[position] = name.removesuffix("__disturbed")
    graph = onnx.helper.make_graph(
        nodes,
        source.graph.name,
        [
            *source.graph.input,
            *(
                onnx.helper.make_tensor_value_info(_operand(t), onnx.TensorProto.FLOAT, None)
                for t in tensors
            ),
            *(
                onnx.helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, None)
                for weight in sorted({layer.weight for layer in model.layers} - given)
            ),
        ],
        source.graph.output,
        source.graph.initializer,
    )
    return onnx.helper.make_model(
        graph, opset_imports=source.opset_import, ir_version=source.ir_version
    )


def _observe(
    session: onnxruntime.InferenceSession, tensors: Sequence[str], feed: dict[str, NDArray[Any]]
) -> dict[str, NDArray[np.float32]]:
    computed = [tensor for tensor in tensors if tensor not in feed]
    return dict(zip(computed, session.run(computed, feed), strict=True)) | {
        tensor: feed[tensor] for tensor in tensors if tensor in feed
    }
