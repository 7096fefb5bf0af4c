"""What must not be overlooked: goals that were missed, a slow model, a search cut short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from optuna_quantune.evaluation.latency import LatencyRatio
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import shares_left_in_float
from optuna_quantune.target import Target


# Share of the parameters from which it is said that they stay in float.
_WORTH_SAYING: Final = 0.005


def remark_lines(
    missed: Sequence[str],
    latency: LatencyRatio,
    target: Target,
    float_model: FloatModel,
    *,
    interrupted: bool,
) -> list[str]:
    """Sentences for a person who looks at nothing else.

    Args:
        missed: A clause for each bound that the chosen model does not keep.
        latency: Its latency beside the float model's.
        target: What it was built for.
        float_model: The float model.
        interrupted: Whether Ctrl-C ended the search.
    """
    lines = [f"Goal not met: {sentence}." for sentence in missed]
    if missed:
        lines.append("This is the best model so far; more trials or a larger space may do better.")
    if not target.measures_latency:
        lines.append(
            f"The latency is that of this machine, which says nothing about target "
            f"{target.name!r}; it decided nothing."
        )
    elif latency.low > 1:
        lines.append(
            f"SLOWER than the float model on this machine: {latency.ratio:.2f}x "
            f"[{latency.low:.2f}, {latency.high:.2f}]."
        )
    elif latency.high >= 1:
        lines.append(
            f"Not measurably faster than the float model on this machine: {latency.ratio:.2f}x "
            f"[{latency.low:.2f}, {latency.high:.2f}]."
        )
    lines += left_in_float_lines(float_model)
    if interrupted:
        lines.append("The search was interrupted; this is the best model so far.")
    return lines


def left_in_float_lines(model: FloatModel) -> list[str]:
    """What is said of a model with nodes that stay in float whatever is chosen."""
    shares = shares_left_in_float(model)
    total = sum(shares.values())
    if total < _WORTH_SAYING:
        return []
    operators = ", ".join(sorted(shares, key=lambda operator: -shares[operator]))
    return [f"{total:.0%} of the parameters stay in float: those of {operators}."]
