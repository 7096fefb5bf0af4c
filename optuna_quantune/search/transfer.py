"""What earlier studies say about the configurations of a search space before any trial.

Values of different models are not on one scale, so everything is learned in standard units: within
a study, values are centred at their median and scaled by the spread of the better half. And a
prediction that is already there (the feature ``prior``) is the best guess on a new model; what
earlier studies add is what the prior misses. So each source has gradient-boosted trees on the
residual between its values and its prior, as a function of the knobs that it shares with this
space and of the shared features; their mean is added to this study's own prior. How much of it is
believed is learned, too: as much as the trees of the other sources explain of the residuals of a
source that they have not seen (leave one out). Whether any of it holds in *this* study is left to
its trials, see ``scoring.py``; ``benchmarks/sampler_transfer.py`` shows both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TYPE_CHECKING
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.prior import PriorLine
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.search.targets import center_and_spread
from optuna_quantune.search.targets import TargetTransform


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


@dataclass(frozen=True)
class _Source:
    """One source in the terms of this space.

    Attributes:
        has_prior: Whether its residuals are from a prior, or from zero.
        inputs: Columns for the trees, float32 of shape (n_trials, n_columns), NaN where unknown.
        residual: Standardised values less standardised prior, float64 of shape (n_trials,).
        trees: The trees that predict the residual.
    """

    has_prior: bool
    inputs: NDArray[np.float32]
    residual: Array
    trees: xgboost.Booster


class Transfer:
    """The sources' joint guess at the values of configurations, in standard units.

    Args:
        sources: Earlier studies.
        encoding: The search space.
        feature_names: Names of this study's features, the columns of ``features`` below.
        prior_column: Which of them is the prior, if there is one.
        sign: -1 where that is of an objective that is maximised, else 1.
    """

    def __init__(
        self,
        sources: Sequence[SourceStudy],
        encoding: SpaceEncoding,
        feature_names: Sequence[str],
        prior_column: int | None,
        sign: float = 1.0,
    ) -> None:
        self._signs = _signs(len(feature_names), prior_column, sign)
        self._sources = [
            _prepare(source, encoding, feature_names, prior_column)
            for source in sources
            if len(source.values) >= _MIN_TRIALS
        ]
        self._trust = _trust(self._sources)

    @property
    def is_empty(self) -> bool:
        """Whether no source had enough trials."""
        return not self._sources

    def guess(self, trees: NDArray[np.float32], features: Array, prior: Array | None) -> Array:
        """Guesses, to be minimised; they rise and fall with the values, their unit is their own.

        Args:
            trees: ``SpaceEncoding.tree_features`` of the configurations.
            features: Their features, standardised over the space, float64 of shape
                (n_configs, n_features), NaN where unknown.
            prior: Their prior in standard units, to be minimised, float64 of shape (n_configs,).

        Returns:
            float64 of shape (n_configs,).
        """
        features = features * self._signs
        inputs = np.concatenate([trees, features.astype(np.float32)], axis=1)
        result = self._trust * _mean_prediction(self._sources, inputs)
        if prior is not None:
            result = result + np.mean([source.has_prior for source in self._sources]) * prior
        return result


def standard_prior(prior: Array, reference: Array) -> Array:
    """A prior, to be minimised, in standard units of its spread over a reference; same shape."""
    return TargetTransform.fit(reference)(prior)


def _prepare(
    source: SourceStudy,
    encoding: SpaceEncoding,
    feature_names: Sequence[str],
    prior_column: int | None,
) -> _Source:
    sign = -1.0 if source.direction == "maximize" else 1.0
    values = sign * np.array(source.values, dtype=np.float64)
    codes = np.full((len(values), encoding.n_params), np.nan)
    for row, params in enumerate(source.params):
        for column, code in encoding.encode_columns(params).items():
            codes[row, column] = code
    features = np.array(
        [[named.get(name, np.nan) for name in feature_names] for named in source.features],
        dtype=np.float64,
    ).reshape(len(values), len(feature_names))
    features[~np.isfinite(features)] = np.nan
    features *= _signs(len(feature_names), prior_column, sign)
    center, spread = center_and_spread(features)
    inputs = np.concatenate(
        [encoding.tree_features(codes), ((features - center) / spread).astype(np.float32)], axis=1
    )
    residual, has_prior = _residual(
        values, None if prior_column is None else features[:, prior_column]
    )
    return _Source(has_prior, inputs, residual, _fit(inputs, residual))


def _signs(n_features: int, prior_column: int | None, sign: float) -> Array:
    """Factors that turn the prior, and no other feature, into one to be minimised."""
    signs = np.ones(n_features)
    if prior_column is not None:
        signs[prior_column] = sign
    return signs


def _residual(values: Array, prior: Array | None) -> tuple[Array, bool]:
    """Values in standard units, less the prior's part where there is one."""
    if prior is None or np.isnan(prior).any() or np.ptp(prior) == 0.0:
        return TargetTransform.fit(values)(values), False
    finite = np.isfinite(values)
    line = PriorLine.fit(prior, prior[finite], values[finite])
    transform = TargetTransform.fit(values, line.spread)
    return transform(values) - transform(line(prior)), True


def _fit(inputs: NDArray[np.float32], residual: Array) -> xgboost.Booster:
    import xgboost

    data = xgboost.DMatrix(inputs, residual, nthread=1)
    booster = xgboost.Booster(_TREE_PARAMS, [data])
    for iteration in range(_N_TREES):
        booster.update(data, iteration)
    return booster


def _mean_prediction(sources: Sequence[_Source], inputs: NDArray[np.float32]) -> Array:
    import xgboost

    data = xgboost.DMatrix(inputs, nthread=1)
    predictions = [source.trees.predict(data) for source in sources]
    return np.asarray(np.mean(predictions, axis=0), dtype=np.float64)


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
