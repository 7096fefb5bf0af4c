"""For the terminal: which layers are worth leaving in float, before anything is built."""

from __future__ import annotations

import math

from rich.table import Table

from optuna_quantune.objective import QuantizationObjective


def float_layers_table(objective: QuantizationObjective) -> Table:
    """What each step of the knob ``float_layers`` leaves in float, and what it is expected to do.

    The other knobs are those of the configuration of the objective's space that promises the least
    noise.
    """
    grid = objective.space.grid()
    best = max(grid, key=lambda params: objective.features(params)["predicted_sqnr_db"])
    table = Table(title="Layers to leave in float, by the knob float_layers", title_justify="left")
    table.add_column("float_layers", justify="right")
    table.add_column("left in float, too", overflow="fold")
    table.add_column("predicted SQNR dB", justify="right")
    table.add_column("expected latency", justify="right")
    known: set[str] = set()
    for number in range(len(objective.quantizer.float_order or ()) + 1):
        params = {**best, "mixed_precision": "none", "float_layers": number}
        config = objective.space.config(params)
        names = objective.quantizer.float_layers(config)
        latency = objective.expected_latency(params)
        table.add_row(
            str(number),
            ", ".join(name for name in names if name not in known),
            f"{objective.features(params)['predicted_sqnr_db']:.1f}",
            "" if math.isnan(latency) else f"{latency:.2f}x",
        )
        known |= set(names)
    table.caption = (
        "The other knobs: "
        + ", ".join(f"{k} {v}" for k, v in best.items() if k != "mixed_precision")
        + ". Latency over the float model's, estimated node by node."
    )
    table.caption_justify = "left"
    return table
