"""What a finished int8 model is worth on a task, whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.task import Task
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.runner import make_session


def describe(task: Task, model: Path) -> dict[str, Any]:
    """Measures a model on the inputs that it was not chosen by.

    Returns:
        ``top1_held_out`` and ``agreement_held_out`` (with the float model), ``difference`` of
        top-1 accuracy to float with the ends of its paired 95 % interval, ``latency_ratio`` over
        float at batch 1, ``size_ratio`` of the files.
    """
    labels = task.labels[task.held_out]
    reference = task.outputs(task.model, task.held_out).argmax(axis=1)
    predicted = task.outputs(model, task.held_out).argmax(axis=1)
    difference = paired_difference_interval(predicted == labels, reference == labels)
    sessions = [make_session(path, threads=None) for path in (model, task.model)]
    feeds = [{sessions[0].get_inputs()[0].name: task.evaluation[:1]}]
    return {
        "top1_held_out": float((predicted == labels).mean()),
        "top1_float_held_out": float((reference == labels).mean()),
        "agreement_held_out": float((predicted == reference).mean()),
        "difference": [difference.estimate, difference.low, difference.high],
        "latency_ratio": latency_ratio(sessions[0], sessions[1], feeds).ratio,
        "size_ratio": model.stat().st_size / task.model.stat().st_size,
    }
