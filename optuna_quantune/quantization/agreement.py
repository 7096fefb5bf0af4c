"""From noise at a classifier's output to the share of inputs whose prediction survives it.

An input keeps its class as long as the noise does not lift another logit above the largest one,
which depends on how far apart the float model's logits are. Clipping of the output is no noise:
whatever lies beyond the largest representable value becomes that value, and classes that were told
apart there tie.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr


# Noise levels that curves are computed at, as powers over that of the logits.
_LEVELS: Final = np.logspace(-7.0, 2.0, 28)
# Largest noisy logits besides the predicted class that are kept of each input.
_KEPT: Final = 16


class AgreementModel:
    """Expected agreement with the float model as a function of the noise at its output.

    The noise is Gaussian and independent between logits. All other logits are drawn with noise
    once for each level; the probability that the predicted one stays above the largest of them
    is then exact, so that curves are smooth. The draws are the same for all configurations.

    Args:
        logits: Outputs of the float model, shape (n, classes) with at least two classes. Inputs
            with a logit that is not a number are left out; an infinite one counts as the largest
            or the smallest of the others.
        seed: Seed of the draws.
    """

    def __init__(self, logits: NDArray[np.float32], *, seed: int = 0) -> None:
        known = logits[~np.isnan(logits).any(axis=1)].astype(np.float64)
        finite = known[np.isfinite(known)]
        self._logits = np.clip(known, finite.min(initial=0.0), finite.max(initial=0.0))
        self._seed = seed
        self._curves: dict[float, NDArray[np.float64]] = {}

    def expected(self, noise_to_signal: float, highest: float = np.inf) -> float:
        """Share of inputs whose class is expected to survive.

        Args:
            noise_to_signal: Mean squared noise of a logit over the mean square of the logits.
            highest: Largest logit that the quantized model can give. Logits beyond it tie, and
                the first of them wins, which is any of them equally often.
        """
        if highest not in self._curves:
            self._curves[highest] = self._curve(highest)
        level = np.log(max(noise_to_signal, _LEVELS[0]))
        return float(np.interp(level, np.log(_LEVELS), self._curves[highest]))

    def _curve(self, highest: float) -> NDArray[np.float64]:
        top = self._logits.max(axis=1)
        shares = []
        for deviation, others in zip(self._deviations, self._noisy_others, strict=True):
            saturated = np.count_nonzero(others >= highest, axis=1)
            ahead = ndtr((top - np.minimum(others[:, 0], highest)) / deviation)
            shares.append(np.mean(ahead / (1 + saturated)))
        return np.array(shares)

    @cached_property
    def _deviations(self) -> NDArray[np.float64]:
        power = np.mean(np.square(self._logits))
        return np.sqrt(np.maximum(_LEVELS * power, np.finfo(np.float64).tiny))

    @cached_property
    def _noisy_others(self) -> list[NDArray[np.float64]]:
        """For each level the largest noisy logits of other classes, descending, (n, kept)."""
        rng = np.random.default_rng(self._seed)
        noise = rng.standard_normal(self._logits.shape)
        others = self._logits.copy()
        others[np.arange(len(others)), others.argmax(axis=1)] = -np.inf
        kept = min(_KEPT, others.shape[1] - 1)
        largest = []
        for deviation in self._deviations:
            noisy = others + deviation * noise
            chosen = np.partition(noisy, -kept, axis=1)[:, -kept:]
            largest.append(np.sort(chosen, axis=1)[:, ::-1])
        return largest
