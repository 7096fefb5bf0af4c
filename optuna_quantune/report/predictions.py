"""For the terminal: what is expected of configurations, before one of them is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Final

import optuna
from optuna.samplers import RandomSampler
from rich.table import Table

from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.report.trial_rows import knob_text
from optuna_quantune.space import SearchSpace


# Of larger spaces so many configurations are drawn: predicting one takes some milliseconds.
MOST_PREDICTED: Final = 2000
# More columns of knobs would be cut off.
_MOST_KNOB_COLUMNS: Final = 6
# Names of nodes in a row of a table.
_MOST_NAMES: Final = 5


@dataclass(frozen=True)
class Prediction:
    """What is expected of a configuration.

    Attributes:
        params: Its parameters in the objective's space.
        features: What `QuantizationObjective.features` says of it.
    """

    params: Mapping[str, Any]
    features: Mapping[str, float]


def predict(objective: QuantizationObjective) -> list[Prediction]:
    """The configurations of an objective's space, or many of a large one, least noise first."""
    asked = _params(objective.space)
    found = []
    for done, params in enumerate(asked, start=1):
        found.append(Prediction(params, objective.features(params)))
        objective.progress("predictions", done, len(asked))
    return sorted(found, key=lambda prediction: -prediction.features["predicted_sqnr_db"])


def _params(space: SearchSpace) -> list[dict[str, Any]]:
    if space.size is not None and space.size <= MOST_PREDICTED:
        return list(space.grid())
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    drawn = (study.ask(dict(space)).params for _ in range(MOST_PREDICTED))
    return list({str(params): params for params in drawn}.values())


def predictions_table(
    objective: QuantizationObjective, least_noise: Sequence[Prediction], *, shown: int
) -> Table:
    """The configurations that promise the least noise.

    Args:
        objective: What predicted it.
        least_noise: What `predict` gave.
        shown: How many of them to show.
    """
    title = "Least predicted noise, nothing run"
    if len(least_noise) != objective.space.size:
        title += f" (of {len(least_noise)} configurations drawn at random)"
    table = Table(title=title, title_justify="left")
    for name in ("predicted SQNR", "rounding", "clipping", "weights"):
        table.add_column(f"{name} dB", justify="right")
    apart = len(objective.space) <= _MOST_KNOB_COLUMNS
    for name in objective.space if apart else ("knobs",):
        table.add_column(name.replace("_", " "))
    for prediction in least_noise[:shown]:
        table.add_row(
            *(
                f"{prediction.features[f'{name}_sqnr_db']:.1f}"
                for name in ("predicted", "rounding", "clipping", "weights")
            ),
            *(
                [str(prediction.params[name]) for name in objective.space]
                if apart
                else [knob_text(prediction.params, objective.space)]
            ),
        )
    return table


def _listed(names: Sequence[str]) -> str:
    """Names with commas, the first ones of many."""
    if len(names) <= _MOST_NAMES + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"


def float_layers_table(
    objective: QuantizationObjective, least_noise: Sequence[Prediction]
) -> Table:
    """What each step of the knob ``float_layers`` leaves in float, and what it is expected to do.

    The other knobs are those of the configuration that promises the least noise.

    Args:
        objective: What predicted it.
        least_noise: What `predict` gave.
    """
    best = least_noise[0].params
    table = Table(title="Layers to leave in float, by the knob float_layers", title_justify="left")
    table.add_column("float_layers", justify="right")
    table.add_column("left in float, too", overflow="fold")
    table.add_column("predicted SQNR dB", justify="right")
    table.add_column("expected latency", justify="right")
    counted = ("mixed_precision", "float_layers")
    nodes = {node.name for node in objective.model.proto.graph.node}
    known: set[str] = set()
    for number in range(len(objective.float_order) + 1):
        params = {**best, "mixed_precision": "none", "float_layers": number}
        config = objective.space.config(params)
        names = objective.quantizer.float_layers(config)
        latency = objective.expected_latency(params)
        table.add_row(
            str(number),
            _listed([name for name in names if name in nodes - known]),
            f"{objective.features(params)['predicted_sqnr_db']:.1f}",
            "" if math.isnan(latency) else f"{latency:.2f}x",
        )
        known |= set(names)
    table.caption = (
        "The other knobs: "
        + knob_text(best, [name for name in best if name not in counted])
        + ". Latency over the float model's, estimated node by node."
    )
    table.caption_justify = "left"
    return table
