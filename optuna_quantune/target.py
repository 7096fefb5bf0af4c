"""What a device can run, and how models for it are written."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.quantizer import ActivationStorage


@dataclass(frozen=True)
class Target:
    """A device that quantized models are made for.

    Attributes:
        name: What it is asked for by.
        activation_storage: How 8-bit activations are written: ``uint8`` or ``int8``. The
            arithmetic is the same; which one has the fast kernels depends on the device.
        providers: ONNX Runtime execution providers that the model is measured with.
    """

    name: str
    activation_storage: ActivationStorage
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


def _cpu() -> Target:
    # ONNX Runtime's x86-64 kernels multiply unsigned activations with signed weights; signed
    # activations take a path about three times slower there, and the direct one on Arm.
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return Target(name="cpu", activation_storage="int8" if arm else "uint8")


_TARGETS: Final[dict[str, Callable[[], Target]]] = {"cpu": _cpu}


def get_target(name: str) -> Target:
    """The target of that name, with what can be detected on this machine filled in.

    Args:
        name: ``cpu``: this machine's processor.

    Raises:
        InputError: If there is no such target.
    """
    if name not in _TARGETS:
        raise InputError(f"target {name!r}: unknown; use one of {', '.join(_TARGETS)}")
    return _TARGETS[name]()
