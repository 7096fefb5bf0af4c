"""What of this machine's processor decides how integers should be written.

x86-64 processors with VNNI (AVX-VNNI or AVX-512 VNNI; all with AMX have it, too) add products of
uint8 and int8 in int32. On older ones ONNX Runtime adds them in pairs in int16 first, where they
saturate.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import helper
from onnx import numpy_helper

from optuna_quantune.quantization.session import make_session


_ARM: Final = ("arm64", "aarch64")
_X86: Final = ("x86_64", "amd64", "x64")


def is_arm() -> bool:
    """Whether this machine has a 64-bit Arm processor."""
    return platform.machine().lower() in _ARM


def detect_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether uint8 x int8 products are exact on this x86-64 processor; None on any other.

    Linux lists the instructions; elsewhere ONNX Runtime is asked to multiply (`saturates`).
    """
    if platform.machine().lower() not in _X86:
        return None
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return not saturates()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return bool({"avx512_vnni", "avx_vnni"} & set(flags)) if flags else not saturates()


def saturates() -> bool:
    """Whether ONNX Runtime gets a product of the largest uint8 and int8 matrices wrong here."""
    rows, inner, columns = 8, 64, 32
    weight = numpy_helper.from_array(np.full((inner, columns), 127, dtype=np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["input", "weight"], ["product"])],
        "product",
        [helper.make_tensor_value_info("input", onnx.TensorProto.UINT8, [rows, inner])],
        [helper.make_tensor_value_info("product", onnx.TensorProto.INT32, [rows, columns])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    values = np.full((rows, inner), 255, dtype=np.uint8)
    product = make_session(model).run(None, {"input": values})[0]
    return bool(np.any(product != 255 * 127 * inner))
