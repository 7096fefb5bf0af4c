"""Random small graphs of what exporters write, and of what they write seldom.

A graph grows node by node from its inputs. Each group of nodes is run by itself on two inputs
first, and is left out where ONNX Runtime refuses it or a value gets out of hand: so shapes are
known without an inference of our own, and every graph is valid. A seed gives one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from optuna_quantune.quantization.graph import reads


Array = NDArray[Any]
# What ONNX Runtime and we append to names, and characters that are no letters.
_ENDINGS: Final = (
    "",
    "_scale",
    "_quantized",
    "_zero_point",
    "/x",
    ":0",
    " y",
    "_output_0",
    "__of__a",
)
_LARGEST_VALUE: Final = 1e4
_TRIES: Final = 60


@dataclass(frozen=True)
class RandomGraph:
    """A model with inputs for it.

    Attributes:
        model: The model.
        inputs: Inputs by name, the first axis counting them.
    """

    model: onnx.ModelProto
    inputs: dict[str, Array]


def random_graph(seed: int) -> RandomGraph:
    """The graph of a seed."""
    return _Growing(np.random.default_rng(seed)).grow()


def exact_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session that computes each node as the model says."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class _Growing:
    """A graph that grows; `values` are those of its activations for two inputs."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.opset = int(rng.choice([11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.values: dict[str, Array] = {}
        self.inputs: dict[str, Array] = {}
        self.style = str(rng.choice(["plain", "unnamed", "odd", "colliding"]))
        self._names = 0
        self._pending: tuple[list[onnx.NodeProto], dict[str, Array]] = ([], {})

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choice(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def name(self, stem: str) -> str:
        self._names += 1
        if self.style == "odd":
            return f"/{stem}.{self._names}{self.choice(*_ENDINGS)}"
        if self.style == "colliding":
            return f"t{self._names}{self.choice('', '', '_scale', '_quantized')}"
        return f"{stem}{self._names}"

    def constant(self, values: Array, *, stem: str = "c") -> str:
        name = self.name(stem)
        self._pending[1][name] = np.asarray(values)
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        return self.node_of_several(kind, inputs, 1, **attributes)[0]

    def node_of_several(
        self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any
    ) -> list[str]:
        names = [self.name(kind.lower()) for _ in range(outputs)]
        label = {"unnamed": "", "plain": f"{names[0]}_node"}.get(self.style, names[0])
        self._pending[0].append(helper.make_node(kind, inputs, names, label, **attributes))
        return names

    def weight(self, shape: tuple[int, ...], fan_in: int, axis: int = 0) -> str:
        """A weight, now and then with what quantization finds hard; an old one now and then."""
        same = [n for n, v in self.constants.items() if v.shape == shape and v.dtype == np.float32]
        if same and self.chance(0.1):
            return str(self.choice(*same))
        values = self.rng.standard_normal(shape) / np.sqrt(max(fan_in, 1))
        trouble = self.choice(
            "none", "none", "none", "zeros", "spread", "outlier", "tiny", "dead", "positive"
        )
        index: list[Any] = [slice(None)] * len(shape)
        if trouble == "zeros":
            index[axis] = self.rng.integers(shape[axis])
            values[tuple(index)] = 0.0
        elif trouble == "dead":
            values[:] = 0.0 if self.chance(0.2) else values
        elif trouble == "spread":
            ones = [1] * len(shape)
            ones[axis] = shape[axis]
            values *= np.exp(self.rng.standard_normal(shape[axis])).reshape(ones)
        elif trouble == "outlier":
            values.reshape(-1)[self.rng.integers(values.size)] *= 20.0
        elif trouble == "tiny":
            values *= 1e-3
        elif trouble == "positive":
            values = np.abs(values)
        name = self.constant(values.astype(np.float32), stem="w")
        if self.chance(0.1):
            return self.node("Identity", [name])
        return name

    def bias(self, count: int) -> str:
        same = [
            n for n, v in self.constants.items() if v.shape == (count,) and v.dtype == np.float32
        ]
        if same and self.chance(0.15):
            return str(self.choice(*same))
        size = self.choice(0.1, 0.1, 1.0, 0.0)
        return self.constant((size * self.rng.standard_normal(count)).astype(np.float32), stem="b")

    def vector(self, *shape: int, low: float = 0.2, high: float = 2.0) -> str:
        return self.constant(self.rng.uniform(low, high, shape).astype(np.float32))

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.values[tensor].shape)

    def commit(self) -> bool:
        """Takes the pending nodes in if they run and give batches of sensible floats."""
        nodes, constants = self._pending
        self._pending = ([], {})
        if not nodes:
            return False
        written = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in reads(node) if name} - written - set(constants)
        ordered = [name for node in nodes for name in node.output if name]
        known = {n: self.constants[n] for n in read if n in self.constants} | constants
        fed = {n: self.values[n] for n in read if n not in self.constants}
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in fed.items()],
            [onnx.ValueInfoProto(name=name) for name in ordered],
            [numpy_helper.from_array(v, n) for n, v in known.items()],
        )
        try:
            found = dict(
                zip(ordered, exact_session(self.proto(graph)).run(None, fed), strict=True)
            )
        except Exception:
            return False
        folded = set(constants)
        for node in nodes:  # an Identity of a constant is no activation
            if node.input and set(node.input) <= folded:
                folded |= set(node.output)
        floats = {n: v for n, v in found.items() if n not in folded and v.dtype == np.float32}
        for v in floats.values():
            if not np.isfinite(v).all() or v.size == 0 or np.abs(v).max() > _LARGEST_VALUE:
                return False
        self.nodes += nodes
        self.constants |= constants
        self.values |= {n: v for n, v in floats.items() if v.ndim >= 2 and v.shape[0] == 2}
        return True

    def proto(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=8 if self.opset < 19 else 10
        )

    def grow(self) -> RandomGraph:
        rng = self.rng
        count = int(rng.choice([8, 12, 16, 32]))
        rank = int(rng.choice([2, 3, 4, 4, 4, 4, 4, 5]))
        every: dict[str, Array] = {}
        for _ in range(int(rng.choice([1, 1, 1, 1, 2]))):
            spatial = {2: (), 3: (12,), 4: self.choice((8, 8), (7, 9), (6, 6)), 5: (4, 5, 4)}[rank]
            shape = (count, int(rng.choice([1, 2, 3, 3, 4, 8, 10])), *spatial)
            values = rng.standard_normal(shape) * rng.choice([1.0, 1.0, 0.01, 20.0])
            values = values + rng.choice([0.0, 0.0, 2.0])
            if self.chance(0.15):
                values = np.abs(values)
            if self.chance(0.1) and shape[1] > 1:
                values[:, 0] = 0.0
            name = self.name("x")
            every[name] = values.astype(np.float32)
            self.inputs[name] = self.values[name] = every[name][:2]
        wanted = int(rng.integers(2, 9))
        made = 0
        layers = 0
        for attempt in range(_TRIES):
            if made >= wanted and layers >= 1:
                break
            tensors = list(self.values)
            x = tensors[-min(int(rng.geometric(0.6)), len(tensors))]  # mostly of the newest
            step = "layer" if attempt == 0 or self.chance(0.45) else self.choice(*_STEPS)
            try:
                getattr(self, step)(x)
            except (_Unsuitable, ValueError, IndexError, KeyError):
                self._pending = ([], {})
                continue
            if self.commit():
                made += 1
                layers += step == "layer"
        return RandomGraph(*self.finish(every))

    def finish(self, every: dict[str, Array]) -> tuple[onnx.ModelProto, dict[str, Array]]:
        rng = self.rng
        read = {name for node in self.nodes for name in reads(node)}
        tensors = [n for n in self.values if n not in self.inputs]
        ends = [n for n in tensors if n not in read]
        outputs = ends if not self.chance(0.15) or len(ends) < 2 else ends[1:]  # a dead node
        inner = [n for n in tensors if n in read]
        if inner and self.chance(0.2):
            outputs = [*outputs, str(rng.choice(inner))]
        outputs = list(dict.fromkeys(outputs))[:4]
        if not outputs:
            outputs = tensors[-1:]
        fixed = self.chance(0.15)
        batch: Any = 1 if fixed else "N"
        free_space = self.chance(0.1)
        typed = self.chance(0.5)

        def value(name: str, values: Array, *, shaped: bool) -> onnx.ValueInfoProto:
            shape = [batch, *values.shape[1:]]
            if free_space and values.ndim > 2:
                shape[2:] = [f"{name}_{i}" for i in range(len(shape) - 2)]
            return helper.make_tensor_value_info(
                name, TensorProto.FLOAT, shape if shaped else None
            )

        used = {name for node in self.nodes for name in reads(node)}
        as_nodes = self.chance(0.15)
        nodes = list(self.nodes)
        initializers, listed = [], []
        for name, values in self.constants.items():
            if name not in used:
                continue
            tensor = numpy_helper.from_array(values, name)
            if as_nodes and self.chance(0.5):
                nodes.insert(0, helper.make_node("Constant", [], [name], value=tensor))
                continue
            initializers.append(tensor)
            listed.append(helper.make_tensor_value_info(name, tensor.data_type, values.shape))
        inputs = [value(n, v, shaped=True) for n, v in self.inputs.items()]
        if self.chance(0.1):
            inputs += listed
        graph = helper.make_graph(
            nodes,
            "graph",
            inputs,
            [value(n, self.values[n], shaped=typed) for n in outputs],
            initializers,
        )
        model = self.proto(graph)
        if self.chance(0.6):
            model = onnx.shape_inference.infer_shapes(model)
        return model, every

    def layer(self, x: str) -> None:
        shape = self.shape(x)
        if len(shape) == 2:
            self.gemm(x) if self.chance(0.6) else self.matmul(x)
        elif self.chance(0.1):
            self.matmul(x)
        elif self.chance(0.15):
            self.conv_transpose(x)
        else:
            self.conv(x)
        last = self._pending[0][-1].output[0]
        follow = self.rng.random()
        if follow < 0.15 and len(shape) > 2:
            last = self._norm(last, self._width(self._pending[0][-1], shape))
        if follow < 0.5:
            self.activate(last)

    def _width(self, node: onnx.NodeProto, shape: tuple[int, ...]) -> int:
        weight = self._pending[1].get(node.input[1], self.constants.get(node.input[1]))
        if weight is None or node.op_type != "Conv":
            raise _Unsuitable
        return int(weight.shape[0])

    def conv(self, x: str) -> None:
        _, channels, *space = self.shape(x)
        rank = len(space)
        kernel = [int(self.rng.integers(1, min(4, s + 1))) for s in space]
        kind = self.choice("dense", "dense", "pointwise", "depthwise", "grouped", "multiplied")
        attributes: dict[str, Any] = {}
        groups, outs = 1, int(self.choice(1, 2, 3, 4, 6, 8, 12, 16, 20))
        if kind == "pointwise":
            kernel = [1] * rank
        elif kind == "depthwise":
            groups = outs = channels
        elif kind == "multiplied":
            groups, outs = channels, 2 * channels
        elif kind == "grouped":
            divisors = [d for d in range(2, channels) if channels % d == 0]
            if divisors:
                groups = int(self.rng.choice(divisors))
                outs = groups * int(self.rng.integers(1, 5))
        if self.chance(0.3):
            attributes["strides"] = [int(self.rng.integers(1, 3)) for _ in space]
        if self.chance(0.15):
            attributes["dilations"] = [int(self.rng.integers(1, 3)) for _ in space]
        padding = self.choice("same", "same", "none", "asymmetric", "auto")
        if padding == "same":
            attributes["pads"] = [k // 2 for k in kernel] * 2
        elif padding == "asymmetric":
            attributes["pads"] = [int(self.rng.integers(0, 3)) for _ in range(2 * rank)]
        elif padding == "auto" and "dilations" not in attributes:
            attributes["auto_pad"] = self.choice("SAME_UPPER", "SAME_LOWER", "VALID")
        if self.chance(0.7):
            attributes["kernel_shape"] = kernel
        inputs = [
            x,
            self.weight(
                (outs, channels // groups, *kernel), channels // groups * int(np.prod(kernel))
            ),
        ]
        if self.chance(0.65):
            inputs.append(self.bias(outs))
        self.node("Conv", inputs, group=groups, **attributes)

    def conv_transpose(self, x: str) -> None:
        _, channels, *space = self.shape(x)
        kernel = [int(self.rng.integers(1, 4)) for _ in space]
        groups = self.choice(1, 1, 2) if channels % 2 == 0 else 1
        outs = int(self.choice(1, 2, 4, 5))
        strides = [int(self.rng.integers(1, 3)) for _ in space]
        inputs = [x, self.weight((channels, outs, *kernel), channels, axis=1)]
        if self.chance(0.6):
            inputs.append(self.bias(outs * groups))
        extra: dict[str, Any] = {}
        if self.chance(0.3) and all(s > 1 for s in strides):
            extra["output_padding"] = [1] * len(space)
        self.node("ConvTranspose", inputs, group=groups, strides=strides, **extra)

    def gemm(self, x: str) -> None:
        _, width = self.shape(x)
        outs = int(self.choice(1, 2, 5, 8, 16))
        transposed = self.chance(0.5)
        inputs = [
            x,
            self.weight(
                (outs, width) if transposed else (width, outs), width, 0 if transposed else 1
            ),
        ]
        if self.chance(0.75):
            inputs.append(
                self.bias(outs)
                if self.chance(0.8)
                else self.vector(*self.choice((1, outs), (1,), ()), low=-1.0)
            )
        extra: dict[str, Any] = {}
        if self.chance(0.2):
            extra["alpha"] = self.choice(0.5, 2.0, -1.0, 0.0)
        if self.chance(0.2):
            extra["beta"] = self.choice(0.5, 2.0, -1.0, 0.0)
        self.node("Gemm", inputs, transB=int(transposed), **extra)

    def matmul(self, x: str) -> None:
        *batch, width = self.shape(x)
        outs = int(self.choice(1, 2, 5, 8))
        if len(batch) > 2 and self.chance(0.1):
            y = self.node("MatMul", [x, self.weight((batch[1], width, outs), width)])
        else:
            y = self.node("MatMul", [x, self.weight((width, outs), width, 1)])
        if self.chance(0.6):
            bias = self.bias(outs)
            y = self.node("Add", [y, bias] if self.chance(0.7) else [bias, y])

    def _norm(self, x: str, channels: int) -> str:
        inputs = [
            x,
            self.vector(channels),
            self.vector(channels, low=-1.0, high=1.0),
            self.vector(channels, low=-1.0, high=1.0),
            self.vector(channels),
        ]
        return self.node("BatchNormalization", inputs, epsilon=self.choice(1e-5, 1e-3))

    def batch_norm(self, x: str) -> None:
        shape = self.shape(x)
        self._norm(x, shape[1])
        if self.chance(0.4):
            self.activate(self._pending[0][-1].output[0])

    def instance_norm(self, x: str) -> None:
        shape = self.shape(x)
        if len(shape) < 3:
            raise _Unsuitable
        self.node("InstanceNormalization", [x, self.vector(shape[1]), self.vector(shape[1])])

    def layer_norm(self, x: str) -> None:
        if self.opset < 17:
            raise _Unsuitable
        width = self.shape(x)[-1]
        self.node(
            "LayerNormalization",
            [x, self.vector(width), *([self.vector(width)] if self.chance(0.7) else [])],
            axis=-1,
        )

    def activate(self, x: str) -> None:
        simple = (
            "Relu",
            "Relu",
            "Relu",
            "LeakyRelu",
            "HardSigmoid",
            "Sigmoid",
            "Elu",
            "Tanh",
            "Softplus",
        )
        kind = self.choice(
            *simple, "Clip", "Clip", "PRelu", "HardSwish", "swish", "gelu", "Gelu", "hswish"
        )
        if kind == "Clip":
            low = (
                self.constant(np.float32(self.choice(0.0, 0.0, -1.0, 0.5)))
                if self.chance(0.8)
                else ""
            )
            high = (
                self.constant(np.float32(self.choice(6.0, 1.0, 2.0))) if self.chance(0.8) else ""
            )
            self.node("Clip", [x, low, high] if high else [x, low] if low else [x])
        elif kind == "PRelu":
            channels = self.values[x].shape[1] if x in self.values else 1
            rank = self.values[x].ndim - 2 if x in self.values else 0
            self.node("PRelu", [x, self.vector(*self.choice((1,), (channels, *[1] * rank)))])
        elif kind in ("HardSwish", "Gelu"):
            if self.opset < (14 if kind == "HardSwish" else 20):
                raise _Unsuitable
            self.node(kind, [x])
        elif kind == "swish":
            self.node("Mul", [x, self.node("Sigmoid", [x])])
        elif kind == "hswish":
            self.node("Mul", [x, self.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5)])
        elif kind == "gelu":
            e = self.node("Erf", [self.node("Div", [x, self.constant(np.float32(np.sqrt(2.0)))])])
            e = self.node("Add", [e, self.constant(np.float32(1.0))])
            self.node("Mul", [self.node("Mul", [x, e]), self.constant(np.float32(0.5))])
        elif kind == "HardSigmoid" and self.chance(0.5):
            self.node(
                "HardSigmoid",
                [x],
                alpha=self.choice(1 / 6, 0.2, 1.0),
                beta=self.choice(0.5, 0.1, 0.0),
            )
        else:
            self.node(kind, [x])

    def softmax(self, x: str) -> None:
        self.node("Softmax", [x], axis=self.choice(1, -1))

    def with_constant(self, x: str) -> None:
        shape = self.shape(x)
        kind = self.choice("Add", "Mul", "Sub", "Div")
        size = self.choice(
            (1,), (), (shape[1], *[1] * (len(shape) - 2)), shape[1:], (1, *shape[1:])
        )
        values = self.rng.uniform(0.3, 2.0, size) * self.choice(1.0, 1.0, 1e-3, 20.0)
        if kind in ("Add", "Mul") and self.chance(0.4):
            values = (
                -values if self.chance(0.5) else values * np.sign(self.rng.standard_normal(size))
            )
        c = self.constant(values.astype(np.float32))
        self.node(kind, [x, c] if self.chance(0.75) or kind == "Div" else [c, x])

    def residual(self, x: str) -> None:
        same = [n for n, v in self.values.items() if v.shape == self.values[x].shape]
        y = str(self.choice(*same))
        self.node(self.choice("Add", "Add", "Mul", "Sub", "Max", "Min"), [x, y])
        if self.chance(0.4):
            self.activate(self._pending[0][-1].output[0])

    def block(self, x: str) -> None:
        """A residual block with layers inside."""
        shape = self.shape(x)
        if len(shape) != 4:
            raise _Unsuitable
        channels, hidden = shape[1], int(self.choice(4, 8, 6))
        a = self.node(
            "Conv", [x, self.weight((hidden, channels, 1, 1), channels), self.bias(hidden)]
        )
        a = (
            self.node("Relu", [a])
            if self.chance(0.5)
            else self.node(
                "Clip", [a, self.constant(np.float32(0.0)), self.constant(np.float32(6.0))]
            )
        )
        a = self.node(
            "Conv",
            [a, self.weight((hidden, 1, 3, 3), 9), self.bias(hidden)],
            group=hidden,
            pads=[1] * 4,
        )
        a = self.node("Relu", [a])
        if self.chance(0.4):
            a = self._squeeze_excite(a, hidden)
        a = self.node("Conv", [a, self.weight((channels, hidden, 1, 1), hidden)])
        a = self.node("Add", [a, x] if self.chance(0.5) else [x, a])
        if self.chance(0.5):
            self.node("Relu", [a])

    def _squeeze_excite(self, a: str, channels: int) -> str:
        s = self.node("GlobalAveragePool", [a])
        s = self.node("Conv", [s, self.weight((4, channels, 1, 1), channels), self.bias(4)])
        s = self.node("Relu", [s])
        s = self.node("Conv", [s, self.weight((channels, 4, 1, 1), 4), self.bias(channels)])
        s = self.node(self.choice("Sigmoid", "HardSigmoid"), [s])
        return self.node("Mul", [a, s])

    def squeeze_excite(self, x: str) -> None:
        shape = self.shape(x)
        if len(shape) != 4:
            raise _Unsuitable
        self._squeeze_excite(x, shape[1])

    def concat(self, x: str) -> None:
        shape = self.shape(x)
        axis = int(self.choice(1, 1, len(shape) - 1))
        fits = [
            n
            for n, v in self.values.items()
            if v.ndim == len(shape)
            and all(
                a == b or i == axis for i, (a, b) in enumerate(zip(v.shape, shape, strict=True))
            )
        ]
        parts = [x] + [str(self.choice(*fits)) for _ in range(int(self.rng.integers(1, 3)))]
        self.node("Concat", parts, axis=axis if self.chance(0.8) else axis - len(shape))

    def split(self, x: str) -> None:
        channels = self.shape(x)[1]
        if channels % 2:
            raise _Unsuitable
        extra = {"num_outputs": 2} if self.opset >= 18 else {}
        a, b = self.node_of_several("Split", [x], 2, axis=1, **extra)
        if self.chance(0.4):
            self.node("Mul", [a, self.node("Sigmoid", [b])])

    def slice(self, x: str) -> None:
        shape = self.shape(x)
        axis = int(self.rng.integers(1, len(shape)))
        bounds = [np.array([v]) for v in (0, max(1, shape[axis] // 2), axis)]
        if self.chance(0.3):
            bounds = [np.array([v]) for v in (-1, -1000, axis, -1)]
        self.node("Slice", [x, *(self.constant(v) for v in bounds)])

    def reshaped(self, x: str, *sizes: int) -> str:
        return self.node("Reshape", [x, self.constant(np.array(sizes))])

    def reshape(self, x: str) -> None:
        shape = self.shape(x)
        ones = [axis for axis, size in enumerate(shape) if size == 1 and axis > 0]
        kind = self.choice(
            "flatten", "reshape", "fold", "squeeze", "unsqueeze", "transpose", "tokens"
        )
        if kind == "flatten":
            self.node("Flatten", [x])
        elif kind == "reshape":
            self.reshaped(x, 0, -1)
        elif kind == "fold":
            divisor = self.choice(2, 3, 4)
            if shape[1] % divisor:
                raise _Unsuitable
            self.reshaped(x, 0, divisor, shape[1] // divisor, -1)
        elif kind == "tokens":
            if len(shape) != 4:
                raise _Unsuitable
            flat = self.reshaped(x, 0, shape[1], -1)
            self.node("Transpose", [flat], perm=[0, 2, 1])
        elif kind == "transpose":
            order = [0, *(1 + self.rng.permutation(len(shape) - 1)).tolist()]
            self.node("Transpose", [x], perm=order)
        elif self.opset >= 13:
            axes = ones if kind == "squeeze" else [self.choice(1, 2)]
            self.node(kind.capitalize(), [x, self.constant(np.array(axes))])
        else:
            axes = ones if kind == "squeeze" else [self.choice(1, 2)]
            self.node(kind.capitalize(), [x], axes=axes)

    def shuffle(self, x: str) -> None:
        _, channels, *space = self.shape(x)
        if len(space) != 2 or channels % 2:
            raise _Unsuitable
        groups = self.choice(2, channels // 2)
        a = self.reshaped(x, self.choice(0, -1), groups, channels // groups, *space)
        a = self.node("Transpose", [a], perm=[0, 2, 1, 3, 4])
        a = self.reshaped(a, self.choice(0, -1), channels, *space)
        if self.chance(0.5):
            self.node(
                "Conv", [a, self.weight((channels, 1, 3, 3), 9)], group=channels, pads=[1] * 4
            )

    def pad(self, x: str) -> None:
        rank = len(self.shape(x))
        pads = [
            0,
            0,
            *self.rng.integers(0, 2, rank - 2).tolist(),
            0,
            0,
            *self.rng.integers(0, 2, rank - 2).tolist(),
        ]
        mode = self.choice("constant", "constant", "reflect", "edge")
        value = (
            [self.constant(np.float32(self.choice(0.0, 1.0, -3.0)))]
            if mode == "constant" and self.chance(0.6)
            else []
        )
        self.node("Pad", [x, self.constant(np.array(pads)), *value], mode=mode)

    def pool(self, x: str) -> None:
        space = self.shape(x)[2:]
        if not space:
            raise _Unsuitable
        kind = self.choice(
            "MaxPool",
            "AveragePool",
            "AveragePool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "ReduceMean",
        )
        if kind.startswith("Global"):
            self.node(kind, [x])
        elif kind == "ReduceMean":
            axes = list(range(2, 2 + len(space)))
            keep = int(self.rng.integers(2))
            if self.opset >= 18:
                self.node(kind, [x, self.constant(np.array(axes))], keepdims=keep)
            else:
                self.node(kind, [x], axes=axes, keepdims=keep)
        else:
            kernel = [int(self.rng.integers(1, 4)) for _ in space]
            extra: dict[str, Any] = {}
            if self.chance(0.5):
                extra["strides"] = [int(self.rng.integers(1, 3)) for _ in space]
            if self.chance(0.4):
                extra["pads"] = [min(int(self.rng.integers(0, 2)), k - 1) for k in kernel * 2]
            elif self.chance(0.15):
                extra["auto_pad"] = self.choice("SAME_UPPER", "SAME_LOWER", "VALID")
            if self.chance(0.2):
                extra["ceil_mode"] = 1
            if kind == "AveragePool" and self.chance(0.3):
                extra["count_include_pad"] = 1
            if (
                kind == "AveragePool"
                and self.opset >= 19
                and self.chance(0.2)
                or kind == "MaxPool"
                and self.chance(0.1)
            ):
                extra["dilations"] = [2 for _ in space]
            self.node(kind, [x], kernel_shape=kernel, **extra)

    def resize(self, x: str) -> None:
        shape = self.shape(x)
        if len(shape) != 4:
            raise _Unsuitable
        mode = self.choice("nearest", "nearest", "linear", "cubic")
        scales = self.constant(np.array([1.0, 1.0, 2.0, 2.0], np.float32))
        extra: dict[str, Any] = {}
        if mode == "nearest":
            extra = {
                "nearest_mode": self.choice("floor", "round_prefer_floor"),
                "coordinate_transformation_mode": self.choice("asymmetric", "half_pixel"),
            }
        self.node(
            "Resize", [x, "" if self.opset >= 13 else self.vector(0), scales], mode=mode, **extra
        )

    def attention(self, x: str) -> None:
        shape = self.shape(x)
        if len(shape) != 3:
            raise _Unsuitable
        width = shape[2]
        q, k, v = (self.node("MatMul", [x, self.weight((width, 4), width, 1)]) for _ in range(3))
        scores = self.node("MatMul", [q, self.node("Transpose", [k], perm=[0, 2, 1])])
        if self.chance(0.5):
            scores = self.node("Div", [scores, self.constant(np.float32(2.0))])
        self.node("MatMul", [self.node("Softmax", [scores], axis=-1), v])

    def nothing(self, x: str) -> None:
        self.node(self.choice("Identity", "Dropout"), [x])

    def branch(self, x: str) -> None:
        """An If whose condition is computed."""
        other = self.name("inner")
        more = self.name("inner")
        condition = self.node(
            "Greater", [self.node("ReduceMax", [x], keepdims=0), self.constant(np.float32(0.5))]
        )
        then = helper.make_graph(
            [helper.make_node("Relu", [x], [other])],
            "then",
            [],
            [helper.make_tensor_value_info(other, TensorProto.FLOAT, None)],
        )
        els = helper.make_graph(
            [helper.make_node("Neg", [x], [more])],
            "else",
            [],
            [helper.make_tensor_value_info(more, TensorProto.FLOAT, None)],
        )
        self.node("If", [condition], then_branch=then, else_branch=els)

    def unary(self, x: str) -> None:
        self.node(
            self.choice("Abs", "Neg", "Exp", "Sqrt", "Tanh"),
            [self.node("Sigmoid", [x]) if self.chance(0.5) else x],
        )

    def lrn(self, x: str) -> None:
        self.node("LRN", [x], size=3, alpha=self.choice(1e-4, 1.0), beta=0.75)


class _Unsuitable(Exception):
    """A step does not go with the tensor."""


_STEPS: Final = (
    *("activate", "activate", "activate", "activate", "attention", "batch_norm", "block"),
    *("branch", "concat", "concat", "concat", "instance_norm", "layer_norm", "lrn", "nothing"),
    *("pad", "pool", "pool", "pool", "pool", "pool", "reshape", "reshape", "reshape", "residual"),
    *("residual", "residual", "residual", "resize", "shuffle", "shuffle", "slice", "softmax"),
    *("split", "split", "squeeze_excite", "unary", "with_constant", "with_constant"),
)
