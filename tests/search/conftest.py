"""What tests of the search share, and Optuna's own conformance cases explained by pytest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xgboost


pytest.register_assert_rewrite("optuna.testing.pytest_samplers")


@pytest.fixture
def xgboost_34(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes any XGBoost predict nothing for no rows in the shape that 3.4 has for it."""
    predict = xgboost.Booster.predict

    def predict_as_34(self: xgboost.Booster, data: xgboost.DMatrix, **kwargs: Any) -> Any:
        return predict(self, data, **kwargs) if data.num_row() else np.empty((0, 0), np.float32)

    monkeypatch.setattr(xgboost.Booster, "predict", predict_as_34)
