"""Each block of the kernels' benchmark shows the rewriting that it is named after."""

from __future__ import annotations

import pytest

from benchmarks import kernels
from benchmarks.kernels import Block


@pytest.mark.parametrize("block", kernels.blocks(), ids=lambda block: block.what)
def test_the_rewriting_changes_next_to_nothing(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "REPEATS", 6)
    row = kernels.measure(block)
    assert row["rewriting"] == block.what
    # Values halfway between two integers may become either.
    assert row["difference, dB"] == "none" or float(str(row["difference, dB"])) < -20.0
