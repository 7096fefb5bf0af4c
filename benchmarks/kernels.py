"""What each rewriting for ONNX Runtime's kernels gains, on a block that it is meant for.

    taskset -c 1 python -m benchmarks.kernels

Blocks of published shapes with random weights. Each is quantized once as it is and once rewritten
(`optuna_quantune/quantization/kernels.py`); the two and the float block are run in turns, with one
thread and one input. Results: `benchmarks/results/kernels/`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
from numpy.typing import NDArray
from onnx import helper
from onnx import numpy_helper
from onnx import TensorProto

from benchmarks import machine
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.representation import Representation


RESULTS = Path(__file__).parent / "results" / "kernels"
REPEATS = 400


@dataclass
class Block:
    """Nodes in a row, from ``x`` to the output of the last one.

    Attributes:
        what: The rewriting.
        shape: Of one input.
        in_float: Nodes that stay in float.
        scheme: How it is quantized.
    """

    what: str
    shape: tuple[int, int, int]
    in_float: tuple[str, ...] = ()
    scheme: Scheme = "asymmetric"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    last: str = "x"
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Appends a node that reads the last tensor, and others behind it."""
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, [self.last, *inputs], [name], name, **attributes)
        )
        self.last = name
        return name

    def conv(self, outputs: int, inputs: int, size: int = 1, *, group: int = 1) -> str:
        """Appends a convolution that keeps width and height."""
        shape = (outputs, inputs // group, size, size)
        scale = 1.0 / np.sqrt(np.prod(shape[1:]))
        weight = self.constant(self._rng.normal(0.0, scale, shape).astype(np.float32))
        return self.add("Conv", weight, group=group, pads=[size // 2] * 4)

    def constant(self, values: NDArray[np.generic]) -> str:
        """The name of a new constant."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def load(self) -> FloatModel:
        """The block as a model."""
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            self.what,
            [value("x", TensorProto.FLOAT, ["n", *self.shape])],
            [value(self.last, TensorProto.FLOAT, None)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "block.onnx"
            onnx.save(onnx.shape_inference.infer_shapes(model), path)
            return load_float_model(path)


def blocks() -> list[Block]:
    """A block for each rewriting."""
    return [
        _groups(),
        _narrow_groups("groups of 4", (256, 28, 28), 128, 4),
        _narrow_groups("groups of 8", (208, 14, 14), 208, 8),
        _channels(),
        _few_channels(),
        _joined(),
        _maxpool(),
        _average(),
        _cut_off(),
        _hard_swish(),
        _normalization(),
        _gelu(),
        _lrn(),
    ]


def _groups() -> Block:
    """A unit of ShuffleNet 0.5x with three groups."""
    block = Block("groups and shuffles", (240, 14, 14))
    block.conv(60, 240, group=3)
    block.add("Relu")
    block.add("Reshape", block.constant(np.array([0, 3, 20, 14, 14])))
    block.add("Transpose", perm=[0, 2, 1, 3, 4])
    block.add("Reshape", block.constant(np.array([-1, 60, 14, 14])))
    block.conv(60, 60, 3, group=60)
    block.conv(240, 60, group=3)
    return block


def _narrow_groups(what: str, shape: tuple[int, int, int], channels: int, width: int) -> Block:
    """A bottleneck of ResNeXt-50 (groups of 4), or of RegNetY-400MF (groups of 8)."""
    block = Block(what, shape)
    block.conv(channels, shape[0])
    block.add("Relu")
    block.conv(channels, channels, 3, group=channels // width)
    block.add("Relu")
    block.conv(shape[0], channels)
    return block


def _channels() -> Block:
    block = Block("depthwise channels", (24, 28, 28))
    block.conv(60, 24)
    block.add("Relu")
    block.conv(60, 60, 3, group=60)
    block.add("Relu")
    block.conv(24, 60)
    return block


def _few_channels() -> Block:
    """A module of GhostNet."""
    block = Block("few depthwise channels", (24, 56, 56))
    block.conv(12, 24)
    start = block.add("Relu")
    block.conv(12, 12, 3, group=12)
    block.add("Concat", start, axis=1)
    block.conv(24, 24)
    return block


def _joined() -> Block:
    """Nine residual units, as ResNet-20 has, behind a stem in float."""
    block = Block("channels last", (3, 32, 32), in_float=("conv_0",))
    block.conv(16, 3, 3)
    for _ in range(9):
        start = block.add("Relu")
        block.conv(16, 16, 3)
        block.add("Relu")
        block.conv(16, 16, 3)
        block.add("Add", start)
    return block


def _maxpool() -> Block:
    """A stem in float up to the pool."""
    block = Block("MaxPool in float", (64, 56, 56), in_float=("conv_0",))
    block.conv(64, 64)
    block.add("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    block.conv(64, 64)
    return block


def _average() -> Block:
    block = Block("AveragePool", (64, 28, 28))
    block.conv(64, 64)
    block.add("AveragePool", kernel_shape=[2, 2], strides=[2, 2])
    block.conv(64, 64)
    return block


def _cut_off() -> Block:
    """An inverted residual of MobileNetV2."""
    block = Block("Clip, scheme symmetric", (24, 56, 56), scheme="symmetric")
    ends = [block.constant(np.array(end, np.float32)) for end in (0.0, 6.0)]
    block.conv(144, 24)
    block.add("Clip", *ends)
    block.conv(144, 144, 3, group=144)
    block.add("Clip", *ends)
    block.conv(24, 144)
    return block


def _hard_swish() -> Block:
    """An inverted residual of MobileNetV3."""
    block = Block("HardSwish", (24, 28, 28))
    block.conv(96, 24)
    for convolution in ((96, 96, 3, 96), (24, 96, 1, 1)):
        source = block.last
        block.add("HardSigmoid", alpha=1.0 / 6.0, beta=0.5)
        block.add("Mul", source)
        outputs, inputs, size, group = convolution
        block.conv(outputs, inputs, size, group=group)
    return block


def _normalization() -> Block:
    """A unit of DenseNet-121."""
    block = Block("BatchNormalization", (224, 28, 28))
    start = block.conv(32, 224)
    block.last = "x"
    block.add("Concat", start, axis=1)
    rng = np.random.default_rng(2)
    shares = (rng.uniform(0.5, 2.0, 256).astype(np.float32) for _ in range(4))
    block.add("BatchNormalization", *(block.constant(share) for share in shares))
    block.add("Relu")
    block.conv(128, 256)
    return block


def _gelu() -> Block:
    """The two linear layers of ConvNeXt's second stage."""
    block = Block("GELU", (80, 28, 28))
    block.conv(320, 80)
    source = block.last
    block.add("Div", block.constant(np.array(2.0**0.5, np.float32)))
    block.add("Erf")
    block.add("Add", block.constant(np.array(1.0, np.float32)))
    block.add("Mul", source)
    block.add("Mul", block.constant(np.array(0.5, np.float32)))
    block.conv(80, 320)
    return block


def _lrn() -> Block:
    block = Block("LRN", (64, 28, 28))
    block.conv(64, 64)
    block.add("LRN", size=5)
    block.conv(64, 64)
    return block


def measure(block: Block) -> dict[str, object]:
    """Latencies and the largest difference that the rewriting makes."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((8, *block.shape)).astype(np.float32)
    model = block.load()
    placement = place(model)
    statistics = calibrate(
        model, ArrayInputs({"x": inputs}), required_activations(placement), sizes=("all",)
    )
    config = QuantizationConfig(scheme=block.scheme, float_layers=len(block.in_float))
    protos = [model.proto]
    for for_kernels in (False, True):
        representation = Representation(for_kernels=for_kernels)
        quantizer = Quantizer(model, statistics, representation=representation)
        quantizer.float_order = tuple((name,) for name in block.in_float)
        protos.append(quantizer.quantize(config).proto)
    float_session, plain, written = (
        make_session(p.SerializeToString(), spinning=False) for p in protos
    )
    feeds = [{"x": x[None]} for x in inputs]
    gain = latency_ratio(written, plain, feeds, repeats=REPEATS)
    whole = latency_ratio(written, float_session, feeds, repeats=REPEATS)
    (before,), (after,) = (session.run(None, {"x": inputs}) for session in (plain, written))
    return {
        "rewriting": block.what,
        "float, ms": round(whole.reference_median_ms, 3),
        "int8 as it is, ms": round(gain.reference_median_ms, 3),
        "rewritten, ms": round(gain.median_ms, 3),
        "rewritten / as it is": f"{gain.ratio:.2f} ({gain.low:.2f} to {gain.high:.2f})",
        "rewritten / float": f"{whole.ratio:.2f} ({whole.low:.2f} to {whole.high:.2f})",
        "difference, dB": _decibels(before, after),
    }


def _decibels(before: NDArray[np.float32], after: NDArray[np.float32]) -> str:
    """Power of the difference beside that of the output."""
    difference = float(np.sum(np.square(after - before)))
    if difference == 0.0:
        return "none"
    return f"{10.0 * np.log10(difference / float(np.sum(np.square(before)))):.0f}"


def main() -> None:
    rows: Sequence[dict[str, object]] = [measure(block) for block in blocks()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(RESULTS / "kernels.csv", index=False)
    table = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    text = f"""# Models written for ONNX Runtime's kernels

`taskset -c 1 python -m benchmarks.kernels`; {machine.as_markdown(machine.describe())}.

One block for each rewriting, random weights, one input and one thread; medians of {REPEATS}
runs in turns, ratios with 95 % intervals. `difference`: what the rewriting changes in the
output, beside the output's power.

{lines}
"""
    (RESULTS / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
