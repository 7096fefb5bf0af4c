"""AMD Quark `AutoSearchPro`: TPE over activations, calibration, granularity and equalization.

Its objective is the float model's metric minus the quantized one's, so it minimizes. Every trial
calibrates again. Its samplers take no seed.

    pip install torch==2.13.0  # a build for the processor alone is enough
    pip install -r benchmarks/peers/requirements/quark_autosearch.txt
    python -m benchmarks.peers.quark_autosearch TASK OUTPUT
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from quark.onnx.quantization.auto_search.auto_search_pro import AutoSearchPro

from benchmarks.peers.peer_run import main
from benchmarks.peers.peer_run import PeerRun


CALIBRATION_INPUTS = 128
N_TRIALS = 72  # the size of the space below
SEARCH_SPACE: dict[str, Any] = {
    "activation": ["Int8Spec", "UInt8Spec"],
    "activation_params": {
        "symmetric": [True, False],
        "calibration_method": ["MinMax", "Percentile", "LayerwisePercentile"],
        "only_if": "activation",
    },
    "weight": ["Int8Spec"],
    "weight_params": {
        "symmetric": [True],
        "quant_granularity": ["Tensor", "Channel"],
        "only_if": "weight",
    },
    "cle_algo": ["cle", None],
    "cle_params": {"cle_steps": [-1, 1], "only_if": {"cle_algo": "cle"}},
    "use_external_data_format": [False],
    "OptimizeModel": [True],
    "exclude": [None],
}


def search(run: PeerRun) -> None:
    """Searches in a folder of its own: every trial's model stays on disk."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        AutoSearchPro(
            {
                "search_space": SEARCH_SPACE,
                "n_trials": N_TRIALS,
                "n_jobs": 1,
                "output_dir": str(Path(folder) / "models"),
                "temp_dir": str(Path(folder) / "temporary"),
                "search_algo": "TPE",
                "search_evaluator": run.measure,
                "direction": "minimize",
                "base_framework": "onnx",
                "study_storage_db": "study.db",
                "load_study_if_exists": False,
                "study_name": "study",
                "model_input": str(run.task.model),
                "calib_data_reader": run.task.reader(CALIBRATION_INPUTS),
                "eval_data_reader": None,
                "two_stage_search": False,
                "plot_results": False,
            }
        ).run()


if __name__ == "__main__":
    main("quark_autosearch", ("amd-quark", "optuna", "onnxruntime", "torch"), search)
