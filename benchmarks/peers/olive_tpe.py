"""Microsoft Olive: its TPE over what its static quantization pass calls searchable.

pip install torch==2.13.0  # a build for the processor alone is enough
pip install -r benchmarks/peers/requirements/olive_tpe.txt
python -m benchmarks.peers.olive_tpe TASK OUTPUT
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from olive.data.registry import Registry as DataRegistry
from olive.evaluator.metric_result import joint_metric_key
from olive.evaluator.metric_result import MetricResult
from olive.evaluator.olive_evaluator import OliveEvaluator
from olive.evaluator.registry import Registry as EvaluatorRegistry
from olive.workflows import run as run_workflow

from benchmarks.peers.peer_run import main
from benchmarks.peers.peer_run import PeerRun
from benchmarks.peers.task import Task


CALIBRATION_INPUTS = 128
MOST_TRIALS = 100
SEED = 0
_SEARCHABLE = "SEARCHABLE_VALUES"


class CalibrationInputs(torch.utils.data.Dataset):  # type: ignore[misc]  # untyped here
    """The task's calibration inputs, as pairs with a label that nothing reads."""

    def __init__(self, task: Task) -> None:
        self._name = task.input_name
        self._inputs = task.calibration[:CALIBRATION_INPUTS]

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
        return {self._name: torch.from_numpy(self._inputs[index])}, 0


def search(run: PeerRun) -> None:
    """Runs the workflow in a folder of its own."""

    def calibration_inputs(**_: Any) -> CalibrationInputs:
        return CalibrationInputs(run.task)

    class TaskEvaluator(OliveEvaluator):  # type: ignore[misc]  # untyped here
        """Olive's own evaluators read data sets of PyTorch; this one is the clock's."""

        def evaluate(self, model: Any, metrics: Any, *_: Any, **__: Any) -> MetricResult:
            accuracy = {"value": run.measure(model.model_path), "priority": 1}
            key = joint_metric_key(metrics[0].name, metrics[0].sub_types[0].name)
            return MetricResult.model_validate({key: {**accuracy, "higher_is_better": True}})

    DataRegistry.register_dataset("task_calibration")(calibration_inputs)
    EvaluatorRegistry.register("TaskEvaluator")(TaskEvaluator)
    with tempfile.TemporaryDirectory() as folder:
        run_workflow(workflow(run.task, Path(folder)))


def workflow(task: Task, folder: Path) -> dict[str, Any]:
    """The workflow as Olive reads it from JSON files."""
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    data = {
        "name": "calibration",
        "type": "DataContainer",
        "load_dataset_config": {"type": "task_calibration"},
        "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
    }
    # Custom metrics cannot be serialized in Olive 0.13; how this one is computed is not used.
    metric = {
        "name": "top1",
        "type": "accuracy",
        "backend": "torch_metrics",
        "data_config": "calibration",
        "sub_types": [
            {
                "name": "accuracy_score",
                "priority": 1,
                "metric_config": {"task": "multiclass", "num_classes": 2},
            }
        ],
    }
    quantization = {
        "type": "OnnxStaticQuantization",
        "data_config": "calibration",
        "calibrate_method": _SEARCHABLE,
        "per_channel": _SEARCHABLE,
        "activation_type": _SEARCHABLE,
        "precision": _SEARCHABLE,
        "quant_preprocess": _SEARCHABLE,
        "reduce_range": _SEARCHABLE,
    }
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(task.model)},
        "systems": {"local": system},
        "data_configs": [data],
        "evaluators": {"top1": {"type": "TaskEvaluator", "metrics": [metric]}},
        "passes": {"quantization": quantization},
        "search_strategy": {
            "execution_order": "joint",
            "sampler": "tpe",
            "sampler_config": {"max_samples": MOST_TRIALS, "seed": SEED},
        },
        "evaluator": "top1",
        "host": "local",
        "target": "local",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "output"),
        "log_severity_level": 2,
    }


if __name__ == "__main__":
    main("olive_tpe", ("olive-ai", "optuna", "onnxruntime", "torch"), search)
