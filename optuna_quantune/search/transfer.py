"""What earlier studies say about the configurations of a search space before any trial.

Values of different models are not on one scale, and collapsed configurations would dominate every
fit, so everything is learned on ranks within a study, as normal scores. A prediction that is
already there (the feature ``prior``) is the best guess on a new model; what earlier studies add is
what the prior misses. So each source has gradient-boosted trees on the residual between the scores
of its values and of its prior, as a function of the knobs that it shares with this space; their
mean is added to this study's own prior, and the order that results gets the prior's values, as
ranks do not say how far configurations are apart. Other features are what a prior is made of: the
trees see them only where there is none, as the few sources that there ever are fit them by chance.
How much of it all is believed is learned, too: as much as the trees of the other sources explain
of the residuals of a source that they have not seen (leave one out). Whether any of it holds in
*this* study is left to its trials, see ``scoring.py``; ``benchmarks/sampler_transfer.py`` shows
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from optuna_quantune.search.boosters import predictions
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.search.targets import center_and_spread
from optuna_quantune.search.targets import LARGEST


if TYPE_CHECKING:
    import xgboost

Array: TypeAlias = NDArray[np.float64]

# A source with fewer trials than this says nothing that would hold elsewhere.
_MIN_TRIALS = 4
_TREE_PARAMS: dict[str, Any] = {
    "max_depth": 3,
    "eta": 0.1,
    "lambda": 5.0,
    "min_child_weight": 4,
    "tree_method": "exact",
    "nthread": 1,
    "verbosity": 0,
    "base_score": 0.0,
}
_N_TREES = 60
# Trust in a single source, where there is no other to test it on.
_TRUST_IN_ONE = 0.5
# Share of the space from which it is read how values go on beyond its best configuration.
_NEAR_BEST = 0.1


@dataclass(frozen=True)
class _Source:
    """One source in the terms of this space.

    Attributes:
        has_prior: Whether its residuals are from a prior, or from zero.
        inputs: Columns for the trees, float32 of shape (n_trials, n_columns), NaN where unknown.
        residual: Normal scores of the values less those of the prior, float64 of shape
            (n_trials,).
        trees: The trees that predict the residual.
    """

    has_prior: bool
    inputs: NDArray[np.float32]
    residual: Array
    trees: xgboost.Booster


class Transfer:
    """The sources' joint guess at the ranks of configurations, as normal scores.

    Args:
        sources: Earlier studies.
        encoding: The search space.
        feature_names: Names of this study's features, the columns of ``features`` below.
        prior_column: Which of them is the prior, if there is one.
    """

    def __init__(
        self,
        sources: Sequence[SourceStudy],
        encoding: SpaceEncoding,
        feature_names: Sequence[str],
        prior_column: int | None,
    ) -> None:
        self._uses_features = prior_column is None
        prepared = [
            _prepare(source, encoding, feature_names, prior_column)
            for source in sources
            if len(source.values) >= _MIN_TRIALS
        ]
        self._sources = [source for source in prepared if source is not None]
        self._trust = _trust(self._sources)

    @property
    def is_empty(self) -> bool:
        """Whether no source says anything about this space."""
        return not self._sources

    def guess(self, trees: NDArray[np.float32], features: Array, prior: Array | None) -> Array:
        """Guesses, to be minimised; they rise and fall with the values.

        Args:
            trees: ``SpaceEncoding.tree_features`` of the configurations.
            features: Their features, standardised over the space, float64 of shape
                (n_configs, n_features), NaN where unknown.
            prior: Normal scores of their prior, to be minimised, float64 of shape (n_configs,).

        Returns:
            float64 of shape (n_configs,).
        """
        inputs = trees
        if self._uses_features:
            inputs = np.concatenate([trees, features.astype(np.float32)], axis=1)
        result = self._trust * _mean_prediction(self._sources, inputs)
        if prior is not None:
            # A source with a prior says what is to be added to it, another one all that it knows.
            share = np.mean([source.has_prior for source in self._sources])
            result = result + (1.0 - (1.0 - share) * self._trust) * prior
        return result


@dataclass(frozen=True)
class Scale:
    """From scores to values that are spread as those of a prior are.

    Scores tell which configuration is ahead, and not by how much: whether the worst ones are far
    from all others is what a prior knows. Over the space the configuration with the best score
    has the best value of the prior, the second the second, and so on; configurations that a prior
    cannot tell apart are spread up to its next values.

    Attributes:
        scores: Strictly increasing, float64 of shape (n_knots,), at least two.
        values: Those of the prior for them, likewise.
        slope: Units of the prior for one of the score, below the first knot.
    """

    scores: Array
    values: Array
    slope: float

    @classmethod
    def fit(cls, scores: Array, prior: Array) -> Scale | None:
        """Fits it to all configurations of a space.

        Args:
            scores: Their scores, to be minimised, float64 of shape (n_configs,), finite.
            prior: Their prior, likewise; in any order, as only the distributions count.

        Returns:
            The scale, or None if all scores or all values of the prior are the same.
        """
        values, group, sizes = np.unique(prior, return_inverse=True, return_counts=True)
        knots = np.bincount(np.sort(group), np.sort(scores)) / sizes
        apart = np.append(True, np.diff(knots) > 0.0)
        knots, values = knots[apart], values[apart]
        if len(knots) < 2:
            return None
        near = max(1, int(_NEAR_BEST * len(knots)))
        slope = float((values[near] - values[0]) / (knots[near] - knots[0]))
        return cls(knots, values, slope)

    def __call__(self, scores: Array) -> Array:
        """The values; float64 of any shape in and out."""
        below = np.minimum(scores - self.scores[0], 0.0)
        return np.asarray(np.interp(scores, self.scores, self.values) + self.slope * below)


def normal_scores(values: Array, reference: Array) -> Array:
    """Where values stand among others, as quantiles of the standard normal distribution.

    Args:
        values: float64 of shape (n_values,), infinities allowed.
        reference: What they are ranked among, float64 of shape (n_reference,), not empty.

    Returns:
        float64 of shape (n_values,); equal values have equal scores.
    """
    ordered = np.sort(reference)
    n = len(ordered)
    below, up_to = np.searchsorted(ordered, values), np.searchsorted(ordered, values, "right")
    shares = np.clip((below + up_to) / (2.0 * n), 0.5 / n, 1.0 - 0.5 / n)
    return np.asarray(ndtri(shares), dtype=np.float64)


def _prepare(
    source: SourceStudy,
    encoding: SpaceEncoding,
    feature_names: Sequence[str],
    prior_column: int | None,
) -> _Source | None:
    """The source in the terms of this space; None if it says nothing about it."""
    sign = -1.0 if source.direction == "maximize" else 1.0
    values = sign * np.array(source.values, dtype=np.float64)
    codes = encoding.encode_known(source.params)
    inputs = encoding.tree_features(codes)
    features = np.array(
        [[named.get(name, np.nan) for name in feature_names] for named in source.features],
        dtype=np.float64,
    ).reshape(len(values), len(feature_names))
    features[~np.isfinite(features)] = np.nan
    features = np.clip(features, -LARGEST, LARGEST)
    residual = normal_scores(values, values)
    shared = codes if prior_column is not None else np.concatenate([codes, features], axis=1)
    if np.isnan(shared).all() or np.isinf(values).all() or np.ptp(residual) == 0.0:
        return None
    has_prior = False
    if prior_column is None:
        center, spread = center_and_spread(features)
        standard = ((features - center) / spread).astype(np.float32)
        inputs = np.concatenate([inputs, standard], axis=1)
    else:
        prior = sign * features[:, prior_column]
        has_prior = bool(not np.isnan(prior).any() and np.ptp(prior) > 0.0)
        if has_prior:
            residual -= normal_scores(prior, prior)
    return _Source(has_prior, inputs, residual, _fit(inputs, residual))


def _fit(inputs: NDArray[np.float32], residual: Array) -> xgboost.Booster:
    import xgboost

    data = xgboost.DMatrix(inputs, residual, nthread=1)
    booster = xgboost.Booster(_TREE_PARAMS, [data])
    for iteration in range(_N_TREES):
        booster.update(data, iteration)
    return booster


def _mean_prediction(sources: Sequence[_Source], inputs: NDArray[np.float32]) -> Array:
    predicted = predictions((source.trees for source in sources), inputs)
    return np.asarray(np.mean(predicted, axis=0), dtype=np.float64)


def _trust(sources: Sequence[_Source]) -> float:
    """The share of the sources' predictions that holds on a source they have not seen.

    The least-squares factor on the predictions of all others, in [0, 1]; every source counts
    alike, however many trials it has.
    """
    if len(sources) < 2:
        return _TRUST_IN_ONE
    agreement = power = 0.0
    for left_out in sources:
        others = [source for source in sources if source is not left_out]
        predicted = _mean_prediction(others, left_out.inputs)
        agreement += float(np.mean(predicted * left_out.residual))
        power += float(np.mean(predicted**2))
    return float(np.clip(agreement / power, 0.0, 1.0)) if power > 0.0 else 0.0
