"""Sums that a mask has moved far away, as in the attention of transformers.

A mask adds -10,000 or -1e9 to the scores of what shall not count, and a softmax makes zeros of
them. In 8-bit steps from there to the others all of these are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx

from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.graph import GraphView
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.placement import MOVING_OPS


# From here on a step of 8 bits is larger than 1, by which a softmax has one input count e times as
# much as another.
_WIDEST: Final = 255.0


def masked(graph: onnx.GraphProto, statistics: CalibrationStatistics) -> Iterator[str]:
    """Tensors that nothing but a softmax makes sense of, as far apart as their values are.

    Args:
        graph: The float model.
        statistics: Of its activations. What has none is not rounded.

    Yields:
        What a Softmax reads, where it was computed. Not what a layer writes: that its products are
        rounded is no reason to compute them in float.
    """
    view = GraphView(graph)
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        tensor = node.input[0]
        while (writer := view.writers.get(tensor)) is not None and writer.op_type in MOVING_OPS:
            tensor = writer.input[0]
        if writer is None or writer.op_type in WEIGHTED_OPS or tensor not in statistics.segments:
            continue
        histogram = statistics.histogram(tensor, ALL_IMAGES)
        if histogram.maximum - histogram.minimum > _WIDEST:
            yield tensor
