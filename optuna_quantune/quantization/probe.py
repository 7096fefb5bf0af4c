"""How much of an error reaches the output: measured once, on the float model.

What is injected (`disturbance.py`) are the errors that quantization really makes, one tensor or
weight at a time. White noise of the same power would not do: a depthwise weight with one scale for
channels of different sizes loses whole channels, which the next layer amplifies again (in
MobileNetV2 up to 130 times more than white noise there), and what clipping cuts off is biased and
correlated. The errors are small, so that the answer grows with their power; where errors are not
small beside the signal, `joint.py` says what they do together.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from itertools import islice
from typing import Any
from typing import Final
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import ordered_map
from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import Scheme
from optuna_quantune.quantization.disturbance import DisturbableModel
from optuna_quantune.quantization.disturbance import Disturbance
from optuna_quantune.quantization.disturbance import Values
from optuna_quantune.quantization.joint import alike
from optuna_quantune.quantization.joint import joined
from optuna_quantune.quantization.joint import JointNoise
from optuna_quantune.quantization.measurable_outputs import with_measurable_outputs
from optuna_quantune.quantization.model import Layer
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.statistics import Histogram


# Inputs that the probes are spread over: of a large network the fewest, of a small one more.
PROBE_INPUTS: Final = 64
_FEWEST_INPUTS: Final = 4
# The configuration whose weights are injected: one scale for a weight shows which channels the
# model cannot spare. What other scales leave of the error follows from the weights; probing those
# with one scale for each channel too took a quarter more runs and predicted no better.
PROBED: Final = QuantizationConfig(granularity="tensor")
# Values computed for all probes together. Of a large network each tensor is probed on one input,
# of a small one on all.
_VALUE_BUDGET: Final = 300_000_000
# Values that are computed at a time, about: a run of a small model is over before its call is, so
# that inputs share one.
_BATCH_VALUES: Final = 1 << 21
# Schemes with steps of their own when nothing is clipped, the finest first.
_SCHEMES: Final[tuple[Scheme, ...]] = ("asymmetric", "symmetric", "symmetric_power2")
# Share of the largest magnitudes that is clipped of a tensor which its range does not clip.
_CLIPPED_SHARE: Final = 1e-3
# Clipping that is a smaller share of every configuration's noise is not probed.
_NEGLIGIBLE: Final = 0.003
# Changes of an output beyond so many times its largest value count as that.
_LARGEST_CHANGE: Final = 10.0
# Values of an input that differ by less, of the largest, are the same beside other inputs.
_SAME: Final = 1e-3
# Simulations of whole configurations that are expected to be asked for, which share the budget.
_JOINT_RUNS: Final = 64
_FEWEST_JOINT: Final = 8


class Sides(NamedTuple):
    """A number for what is cut off below a range, and one for what is cut off above it."""

    below: float
    above: float


@dataclass(frozen=True)
class GainOfStep:
    """A gain of rounding errors, which is not that of white noise.

    Values that most inputs have in common, as a background has, are rounded to the same side
    everywhere: how much that is, and how far it reaches, changes with the step.

    Attributes:
        steps: Steps of the integers that it was measured with, ascending, shape (n,).
        gains: The gain of each, shape (n,).
    """

    steps: NDArray[np.float64]
    gains: NDArray[np.float64]

    @classmethod
    def of(cls, gains: Mapping[float, float]) -> GainOfStep:
        """From the gain of each step; 0 tells nothing, as of a step that makes no error."""
        steps = sorted(step for step, gain in gains.items() if gain > 0.0)
        return cls(np.array(steps), np.array([gains[step] for step in steps]))

    def at(self, step: float) -> float:
        """The gain of any step, between those of its neighbours (all in logarithms)."""
        if len(self.steps) == 0:
            return 0.0
        between = np.interp(np.log(step), np.log(self.steps), np.log(self.gains))
        return float(np.exp(between))


@dataclass(frozen=True)
class Probe:
    """What the float model does to errors. All powers are mean squares of a value.

    Attributes:
        rounding_gain: For each tensor the power at the output for a power of 1 of the error that
            rounding makes in it, by the step.
        layer_gain: The same, with the smallest step, when one layer alone sees the error: for each
            tensor by the names of layers that read it beside other nodes.
        clipping_gain: That power for the error that clipping makes, below the range and above it:
            what HardSwish or GELU read is large in both directions, and means nothing in one.
        clipping_scaling: For each tensor the shares of these powers, 0 to 1, which only scale the
            output and so change no prediction.
        weight_noise: For each weight (by name) the power at the output when it alone is quantized
            as `PROBED` says.
        channel_mean: For each layer (by name) the mean of each channel of its input.
        channel_power: For each layer the mean square of each channel of its input.
        output_power: Mean square of an output value.
        joint: What errors do together, measured when it is asked for.

    Of a model with several outputs, an output value is one that is divided by the root mean square
    of its output, so that each output counts alike.
    """

    rounding_gain: Mapping[str, GainOfStep]
    layer_gain: Mapping[str, Mapping[str, float]]
    clipping_gain: Mapping[str, Sides]
    clipping_scaling: Mapping[str, Sides]
    weight_noise: Mapping[str, float]
    channel_mean: Mapping[str, NDArray[np.float64]]
    channel_power: Mapping[str, NDArray[np.float64]]
    output_power: float
    joint: JointNoise


def probe(
    quantizer: Quantizer,
    inputs: Iterable[dict[str, NDArray[Any]]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Measures what errors of activations and weights do to the output.

    Args:
        quantizer: Of the float model; its steps, ranges and weights are the ones injected.
        inputs: Inputs of batch size 1, by name; only as many are read as are needed, at most
            `PROBE_INPUTS`.
        threads: Runs side by side, each in a thread of its own; None is one for each core.
        progress: Called after every input, or several, with the inputs done and the inputs in all.

    Raises:
        InputError: If an output changes its shape with a little noise.
    """
    model, ranges = with_measurable_outputs(quantizer.model), quantizer.clipping_ranges()
    tensors, weights = list(ranges), _weights(quantizer, PROBED)
    disturbable = DisturbableModel(model, tensors, weights)
    queue = iter(inputs)
    feeds = list(islice(queue, _FEWEST_INPUTS))
    first = disturbable.start(feeds[0])
    values_a_run = disturbable.size(first)
    runs = _VALUE_BUDGET // ((2 * len(tensors) + len(weights)) * values_a_run)
    feeds += islice(queue, max(0, min(PROBE_INPUTS, runs) - len(feeds)))
    repeats = int(np.clip(runs, 1, len(feeds)))
    together = _joint_inputs(values_a_run)
    joint = [*feeds, *islice(queue, max(0, together - len(feeds)))][:together]
    # Where a probe costs next to nothing, none is spared, and each step of a scheme is probed.
    spared = repeats < len(feeds)
    batch_size = 1
    if model.takes_batches and alike(feeds) and not spared:
        batch_size = int(np.clip(_BATCH_VALUES // values_a_run, 1, len(feeds)))
    moments, outputs = _Moments(model.layers), _Outputs(disturbable)
    schemes = _SCHEMES[:1] if spared else _SCHEMES
    steps = {scheme: _steps(quantizer, scheme) for scheme in schemes}
    rounding = {scheme: _Gains(outputs) for scheme in schemes}
    single, alone = _Gains(outputs), _Gains(outputs)
    side_readers = disturbable.side_readers(set(tensors))
    clipping, tail = ([_Gains(outputs) for _ in Sides._fields] for _ in range(2))
    begun: list[tuple[list[str], _Batch]] = []

    def small_errors() -> Iterator[_Error]:
        done = 0
        for batch in _batches(disturbable, feeds, first, batch_size):
            moments.add(batch)
            outputs.add(batch)
            chosen = _due(tensors, done, repeats, len(feeds))
            for tensor in chosen:
                for scheme, gains in rounding.items():
                    error = _rounding_error(batch.values[tensor], steps[scheme][tensor])
                    yield _Error(gains, tensor, Disturbance(tensor, error), batch)
                if not (layers := side_readers.get(tensor)):
                    continue
                error = _rounding_error(batch.values[tensor], steps[_SCHEMES[0]][tensor])
                power = float(_powers(batch.rows(tensor, error)).mean())
                seen = Disturbance(tensor, error)
                for layer in layers:
                    change = disturbable.changes_of_layer(layer, seen, batch.values)
                    yield _Error(alone, layer, change, batch, power)
            turn = _due(list(weights), done, repeats, len(feeds))
            for weight, changes in disturbable.changes(turn, batch.values).items():
                for change in changes:
                    # What layers with the same weight do adds up.
                    yield _Error(single, weight, change, batch, 1.0 / len(changes))
            kept = disturbable.kept | set(chosen)
            begun.append((chosen, batch.only(kept)))
            done += batch.size
            if progress is not None:
                progress(done, len(feeds))

    def clipping_errors() -> Iterator[_Error]:
        finest = steps[_SCHEMES[0]], rounding[_SCHEMES[0]]
        clipped = _clipped(quantizer, *finest) if spared else set(tensors)
        beyond_range: set[tuple[str, int]] = set()
        for chosen, batch in begun:
            for tensor in chosen:
                if tensor not in clipped:
                    continue
                value, (low, high) = batch.values[tensor], ranges[tensor]
                for side, (sign, end) in enumerate(((-1, low), (1, high))):
                    gains, error = clipping[side], _clipping_error(value, sign * end, sign)
                    if np.any(error):
                        beyond_range.add((tensor, side))
                    elif (tensor, side) not in beyond_range:
                        gains = tail[side]
                        error = _tail_error(batch, tensor, sign)
                    if np.any(error):
                        yield _Error(gains, tensor, Disturbance(tensor, error), batch)

    workers = threads or available_cores()
    for errors in (small_errors, clipping_errors):
        for effect in ordered_map(outputs.measure, errors(), workers=workers):
            effect.error.gains.add(effect)
    for tensor in tensors:
        for own, other, of_tail in zip(clipping, reversed(clipping), tail, strict=True):
            own.fall_back(tensor, of_tail, other, rounding[_SCHEMES[0]])
    return Probe(
        rounding_gain={
            tensor: GainOfStep.of(
                {steps[scheme][tensor]: gains.gain(tensor) for scheme, gains in rounding.items()}
            )
            for tensor in tensors
        },
        layer_gain={
            tensor: {layer: alone.gain(layer) for layer in side_readers.get(tensor, ())}
            for tensor in tensors
        },
        clipping_gain={t: Sides(*(side.gain(t) for side in clipping)) for t in tensors},
        clipping_scaling={t: Sides(*(side.scaling(t) for side in clipping)) for t in tensors},
        weight_noise={name: single.gain(name) for name in weights},
        channel_mean=moments.mean(),
        channel_power=moments.power(),
        output_power=outputs.power,
        joint=JointNoise(quantizer, model, joint, threads=threads),
    )


@dataclass(frozen=True)
class _Batch:
    """Some undisturbed inputs that are run at once.

    Attributes:
        values: Their values by name.
        size: How many they are.
        leads: How the values of several inputs stand, see `_lead`; by default one behind another.
    """

    values: Values
    size: int
    leads: Mapping[str, int] = field(default_factory=dict)

    def rows(self, name: str, value: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """A value, or what stands as it does, with a row for each input."""
        value = self.values[name] if value is None else value
        lead = self.leads.get(name, 1)
        if lead == 0:
            return np.broadcast_to(value.reshape(1, -1), (self.size, value.size))
        parts = value.reshape(lead, self.size, -1)
        rows: NDArray[np.float32] = parts.swapaxes(0, 1).reshape(self.size, -1)
        return rows

    def from_rows(self, name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `rows` gave, in the shape of the value again."""
        lead = self.leads.get(name, 1)
        parts = rows[:1] if lead == 0 else rows.reshape(self.size, lead, -1).swapaxes(0, 1)
        value: NDArray[np.float32] = parts.reshape(self.values[name].shape)
        return value

    def only(self, names: Iterable[str]) -> _Batch:
        """With these values alone."""
        return replace(self, values={name: self.values[name] for name in names})


def _batches(
    model: DisturbableModel, feeds: Sequence[Values], first: Values, size: int
) -> Iterator[_Batch]:
    """Runs all inputs, `size` at a time if all that is looked at is known input by input.

    Args:
        model: The model.
        feeds: The inputs.
        first: The values of the first one.
        size: How many share a run, the last ones excepted.
    """
    values, leads = first, {}
    if size > 1:
        together = model.start(joined(feeds[:size]))
        found = {name: _lead(together[name], first[name], size) for name in model.of_each_input}
        leads = {name: lead for name, lead in found.items() if lead is not None}
        if len(leads) == len(found):
            values = together
        else:
            leads, size = {}, 1
    yield _Batch(values, size, leads)
    for start in range(size, len(feeds), size):
        part = feeds[start : start + size]
        yield _Batch(model.start(joined(part)), len(part), leads)


def _lead(value: object, single: object, inputs: int) -> int | None:
    """How the values of several inputs stand in one array.

    Args:
        value: What is computed of all; a sequence is no array.
        single: The same of the first input.
        inputs: How many they are.

    Returns:
        In how many parts the values of an input stand, with those of all inputs between one part
        and the next: 1 where one input stands behind another, the number of tokens where tokens
        come first. 0 where all inputs share one value, None where neither is so.
    """
    if not (isinstance(value, np.ndarray) and isinstance(single, np.ndarray)):
        return None
    if value.shape[:1] == (inputs,) and single.shape == (1, *value.shape[1:]):
        return 1
    tolerance = _SAME * np.abs(single).max(initial=0.0)
    if value.shape == single.shape:
        return 0 if np.allclose(value, single, rtol=0.0, atol=tolerance) else None
    if value.ndim != single.ndim or value.size != inputs * single.size:
        return None
    for lead in np.cumprod([1, *single.shape[:-1]]):
        first = value.reshape(lead, inputs, -1)[:, 0]
        if np.allclose(first, single.reshape(lead, -1), rtol=0.0, atol=tolerance):
            return int(lead)
    return None


def _due(names: list[str], number: int, repeats: int, inputs: int) -> list[str]:
    """Whose turn it is on an input, when each is probed on `repeats` of them."""
    return [name for i, name in enumerate(names) if (number - i) % inputs < repeats]


def _joint_inputs(values_a_run: int) -> int:
    return int(np.clip(_VALUE_BUDGET // (_JOINT_RUNS * values_a_run), _FEWEST_JOINT, PROBE_INPUTS))


def _steps(quantizer: Quantizer, scheme: Scheme) -> dict[str, float]:
    """For each activation the step of its integers when nothing is clipped."""
    config = QuantizationConfig(scheme=scheme, equalization=quantizer.equalized)
    return {
        tensor: float(quantizer.activation_parameters(tensor, config).scale)
        for tensor in quantizer.statistics.segments
    }


def _weights(quantizer: Quantizer, config: QuantizationConfig) -> dict[str, NDArray[np.float32]]:
    """Every weight as a configuration quantizes it, by name."""
    parameters = quantizer.plan(replace(config, equalization=quantizer.equalized)).constants
    return {
        layer.weight: quantizer.model.weights[layer.weight]
        + quantizer.weight_error(layer, parameters[layer.weight])
        for layer in quantizer.model.layers
        if layer.weight in parameters
    }


def _clipped(quantizer: Quantizer, steps: Mapping[str, float], rounding: _Gains) -> set[str]:
    """The tensors whose clipping can be a part of some configuration's noise that matters.

    Ranges clip most that have the least divergence, or that come from the fewest inputs, or both.
    What each tensor loses with them is compared with what all lose, as if both were rounding.
    """
    statistics, tightest = quantizer.statistics, quantizer.clipping_ranges()
    tensors = list(tightest)
    gains = np.array([rounding.gain(tensor) for tensor in tensors])
    rounded = gains @ np.square([steps[tensor] for tensor in tensors]) / 12.0
    histograms = {t: statistics.histogram(t, statistics.sizes[0]) for t in tensors}
    fewest = {t: (h.minimum, h.maximum) for t, h in histograms.items()}
    both = {
        t: (max(low, fewest[t][0]), min(high, fewest[t][1])) for t, (low, high) in tightest.items()
    }
    relevant = np.zeros(len(tensors), dtype=np.bool_)
    for ranges in (tightest, fewest, both):
        lost = gains * [
            _lost(statistics.histogram(tensor, ALL_IMAGES), *ranges[tensor]) for tensor in tensors
        ]
        relevant |= lost > _NEGLIGIBLE * (rounded + lost.sum())
    return {tensor for tensor, matters in zip(tensors, relevant, strict=True) if matters}


def _lost(histogram: Histogram, low: float, high: float) -> float:
    """Mean square of what a range cuts off."""
    return sum(histogram.cut_off(low, high)) / max(histogram.total, 1)


def _rounding_error(value: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    error: NDArray[np.float32] = np.asarray(value / np.float32(step))
    np.rint(error, out=error)
    error *= np.float32(step)
    error -= value
    return error


def _clipping_error(
    value: NDArray[np.float32], limit: float | NDArray[np.float32], sign: int
) -> NDArray[np.float32]:
    """The error when values of a sign are clipped to a magnitude."""
    error: NDArray[np.float32] = sign * np.minimum(limit - sign * value, 0.0)
    return error


def _tail_error(batch: _Batch, tensor: str, sign: int) -> NDArray[np.float32]:
    """The error when of each input the largest values of a sign are clipped."""
    rows = batch.rows(tensor)
    limit = np.quantile(sign * rows, 1.0 - _CLIPPED_SHARE, axis=1, keepdims=True)
    error = _clipping_error(rows, np.maximum(limit, np.float32(0.0)), sign)
    return batch.from_rows(tensor, error)


@dataclass(frozen=True)
class _Error:
    """An error in one tensor of some inputs.

    Attributes:
        gains: What it is measured for.
        name: Whose gain it shows.
        disturbance: The error of all inputs.
        batch: The inputs.
        power: What counts as its power; None is the one that it has.
    """

    gains: _Gains
    name: str
    disturbance: Disturbance
    batch: _Batch
    power: float | None = None


@dataclass(frozen=True)
class _Effect:
    """What an error changes, summed over its inputs.

    Attributes:
        error: The error.
        power_in: Its power.
        powers: What comes of it at each output.
        scaling: The part of them that only scales the output.
    """

    error: _Error
    power_in: float
    powers: NDArray[np.float64]
    scaling: NDArray[np.float64]


class _Outputs:
    """What errors change in the outputs of a model, where the float model gives numbers."""

    def __init__(self, model: DisturbableModel) -> None:
        self._model = model
        self._powers: list[NDArray[np.float64]] = []

    @property
    def power(self) -> float:
        """Mean square of an undisturbed output value."""
        return self.joint(np.mean(self._powers, axis=0))

    def add(self, batch: _Batch) -> None:
        """Takes the outputs of undisturbed inputs into account."""
        powers = [_powers(_numbers(batch.rows(name))) for name in self._model.names]
        self._powers.extend(np.stack(powers, axis=1))

    def joint(self, powers: NDArray[np.float64]) -> float:
        """Mean square of a value of all outputs, from that of each; one output counts as it is."""
        if len(powers) == 1:
            return float(powers[0])
        own = np.mean(self._powers, axis=0)
        return float(np.mean(powers / np.where(own > 0.0, own, 1.0)))

    def measure(self, error: _Error) -> _Effect:
        """Runs the model with an error, unless it is none."""
        names, batch, disturbance = self._model.names, error.batch, error.disturbance
        power_in = _powers(batch.rows(disturbance.tensor, disturbance.error))
        if error.power is not None:
            power_in = np.full(batch.size, error.power)
        if not power_in.any():
            return _Effect(error, 0.0, np.zeros(len(names)), np.zeros(len(names)))
        disturbed = self._model.run(disturbance, batch.values)
        _check_shapes(names, disturbed, batch.values)
        floats = [batch.rows(name) for name in names]
        references = [_numbers(rows) for rows in floats]
        changes = [
            _limited(_numbers(batch.rows(name, after), rows) - before, before)
            for name, after, rows, before in zip(names, disturbed, floats, references, strict=True)
        ]
        # Beside others, an input without an error changes by what the order of sums does to it.
        powers = np.array([_powers(change) for change in changes]) * (power_in > 0.0)
        scaling = _scaling(changes[0], references[0])
        share = np.divide(scaling, powers[0], out=np.zeros(batch.size), where=powers[0] > 0.0)
        return _Effect(error, float(power_in.sum()), powers.sum(axis=1), powers @ share)


def _numbers(
    rows: NDArray[np.float32], reference: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Rows with 0 where the reference, by default they themselves, is infinite, as behind a mask.

    The measured noise leaves these values out, too.
    """
    known = np.isfinite(rows if reference is None else reference)
    return rows if known.all() else np.where(known, rows, np.float32(0.0))


def _limited(change: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Changes of an output, no larger than a few times its values; a row is that of an input.

    What was a little above 0 is not after rounding: its logarithm or root is no number then.
    """
    limit = _LARGEST_CHANGE * np.abs(reference).max(axis=1, keepdims=True, initial=0.0)
    change = np.where(np.isnan(change), limit, change)
    limited: NDArray[np.float32] = np.clip(change, -limit, limit)
    return limited


def _scaling(change: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Power of the part of each row of `change` that shifts all its values or scales them."""
    shift = np.mean(change, axis=1, dtype=np.float64)
    centered = reference - reference.mean(axis=1, keepdims=True)
    spread = _powers(centered)
    common = np.vecdot(change, centered).astype(np.float64) / change.shape[1]
    scaled: NDArray[np.float64] = shift**2 + np.divide(
        common**2, spread, out=np.zeros(len(change)), where=spread > 0.0
    )
    return scaled


class _Gains:
    """Error power in and out of each tensor, summed over inputs.

    The gain is the ratio of the sums: an input that is hardly clipped says as little about it as
    it will contribute.

    Args:
        outputs: What the error comes out at.
    """

    def __init__(self, outputs: _Outputs) -> None:
        self._outputs = outputs
        # In, out at each output, and what of that scales the output.
        self._sums: dict[str, tuple[float, NDArray[np.float64], NDArray[np.float64]]] = {}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._sums

    def add(self, effect: _Effect) -> None:
        """Takes an effect into account, unless its error is none."""
        if effect.power_in == 0.0:
            return
        name, nothing = effect.error.name, np.zeros_like(effect.powers)
        power_in, powers, scaling = self._sums.get(name, (0.0, nothing, nothing))
        self._sums[name] = (
            power_in + effect.power_in,
            powers + effect.powers,
            scaling + effect.scaling,
        )

    def fall_back(self, tensor: str, *others: _Gains) -> None:
        """Takes over what the first of `others` knows of a tensor that was not added here."""
        for other in others:
            if tensor not in self and tensor in other:
                self._sums[tensor] = other._sums[tensor]

    def gain(self, tensor: str) -> float:
        """Power out for a power of 1 in; 0 of a tensor that bore no error."""
        if tensor not in self:
            return 0.0
        power_in, powers, _ = self._sums[tensor]
        return self._outputs.joint(powers) / power_in

    def scaling(self, tensor: str) -> float:
        """Share of the power out that only scales the output."""
        out = 0.0 if tensor not in self else self._outputs.joint(self._sums[tensor][1])
        return self._outputs.joint(self._sums[tensor][2]) / out if out > 0.0 else 0.0


def _powers(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The power of each row."""
    powers: NDArray[np.float64] = np.vecdot(rows, rows).astype(np.float64) / rows.shape[1]
    return powers


def _check_shapes(
    names: Sequence[str], disturbed: Sequence[NDArray[np.float32]], reference: Values
) -> None:
    for name, after in zip(names, disturbed, strict=True):
        before = reference[name]
        if after.shape != before.shape:
            raise InputError(
                f"the model's output {name!r} changes its shape with a little noise, from "
                f"{before.shape} to {after.shape}; cut the model before the step that selects "
                "(a non-maximum suppression, for instance)"
            )


class _Moments:
    """Running first and second moments of each channel of each layer's input."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._sums: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._count = 0

    def add(self, batch: _Batch) -> None:
        """Takes the values of some inputs into account."""
        values, inputs = batch.values, batch.size
        self._count += inputs
        found: dict[tuple[str, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        for layer in self._layers:
            value = values[layer.input]
            channel = 1 if layer.op_type in ("Conv", "ConvTranspose") else value.ndim - 1
            read = (layer.input, channel)
            if read not in found:
                found[read] = _channel_moments(value, channel)
            mean, power = found[read]
            before = self._sums.get(layer.name, (np.zeros_like(mean), np.zeros_like(mean)))
            self._sums[layer.name] = before[0] + inputs * mean, before[1] + inputs * power

    def mean(self) -> dict[str, NDArray[np.float64]]:
        return {name: sums[0] / self._count for name, sums in self._sums.items()}

    def power(self) -> dict[str, NDArray[np.float64]]:
        return {name: sums[1] / self._count for name, sums in self._sums.items()}


def _channel_moments(
    value: NDArray[np.float32], channel: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = np.moveaxis(value, channel, 0).reshape(value.shape[channel], -1)
    return rows.mean(axis=1).astype(np.float64), _powers(rows)
