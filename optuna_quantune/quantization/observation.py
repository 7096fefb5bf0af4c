"""The float model with eyes: what calibration sees of each activation while the model runs.

What is kept of an activation is taken inside the graph, so that whole activations never leave ONNX
Runtime: copying and counting all of them costs more than computing them. Three things are seen of
a large activation, all in rows along its last axis:

- the rows with the largest maxima, whole. Every value above the smallest of these maxima is among
  them, so the tail is known value by value and the maximum exactly;
- likewise the rows with the smallest minima, unless the activation cannot be negative: zero is in
  every range whatever the smallest value is;
- every n-th value of all, from an offset that goes through all residues from input to input.

A small activation is seen whole.

All of that needs an activation in its plain layout, and bringing it there from the blocked layout
that ONNX Runtime's convolutions use takes longer than anything else. So the observer can also take
a glance: the extremes only, of many activations in the blocked layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.session import make_session
from optuna_quantune.quantization.statistics import Tail


# Values for one input up to which an activation is seen whole.
_SMALL: Final = 1 << 12
# Rows of each tail that are seen whole in one run.
_ROWS: Final = 64
# Operators without negative outputs; those whose outputs are not negative where their inputs are
# not; and the first opset in which a reduction takes its axes as an input.
_NEVER_NEGATIVE: Final = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax"})
_KEEP_SIGN: Final = frozenset(
    {"Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "GlobalMaxPool"}
    | {"MaxPool", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_REDUCTION_AXES_OPSET: Final = 18
_NOTHING: Final = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Observation:
    """What was seen of one activation in one run.

    Attributes:
        tensor: Its name.
        sample: All or some of its values, float32, C-contiguous.
        weight: How many values each of them stands for.
        minimum: The smallest value; of an activation that cannot be negative the smallest that was
            seen.
        maximum: The largest value.
        upper: The largest values, if not all are in `sample`.
        lower: The smallest values, if not all are in `sample` and they may be negative.
    """

    tensor: str
    sample: NDArray[np.float32]
    weight: int
    minimum: float
    maximum: float
    upper: Tail | None = None
    lower: Tail | None = None


def observe_whole(
    model: FloatModel, tensors: Sequence[str], feed: dict[str, NDArray[Any]]
) -> list[Observation]:
    """Runs the model once and sees every activation whole."""
    outputs = [tensor for tensor in tensors if tensor not in feed]
    proto = _with_outputs(model, outputs)
    results = _run(model, make_session(proto, threads=1), outputs, feed)
    found = feed | dict(zip(outputs, results, strict=True))
    return [_whole(tensor, found[tensor]) for tensor in tensors]


class Observer:
    """Runs the float model and looks at its activations.

    Args:
        model: The float model.
        first: What `observe_whole` saw of one input: the wanted activations and their sizes.
    """

    def __init__(self, model: FloatModel, first: Sequence[Observation]) -> None:
        self._model = model
        self._values = {seen.tensor: seen.sample.size for seen in first}
        large = [
            seen.tensor
            for seen in first
            if seen.sample.size > _SMALL and seen.sample.size // seen.sample.shape[-1] >= _ROWS
        ]
        inputs = {spec.name for spec in model.inputs}
        signs = _never_negative(model.proto.graph)
        # ONNX Runtime begins with the leaf that was added last and computes what it needs. Added
        # from the end of the network to its beginning, observers run right behind the node that
        # they look at, while its output is in the processor's cache, and activations need not be
        # kept: that takes a quarter less time than the other way round.
        order = {name: i for i, node in enumerate(model.proto.graph.node) for name in node.output}
        large.sort(key=lambda tensor: order.get(tensor, -1), reverse=True)
        self._kinds: dict[str, tuple[str, ...]] = {
            tensor: ("max",) if tensor in signs else ("max", "min") for tensor in large
        }
        self._whole = [t for t in self._values if t not in self._kinds and t not in inputs]
        self._names = [
            *self._whole,
            *(_name(tensor, part) for tensor in large for part in self._parts(tensor)),
        ]
        whole = _with_outputs(model, self._whole)
        self._eyes = make_session(_with_eyes(whole, self._kinds), threads=1)
        convolved = _after_convolutions(model.proto.graph)
        blocked = {
            seen.tensor
            for seen in first
            if self._kinds.get(seen.tensor) == ("max",)
            and seen.tensor in convolved
            and seen.sample.ndim == 4
        }
        self._glance_names = [
            *self._whole,
            *(_name(t, f"all_{k}") for t in large for k in self._kinds[t]),
        ]
        self._glance = make_session(
            _with_glances(whole, self._kinds, blocked),
            threads=1,
        )

    def observe(
        self, feed: dict[str, NDArray[Any]], *, offset: int, sample: int, weight: int
    ) -> list[Observation]:
        """Runs a batch and looks closely.

        Args:
            feed: The batch by model input name.
            offset: Where sampling begins; different for each batch.
            sample: Values of a large activation that are counted for each input, about.
            weight: How many batches this one stands for.

        Raises:
            InputError: If the model cannot be run.
        """
        # Widths and channel counts are mostly even, so that an odd step visits all of them.
        steps = {t: max(1, self._values[t] // sample) | 1 for t in self._kinds}
        places = {_name(t, "start"): np.array([offset % step]) for t, step in steps.items()}
        places |= {_name(t, "step"): np.array([step]) for t, step in steps.items()}
        results = _run(self._model, self._eyes, self._names, feed | places)
        found = dict(zip(self._names, results, strict=True)) | feed
        return [
            self._large(tensor, found, steps[tensor], weight)
            if tensor in steps
            else _whole(tensor, found[tensor])
            for tensor in self._values
        ]

    def glance(self, feed: dict[str, NDArray[Any]]) -> list[Observation]:
        """Runs a batch and takes the extremes of large activations only.

        Raises:
            InputError: If the model cannot be run.
        """
        results = _run(self._model, self._glance, self._glance_names, feed)
        found = dict(zip(self._glance_names, results, strict=True)) | feed
        observations = []
        for tensor in self._values:
            if tensor not in self._kinds:
                observations.append(_whole(tensor, found[tensor]))
                continue
            maximum = float(found[_name(tensor, "all_max")].max())
            signed = "min" in self._kinds[tensor]
            minimum = float(found[_name(tensor, "all_min")]) if signed else maximum
            observations.append(Observation(tensor, _NOTHING, 1, minimum, maximum))
        return observations

    def _parts(self, tensor: str) -> Iterable[str]:
        yield "sample"
        for kind in self._kinds[tensor]:
            yield f"{kind}_ends"
            yield f"{kind}_rows"

    def _large(
        self, tensor: str, found: dict[str, NDArray[Any]], step: int, weight: int
    ) -> Observation:
        sample = found[_name(tensor, "sample")]
        ends = found[_name(tensor, "max_ends")]
        upper = Tail(found[_name(tensor, "max_rows")], float(ends[-1]), weight)
        maximum, minimum, lower = float(ends[0]), float(sample.min()), None
        if "min" in self._kinds[tensor]:
            ends = found[_name(tensor, "min_ends")]
            lower = Tail(found[_name(tensor, "min_rows")], float(ends[-1]), weight)
            minimum = float(ends[0])
        return Observation(tensor, sample, step * weight, minimum, maximum, upper, lower)


def _run(model: FloatModel, session: Any, names: list[str], feed: dict[str, Any]) -> list[Any]:
    try:
        results: list[Any] = session.run(names, feed)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model {model.path}: cannot run a calibration input ({reason})"
        ) from error
    return results


def _whole(tensor: str, values: NDArray[np.float32]) -> Observation:
    values = np.ascontiguousarray(values)
    return Observation(tensor, values, 1, float(values.min()), float(values.max()))


def _name(tensor: str, part: str) -> str:
    return f"{tensor}__calibration_{part}"


def _with_outputs(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with these activations as its only outputs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in tensors)
    return proto


def _with_eyes(proto: onnx.ModelProto, kinds: dict[str, tuple[str, ...]]) -> onnx.ModelProto:
    """Adds the sample and the tails of activations as outputs, in the order of `kinds`."""
    seeing = onnx.ModelProto()
    seeing.CopyFrom(proto)
    graph = seeing.graph
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    constants = {
        "flat": np.array([-1]),
        "end": np.array([np.iinfo(np.int64).max]),
        "rows": np.array([_ROWS]),
        "axes": np.array([1]),
    }
    names = {key: f"calibration__{key}" for key in constants}
    graph.initializer.extend(
        numpy_helper.from_array(value, names[key]) for key, value in constants.items()
    )
    make = helper.make_node
    for tensor, sides in kinds.items():
        rows, flat = _name(tensor, "rows"), _name(tensor, "flat")
        start, step, sample = (_name(tensor, part) for part in ("start", "step", "sample"))
        graph.input.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1])
            for name in (start, step)
        )
        graph.node.append(make("Flatten", [tensor], [rows], axis=-1))
        for side in sides:
            extremes, count, index = (_name(tensor, f"{side}_{p}") for p in ("all", "k", "index"))
            size, ends, tail = (_name(tensor, f"{side}_{p}") for p in ("size", "ends", "rows"))
            operator = {"max": "ReduceMax", "min": "ReduceMin"}[side]
            if opset < _REDUCTION_AXES_OPSET:
                graph.node.append(make(operator, [rows], [extremes], axes=[1], keepdims=0))
            else:
                graph.node.append(make(operator, [rows, names["axes"]], [extremes], keepdims=0))
            graph.node.extend(
                [
                    make("Shape", [extremes], [size]),
                    make("Min", [size, names["rows"]], [count]),
                    make("TopK", [extremes, count], [ends, index], largest=int(side == "max")),
                    make("Gather", [rows, index], [tail], axis=0),
                ]
            )
            graph.output.extend(onnx.ValueInfoProto(name=name) for name in (ends, tail))
        graph.node.append(make("Reshape", [tensor, names["flat"]], [flat]))
        graph.node.append(make("Slice", [flat, start, names["end"], "", step], [sample]))
        graph.output.append(onnx.ValueInfoProto(name=sample))
    return seeing


def _with_glances(
    proto: onnx.ModelProto, kinds: dict[str, tuple[str, ...]], blocked: set[str]
) -> onnx.ModelProto:
    """Adds the extremes of activations as outputs, in the order of `kinds`.

    Args:
        proto: The model.
        kinds: Which extremes of each activation.
        blocked: Activations that ONNX Runtime holds in the blocked layout of its convolutions,
            in which it can pool but not reduce: their maxima are given channel by channel.
    """
    glancing = onnx.ModelProto()
    glancing.CopyFrom(proto)
    for tensor, sides in kinds.items():
        for side in sides:
            name = _name(tensor, f"all_{side}")
            if tensor in blocked:
                node = helper.make_node("GlobalMaxPool", [tensor], [name])
            else:
                operator = {"max": "ReduceMax", "min": "ReduceMin"}[side]
                node = helper.make_node(operator, [tensor], [name], keepdims=0)
            glancing.graph.node.append(node)
            glancing.graph.output.append(onnx.ValueInfoProto(name=name))
    return glancing


def _after_convolutions(graph: onnx.GraphProto) -> set[str]:
    """Names of the outputs of convolutions and of the activation functions behind them."""
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv" or (node.op_type in ("Relu", "Clip") and node.input[0] in found):
            found |= set(node.output)
    return found


def _never_negative(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that cannot hold a negative value."""
    found = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
        and np.all(numpy_helper.to_array(tensor) >= 0.0)
    }
    for node in graph.node:
        operands = node.input[:1] if node.op_type not in ("Add", "Concat", "Mul") else node.input
        floor = node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in found
        kept = node.op_type in _KEEP_SIGN and all(name in found for name in operands)
        if node.op_type in _NEVER_NEGATIVE or floor or kept:
            found |= set(node.output)
    return found
