"""Builds the configurations of a search and predicts their noise, from one calibration for all."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Final

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution

from optuna_quantune.evaluation.dataset import InputSource
from optuna_quantune.evaluation.evaluator import Progress
from optuna_quantune.quantization.bias_correction import BiasCorrection
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.calibration import CalibrationStatistics
from optuna_quantune.quantization.calibration import NotFiniteError
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.equalization import equalize
from optuna_quantune.quantization.fusion import separate
from optuna_quantune.quantization.layer_inputs import input_moments
from optuna_quantune.quantization.layer_inputs import Moments
from optuna_quantune.quantization.masks import masked
from optuna_quantune.quantization.model import FloatModel
from optuna_quantune.quantization.model import WEIGHTED_OPS
from optuna_quantune.quantization.noise import NoiseModel
from optuna_quantune.quantization.noise import NoisePrediction
from optuna_quantune.quantization.placed_graph import PlacedGraph
from optuna_quantune.quantization.placement import keep_float
from optuna_quantune.quantization.placement import nodes_around
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.placement import Placement
from optuna_quantune.quantization.probe import probe
from optuna_quantune.quantization.probe import PROBE_INPUTS
from optuna_quantune.quantization.quantizer import QuantizedModel
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.sensitivity import float_order
from optuna_quantune.quantization.weight_rounding import WeightRounding
from optuna_quantune.space import SearchSpace
from optuna_quantune.target import Target


# Names that a warning lists.
_NAMES_SHOWN: Final = 4

_logger = logging.getLogger(__name__)


class Builder:
    """One float model with all that its configurations are built and predicted from.

    What that takes (equalization, calibration, the probe for noise) is done on first use, once for
    each value of the knob ``equalization``: it changes the float model and with it everything that
    is measured on it. Threads can share one.

    Args:
        model: The float model.
        calibration: Inputs that activation ranges are taken from, bound to the model's.
        space: The search space: which calibration sizes there are, and whether fusion is a knob.
        target: What the models are for.
        takes_batches: Tells whether a model whose batch axis is free takes several inputs at once.
        cache: Folder where calibration statistics are kept for the next run; None keeps nothing.
        progress: Called with the stage, the items done and the items in all.
    """

    def __init__(
        self,
        model: FloatModel,
        calibration: InputSource,
        *,
        space: SearchSpace,
        target: Target,
        takes_batches: Callable[[], bool],
        cache: Path | None,
        progress: Progress,
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._space = space
        self._target = target
        self._takes_batches = takes_batches
        self._cache = cache
        self._progress = progress
        # Placements and ranges are shared between threads.
        self._lock = threading.RLock()
        self._quantizers: dict[bool, Quantizer] = {}
        self._noise_models: dict[bool, NoiseModel] = {}
        self._graphs: dict[bool, PlacedGraph] = {}
        # Activations that the user was told of.
        self._masked: set[str] = set()

    def prepare(self) -> None:
        """Does what all configurations of the space share."""
        for equalized in self._choices("equalization", default=False):
            self._noise(equalized=equalized)

    def quantize(self, config: QuantizationConfig) -> QuantizedModel:
        """Builds the int8 model of a configuration.

        Raises:
            InputError: If the target cannot run it.
        """
        self._target.check(config)
        with self._lock:
            return self._quantizer_for(config).quantize(config)

    def predict(self, config: QuantizationConfig) -> NoisePrediction:
        """The noise of a configuration, before it is built."""
        with self._lock:
            self._quantizer_for(config)  # what the noise model asks for float layers
            return self._noise(equalized=config.equalization).predict(config)

    def predict_latency(self, config: QuantizationConfig) -> float:
        """About how long a configuration takes beside the float model, before it is built.

        NaN for a target that does not run on a processor.
        """
        if not self._target.representation.for_kernels:
            return math.nan
        with self._lock:
            chosen = frozenset(self._quantizer_for(config).float_layers(config))
            graph = self.placed_graph(equalized=config.equalization)
            return graph.latency_ratio(chosen, activation_bits=config.activation_bits)

    def predict_size(self, config: QuantizationConfig) -> float:
        """About how many bytes the file of a configuration has, before it is built."""
        with self._lock:
            quantizer = self._quantizer_for(config)
            placement = quantizer.placement(quantizer.float_layers(config), config.fusion)
            stored = {site.tensor for site in placement.constants if site.kind != "bias"}
            # A byte for each value instead of four.
            size: int = self._model.proto.ByteSize()
            return size - 3 * sum(self._values[name] for name in stored)

    def quantizer(self, *, equalized: bool) -> Quantizer:
        """Builds configurations with or without equalization; the first use calibrates."""
        with self._lock:
            if equalized not in self._quantizers:
                self._quantizers[equalized] = self._make_quantizer(equalized=equalized)
            return self._quantizers[equalized]

    def float_order(self, *, equalized: bool) -> Sequence[tuple[str, ...]]:
        """What the knob ``float_layers`` counts (`sensitivity.float_order`)."""
        with self._lock:
            quantizer = self.quantizer(equalized=equalized)
            if quantizer.float_order is None:
                quantizer.float_order = float_order(self.placed_graph(equalized=equalized))
            return quantizer.float_order

    def placed_graph(self, *, equalized: bool) -> PlacedGraph:
        """Noise and time of the nodes and tensors, on which the order of float layers rests."""
        with self._lock:
            if equalized not in self._graphs:
                quantizer = self.quantizer(equalized=equalized)
                whole = QuantizationConfig(bias_correction=True, equalization=equalized)
                self._graphs[equalized] = PlacedGraph.of(
                    quantizer.model,
                    quantizer.placement(()),
                    self._noise(equalized=equalized).predict(whole),
                    in_pairs=quantizer.representation.adds_in_pairs,
                )
            return self._graphs[equalized]

    @cached_property
    def _values(self) -> dict[str, int]:
        """The number of values of each constant."""
        return {t.name: math.prod(t.dims) for t in self._model.proto.graph.initializer}

    @cached_property
    def _prepared(self) -> FloatModel:
        return self._model if self._takes_batches() else self._model.one_at_a_time()

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        """Of the model without equalization; the other's follow from them."""
        return input_moments(
            self._prepared,
            self._calibration,
            progress=lambda done, total: self._progress("layer inputs", done, total),
        )

    def _make_quantizer(self, *, equalized: bool) -> Quantizer:
        model = self._prepared
        factors: Mapping[str, NDArray[np.float64]] = {}
        if equalized:
            other = equalize(model, self._calibration)
            model, factors = other.model, other.read
        placement, statistics = self._calibrated(model)
        return Quantizer(
            model,
            statistics,
            representation=self._target.representation,
            bias_correction=BiasCorrection(model, self._calibration),
            weight_rounding=WeightRounding(lambda: self._moments, factors),
            equalized=equalized,
            placement=placement,
        )

    def _calibrated(self, model: FloatModel) -> tuple[Placement, CalibrationStatistics]:
        """Where the pairs of a model stand, and the statistics of what they round.

        What is infinite, as behind a mask, has none: the nodes around it are kept in float, and so
        are those around what a mask has moved as far that a step of integers decides a softmax.
        """
        placement = place(model)
        default = QuantizationConfig().calibration_images
        first: NotFiniteError | None = None
        while True:
            placements = [placement]
            if "off" in self._choices("fusion", default="runtime"):
                placements.append(separate(placement, model.proto.graph))
            try:
                statistics = calibrate(
                    model,
                    self._calibration,
                    required_activations(*placements),
                    sizes=[default, *self._choices("calibration_images", default=default)],
                    cache=self._cache,
                    progress=lambda done, total: self._progress("calibration", done, total),
                )
            except NotFiniteError as error:
                first = first or error
                around = _around(model, error.tensors)
                kept = _always_kept(placement, model, around)
                unchanged = len(kept.activations) == len(placement.activations)
                if wrong := _without_excuse(model, error):
                    raise NotFiniteError(wrong) from None
                if unchanged:
                    raise first from None
                self._warn_of_mask(error.tensors, "infinite, or nearly so,", around)
                placement = kept
                continue
            if tensors := list(masked(model.proto.graph, statistics)):
                around = _around(model, tensors)
                self._warn_of_mask(tensors, "far apart", around)
                placement = _always_kept(placement, model, around)
            return placement, statistics

    def _warn_of_mask(self, tensors: Sequence[str], what: str, around: Sequence[str]) -> None:
        if not self._masked.issuperset(tensors):
            _logger.warning(
                f"Values of {_listed(tensors)} are {what} for some calibration input, as behind a "
                f"mask: {_listed(around)} stay in float."
            )
            self._masked.update(tensors)

    def _noise(self, *, equalized: bool) -> NoiseModel:
        with self._lock:
            if equalized not in self._noise_models:
                quantizer = self.quantizer(equalized=equalized)
                # The last ones: the first decide the ranges of small calibration sets.
                last = np.arange(len(self._calibration))[::-1][:PROBE_INPUTS]
                gains = probe(
                    quantizer,
                    self._calibration.batches(1, last),
                    progress=lambda done, total: self._progress("probe", done, total),
                )
                self._noise_models[equalized] = NoiseModel(quantizer, gains)
            return self._noise_models[equalized]

    def _quantizer_for(self, config: QuantizationConfig) -> Quantizer:
        """The quantizer of a configuration, with the order of float layers if that counts."""
        if config.float_layers:
            self.float_order(equalized=config.equalization)
        return self.quantizer(equalized=config.equalization)

    def _choices(self, knob: str, *, default: Any) -> tuple[Any, ...]:
        """The values that a knob can have in the space."""
        distribution = self._space.get(knob)
        if isinstance(distribution, CategoricalDistribution):
            return distribution.choices
        return (default,)


def _around(model: FloatModel, tensors: Sequence[str]) -> list[str]:
    """Names of the nodes around some tensors."""
    nodes = (node for tensor in tensors for node in nodes_around(model.proto.graph, tensor))
    return list(dict.fromkeys(node.name for node in nodes))


def _always_kept(placement: Placement, model: FloatModel, nodes: Sequence[str]) -> Placement:
    """A placement in which nodes stay in float whatever else does."""
    kept = keep_float(placement, model, nodes)
    return replace(kept, always_float=kept.always_float.union(nodes))


def _without_excuse(model: FloatModel, error: NotFiniteError) -> Sequence[str]:
    """Tensors that no mask can be behind: inputs of layers, what is no number, or outputs."""
    inputs, outputs = ({spec.name for spec in specs} for specs in (model.inputs, model.outputs))
    of_layers = [
        tensor
        for tensor in error.tensors
        if tensor in inputs
        and any(n.op_type in WEIGHTED_OPS for n in nodes_around(model.proto.graph, tensor))
    ]
    return of_layers or error.not_numbers or [t for t in error.tensors if t in outputs]


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more
