"""How much of an error in a tensor reaches the output: measured once, on the float model.

One graph serves all tensors: behind each of them stands an addition whose second operand is an
input of the graph, a single zero unless the tensor is the one that is probed. Each tensor is
disturbed twice: by white noise, which is what rounding does, and by clipping, whose error is
biased and correlated and may reach the output ten times more or less. The noise is small, so the
answer is linear: output error power for a unit of error power in the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.session import make_session


# Inputs that the probes are spread over.
PROBE_INPUTS: Final = 8
# Power of the injected noise beside that of its tensor: -20 dB, as int8 makes in a bad case.
_NOISE_TO_SIGNAL: Final = 0.01
# Values computed for all probes together. A large network is probed on one input for each tensor,
# which is 94 inferences for SqueezeNet, a small one on all inputs.
_VALUE_BUDGET: Final = 300_000_000
# Share of the largest magnitudes that is clipped of a tensor which its range does not clip.
_CLIPPED_SHARE: Final = 1e-3


@dataclass(frozen=True)
class Probe:
    """What the float model does to errors.

    Attributes:
        noise_gain: For each tensor the mean squared error of an output value for white noise of
            power 1 in every value of the tensor.
        clipping_gain: The same for a clipping error of mean square 1.
        channel_mean: For each layer (by name) the mean of each channel of its input.
        channel_power: For each layer the mean square of each channel of its input.
        output_power: Mean square of an output value.
    """

    noise_gain: Mapping[str, float]
    clipping_gain: Mapping[str, float]
    channel_mean: Mapping[str, NDArray[np.float64]]
    channel_power: Mapping[str, NDArray[np.float64]]
    output_power: float


def probe(
    model: FloatModel,
    inputs: Sequence[dict[str, NDArray[Any]]],
    ranges: Mapping[str, tuple[float, float]],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Measures the gains of activations and the channel moments of every layer's input.

    Noise is added where a value is not exactly zero, because zero is always represented: a channel
    that is never active bears no rounding error, however large the weights behind it are.

    Args:
        model: The prepared float model.
        inputs: A few inputs of batch size 1, by name.
        ranges: For each activation to probe (model inputs included) a range that clips it about as
            configurations that clip do.
        seed: Seed of the noise.
        progress: Called after every input with the inputs done and the inputs in all.
    """
    tensors = list(ranges)
    observed = list(dict.fromkeys([*tensors, *(layer.input for layer in model.layers)]))
    watching = make_session(_with_outputs(model, observed))
    disturbing = make_session(_with_additions(model, tensors))
    output = model.outputs[0].name
    rng = np.random.default_rng(seed)
    noise, clipping, tail = _Gains(), _Gains(), _Gains()
    moments = _Moments(model.layers)
    output_power: list[float] = []
    for number, feed in enumerate(inputs):
        values = _observe(watching, observed, feed)
        moments.add(values)
        quiet = feed | {_operand(tensor): np.zeros(1, dtype=np.float32) for tensor in tensors}
        reference = disturbing.run([output], quiet)[0]
        output_power.append(_power(reference))
        repeats = _repeats(tensors, values, len(inputs))
        for index, tensor in enumerate(tensors):
            value = values[tensor]
            deviation = np.sqrt(_NOISE_TO_SIGNAL * _power(value))
            if (number - index) % len(inputs) >= repeats or deviation == 0.0:
                continue
            white = rng.standard_normal(value.shape, dtype=np.float32) * np.float32(deviation)
            limit = np.quantile(np.abs(value), 1.0 - _CLIPPED_SHARE)
            for gains, error in (
                (noise, white * (value != 0.0)),
                (clipping, np.clip(value, *ranges[tensor]) - value),
                (tail, np.clip(value, -limit, limit) - value),
            ):
                if not np.any(error) or (gains is tail and tensor in clipping):
                    continue
                disturbed = disturbing.run([output], quiet | {_operand(tensor): error})[0]
                gains.add(tensor, _power(error), _power(disturbed - reference))
        if progress is not None:
            progress(number + 1, len(inputs))
    return Probe(
        noise_gain={tensor: noise.get(tensor, 0.0) for tensor in tensors},
        clipping_gain={
            tensor: clipping.get(tensor, tail.get(tensor, noise.get(tensor, 0.0)))
            for tensor in tensors
        },
        channel_mean=moments.mean(),
        channel_power=moments.power(),
        output_power=float(np.mean(output_power)),
    )


class _Gains:
    """Error power in and out of each tensor, summed over inputs.

    The gain is the ratio of the sums: an input that is hardly clipped says as little about it as
    it will contribute.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._sums

    def add(self, tensor: str, power_in: float, power_out: float) -> None:
        before = self._sums.get(tensor, (0.0, 0.0))
        self._sums[tensor] = before[0] + power_in, before[1] + power_out

    def get(self, tensor: str, default: float) -> float:
        if tensor not in self._sums:
            return default
        power_in, power_out = self._sums[tensor]
        return power_out / power_in


def _power(values: NDArray[np.float32]) -> float:
    return float(np.mean(np.square(values, dtype=np.float64)))


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


def _repeats(
    tensors: Sequence[str], values: Mapping[str, NDArray[np.float32]], inputs: int
) -> int:
    """How many of the inputs each tensor is probed on."""
    one_run = sum(value.size for value in values.values())
    return int(np.clip(_VALUE_BUDGET // (2 * len(tensors) * one_run), 1, inputs))


def _operand(tensor: str) -> str:
    return f"{tensor}__error"


def _with_outputs(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in known)
    return proto


def _with_additions(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with ``tensor + tensor__error`` in place of each of `tensors`."""
    source = model.proto
    wanted = set(tensors)
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
