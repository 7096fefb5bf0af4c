"""The ladder of a trial: estimates of its value from few inputs, then from more, then from all.

Each rung says the same thing, what the metric would be on all evaluation inputs, and how sure that
is. Races (`evaluation/racing.py`) climb it one margin after the other; this file says what a
margin is for each metric and turns what was run into measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.evaluation import racing
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import class_scores
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import margin_sqnr_db
from optuna_quantune.evaluation.metrics import margins
from optuna_quantune.evaluation.metrics import mean_sqnr_db
from optuna_quantune.evaluation.metrics import Measurement
from optuna_quantune.evaluation.metrics import rank_margins
from optuna_quantune.evaluation.metrics import top_k_correct


# The pilot is the same in every trial and every process: trials are compared on the same inputs.
_SEED = 0
# The k of the top-k metrics.
RANKS = {"top1": 1, "top5": 5}


@dataclass(frozen=True)
class Ladder:
    """What the float model's outputs say about a metric, before any trial.

    Attributes:
        metric: ``top1``, ``top5`` (with more than five classes) or ``agreement``.
        reference: The float model's outputs by name, of all inputs; the first gives the classes.
        labels: Class indices of shape (n,), or None.
    """

    metric: str
    reference: Mapping[str, NDArray[Any]]
    labels: NDArray[np.int64] | None

    @cached_property
    def scores(self) -> NDArray[Any]:
        """The float model's scores, shape (n, classes)."""
        return class_scores(next(iter(self.reference.values())))

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """What the outcome of each input bears before it flips, shape (n,).

        For top-1 and agreement the outcome is the predicted class, for top-5 whether the label is
        among the five highest scores. Where scores are not numbers it bears nothing.
        """
        if self.metric != "top5":
            found = margins(self.scores)
        else:
            found = np.abs(self.left(np.arange(len(self.scores)), self.scores))
        largest = np.max(found, where=np.isfinite(found), initial=0.0)
        return np.nan_to_num(found, nan=0.0, posinf=largest)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The inputs in the order in which every trial runs them, shape (n,)."""
        return racing.order(self.margins, seed=_SEED)

    @cached_property
    def float_right(self) -> Mapping[str, NDArray[np.bool_]]:
        """For each metric on which inputs the float model is right, shape (n,)."""
        return self.right(np.arange(len(self.scores)), self.scores)

    def left(self, indices: NDArray[np.int64], scores: NDArray[Any]) -> NDArray[np.float64]:
        """Margins that a model leaves of the float model's outcomes; not positive: flipped."""
        if self.metric != "top5":
            return rank_margins(scores, self.scores[indices].argmax(axis=1), k=1)
        assert self.labels is not None
        kept = np.where(self.float_right["top5"][indices], 1.0, -1.0)
        return kept * rank_margins(scores, self.labels[indices], k=RANKS["top5"])

    def right(
        self, indices: NDArray[np.int64], scores: NDArray[Any]
    ) -> dict[str, NDArray[np.bool_]]:
        """For each metric on which of some inputs a model is right."""
        right = {"agreement": agrees(scores, self.scores[indices])}
        if self.labels is not None:
            for name, k in RANKS.items():
                right[name] = top_k_correct(scores, self.labels[indices], k=k)
        return right


class Climb:
    """One model on its way up the ladder.

    Args:
        ladder: The ladder.
    """

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._race = racing.Race(ladder.margins)
        # For each metric; where an input was not run yet, what the float model did.
        self.right = {name: bits.copy() for name, bits in ladder.float_right.items()}
        self._indices: list[NDArray[np.int64]] = []
        self._outputs: list[Mapping[str, NDArray[Any]]] = []

    def run(
        self, outputs: Callable[[NDArray[np.int64]], Mapping[str, NDArray[Any]]]
    ) -> Iterator[Interval]:
        """Runs inputs, rung by rung, as long as the caller asks for the next.

        Args:
            outputs: Gives the model's outputs by name for the inputs of some indices.

        Yields:
            The metric with its 95 % interval, after each rung.
        """
        for start, stop in pairwise([0, *racing.looks(len(self._ladder.order))]):
            indices = self._ladder.order[start:stop]
            batch = outputs(indices)
            self._indices.append(indices)
            self._outputs.append(batch)
            scores = class_scores(next(iter(batch.values())))
            self._race.add(indices, self._ladder.left(indices, scores))
            for name, bits in self._ladder.right(indices, scores).items():
                self.right[name][indices] = bits
            yield self._estimate(self._ladder.metric)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Which inputs were run, shape (n,)."""
        return self._race.seen

    def is_certain(self, interval: Interval, precision: float | None) -> bool:
        """Whether no more inputs need to be run.

        Args:
            interval: What the last rung gave; a handful of inputs is not enough for certainty.
            precision: Half of the width that the interval may have; None asks for all inputs.
        """
        if self.seen.all():
            return True
        enough = precision is not None and racing.half_width(interval) <= precision
        return enough and int(self.seen.sum()) >= racing.PILOT

    def measurement(self) -> Measurement:
        """What is known of all metrics, as if all inputs had been run."""
        values = {name: self._estimate(name).estimate for name in self.right}
        weights = np.sqrt(racing.weights(self._ladder.margins, self.seen)[self._order])
        outputs = {name: _scaled(self._joined(name), weights) for name in self._ladder.reference}
        reference = {
            name: _scaled(values[self._order], weights)
            for name, values in self._ladder.reference.items()
        }
        first = next(iter(outputs))
        return Measurement(
            len(self.seen),
            values.get("top1"),
            values.get("top5"),
            values["agreement"],
            mean_sqnr_db(outputs, reference),
            margin_sqnr_db(outputs[first], reference[first]),
        )

    def outputs(self) -> dict[str, NDArray[Any]]:
        """The outputs by name of all inputs in their order; only when all were run."""
        back = np.argsort(self._order)
        return {name: self._joined(name)[back] for name in self._ladder.reference}

    def _estimate(self, metric: str) -> Interval:
        right, float_right = self.right[metric], self._ladder.float_right[metric]
        if (metric == "top5") == (self._ladder.metric == "top5"):
            return self._race.estimate(right, float_right)
        # The margins of this race say nothing about the other metric.
        weights = racing.weights(self._ladder.margins, self.seen)
        change = weights @ (right.astype(np.float64) - float_right)
        value = float(np.clip(float_right.mean() + change / len(right), 0.0, 1.0))
        return Interval(value, 0.0, 1.0)

    @property
    def _order(self) -> NDArray[np.int64]:
        return np.concatenate(self._indices)

    def _joined(self, name: str) -> NDArray[Any]:
        return np.concatenate([batch[name] for batch in self._outputs])


def _scaled(values: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    if values.dtype.kind != "f":  # does not count in the noise, and would if it became real
        return values
    scaled: NDArray[Any] = values * factors.reshape(-1, *[1] * (values.ndim - 1))
    return scaled
