"""Bias correction: the mean error that a quantized weight makes in its layer, taken off the bias.

The rounding errors of the weights of an output channel do not add up to zero, and behind a ReLU
all inputs are positive: the whole channel is shifted by a constant, which the bias can take back
(Nagel et al., arXiv 1906.04721, section 4.2). A layer is linear, so that its mean error over any
number of inputs is its error on their mean: one pass over a few inputs keeps the mean input of
each layer, and the correction of any configuration costs about one inference more.

The paper's other way compares the outputs of the quantized model with the float model's, which
also sees what clipped activations shift. It needs many more inputs: the estimate is a difference
of two large noisy means where this one is a small product. On MobileNetV2 and ShuffleNet its
models were up to 3 dB worse with 64 inputs than these are with 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.calibration import CalibrationInputs
from optuna_quantune.quantization.graph import copy_of
from optuna_quantune.quantization.graph import opset_of
from optuna_quantune.quantization.graph import with_outputs
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.session import make_session


# Inputs that the mean inputs are taken over. From 8 to 128 the accuracy was the same.
CORRECTION_INPUTS: Final = 32
# Inputs that are run at a time.
_BATCH: Final = 4
# From this opset on ReduceMean takes its axes as an input.
_AXES_ARE_AN_INPUT: Final = 18


class BiasCorrection:
    """What errors in the weights of one float model shift.

    The pass over the inputs happens on first use.

    Args:
        model: The prepared float model.
        inputs: The calibration inputs, bound to the model's input names; the first
            `CORRECTION_INPUTS` are used.
    """

    def __init__(self, model: FloatModel, inputs: CalibrationInputs) -> None:
        self._model = model
        self._inputs = inputs
        self._layers = tuple(layer for layer in model.layers if layer.bias is not None)

    def shifts(
        self, weight_errors: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """The mean that a weight error adds to each output channel of its layer.

        Args:
            weight_errors: Quantized minus float weight by layer name.

        Returns:
            By layer name an array of shape (channels,), for the layers of `weight_errors` that
            have a bias.
        """
        feed = {
            _error(layer): weight_errors[layer.name]
            if layer.name in weight_errors
            else np.zeros_like(self._model.weights[layer.weight])
            for layer in self._layers
        }
        wanted = [layer for layer in self._layers if layer.name in weight_errors]
        if not wanted:  # ONNX Runtime takes an empty list for all outputs
            return {}
        outputs = self._session.run([_output(layer) for layer in wanted], feed)
        return {
            layer.name: _channel_mean(layer, output)
            for layer, output in zip(wanted, outputs, strict=True)
        }

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        """A graph of the layers alone, from the error of each weight to the error it makes."""
        means = self._mean_inputs()
        nodes = []
        by_name = {node.name: node for node in self._model.proto.graph.node}
        for layer in self._layers:
            node = copy_of(by_name[layer.name])
            node.input[:] = [_mean(layer), _error(layer)]
            node.output[0] = _output(layer)
            nodes.append(node)
        graph = helper.make_graph(
            nodes,
            "weight_errors",
            [
                helper.make_tensor_value_info(
                    _error(layer),
                    onnx.TensorProto.FLOAT,
                    self._model.weights[layer.weight].shape,
                )
                for layer in self._layers
            ],
            [onnx.ValueInfoProto(name=_output(layer)) for layer in self._layers],
            [numpy_helper.from_array(means[layer.name], _mean(layer)) for layer in self._layers],
        )
        return make_session(
            helper.make_model(
                graph,
                opset_imports=self._model.proto.opset_import,
                ir_version=self._model.proto.ir_version,
            )
        )

    def _mean_inputs(self) -> dict[str, NDArray[np.float32]]:
        """The mean of each layer's input over inputs, of batch size 1, by layer name."""
        session = make_session(_with_means(self._model, self._layers))
        names = [_mean(layer) for layer in self._layers]
        sums = [np.zeros(1)] * len(names)
        number = min(CORRECTION_INPUTS, len(self._inputs))
        batch = _BATCH if self._model.batches_any else 1
        for feed in self._inputs.batches(batch, np.arange(number)):
            size = len(next(iter(feed.values())))
            means = session.run(names, feed)
            if any(s.size > 1 and s.shape != m.shape for s, m in zip(sums, means, strict=True)):
                raise InputError(
                    "knob 'bias_correction': needs calibration inputs of one shape; leave it out"
                )
            sums = [total + size * mean for total, mean in zip(sums, means, strict=True)]
        return {
            layer.name: (total / number).astype(np.float32)
            for layer, total in zip(self._layers, sums, strict=True)
        }


def _mean(layer: Layer) -> str:
    return f"{layer.name}__mean_input"


def _error(layer: Layer) -> str:
    return f"{layer.name}__weight_error"


def _output(layer: Layer) -> str:
    return f"{layer.name}__output_error"


def _channel_mean(layer: Layer, output: NDArray[np.float32]) -> NDArray[np.float32]:
    channel = output.ndim - 1 if layer.op_type == "Gemm" else 1
    others = tuple(axis for axis in range(output.ndim) if axis != channel)
    mean: NDArray[np.float32] = output.mean(axis=others, dtype=np.float64).astype(np.float32)
    return mean


def _with_means(model: FloatModel, layers: tuple[Layer, ...]) -> onnx.ModelProto:
    """The float model with the mean over the batch of each layer's input as outputs."""
    proto = with_outputs(model.proto, map(_mean, layers))
    opset = opset_of(proto)
    batch = numpy_helper.from_array(np.array([0]), "bias_correction__batch_axis")
    if opset >= _AXES_ARE_AN_INPUT:
        proto.graph.initializer.append(batch)
    for layer in layers:
        if opset >= _AXES_ARE_AN_INPUT:
            node = helper.make_node("ReduceMean", [layer.input, batch.name], [_mean(layer)])
        else:
            node = helper.make_node("ReduceMean", [layer.input], [_mean(layer)], axes=[0])
        proto.graph.node.append(node)
    return proto
