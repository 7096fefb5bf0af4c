"""QuantuneSampler: the adapter between Optuna's trials and the surrogate.

The study is the only state. Every proposal is computed from its trials, so that any thread,
process or machine that joins the study goes on where the others are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import PartialFixedSampler
from optuna.samplers import RandomSampler
from optuna.samplers._base import _INDEPENDENT_SAMPLING_WARNING_TEMPLATE
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.study import StudyDirection
from optuna.trial import TrialState

from optuna_quantune.errors import InputError
from optuna_quantune.search.conditions import inferred_space
from optuna_quantune.search.configurations import Configurations
from optuna_quantune.search.encoding import SpaceEncoding
from optuna_quantune.search.history import History
from optuna_quantune.search.history import is_taken
from optuna_quantune.search.history import publish_plan
from optuna_quantune.search.history import read_history
from optuna_quantune.search.proposal import Proposer
from optuna_quantune.search.sources import SourceStudy


if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# Below Optuna's logger, so that ``optuna.logging.set_verbosity`` rules it.
_logger = optuna.logging.get_logger(f"optuna.{__name__}")

# Longest wait before a second try when two processes have claimed one configuration.
_MAX_BACKOFF_SECONDS = 0.02
# Spaces (full ones and those that PartialFixedSampler leaves) whose configurations are kept.
_MAX_CACHED_SPACES = 4


class SearchSpaceExhausted(optuna.TrialPruned):
    """Every configuration of the search space has been proposed.

    A trial that asks for one more is pruned by it before anything is measured, and the study ends.
    Only a study that is resumed, or that other processes have just finished, comes that far; with
    the ask-and-tell interface, ``Study.ask`` raises it.
    """


class QuantuneSampler(BaseSampler):
    """Sampler for small and medium discrete search spaces that never measures anything twice.

    A Gaussian process whose kernel is partly made by gradient-boosted trees (XGBoost) is fitted to
    the trials; the configuration with the greatest expected improvement, of all of a space of up
    to 100,000 configurations, of a pool improved by local search otherwise, comes next. It is
    made for objectives of which each evaluation takes seconds to minutes, such as quantizing a
    model and measuring it, and it needs few of them. What is known of a configuration before it is
    measured can be told by ``features``.

    It works with any search space (categorical, int, float, log, step, conditional: when a
    parameter is asked for is read off the trials), with several objectives
    (a random augmented Tchebycheff scalarisation for each trial), constraints
    (:meth:`optuna.trial.Trial.set_constraint`), pruned, failed, enqueued and concurrently running
    trials. Failed trials are not proposed again, and regions that fail are avoided; a trial that
    raises :exc:`optuna.TrialPruned` before it has reported anything counts as failed.

    Example:

        .. code-block:: python

            import optuna
            from optuna.distributions import CategoricalDistribution
            from optuna_quantune import QuantuneSampler

            space = {
                "clipping": CategoricalDistribution(["max", "kl"]),
                "granularity": CategoricalDistribution(["tensor", "channel"]),
            }


            def objective(trial: optuna.Trial) -> float:
                clipping = trial.suggest_categorical("clipping", ["max", "kl"])
                granularity = trial.suggest_categorical("granularity", ["tensor", "channel"])
                return 0.1 * (clipping == "max") + 0.3 * (granularity == "tensor")


            study = optuna.create_study(sampler=QuantuneSampler(space, seed=0))
            study.optimize(objective)  # Ends after the four configurations.

    Note:
        Following `Quantune <https://arxiv.org/abs/2202.05048>`__ (Lee et al., 2022), which
        chooses quantization configurations with XGBoost.

    Args:
        search_space: Optuna distributions by parameter name. With it, the first trials are chosen
            too, and a study whose configurations have all been proposed is stopped. Without it,
            the parameters that all complete trials share are modelled, as other samplers do, and
            those of which the trials show on which values of another they depend; and the study is
            never stopped, as the next trial may show further parameters.
        features: Named numbers of a configuration, called with its parameters, once for each
            configuration that is considered; always the same names, NaN where unknown. The name
            ``prior`` (:data:`PRIOR_FEATURE`) is an estimate of the objective's first value, on its
            scale or rising and falling with it; the first trial is the one with the best prior.
            ``prior_2``, ``prior_3`` and so on are those of the other values, if there are several.
            ``prior:NAME`` is one of the constraint NAME, which a trial keeps when it is at most 0;
            it is ignored, with a warning, when complete trials have set no such constraint.
            Numbers that are the same for all configurations describe the task, for later studies
            that learn from this one. Spaces of more than 512 configurations are sketched from
            some hundreds of them, and about a hundred are considered for each trial.
        valid: Whether a configuration can be run, called with its parameters. Others are never
            proposed.
        candidates: Configurations that are worth looking at in a space too large to look at all of
            it, such as those of :func:`knapsack_front`, or in which hardly any is valid; called
            once.
        source_studies: Earlier studies of related tasks, Optuna's or recorded ones, with the same
            or other search spaces, on the same or other scales; they are read once. They decide
            the first trials, and are believed as far as the trials of this study bear them out.
        n_startup_trials: How many trials are spread over the space before the surrogate is asked.
            Not used with a prior or source studies.
        seed: Seed of the random numbers.
        allow_duplicates: Whether a configuration can be proposed again, for objectives with noise
            that is to be averaged out.
        independent_sampler: Sampler of parameters outside the modelled space. Defaults to a
            :class:`~optuna.samplers.RandomSampler` with the same seed.
        warn_independent_sampling: Whether to warn when that sampler is used.
        progress: Called while ``features`` is asked for several configurations, which may take
            long before the first trial, with how many are done and how many there are.

    Raises:
        InputError: If a value of ``search_space`` is not a distribution, or an item of
            ``source_studies`` not a study.
    """

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution] | None = None,
        *,
        features: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
        valid: Callable[[Mapping[str, Any]], bool] | None = None,
        candidates: Callable[[], Iterable[Mapping[str, Any]]] | None = None,
        source_studies: Sequence[optuna.Study | SourceStudy] = (),
        n_startup_trials: int = 4,
        seed: int | None = None,
        allow_duplicates: bool = False,
        independent_sampler: BaseSampler | None = None,
        warn_independent_sampling: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for name, distribution in (search_space or {}).items():
            if not isinstance(distribution, BaseDistribution):
                raise InputError(
                    f"search_space[{name!r}]: {distribution!r} is not an Optuna distribution; "
                    "use one of optuna.distributions"
                )
        source_studies = tuple(source_studies)
        for source in source_studies:
            if not isinstance(source, (SourceStudy, optuna.Study)):
                raise InputError(
                    f"source_studies: {source!r} is neither a Study nor a SourceStudy"
                )
        self._search_space = None if search_space is None else dict(search_space)
        self._features = features
        self._valid = valid
        self._candidates = candidates
        self._sources = tuple(
            source if isinstance(source, SourceStudy) else SourceStudy.from_study(source)
            for source in source_studies
        )
        self._n_startup_trials = n_startup_trials
        self._rng = LazyRandomState(seed)
        self._allow_duplicates = allow_duplicates
        self._independent_sampler = independent_sampler or RandomSampler(seed=seed)
        self._warn_independent_sampling = warn_independent_sampling
        self._progress = progress
        self._configurations: dict[object, Configurations] = {}

    def reseed_rng(self) -> None:
        """Gives a copy of the sampler in another thread or process random numbers of its own."""
        self._rng.rng.seed()
        self._independent_sampler.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The search space of the constructor, or what is read off the complete trials."""
        if self._search_space is not None:
            return dict(self._search_space)
        # All trials that the history has: a HyperbandPruner hides some from `study.get_trials`.
        return inferred_space(
            study._storage.get_all_trials(
                study._study_id, deepcopy=False, states=(TrialState.COMPLETE,)
            )
        )

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Proposes the parameters of one trial.

        Raises:
            SearchSpaceExhausted: If every configuration of the search space has been proposed.
            InputError: If no valid configuration is found.
        """
        if not search_space:
            return {}
        fixed = _fixed_params(study, trial)
        configurations = self._configurations_of(study, self._modelled(study, trial, search_space))
        while True:
            history = read_history(
                study,
                configurations.encoding,
                trial.number,
                fixed,
                is_inferred=self._search_space is None,
            )
            avoid_seen = not self._allow_duplicates
            codes = self._proposer(study, configurations, history, fixed, avoid_seen).choose()
            if codes is None and self._search_space is None:
                # An inferred space may be only a part of what the trials differ in.
                avoid_seen = False
                codes = self._proposer(study, configurations, history, fixed, avoid_seen).choose()
            if codes is None:
                if "fixed_params" not in trial.system_attrs:
                    _stop(study)
                raise SearchSpaceExhausted(
                    "every configuration that this trial could take has been proposed before, or "
                    "is not valid; QuantuneSampler(allow_duplicates=True) proposes them again"
                )
            params = configurations.encoding.decode(codes)
            publish_plan(study, trial, params, configurations.named_features(codes))
            # As others read it: a float loses digits on the way, and of steps that are small
            # beside the values Optuna itself takes some for values outside the distribution.
            told = configurations.encoding.encode(params)
            if (
                not avoid_seen
                or told is None
                or not is_taken(
                    study, configurations.encoding, told, trial.number, history.finished, fixed
                )
            ):
                return {name: params[name] for name in search_space}
            # Whoever shares a plan withdraws it, lest both keep it, and tries again.
            publish_plan(study, trial, {})
            time.sleep(self._rng.rng.uniform(0.0, _MAX_BACKOFF_SECONDS))

    def _modelled(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, BaseDistribution]:
        """An inferred space with the parameters that a `PartialFixedSampler` has taken out.

        Others may depend on them, and trials with other values of them tell of other things.
        """
        fixed = _fixed_by_samplers(study)
        if self._search_space is not None or not fixed:
            return search_space
        inferred = self.infer_relative_search_space(study, trial)
        encoding = SpaceEncoding(inferred)
        taken_out = [encoding.names[column] for column in encoding.encode_columns(fixed)]
        return {**search_space, **{name: inferred[name] for name in taken_out}}

    def _proposer(
        self,
        study: Study,
        configurations: Configurations,
        history: History,
        fixed: Mapping[str, Any],
        avoid_seen: bool,
    ) -> Proposer:
        return Proposer(
            configurations,
            history,
            fixed=configurations.encoding.encode_columns(fixed),
            n_objectives=len(study.directions),
            n_startup_trials=self._n_startup_trials,
            avoid_seen=avoid_seen,
            rng=self._rng.rng,
        )

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Samples a parameter that the modelled space lacks, by the independent sampler."""
        if self._warn_independent_sampling:
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            # A parameter that no trial has shown yet could not have been modelled.
            if any(param_name in other.params for other in complete):
                _logger.warning(
                    _INDEPENDENT_SAMPLING_WARNING_TEMPLATE.format(
                        param_name=param_name,
                        trial_number=trial.number,
                        independent_sampler_name=self._independent_sampler.__class__.__name__,
                        sampler_name=self.__class__.__name__,
                        fallback_reason="not all trials have it and no other parameter tells "
                        "which do, its range has changed, or it has more than 2**53 values",
                    )
                )
        return self._independent_sampler.sample_independent(
            study, trial, param_name, param_distribution
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Lets the independent sampler prepare."""
        self._independent_sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stops the study when every configuration has been proposed."""
        self._independent_sampler.after_trial(study, trial, state, values)
        if self._is_exhausted(study, trial.number if state == TrialState.COMPLETE else None):
            _stop(study)

    def is_exhausted(self, study: Study) -> bool:
        """Whether every configuration of ``search_space`` has been measured or is running."""
        return self._is_exhausted(study, None)

    def _is_exhausted(self, study: Study, ending: int | None) -> bool:
        if not self._search_space or self._allow_duplicates:
            return False
        configurations = self._configurations_of(study, self._search_space)
        if not configurations.is_enumerable:
            return False
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return False  # what is enqueued is still to be measured
        names = configurations.encoding.name_set
        ended = (t for t in trials if t.state == TrialState.COMPLETE or t.number == ending)
        if len(trials) < len(configurations.all) and all(t.params.keys() >= names for t in ended):
            return False
        history = read_history(study, configurations.encoding, None, ending=ending)
        return not configurations.unseen(configurations.all.codes, history.seen).any()

    def _configurations_of(
        self, study: Study, search_space: dict[str, BaseDistribution]
    ) -> Configurations:
        if self._search_space is not None and search_space.keys() <= self._search_space.keys():
            search_space = self._search_space  # PartialFixedSampler takes parameters out
        fixed = _fixed_by_samplers(study)
        constants = {name: value for name, value in fixed.items() if name not in search_space}
        signs = tuple(-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions)
        key = (repr(sorted(search_space.items())), repr(sorted(constants.items())), signs)
        configurations = self._configurations.pop(key, None)
        if configurations is None:
            configurations = Configurations(
                search_space,
                self._features,
                self._valid,
                constants,
                signs=signs,
                sources=self._sources,
                suggest=self._candidates,
                progress=self._progress,
            )
        self._configurations[key] = configurations  # the last one is the latest used
        for oldest in list(self._configurations)[:-_MAX_CACHED_SPACES]:
            self._configurations.pop(oldest, None)
        return configurations


def _fixed_params(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Values that are set from outside: by ``enqueue_trial`` or a ``PartialFixedSampler``."""
    return {**_fixed_by_samplers(study), **trial.system_attrs.get("fixed_params", {})}


def _fixed_by_samplers(study: Study) -> dict[str, Any]:
    """Those that a ``PartialFixedSampler`` sets in every trial."""
    fixed: dict[str, Any] = {}
    sampler = study.sampler
    while isinstance(sampler, PartialFixedSampler):
        fixed = {**sampler._fixed_params, **fixed}
        sampler = sampler._base_sampler
    return fixed


def _stop(study: Study) -> None:
    # With ask and tell there is no loop to end; ``is_exhausted`` tells.
    with contextlib.suppress(RuntimeError):
        study.stop()
