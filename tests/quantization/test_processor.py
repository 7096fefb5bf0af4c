from __future__ import annotations

import platform
from pathlib import Path

import pytest

from optuna_quantune.quantization import processor
from optuna_quantune.quantization.processor import detect_vnni
from optuna_quantune.quantization.processor import saturates


def test_vnni_is_read_from_the_flags_of_an_x86_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    for text, expected in (
        ("flags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2\n", False),
    ):
        cpuinfo.write_text(text)
        assert detect_vnni(cpuinfo) is expected


@pytest.mark.parametrize("wrong", [False, True])
def test_without_flags_onnx_runtime_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(processor, "saturates", lambda: wrong)
    cpuinfo = tmp_path / "cpuinfo"
    assert detect_vnni(cpuinfo) is not wrong
    cpuinfo.write_text("processor : 0\n")
    assert detect_vnni(cpuinfo) is not wrong


def test_vnni_is_a_matter_of_x86_processors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert detect_vnni() is None
    assert processor.is_arm()


@pytest.mark.skipif(detect_vnni() is None, reason="the processor is not an x86-64 one")
def test_the_flags_and_the_multiplication_agree() -> None:
    assert saturates() is not detect_vnni()
