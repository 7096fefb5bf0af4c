"""What the errors of a whole configuration do together, where they no longer add up.

Powers of errors add up as long as the errors are small beside the signal. Beyond that a network
saturates, or falls silent, and errors of activations meet other gains than those of the float
model. Here the float model runs with all weights, or all weights and activations, rounded and
clipped as a configuration says, on a few inputs: what it gives beside the float outputs holds for
every configuration that differs in details only (`noise.py`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from typing import Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx import NodeProto
from onnx import TensorProto

from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import ordered_map
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.disturbance import behind
from optuna_quantune.quantization.disturbance import Insertion
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.scheme import QuantizationParameters
from optuna_quantune.quantization.session import make_session
from optuna_quantune.quantization.writing import QuantizationPlan


# Types of the parameters of an activation.
_TYPES: Final = (TensorProto.FLOAT, TensorProto.INT8)
# Beyond it no prediction survives: what is left of the signal cannot be told from none.
_SILENT: Final = 1e4
# Noise over the signal beyond which a configuration is lost, and more inputs say nothing of use.
_LOST: Final = 4.0
# Share of the inputs that shows whether it is.
_FIRST: Final = 0.25
# Inputs that are run at once, at most, where the model takes batches.
_BATCH: Final = 16


@dataclass(frozen=True)
class JointError:
    """What quantization makes of the outputs.

    Attributes:
        total: Power of the error over that of the float output.
        confusion: The same of what remains of the first output when the best scale for all inputs
            and a shift of each are taken off, over what remains of the signal: a signal that is
            half as large is confused by half the noise.
        gain: That scale.
    """

    total: float
    confusion: float
    gain: float


class JointNoise:
    """Runs the float model with whole configurations in it, once for each.

    A configuration that loses the signal on the first inputs is not run on the others.

    Args:
        quantizer: Of the float model.
        model: That model, with the outputs that noise is measured at.
        inputs: A few inputs of batch size 1, by name.
        threads: Threads of all runs that are side by side; None is one for each core.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        model: FloatModel,
        inputs: Sequence[Mapping[str, NDArray[Any]]],
        *,
        threads: int | None = None,
    ) -> None:
        self._workers = threads or available_cores()
        self._quantizer = quantizer
        self._model = model
        first = math.ceil(_FIRST * len(inputs))
        self._feeds = [
            self._in_batches(part) if self._model.takes_batches and alike(inputs) else part
            for part in (inputs[:first], inputs[first:])
            if part
        ]
        # Those that batches leave over; threads of one run wait for each other.
        self._threads = max(1, self._workers // max(map(len, self._feeds)))
        self._names = [s.name for s in self._model.outputs if s.dtype.kind == "f"]
        self._sessions: dict[frozenset[str], onnxruntime.InferenceSession] = {}
        self._known: dict[tuple[bytes, ...], JointError] = {}

    def of_weights(self, config: QuantizationConfig) -> JointError:
        """What all weights that `config` quantizes do."""
        return self._run(self._quantizer.plan(config), {})

    def of_everything(self, config: QuantizationConfig) -> JointError:
        """What all weights and activations that `config` quantizes do."""
        plan = self._quantizer.plan(config)
        sites = self._quantizer.placement(plan.float_layers, config.fusion).activations
        return self._run(plan, {site.statistics: plan.activations[site.tensor] for site in sites})

    def _run(
        self, plan: QuantizationPlan, activations: Mapping[str, QuantizationParameters]
    ) -> JointError:
        layers = [layer for layer in self._model.layers if layer.weight in plan.constants]
        used = {layer.weight: plan.constants[layer.weight] for layer in layers} | dict(activations)
        key = tuple(
            name.encode() + p.scale.tobytes() + p.zero_point.tobytes() for name, p in used.items()
        )
        if key not in self._known:
            parameters: dict[str, NDArray[Any]] = {
                layer.weight: self._model.weights[layer.weight]
                + self._quantizer.weight_error(layer, plan.constants[layer.weight])
                for layer in layers
            }
            for tensor, p in activations.items():
                scale, zero_point = _parameters(tensor)
                parameters[scale] = np.asarray(p.scale)
                parameters[zero_point] = np.asarray(p.zero_point, dtype=np.int8)
            self._known[key] = self._error(frozenset(activations), parameters)
        return self._known[key]

    def _error(
        self, tensors: frozenset[str], parameters: Mapping[str, NDArray[Any]]
    ) -> JointError:
        outputs: list[list[NDArray[np.float32]]] = []
        for feeds in self._feeds:
            outputs += self._outputs(feeds, tensors, parameters)
            error = joint_error(outputs, self._float_outputs[: len(outputs)])
            if error.confusion > _LOST:
                break
        return error

    @cached_property
    def _float_outputs(self) -> list[list[NDArray[np.float32]]]:
        parts = (self._outputs(feeds, frozenset(), {}) for feeds in self._feeds)
        return list(itertools.chain.from_iterable(parts))

    def _outputs(
        self,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        tensors: frozenset[str],
        parameters: Mapping[str, NDArray[Any]],
    ) -> list[list[NDArray[np.float32]]]:
        """For each input the outputs."""
        session = self._session(tensors)

        def run(feed: Mapping[str, NDArray[Any]]) -> list[list[NDArray[np.float32]]]:
            batches = session.run(self._names, {**feed, **parameters})
            size = len(next(iter(feed.values()))) if self._model.takes_batches else 1
            if any(batch.shape[:1] != (size,) for batch in batches):  # no axis for the batch
                return [batches]
            return [[batch[n : n + 1] for batch in batches] for n in range(size)]

        return list(itertools.chain(*ordered_map(run, feeds, workers=self._workers)))

    def _in_batches(
        self, inputs: Sequence[Mapping[str, NDArray[Any]]]
    ) -> list[Mapping[str, NDArray[Any]]]:
        """As few batches as keep all cores busy, as weights are packed anew for each run."""
        size = min(_BATCH, math.ceil(len(inputs) / self._workers))
        return [joined(inputs[start : start + size]) for start in range(0, len(inputs), size)]

    def _session(self, tensors: frozenset[str]) -> onnxruntime.InferenceSession:
        """The model with weights as inputs, and rounding behind `tensors`."""
        if tensors not in self._sessions:
            names = sorted(tensors)
            given = {value.name for value in self._model.proto.graph.input}
            weights = {layer.weight for layer in self._model.layers} - given
            proto, _ = behind(
                self._model,
                0,
                {tensor: _rounding(tensor) for tensor in names},
                [
                    *(
                        helper.make_tensor_value_info(name, dtype, ())
                        for tensor in names
                        for name, dtype in zip(_parameters(tensor), _TYPES, strict=True)
                    ),
                    *(
                        helper.make_tensor_value_info(weight, TensorProto.FLOAT, None)
                        for weight in sorted(weights)
                    ),
                ],
            )
            self._sessions[tensors] = make_session(proto, threads=self._threads)
        return self._sessions[tensors]


def joint_error(
    outputs: Sequence[Sequence[NDArray[np.float32]]],
    reference: Sequence[Sequence[NDArray[np.float32]]],
) -> JointError:
    """Compares outputs with those of the float model.

    Args:
        outputs: For each input the model's outputs.
        reference: The same of the float model. What is not finite there does not count.
    """
    known = [[np.isfinite(part) for part in parts] for parts in reference]
    outputs, reference = _at(outputs, known), _at(reference, known)
    if not all(np.isfinite(part).all() for parts in outputs for part in parts):
        return JointError(_SILENT, _SILENT, 0.0)  # rounding has made infinities
    tiny = np.finfo(np.float64).tiny
    ratios = []
    for number in range(len(reference[0])):
        pairs = [(a[number], b[number]) for a, b in zip(outputs, reference, strict=True)]
        error, power = sum(_energy(a - b) for a, b in pairs), sum(_energy(b) for _, b in pairs)
        ratios.append(error / max(power, tiny))
    after = [_centered(parts[0]) for parts in outputs]
    before = [_centered(parts[0]) for parts in reference]
    signal = max(sum(map(_energy, before)), tiny)
    common = sum(float(np.vdot(a, b)) for a, b in zip(after, before, strict=True))
    gain = common / signal
    left = sum(_energy(a - gain * b) for a, b in zip(after, before, strict=True))
    power = max(sum(_energy(parts[0]) for parts in reference), tiny)
    silent = gain <= 0.0 or left > _SILENT * gain**2 * power
    confusion = _SILENT if silent else left / (gain**2 * power)
    return JointError(float(np.mean(ratios)), confusion, gain)


def _at(
    outputs: Sequence[Sequence[NDArray[np.float32]]], known: Sequence[Sequence[NDArray[np.bool_]]]
) -> list[list[NDArray[np.float32]]]:
    """The outputs with 0 for what does not count."""
    return [
        [np.where(at, part, np.float32(0.0)) for part, at in zip(parts, places, strict=True)]
        for parts, places in zip(outputs, known, strict=True)
    ]


def alike(inputs: Sequence[Mapping[str, NDArray[Any]]]) -> bool:
    """Whether all inputs have the same shapes, so that they can share a batch."""
    return len({tuple(feed[name].shape for name in feed) for feed in inputs}) == 1


def joined(inputs: Sequence[Mapping[str, NDArray[Any]]]) -> Mapping[str, NDArray[Any]]:
    """Inputs that are alike in one batch."""
    if len(inputs) == 1:
        return inputs[0]
    return {name: np.concatenate([feed[name] for feed in inputs]) for name in inputs[0]}


def _centered(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    centered: NDArray[np.float64] = exact - exact.mean()
    return centered


def _energy(values: NDArray[Any]) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _rounding(tensor: str) -> Insertion:
    """Rounds and clips as 8-bit integers do."""
    parameters = _parameters(tensor)

    def make(before: str, after: str) -> list[NodeProto]:
        integers = f"{tensor}__integers"
        return [
            helper.make_node("QuantizeLinear", [before, *parameters], [integers]),
            helper.make_node("DequantizeLinear", [integers, *parameters], [after]),
        ]

    return make


def _parameters(tensor: str) -> tuple[str, str]:
    return f"{tensor}__scale", f"{tensor}__zero_point"
