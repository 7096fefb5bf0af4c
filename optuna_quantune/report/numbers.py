"""Numbers as a person reads them: the same in the terminal, in the report and in notes."""

from __future__ import annotations

import math


def figure(number: float) -> str:
    """Two decimals, but at least three digits: tiny models take 0.0124 ms and have 0.0521 MB."""
    zeros = -math.floor(math.log10(number)) - 1 if 0 < number < 1 else -1
    return f"{number:.{max(2, 3 + zeros)}f}"


def short(number: float) -> str:
    """Accuracies and ratios with four decimals, bytes without, errors with four digits."""
    if 0 < abs(number) < 0.01:
        return f"{number:.4g}"
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:,.0f}"


def optional(number: float | None, style: str) -> str:
    """A number in a format of its own, and nothing where there is none."""
    return "" if number is None else f"{number:{style}}"


def times(ratio: float, low: float | None = None, high: float | None = None) -> str:
    """A ratio to the float model, with its interval if there is one."""
    if low is None or high is None:
        return f"{ratio:.2f}x"
    return f"{ratio:.2f}x [{low:.2f}, {high:.2f}]"


def points(low: float, high: float) -> str:
    """The interval of a difference of two shares, in points (hundredths)."""
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"
