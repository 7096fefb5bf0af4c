"""What a device can run, how models for it are written, and whether it can be timed here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Final

import onnxruntime
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.runner import Provider
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.quantization.processor import is_arm
from optuna_quantune.quantization.representation import Representation
from optuna_quantune.space import SearchSpace


_CPU: Final = "CPUExecutionProvider"
# ONNX Runtime's processor kernels multiply 8-bit integers. With 16-bit activations a model is
# computed in float between its pairs and takes longer than the float model.
_BITS: Final = (8,)


@dataclass(frozen=True)
class Target:
    """A device that quantized models are made for.

    Attributes:
        name: What it is asked for by.
        representation: How it wants quantized tensors written.
        knobs: For some knobs the values that it can run; a knob left out may have any.
        providers: ONNX Runtime execution providers that models are run with, in order of
            preference: names, or pairs of a name and its options. Where the device's own is not
            part of this ONNX Runtime, its arithmetic is computed on the processor.
        measures_latency: Whether the latency of a model on this machine says something about the
            device. Where it does not, it must not decide anything.
    """

    name: str
    representation: Representation
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    providers: tuple[Provider, ...] = (_CPU,)
    measures_latency: bool = True

    @property
    def is_elsewhere(self) -> bool:
        """Whether this machine only computes the device's arithmetic in its place.

        What is particular to this machine's processor must not count then.
        """
        return not self.measures_latency

    def restrict(self, space: SearchSpace) -> SearchSpace:
        """A search space without what the device cannot run.

        A knob that `space` leaves out, and whose default the device cannot run, is added.

        Raises:
            InputError: If no value of a knob is left.
        """
        knobs: dict[str, BaseDistribution] = dict(space)
        for knob, allowed in self.knobs.items():
            distribution = knobs.get(knob)
            if distribution is None:
                if getattr(QuantizationConfig(), knob) not in allowed:
                    knobs[knob] = CategoricalDistribution(allowed)
                continue
            if isinstance(distribution, CategoricalDistribution):
                left = [choice for choice in distribution.choices if choice in allowed]
            else:
                left = [value for value in allowed if distribution._contains(value)]
            if not left:
                raise self._refusal(knob, "nothing that the search space holds")
            if not isinstance(distribution, CategoricalDistribution) or len(left) < len(
                distribution.choices
            ):
                knobs[knob] = CategoricalDistribution(left)
        return SearchSpace(knobs)

    def check(self, config: QuantizationConfig) -> None:
        """Refuses a configuration that the device cannot run.

        Raises:
            InputError: If a knob has a value that is not one of `knobs`.
        """
        for knob, allowed in self.knobs.items():
            value = getattr(config, knob)
            if value not in allowed:
                raise self._refusal(knob, f"not {value!r}")

    def check_latency(self) -> None:
        """Refuses a device whose latency cannot be measured on this machine.

        Raises:
            InputError: If it cannot.
        """
        if not self.measures_latency:
            raise InputError(
                f"latency: target {self.name!r} cannot be timed on this machine (execution "
                f"providers: {', '.join(onnxruntime.get_available_providers())}); bound the "
                "accuracy or the size instead"
            )

    def _refusal(self, knob: str, reason: str) -> InputError:
        allowed = ", ".join(repr(value) for value in self.knobs[knob])
        return InputError(f"knob {knob!r}: target {self.name!r} runs {allowed}, {reason}")


def _cpu() -> Target:
    # ONNX Runtime's x86-64 kernels multiply unsigned activations with signed weights; signed
    # activations take a path about three times slower there, and the direct one on Arm.
    if is_arm():
        representation = Representation(activations="int8", for_kernels=True)
    else:
        pairs = detect_vnni() is False
        representation = Representation(adds_in_pairs=pairs, for_kernels=True)
    return Target("cpu", representation, {"activation_bits": _BITS, "fusion": ("runtime",)})


def _arm64() -> Target:
    return Target(
        "arm64",
        Representation(activations="int8"),
        {"activation_bits": _BITS, "fusion": ("runtime",)},
        measures_latency=is_arm(),
    )


def _tensorrt() -> Target:
    # TensorRT's explicit quantization: int8 with zero point 0, weights within [-127, 127], biases
    # in float (DequantizeLinear takes no int32), no pairs between a layer and the Relu or the
    # residual Add that it is fused with.
    own = _available("TensorrtExecutionProvider")
    return Target(
        "tensorrt",
        Representation(activations="int8", narrow_weights=True, float_bias=True),
        {
            "scheme": ("symmetric", "symmetric_power2"),
            "activation_bits": (8,),
            "fusion": ("on",),
        },
        providers=(*own, *_available("CUDAExecutionProvider"), _CPU) if own else (_CPU,),
        measures_latency=bool(own),
    )


def _qnn() -> Target:
    # ONNX Runtime's `get_qnn_qdq_config`: uint8 activations, signed weights symmetric, one scale
    # for each channel for convolutions only.
    own = _available("QNNExecutionProvider")
    return Target(
        "qnn",
        Representation(symmetric_weights=True, per_channel=("Conv", "ConvTranspose")),
        {"fusion": ("runtime",)},
        providers=(*((name, {"backend_type": "htp"}) for name in own), _CPU),
        measures_latency=bool(own),
    )


def _vta() -> Target:
    # An integer-only accelerator: scales are shifts, and one of them serves a whole weight.
    return Target(
        "vta",
        Representation(activations="int8"),
        {
            "scheme": ("symmetric_power2",),
            "granularity": ("tensor",),
            "mixed_precision": ("none",),
            "float_layers": (0,),
            "activation_bits": (8,),
            "fusion": ("off", "on"),
        },
        measures_latency=False,
    )


_TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "cpu": _cpu,
    "arm64": _arm64,
    "tensorrt": _tensorrt,
    "qnn": _qnn,
    "vta": _vta,
}


def get_target(name: str) -> Target:
    """The target of that name, with what can be detected on this machine filled in.

    Args:
        name: ``cpu`` (this machine's processor), ``arm64``, ``tensorrt`` (NVIDIA GPUs), ``qnn``
            (Qualcomm NPUs) or ``vta`` (an integer-only accelerator).

    Raises:
        InputError: If there is no such target.
    """
    if name not in _TARGETS:
        raise InputError(f"target {name!r}: unknown; use one of {', '.join(_TARGETS)}")
    return _TARGETS[name]()


def _available(provider: str) -> tuple[str, ...]:
    """The execution provider if this ONNX Runtime has it, otherwise nothing."""
    return tuple(name for name in onnxruntime.get_available_providers() if name == provider)
