"""Where Q/DQ pairs stand: ONNX Runtime's decision, asked for once for each set of float layers.

`quantize_static` is run once with placeholder ranges. What it decides (which tensors carry Q/DQ
pairs, which of them share parameters, which constants are stored as integers) does not depend on
the ranges, so every configuration with the same float layers fills its own numbers into the same
graph. A run of `quantize_static` takes 1.5 s for MobileNetV2, filling a few hundredths.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from typing import Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import save_tensors_data
from onnxruntime.quantization.calibrate import TensorData
from onnxruntime.quantization.calibrate import TensorsData

from optuna_quantune.quantization.lint import check_node_names
from optuna_quantune.quantization.model import FloatModel


_SCALE_SUFFIX: Final = "_scale"
# What ONNX Runtime quantizes with the parameters of the input (`QDQDirect8BitOp`, `QDQMaxPool`).
_MOVING_OPS: Final = frozenset(
    {"AveragePool", "Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class ActivationSite:
    """One scale and zero point in the graph, shared by one or more activation tensors.

    Attributes:
        tensor: The activation whose range decides.
        statistics: The activation whose statistics are that range: `tensor` itself, or the one
            that has the same range (`statistics_sources`).
        scale: Name of the scale initializer.
        zero_point: Name of the zero-point initializer.
    """

    tensor: str
    statistics: str
    scale: str
    zero_point: str


@dataclass(frozen=True)
class ConstantSite:
    """One constant that is stored as integers.

    Attributes:
        kind: ``weight`` (of a layer), ``bias`` (int32) or ``other`` (an operand of Add, Mul, ...).
        tensor: Name of the float initializer.
        quantized: Name of the integer initializer.
        scale: Name of the scale initializer.
        zero_point: Name of the zero-point initializer.
        axis: Channel axis where per-channel scales are possible, otherwise None.
        input_scale: For a bias, the scale initializer of its layer's input.
        weight: For a bias, the weight of its layer.
    """

    kind: Literal["weight", "bias", "other"]
    tensor: str
    quantized: str
    scale: str
    zero_point: str
    axis: int | None
    input_scale: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class Placement:
    """The quantized graph without its numbers.

    Attributes:
        template: The Q/DQ model; the initializers named by the sites are left out.
        activations: All activation parameters in graph order.
        constants: All constants in graph order; weights stand before the biases that need them.
    """

    template: onnx.ModelProto
    activations: tuple[ActivationSite, ...]
    constants: tuple[ConstantSite, ...]


def place(model: FloatModel, *, float_nodes: Sequence[str] = ()) -> Placement:
    """Asks ONNX Runtime where the Q/DQ pairs of `model` go.

    The options are per-channel weights (the axis is dropped later for per-tensor ones) and
    ``QDQKeepRemovableActivations``: with our own parameters ONNX Runtime cannot know whether the
    range of a tensor makes its Relu or Clip superfluous, and would remove it all the same.

    Args:
        model: The prepared float model.
        float_nodes: Names of nodes that stay in float (``nodes_to_exclude``).

    Raises:
        InputError: If no node has one of these names.
    """
    check_node_names(model, float_nodes)
    quantized = _run_quantize_static(model, float_nodes)
    graph = quantized.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    sources = statistics_sources(model.proto.graph)
    activations: dict[str, ActivationSite] = {}
    constants: list[ConstantSite] = []
    dequantized_by: dict[str, onnx.NodeProto] = {}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if node.op_type == "QuantizeLinear":
            scale, zero_point = node.input[1], node.input[2]
            tensor = scale.removesuffix(_SCALE_SUFFIX)
            activations[scale] = ActivationSite(
                tensor, sources.get(tensor, tensor), scale, zero_point
            )
        elif node.op_type == "DequantizeLinear":
            dequantized_by[node.output[0]] = node
    for node in dequantized_by.values():
        if node.input[0] in initializers:
            constants.append(_constant_site(node, initializers, readers, dequantized_by, model))
    constants.sort(key=lambda site: site.kind == "bias")
    filled_in = {name for site in activations.values() for name in (site.scale, site.zero_point)}
    for constant in constants:
        filled_in |= {constant.quantized, constant.scale, constant.zero_point}
    kept = [tensor for tensor in graph.initializer if tensor.name not in filled_in]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return Placement(quantized, tuple(activations.values()), tuple(constants))


def _run_quantize_static(model: FloatModel, float_nodes: Sequence[str]) -> onnx.ModelProto:
    graph = model.proto.graph
    tensors = [name for node in graph.node for name in node.output if name]
    tensors += [spec.name for spec in model.inputs]
    placeholder = TensorData(lowest=np.float32(0), highest=np.float32(1))
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(tensors, placeholder))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "ranges.json"
        output = Path(folder) / "quantized.onnx"
        save_tensors_data(ranges, str(cache))
        copy = onnx.ModelProto()
        copy.CopyFrom(model.proto)
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # it advises a pre-processing that was done already
        try:
            quantize_static(
                copy,
                str(output),
                None,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(float_nodes),
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=str(cache),
                extra_options={"QDQKeepRemovableActivations": True},
            )
        finally:
            logging.root.setLevel(level)
        return onnx.load(output)


def statistics_sources(graph: onnx.GraphProto) -> dict[str, str]:
    """Maps tensors whose range is that of another tensor to that tensor.

    - What a Relu or Clip without a sibling cuts off never matters, so the tensor before it takes
      the range behind it (ONNX Runtime does the same in ``adjust_tensor_ranges``).
    - Nodes that only move or pool values keep their input's parameters where the input is
      quantized. Where it is not, because the layer before stays in float, their output gets
      parameters of its own; its values still lie in the input's range.
    """
    outputs = {output.name for output in graph.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    sources: dict[str, str] = {}
    for node in reversed(graph.node):
        tensor = node.input[0] if node.input else ""
        if node.op_type in ("Relu", "Clip") and readers[tensor] == 1 and tensor not in outputs:
            sources[tensor] = sources.get(node.output[0], node.output[0])
    for node in graph.node:
        if node.op_type in _MOVING_OPS:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
    return sources


def _constant_site(
    node: onnx.NodeProto,
    initializers: dict[str, onnx.TensorProto],
    readers: dict[str, list[onnx.NodeProto]],
    dequantized_by: dict[str, onnx.NodeProto],
    model: FloatModel,
) -> ConstantSite:
    quantized, scale, zero_point = node.input
    tensor = quantized.removesuffix("_quantized")
    if initializers[quantized].data_type == onnx.TensorProto.INT32:
        layer = readers[node.output[0]][0]
        data, weight = dequantized_by[layer.input[0]], dequantized_by[layer.input[1]]
        return ConstantSite(
            "bias",
            # ONNX Runtime stores a second copy, under another name, of a bias used twice.
            next(item.bias or tensor for item in model.layers if item.name == layer.name),
            quantized,
            scale,
            zero_point,
            axis=None,
            input_scale=data.input[1],
            weight=weight.input[0].removesuffix("_quantized"),
        )
    axis = next((a.i for a in node.attribute if a.name == "axis"), None)
    kind: Literal["weight", "other"] = (
        "weight" if any(layer.weight == tensor for layer in model.layers) else "other"
    )
    return ConstantSite(kind, tensor, quantized, scale, zero_point, axis)
