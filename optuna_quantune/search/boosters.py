"""What boosted trees say of configurations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray


if TYPE_CHECKING:
    import xgboost


def predictions(
    boosters: Iterable[xgboost.Booster], inputs: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """What each of some boosters predicts, float32 of shape (n_rows,).

    Args:
        boosters: Fitted to the same columns.
        inputs: The rows, NaN where unknown, shape (n_rows, n_columns).
    """
    import xgboost

    data = xgboost.DMatrix(inputs, nthread=1)
    # For no rows at all XGBoost 3.4 gives an array of shape (0, 0).
    return [booster.predict(data).reshape(len(inputs)) for booster in boosters]
