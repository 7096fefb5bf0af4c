"""How clipping is spread over the inputs, and what that leaves of its power.

A range that a few inputs exceed by far takes nothing away from the others: on ResNet-20 with
ranges of least divergence, one of 512 inputs has a third of all that is cut off. The mean power
over the inputs, which is what the signal-to-noise ratio is made of, is that of these few. Those
whose prediction changes are many more where the same power is spread evenly.

While noise is small, the inputs that it flips are those whose margin is within reach, and the
reach is a standard deviation. So the flips of all inputs grow with the mean of their standard
deviations, and as much as an even power does whose root is that mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def shares_of_inputs(
    extremes: NDArray[np.float32], low: float, high: float
) -> NDArray[np.float64]:
    """What a range cuts off of each input at either end, over the mean of all inputs.

    The values of an input beyond the range are taken as evenly spread up to its largest one and
    as dense in one input as in another: their squared distances add up to the cube of its.

    Args:
        extremes: The smallest and the largest value of each input, shape (inputs, 2).
        low: Lower end of the range.
        high: Upper end of the range.

    Returns:
        Shape (inputs, 2): below the range and above it; all 1 where no input is known to exceed
        that end.
    """
    ends = np.array([-low, high])
    beyond = np.maximum(extremes * np.array([-1.0, 1.0]) - ends, 0.0) ** 3
    mean = beyond.mean(axis=0) if len(beyond) else np.zeros(2)
    return np.where(mean > 0.0, beyond / np.where(mean > 0.0, mean, 1.0), 1.0)


def as_if_even(even: float, uneven: NDArray[np.float64]) -> float:
    """The even power that flips as many inputs as an even and an uneven one together.

    Args:
        even: The power that all inputs have.
        uneven: What each has besides, shape (inputs,); of no inputs it is nothing.
    """
    if len(uneven) == 0:
        return even
    return float(np.mean(np.sqrt(even + uneven))) ** 2
