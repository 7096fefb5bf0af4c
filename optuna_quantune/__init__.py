"""Finds the int8 configuration of an ONNX model that loses the least accuracy, with Optuna."""

from __future__ import annotations

from importlib.metadata import version

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.dataset import ArrayFile
from optuna_quantune.evaluation.dataset import ArrayInputs
from optuna_quantune.evaluation.dataset import ImageFolder
from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.dataset import ReaderInputs
from optuna_quantune.evaluation.preprocessing import Preprocessing
from optuna_quantune.objective import QuantizationObjective
from optuna_quantune.objective import TrialFailure
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.search.pruner import RacingPruner
from optuna_quantune.search.sampler import QuantuneSampler
from optuna_quantune.search.sources import SourceStudy
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import Target
from optuna_quantune.tuning import ResultInterrupted
from optuna_quantune.tuning import tune
from optuna_quantune.tuning import TuningResult
from optuna_quantune.worker import work


__version__ = version("optuna-quantune")

__all__ = [
    "ArrayFile",
    "ArrayInputs",
    "ImageFolder",
    "InputError",
    "InputSource",
    "Preprocessing",
    "QuantizationConfig",
    "QuantizationObjective",
    "QuantuneSampler",
    "RacingPruner",
    "ReaderInputs",
    "ResultInterrupted",
    "SearchSpace",
    "SourceStudy",
    "Target",
    "TrialFailure",
    "TuningResult",
    "tune",
    "work",
]
