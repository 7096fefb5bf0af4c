"""The table of layers to leave in float says what the models that it counts have in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.report.sensitivity import float_layers_table
from optuna_quantune.space import SearchSpace


def test_every_row_leaves_in_float_what_the_built_model_does(
    toy_model: Path, toy_inputs: NDArray[np.float32]
) -> None:
    inputs = ArrayInputs(toy_inputs[:40])
    objective = QuantizationObjective(
        toy_model,
        calibration=inputs,
        evaluation=inputs,
        metric="sqnr_db",
        space=SearchSpace({"granularity": ["tensor", "channel"], "scheme": ["symmetric"]}),
        cache=None,
    )
    table = float_layers_table(objective)
    counts, names, predicted, latencies = (list(column.cells) for column in table.columns)
    assert counts == [str(number) for number in range(len(counts))]
    assert len(counts) > 2
    assert not names[0]
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
