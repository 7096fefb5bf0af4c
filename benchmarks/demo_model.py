"""Makes the model and the images of ``optuna-quantune demo``, from Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    pip install torch==2.13.0
    python -m benchmarks.demo_model --output optuna_quantune/demo

Trains a MobileNetV2 of 67,000 parameters, folds its batch norms, writes ``model.onnx``,
``images.npz`` and ``preprocessing.json``, and prints how much accuracy ONNX Runtime's own static
quantization costs. `optuna_quantune/demo/DATA.md` holds what it printed for the files that ship.

The model is as hard to quantize as the MobileNets that people deploy, and for the same reason. It
is trained with RMSProp, as they are (Sandler et al., *MobileNetV2: Inverted Residuals and Linear
Bottlenecks*, CVPR 2018, section 6.1), and some of its channels die: their ReLU never lets anything
through, so behind a depthwise convolution their variance is zero. Folding the batch norm divides
their weights by the square root of its epsilon, which leaves a few channels of a depthwise weight
hundreds of times larger than the others: one scale for the whole weight then rounds the others
away (Sheng et al., *A Quantization-Friendly Separable Convolution for MobileNets*, arXiv
1803.08607). ReLU stands in for ReLU6, so that activations have tails for clipping to cut.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization import quantize_static
from onnxruntime.quantization import QuantType


try:
    import torch
    from torch import nn
except ImportError:
    raise SystemExit(
        "benchmarks.demo_model trains with PyTorch: pip install torch==2.13.0"
    ) from None


if TYPE_CHECKING:
    from numpy.typing import NDArray

# Where Debian's and Ubuntu's package `dataset-fashion-mnist` puts the four files of the data set,
# and what they must be: the result depends on every byte.
DATA_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {
    "t10k-images-idx3-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
}
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# The mean and the standard deviation of the 60,000 training images, in units of a pixel (0..255).
PREPROCESSING: dict[str, Any] = {
    "resize_short_side": 28,
    "crop": 28,
    "interpolation": "bilinear",
    "mean": [72.94],
    "std": [90.02],
    "scale": 1.0,
    "channel_order": "L",
    "formula": "(x[0..255]*scale - mean)/std, channels in channel_order",
}
CALIBRATION_IMAGES = 512
EVALUATION_IMAGES = 2000

STEM_CHANNELS = 16
HEAD_CHANNELS = 128

EPOCHS = 3
IMAGES_PER_EPOCH = 40_000
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 0.0045
WARM_UP = 0.15  # the share of the steps in which the learning rate rises to its peak
WEIGHT_DECAY = 4e-5
SHIFT = 2  # pixels, the largest random shift of a training batch


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table of a MobileNetV2: inverted residuals, of which the first may stride."""

    expansion: int
    channels: int
    blocks: int
    stride: int


# Table 2 of the MobileNetV2 paper, cut down to images of 28 pixels.
STAGES = (Stage(1, 16, 1, 1), Stage(4, 24, 2, 1), Stage(4, 32, 2, 2), Stage(4, 48, 2, 1))


@dataclasses.dataclass(frozen=True)
class FashionMnist:
    """Images of shape (n, 28, 28), uint8, and labels of shape (n,), int64, of both splits."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load_fashion_mnist(folder: Path) -> FashionMnist:
    """Read the four files of the data set, after a check of their SHA-256."""
    content = {}
    for name, expected in SHA256.items():
        file = folder / f"{name}.gz"
        if not file.is_file():
            raise SystemExit(
                f"{file}: no such file; install Debian's package dataset-fashion-mnist, or name a "
                "folder with the four files of github.com/zalandoresearch/fashion-mnist by --data"
            )
        compressed = file.read_bytes()
        if hashlib.sha256(compressed).hexdigest() != expected:
            raise SystemExit(f"{file}: not the file of Fashion-MNIST, its SHA-256 differs")
        content[name] = gzip.decompress(compressed)

    def images(split: str) -> NDArray[np.uint8]:
        pixels = np.frombuffer(content[f"{split}-images-idx3-ubyte"], np.uint8, offset=16)
        return pixels.reshape(-1, 28, 28)

    def labels(split: str) -> NDArray[np.int64]:
        classes = np.frombuffer(content[f"{split}-labels-idx1-ubyte"], np.uint8, offset=8)
        return classes.astype(np.int64)

    return FashionMnist(images("train"), labels("train"), images("t10k"), labels("t10k"))


def normalize(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn images (n, 28, 28) into inputs (n, 1, 28, 28) as `PREPROCESSING` says."""
    scaled = images.astype(np.float32) * np.float32(PREPROCESSING["scale"])
    mean, std = np.float32(PREPROCESSING["mean"]), np.float32(PREPROCESSING["std"])
    inputs: NDArray[np.float32] = ((scaled - mean) / std)[:, np.newaxis]
    return inputs


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm, and a ReLU unless it is linear."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in,
            channels_out,
            kernel,
            stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(channels_out)
        self.linear = linear
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layers."""
        x = self.norm(self.conv(x))
        return x if self.linear else nn.functional.relu(x)

    def folded(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight and bias of the one convolution that does what the two layers do."""
        factor = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * factor[:, None, None, None]
        bias = self.norm.bias - self.norm.running_mean * factor
        return weight.detach().contiguous().numpy(), bias.detach().numpy()


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, filter each channel by itself, project linearly."""

    def __init__(self, channels_in: int, channels_out: int, *, expansion: int, stride: int):
        super().__init__()
        hidden = channels_in * expansion
        expand = [ConvNorm(channels_in, hidden)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            ConvNorm(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            ConvNorm(hidden, channels_out, linear=True),
        )
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block."""
        return x + self.layers(x) if self.residual else self.layers(x)


class DemoNetwork(nn.Module):
    """The demo's MobileNetV2: inputs (batch, 1, 28, 28) to logits (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, STEM_CHANNELS, kernel=3, stride=2)
        blocks: list[InvertedResidual] = []
        channels = STEM_CHANNELS
        for stage in STAGES:
            for index in range(stage.blocks):
                blocks.append(
                    InvertedResidual(
                        channels,
                        stage.channels,
                        expansion=stage.expansion,
                        stride=stage.stride if index == 0 else 1,
                    )
                )
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(channels, HEAD_CHANNELS)
        self.classifier = nn.Linear(HEAD_CHANNELS, len(CLASS_NAMES))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give the logits."""
        features = self.head(self.blocks(self.stem(x))).mean(dim=(2, 3))
        return self.classifier(features)


def train(images: NDArray[np.uint8], labels: NDArray[np.int64], *, seed: int) -> DemoNetwork:
    """Train on images (n, 28, 28) with flips and small shifts, and one cycle of learning rate."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # sums in another order give another model
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(seed)
    network = DemoNetwork().to(memory_format=torch.channels_last)
    optimizer = torch.optim.RMSprop(
        network.parameters(),
        alpha=0.9,
        momentum=0.9,
        eps=1e-3,
        weight_decay=WEIGHT_DECAY,
    )
    batches = IMAGES_PER_EPOCH // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LEARNING_RATE,
        total_steps=EPOCHS * batches,
        pct_start=WARM_UP,
        cycle_momentum=False,
    )
    print(f"training {sum(p.numel() for p in network.parameters()):,} parameters", flush=True)
    start = time.perf_counter()
    for epoch in range(EPOCHS):
        total_loss = 0.0
        order = rng.permutation(len(images))[: batches * BATCH_SIZE].reshape(batches, BATCH_SIZE)
        for rows in order:
            inputs = torch.from_numpy(normalize(augment(images[rows], rng)))
            loss = nn.functional.cross_entropy(network(inputs), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.item()
        print(
            f"epoch {epoch + 1}/{EPOCHS}: loss {total_loss / batches:.4f}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    network.eval()
    return network


def augment(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Mirror half of the images and shift the batch by up to `SHIFT` pixels, zeros moving in."""
    mirrored = rng.random(len(images)) < 0.5
    images = np.where(mirrored[:, None, None], images[:, :, ::-1], images)
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    down, right = rng.integers(0, 2 * SHIFT + 1, size=2)
    return padded[:, down : down + 28, right : right + 28]


class GraphBuilder:
    """Collects the nodes and initializers of the ONNX graph, each named after its layer."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def node(self, op_type: str, name: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node and give the name of its output."""
        output = "logits" if op_type == "Gemm" else f"{name}.output"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def weights(self, name: str, weight: NDArray[Any], bias: NDArray[Any]) -> list[str]:
        """Add the two initializers of a layer and give their names."""
        names = [f"{name}.weight", f"{name}.bias"]
        arrays = zip(names, (weight, bias), strict=True)
        self.initializers += [numpy_helper.from_array(array, name) for name, array in arrays]
        return names

    def conv(self, name: str, layer: ConvNorm, source: str) -> str:
        """Add a convolution with its batch norm folded, and its ReLU."""
        conv = layer.conv
        output = self.node(
            "Conv",
            name,
            [source, *self.weights(name, *layer.folded())],
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[conv.padding[0]] * 4,
            group=conv.groups,
        )
        return output if layer.linear else self.node("Relu", f"{name}.relu", [output])


def export(network: DemoNetwork) -> onnx.ModelProto:
    """Write the network as ONNX, node by node, for a graph that a person can read."""
    builder = GraphBuilder()
    tensor = builder.conv("stem", network.stem, "input")
    for index, block in enumerate(network.blocks):
        source = tensor
        names = ("expand", "depthwise", "project")[-len(block.layers) :]
        for name, layer in zip(names, block.layers, strict=True):
            tensor = builder.conv(f"block{index}.{name}", layer, tensor)
        if block.residual:
            tensor = builder.node("Add", f"block{index}.add", [source, tensor])
    tensor = builder.conv("head", network.head, tensor)
    tensor = builder.node("GlobalAveragePool", "pool", [tensor])
    tensor = builder.node("Flatten", "flatten", [tensor])
    weight = network.classifier.weight.detach().numpy()
    bias = network.classifier.bias.detach().numpy()
    builder.node(
        "Gemm", "classifier", [tensor, *builder.weights("classifier", weight, bias)], transB=1
    )
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        builder.nodes,
        "demo",
        [helper.make_tensor_value_info("input", float32, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", float32, ["batch", len(CLASS_NAMES)])],
        builder.initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # the one of opset 17
        producer_name="optuna-quantune",
        doc_string="MobileNetV2 for Fashion-MNIST, made by benchmarks/demo_model.py",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def weight_spread(model: onnx.ModelProto) -> float:
    """Largest ratio, over the depthwise weights, of the largest channel to the median channel."""
    spread = 0.0
    for initializer in model.graph.initializer:
        if initializer.name.endswith("depthwise.weight"):
            largest = np.abs(numpy_helper.to_array(initializer)).max(axis=(1, 2, 3))
            spread = max(spread, float(largest.max() / np.median(largest)))
    return spread


def predict(model: Path, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Run the model on images (n, 28, 28) and give the classes (n,) that it answers."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    answers = [
        session.run(["logits"], {"input": normalize(images[start : start + 250])})[0]
        for start in range(0, len(images), 250)
    ]
    classes: NDArray[np.int64] = np.concatenate(answers).argmax(axis=1)
    return classes


class ImageReader(CalibrationDataReader):
    """Gives images (n, 28, 28) to ONNX Runtime's calibration, 32 at a time."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._batches: Iterator[dict[str, NDArray[np.float32]]] = (
            {"input": normalize(images[start : start + 32])} for start in range(0, len(images), 32)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Give the next batch, None at the end."""
        return next(self._batches, None)


def quantization_damage(
    model: Path,
    calibration: NDArray[np.uint8],
    evaluation: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> Iterator[str]:
    """Quantize with ONNX Runtime's `quantize_static` and give the rows of a Markdown table."""
    schemes = {
        "asymmetric uint8": (QuantType.QUInt8, {"WeightSymmetric": False}),
        "symmetric int8": (QuantType.QInt8, {"ActivationSymmetric": True}),
    }
    # For every build it advises a preprocessing whose folding is done here already.
    logging.disable(logging.WARNING)
    reference = predict(model, evaluation)
    yield "| weights | activations | calibration images | top-1 | agreement with the float model |"
    yield "| --- | --- | --- | --- | --- |"
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "quantized.onnx"
        for per_channel in (False, True):
            for scheme, (activation_type, options) in schemes.items():
                for count in (1, len(calibration)):
                    quantize_static(
                        model,
                        quantized,
                        ImageReader(calibration[:count]),
                        per_channel=per_channel,
                        activation_type=activation_type,
                        weight_type=QuantType.QInt8,
                        extra_options=options,
                    )
                    answers = predict(quantized, evaluation)
                    top1, agreement = np.mean(answers == labels), np.mean(answers == reference)
                    granularity = "per channel" if per_channel else "per tensor"
                    yield f"| {granularity} | {scheme} | {count} | {top1:.1%} | {agreement:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model and images of the demo.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER, help="Fashion-MNIST's folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    data = load_fashion_mnist(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    # The data set is shuffled already, so its first images are a fair sample. The rest of the test
    # split is what the choices above were made on: the evaluation images had no say in them.
    calibration = data.train_images[:CALIBRATION_IMAGES]
    evaluation = data.test_images[:EVALUATION_IMAGES]
    labels = data.test_labels[:EVALUATION_IMAGES]
    np.savez_compressed(
        arguments.output / "images.npz",
        calibration=calibration,
        evaluation=evaluation,
        evaluation_labels=labels,
        class_names=np.array(CLASS_NAMES),
    )
    (arguments.output / "preprocessing.json").write_text(
        json.dumps(PREPROCESSING, indent=2) + "\n", "utf-8"
    )

    network = train(data.train_images, data.train_labels, seed=arguments.seed)
    model = export(network)
    path = arguments.output / "model.onnx"
    onnx.save(model, path)
    rest = predict(path, data.test_images[EVALUATION_IMAGES:])
    development = np.mean(rest == data.test_labels[EVALUATION_IMAGES:])
    held_out = np.mean(predict(path, evaluation) == labels)
    print(f"largest depthwise channel over the median one: {weight_spread(model):.0f}")
    print(f"float top-1 on the other {len(rest):,} test images: {development:.2%}")
    print(f"float top-1 on the {len(labels):,} evaluation images: {held_out:.2%}")
    for row in quantization_damage(path, calibration, evaluation, labels):
        print(row, flush=True)


if __name__ == "__main__":
    main()
