"""The float model with eyes: what calibration sees of each activation while the model runs.

Activations are looked at where ONNX Runtime computes them, and are neither copied nor reordered.
Its convolutions hold them in a blocked layout (``com.microsoft.nchwc``), and an activation that is
asked for as an output is brought back into its plain layout first, which takes longer than
anything else in calibration. Counting values does not care for their order. So the model that ONNX
Runtime has optimized is written out, its outputs are moved to the blocked tensors before those
reorderings, and it is loaded again as it is. (Where channels do not fill all blocks, the plain
tensor is taken: the blocked one is padded.)

Of a large activation two things are kept: every value outside of given bounds, and every n-th
value of those inside. So its tails and extremes are known value by value, of every input.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.graph import attribute_of
from optuna_quantune.quantization.graph import with_outputs
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.session import make_session


# The widest block of channels that ONNX Runtime has; others divide it.
_BLOCK: Final = 16
# Values that are compared at a time: their marks stay in the processor's cache.
_PIECE: Final = 1 << 19
_WORD: Final = 8
_ALL: Final = np.ones(_WORD, dtype=np.bool_).view(np.uint64)[0]
# Operators without negative outputs, and those whose outputs are not negative where their inputs
# are not.
_NEVER_NEGATIVE: Final = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax"})
_KEEP_SIGN: Final = frozenset(
    {"Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "GlobalMaxPool"}
    | {"MaxPool", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
# What no activation reaches but to mask others: the lowest number of float32 is -3.4e38.
_INFINITE: Final = 1e30
_NOTHING: Final = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Bounds:
    """Beyond what an activation's values are seen one by one: within the extremes seen so far.

    Attributes:
        lower: Values below it are; None of an activation that cannot be negative.
        upper: Values above it are.
    """

    lower: float | None
    upper: float


def is_finite(values: NDArray[np.floating[Any]]) -> bool:
    """Whether values are numbers that a model computes with.

    Infinite ones are not, nor what stands for them in masks: the lowest number of float32.
    """
    return not values.size or bool(values.min() > -_INFINITE and values.max() < _INFINITE)


@dataclass(frozen=True)
class Observation:
    """What was seen of one activation in one run.

    Attributes:
        tensor: Its name.
        sample: All values, or some of those within the bounds, float32, shape (n,).
        weight: How many values each of `sample` stands for.
        tails: All values beyond the bounds that are not in `sample`, float32, shape (m,); a value
            that is not a number is among them.
        extremes: The smallest and the largest value of each input of the batch, float32, shape
            (inputs, 2); where they are within the bounds, the bounds.
    """

    tensor: str
    sample: NDArray[np.float32]
    weight: int
    tails: NDArray[np.float32]
    extremes: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """Whether all values of the activation are finite."""
        return is_finite(self.tails) and is_finite(self.sample)

    @property
    def is_number(self) -> bool:
        """Whether all its values are numbers, infinite ones included."""
        return not any(np.isnan(part).any() for part in (self.tails, self.sample))


class Observer:
    """Runs the float model and looks at its activations.

    Args:
        model: The float model.
        tensors: Names of the activations, model inputs included.
    """

    def __init__(self, model: FloatModel, tensors: Sequence[str]) -> None:
        self._model = model
        self._tensors = tensors
        inputs = {spec.name for spec in model.inputs}
        self._computed = [tensor for tensor in tensors if tensor not in inputs]
        self._session, self._outputs = _look_inside(model, self._computed)

    def observe(
        self,
        feed: Mapping[str, NDArray[Any]],
        *,
        steps: Mapping[str, int],
        bounds: Mapping[str, Bounds],
        offset: int = 0,
        inputs: int = 1,
    ) -> list[Observation]:
        """Runs a batch.

        Args:
            feed: The batch by model input name.
            steps: For each activation which values within the bounds are kept: 1 is every value,
                whatever the bounds are, n is every n-th.
            bounds: Of the activations with larger steps.
            offset: Where sampling begins; different for each batch.
            inputs: How many inputs the batch has.

        Raises:
            InputError: If the model cannot be run.
        """
        found = self._run(feed)
        return [
            _observed(tensor, found[tensor], steps[tensor], bounds.get(tensor), offset, inputs)
            for tensor in self._tensors
        ]

    def values(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """How many values each activation has for a batch."""
        return {tensor: values.size for tensor, values in self._run(feed).items()}

    def _run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """The activations in memory of ONNX Runtime, flat, in whatever order they are held."""
        binding = self._session.io_binding()
        try:
            for name, values in feed.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(values))
            for name in self._outputs:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises its own types, without a common base
            reason = str(error).splitlines()[0]
            raise InputError(
                f"model {self._model.path}: cannot run a calibration input ({reason})"
            ) from error
        held = binding.get_outputs()
        found = {t: np.from_dlpack(v) for t, v in zip(self._computed, held, strict=True)}
        found |= {t: feed[t] for t in self._tensors if t in feed}
        return {tensor: np.ascontiguousarray(v).reshape(-1) for tensor, v in found.items()}


def _observed(
    tensor: str,
    values: NDArray[np.float32],
    step: int,
    bounds: Bounds | None,
    offset: int,
    inputs: int,
) -> Observation:
    # What has no axis for the inputs is all of each of them.
    rows = inputs if values.size % inputs == 0 else 1
    extremes = np.empty((rows, 2), dtype=np.float32)
    if step == 1 or bounds is None:
        of_inputs = values.reshape(rows, -1)
        if values.size:
            of_inputs.min(axis=1, out=extremes[:, 0])
            of_inputs.max(axis=1, out=extremes[:, 1])
        else:
            extremes[:] = 0.0
        return Observation(tensor, values, 1, _NOTHING, _for_each(extremes, inputs))
    extremes[:] = bounds.lower or 0.0, bounds.upper
    samples, tails = [], []
    for start in range(0, values.size, _PIECE):
        piece = values[start : start + _PIECE]
        inside = _inside(piece, bounds)
        every = slice((offset - start) % step, None, step)
        samples.append(piece[every][inside[every]])
        places = _outside(inside)
        beyond = piece[places]
        tails.append(beyond)
        owners = (start + places) // (values.size // rows)
        with np.errstate(invalid="ignore"):  # what is not a number is noticed by others
            np.minimum.at(extremes[:, 0], owners, beyond)
            np.maximum.at(extremes[:, 1], owners, beyond)
    return Observation(
        tensor, np.concatenate(samples), step, np.concatenate(tails), _for_each(extremes, inputs)
    )


def _for_each(extremes: NDArray[np.float32], inputs: int) -> NDArray[np.float32]:
    return extremes if len(extremes) == inputs else np.repeat(extremes, inputs, axis=0)


def _inside(values: NDArray[np.float32], bounds: Bounds) -> NDArray[np.bool_]:
    """Which values are within the bounds, limits included; what is not a number is not."""
    inside: NDArray[np.bool_] = values <= np.float32(bounds.upper)
    if bounds.lower is not None:
        inside &= values >= np.float32(bounds.lower)
    return inside


def _outside(inside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Places of the few values that are not marked, in ascending order."""
    whole = inside.size // _WORD * _WORD
    # Eight marks are looked at together: most of the time is spent where all are set.
    words = np.flatnonzero(inside[:whole].view(np.uint64) != _ALL)
    word, mark = np.nonzero(~inside[:whole].reshape(-1, _WORD).take(words, axis=0))
    return np.concatenate([words[word] * _WORD + mark, whole + np.flatnonzero(~inside[whole:])])


def _look_inside(
    model: FloatModel, tensors: Sequence[str]
) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """A session of the optimized model, and the name in it for each tensor that is wanted."""
    proto = _optimized(model, tensors)
    blocked = {
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type == "ReorderOutput" and node.output[0] in tensors and _fills_blocks(node)
    }
    read = {name for node in proto.graph.node for name in node.input}
    names = [blocked.get(tensor, tensor) for tensor in tensors]
    for node in [n for n in proto.graph.node if n.output[0] in blocked]:
        if node.output[0] not in read:
            proto.graph.node.remove(node)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    return make_session(proto, threads=1, optimize=False), names


def _fills_blocks(reorder: onnx.NodeProto) -> bool:
    channels = attribute_of(reorder, "channels")
    return bool(channels % _BLOCK == 0)


def _optimized(model: FloatModel, tensors: Sequence[str]) -> onnx.ModelProto:
    """What ONNX Runtime makes of the model on this machine, with these activations as outputs."""
    proto = with_outputs(model.proto, tensors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        make_session(proto, threads=1, optimized=path)
        return onnx.load(path)


def never_negative(graph: onnx.GraphProto) -> set[str]:
    """Names of the activations that cannot hold a negative value."""
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
