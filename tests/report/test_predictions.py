"""Tables of what is expected: of the best configurations, and of layers left in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.distributions import IntDistribution

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.report import predictions
from optuna_quantune.report.predictions import float_layers_table
from optuna_quantune.report.predictions import predict
from optuna_quantune.report.predictions import predictions_table
from optuna_quantune.space import SearchSpace


SPACE = SearchSpace({"granularity": ["tensor", "channel"], "scheme": ["symmetric"]})

Make = Callable[[SearchSpace], QuantizationObjective]


@pytest.fixture
def make(toy_model: Path, toy_inputs: NDArray[np.float32]) -> Make:
    inputs = ArrayInputs(toy_inputs[:40])

    def make(space: SearchSpace) -> QuantizationObjective:
        return QuantizationObjective(
            toy_model,
            calibration=inputs,
            evaluation=inputs,
            metric="sqnr_db",
            space=space,
            cache=None,
        )

    return make


def test_every_row_leaves_in_float_what_the_built_model_does(
    make: Make,
) -> None:
    objective = make(SPACE)
    table = float_layers_table(objective, predict(objective))
    counts, names, predicted, latencies = (list(column.cells) for column in table.columns)
    assert counts == [str(number) for number in range(len(counts))]
    assert len(counts) > 2
    assert not names[0]
    nodes = {node.name for node in objective.model.proto.graph.node}
    assert {name for step in names[1:] for name in str(step).split(", ")} <= nodes
    steps = [float(number) for number in predicted]
    assert steps == sorted(steps)  # each step takes noise away
    assert steps[-1] > steps[0]
    assert all(latency.endswith("x") for latency in latencies)
    best = {"granularity": "channel", "scheme": "symmetric"}
    for number in (0, 1, len(counts) - 1):
        config = QuantizationConfig.from_dict({**best, "float_layers": number})
        proto = objective.quantize(config).proto
        quantized = {n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear"}
        in_float = {
            node.name
            for node in proto.graph.node
            if node.op_type in ("Conv", "Gemm") and node.input[1] not in quantized
        }
        listed = {name for step in names[: number + 1] for name in str(step).split(", ")}
        layers = {layer.name for layer in objective.model.layers}
        assert in_float == listed & layers
    assert "granularity channel" in str(table.caption)


def test_large_and_endless_spaces_are_drawn_from(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make(SPACE)
    whole = predict(objective)
    assert [prediction.params["granularity"] for prediction in whole] == ["channel", "tensor"]
    table = predictions_table(objective, whole, shown=1)
    assert table.row_count == 1
    assert table.title == "Least predicted noise, nothing run"
    monkeypatch.setattr(predictions, "MOST_PREDICTED", 30)
    steps = IntDistribution(0, 3)
    for knobs in ({"float_layers": steps}, dict(SearchSpace.preset("extended"))):
        objective = make(SearchSpace(knobs))
        drawn = predict(objective)
        assert 1 < len(drawn) <= 30
        assert len({str(prediction.params) for prediction in drawn}) == len(drawn)
        noise = [prediction.features["predicted_sqnr_db"] for prediction in drawn]
        assert noise == sorted(noise, reverse=True)
        table = predictions_table(objective, drawn, shown=5)
        assert f"of {len(drawn)} configurations drawn at random" in str(table.title)
