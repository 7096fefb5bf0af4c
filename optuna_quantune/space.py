"""Search spaces: knobs as Optuna distributions, for every sampler and dashboard."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from typing import Final
from typing import get_args

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import Trial

from optuna_quantune.errors import InputError
from optuna_quantune.quantization.config import ActivationBits
from optuna_quantune.quantization.config import ALL_IMAGES
from optuna_quantune.quantization.config import Clipping
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.config import WeightClipping
from optuna_quantune.quantization.config import WeightRounding
from optuna_quantune.quantization.sensitivity import LONGEST_ORDER


# The space of Quantune (arXiv 2202.05048): 3 * 4 * 2 * 2 * 2 = 96 configurations.
_QUANTUNE: Final[Mapping[str, Sequence[Any]]] = MappingProxyType(
    {
        "calibration_images": (1, 32, ALL_IMAGES),
        "scheme": ("asymmetric", "symmetric", "symmetric_uint8", "symmetric_power2"),
        "clipping": ("max", "kl"),
        "granularity": ("tensor", "channel"),
        "mixed_precision": ("none", "first_last"),
    }
)
# With every clipping, sensitive layers in float and the corrections: 279,552 configurations.
_EXTENDED: Final[Mapping[str, Sequence[Any]]] = MappingProxyType(
    {
        **_QUANTUNE,
        "clipping": get_args(Clipping),
        "weight_clipping": get_args(WeightClipping),
        "weight_rounding": get_args(WeightRounding),
        "float_layers": tuple(range(LONGEST_ORDER + 1)),
        "activation_bits": get_args(ActivationBits),
        "zero_dead_weights": (False, True),
        "bias_correction": (False, True),
        "equalization": (False, True),
    }
)
# Quantune's space for an integer-only accelerator: 3 * 2 * 2 = 12 configurations.
_VTA: Final[Mapping[str, Sequence[Any]]] = MappingProxyType(
    {
        "calibration_images": (1, 32, ALL_IMAGES),
        "scheme": ("symmetric_power2",),
        "clipping": ("max", "kl"),
        "granularity": ("tensor",),
        "fusion": ("off", "on"),
    }
)
_PRESETS: Final[Mapping[str, Mapping[str, Sequence[Any]]]] = MappingProxyType(
    {"quantune": _QUANTUNE, "extended": _EXTENDED, "vta": _VTA}
)


class SearchSpace(Mapping[str, BaseDistribution]):
    """A mapping from knob to Optuna distribution that knows what its values mean.

    Any sampler that takes a search space takes it as it is.

    Example:
        >>> space = SearchSpace.preset("quantune")
        >>> space.size
        96
        >>> narrow = SearchSpace({"scheme": ["symmetric", "asymmetric"]})

    Args:
        knobs: For each knob (a field of `QuantizationConfig`) a distribution, or the choices of a
            categorical one. Knobs left out keep their default.

    Raises:
        InputError: If a knob or one of its choices is unknown.
    """

    def __init__(self, knobs: Mapping[str, BaseDistribution | Sequence[Any]]) -> None:
        if not knobs:
            raise InputError("search space: no knobs; give at least one")
        self._distributions = {
            name: choices
            if isinstance(choices, BaseDistribution)
            else CategoricalDistribution(_choices(name, choices))
            for name, choices in knobs.items()
        }
        for name, distribution in self._distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                for choice in distribution.choices:
                    QuantizationConfig.from_dict({name: choice})
            elif name not in {field.name for field in dataclasses.fields(QuantizationConfig)}:
                QuantizationConfig.from_dict({name: None})  # raises, and names the knobs there are

    @classmethod
    def preset(cls, name: str) -> SearchSpace:
        """A search space by name.

        Args:
            name: ``quantune``, the 96 configurations of the paper, ``extended``, the same with
                every clipping of activations and weights, layers left in float in the order of
                their sensitivity, 16-bit activations, dead weights set to 0, bias correction and
                equalization, or ``vta``, the paper's 12 configurations for an integer-only
                accelerator.

        Raises:
            InputError: If there is no such preset.
        """
        if name not in _PRESETS:
            raise InputError(f"search space {name!r}: no such preset; use {', '.join(_PRESETS)}")
        return cls(_PRESETS[name])

    @classmethod
    def load(cls, name_or_path: str) -> SearchSpace:
        """A preset by name, or the JSON file of an object from knob to list of choices.

        Raises:
            InputError: If it is neither, or the file does not describe a search space.
        """
        path = Path(name_or_path)
        if path.suffix != ".json":
            return cls.preset(name_or_path)
        try:
            knobs = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InputError(f"search space {path}: cannot be read as JSON ({error})") from error
        if not isinstance(knobs, dict):
            raise InputError(
                f"search space {path}: must be an object from knob to list of choices"
            )
        return cls(knobs)

    @property
    def size(self) -> int | None:
        """Number of configurations; None if a knob is not categorical."""
        size = 1
        for distribution in self._distributions.values():
            if not isinstance(distribution, CategoricalDistribution):
                return None
            size *= len(distribution.choices)
        return size

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the knobs' choices; the knobs must all be categorical."""
        choices = [d.choices for d in self.values() if isinstance(d, CategoricalDistribution)]
        for values in itertools.product(*choices):
            yield dict(zip(self, values, strict=True))

    def config(self, params: Mapping[str, Any]) -> QuantizationConfig:
        """The configuration that a trial's parameters stand for.

        Raises:
            InputError: If a parameter is not a knob, or its value is not one of the knob's.
        """
        return QuantizationConfig.from_dict(dict(params))

    def suggest(self, trial: Trial) -> QuantizationConfig:
        """Asks a trial for a value of every knob."""
        return self.config(
            {name: _suggest(trial, name, dist) for name, dist in self._distributions.items()}
        )

    def __getitem__(self, name: str) -> BaseDistribution:
        return self._distributions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._distributions)

    def __len__(self) -> int:
        return len(self._distributions)


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name,
            distribution.low,
            distribution.high,
            step=distribution.step,
            log=distribution.log,
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _choices(name: str, choices: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise InputError(f"knob {name!r}: give a list of choices or an Optuna distribution")
    return tuple(choices)
