"""How good a quantized model's outputs are: accuracy, agreement, noise, and how sure each is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.labels import are_class_indices
from optuna_quantune.evaluation.labels import check_label_range
from optuna_quantune.evaluation.labels import label_array


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from numpy.typing import NDArray

# A model whose accuracy may be explained by this share of the way from chance to perfect is
# reported. Trained ImageNet classifiers (SqueezeNet, MobileNetV2, EfficientNet-Lite0) had a top-1
# of 0 to .05 with the pixel range wrong, and .53 to .79 with milder mistakes (channels swapped, a
# mean left out), which no threshold can tell from a weaker model.
_NEAR_CHANCE = 0.1
_JACKKNIFE_GROUPS = 20
# Values whose noise is summed at a time.
_PART = 1 << 18
# How many of the highest scores count for top-5.
TOP5 = 5


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, all in the unit of the estimate."""

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a model's outputs are worth.

    Attributes:
        n: Number of inputs.
        top1: Share of inputs whose label has the highest score, 0 to 1; None without labels.
        top5: Share of inputs whose label is among the five highest; None without labels, or with
            no more classes than that.
        agreement: Share of inputs with the same prediction as the float model, 0 to 1; None where
            the outputs are not taken as scores of classes.
        sqnr_db: Output signal-to-quantization-noise ratio against the float model, in decibels;
            infinite where the outputs are equal, None where they were not compared or are whole
            numbers.
        margin_sqnr_db: The same of the margins by which the float model's classes win, which is
            what predictions depend on; None where the outputs are not scores of classes.
        own: Value of the user's own metric; None if there is none.
    """

    n: int
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None
    margin_sqnr_db: float | None = None
    own: float | None = None


def measure(
    outputs: NDArray[Any], *, reference: NDArray[Any], labels: ArrayLike | None
) -> Measurement:
    """Measure a model's outputs against the float model's and, where there are, the labels.

    Args:
        outputs: Scores (logits or probabilities) of shape (n, classes) or (n, classes, 1, 1).
        reference: The float model's scores for the same inputs.
        labels: Class indices of shape (n,), or None.

    Raises:
        InputError: The outputs are not scores of classes, or the labels are not theirs.
    """
    few = class_scores(outputs).shape[1] <= TOP5  # of which every one is among the highest
    return Measurement(
        n=len(outputs),
        top1=None if labels is None else top_k_accuracy(outputs, labels, k=1),
        top5=None if labels is None or few else top_k_accuracy(outputs, labels, k=TOP5),
        agreement=agreement(outputs, reference),
        sqnr_db=sqnr_db(outputs, reference),
        margin_sqnr_db=margin_sqnr_db(outputs, reference),
    )


def class_scores(outputs: NDArray[Any]) -> NDArray[Any]:
    """Give a classifier's scores of shape (n, classes).

    Args:
        outputs: Scores of shape (n, classes), or (n, classes, 1, 1) as fully convolutional
            classifiers give them; at least two classes.

    Raises:
        InputError: The outputs have another shape.
    """
    if not _are_class_scores(outputs):
        raise InputError(
            f"the model's output has the shape {outputs.shape}, not (inputs, classes): accuracy "
            "and agreement need a classifier; give a metric of your own for other models, or "
            "sqnr_db, which compares outputs of any kind"
        )
    return outputs.reshape(outputs.shape[:2])


def can_be_class_scores(shape: tuple[int | None, ...]) -> bool:
    """Say whether outputs of a declared shape can be what `class_scores` takes.

    Args:
        shape: The shape with the batch axis, None where a size is free; empty if nothing is known.
    """
    if not shape:
        return True
    return (len(shape) == 2 or shape[2:] == (1, 1)) and shape[1] != 1


def are_classes_of(outputs: NDArray[Any], labels: NDArray[Any]) -> bool:
    """Say whether labels can be classes of these outputs; a metric of one's own may have others.

    Args:
        outputs: Outputs of any shape, batch axis first.
        labels: Labels of shape (n, ...).
    """
    return (
        _are_class_scores(outputs)
        and are_class_indices(labels)
        and bool(labels.min() >= 0 and labels.max() < outputs.shape[1])
    )


def _are_class_scores(outputs: NDArray[Any]) -> bool:
    return bool(outputs.ndim and outputs.size and can_be_class_scores(outputs.shape))


def top_k_correct(outputs: NDArray[Any], labels: ArrayLike, *, k: int) -> NDArray[np.bool_]:
    """Say for each input whether its label is among the k highest scores.

    Equal scores, which int8 outputs often have, rank in the order of the classes, as
    ``numpy.argmax`` does. A label whose score is not a number is not among the highest.

    Args:
        outputs: Scores of shape (n, classes) or (n, classes, 1, 1).
        labels: Class indices of shape (n,).
        k: How many of the highest scores count, at least 1.

    Returns:
        Booleans of shape (n,).

    Raises:
        InputError: See :func:`measure`.
    """
    scores = class_scores(outputs)
    label = label_array(labels, inputs=len(scores))
    check_label_range(label, classes=scores.shape[1])
    own = scores[np.arange(len(scores)), label][:, None]
    lower_class = np.arange(scores.shape[1]) < label[:, None]
    rank = ((scores > own) | ((scores == own) & lower_class)).sum(axis=1)
    correct: NDArray[np.bool_] = (rank < k) & ~np.isnan(own[:, 0])
    return correct


def top_k_accuracy(outputs: NDArray[Any], labels: ArrayLike, k: int) -> float:
    """Share of inputs, 0 to 1, whose label is among the k highest scores.

    See :func:`top_k_correct` for arguments and errors.
    """
    return float(top_k_correct(outputs, labels, k=k).mean())


def agreement(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
    """Share of inputs, 0 to 1, for which two models predict the same class.

    See :func:`agrees` for arguments and errors.
    """
    return float(agrees(outputs, reference).mean())


def agrees(outputs: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.bool_]:
    """Say for each input whether two models predict the same class.

    An input for which a score is not a number does not agree.

    Args:
        outputs: Scores of shape (n, classes) or (n, classes, 1, 1).
        reference: The other model's scores, of the same shape.

    Returns:
        Booleans of shape (n,).

    Raises:
        InputError: The outputs are not scores of classes, or have different shapes.
    """
    _check_same_shape(outputs, reference)
    ours, theirs = class_scores(outputs), class_scores(reference)
    valid = ~(np.isnan(ours).any(axis=1) | np.isnan(theirs).any(axis=1))
    same: NDArray[np.bool_] = valid & (ours.argmax(axis=1) == theirs.argmax(axis=1))
    return same


def sqnr_db(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio of outputs of any shape, in decibels.

    ``10 log10(sum(reference^2) / sum((reference - outputs)^2))`` over all elements.

    Args:
        outputs: The quantized model's outputs.
        reference: The float model's outputs, of the same shape.

    Returns:
        Infinity where the outputs are equal, minus infinity where they are not finite or where
        there is noise and no signal.

    Raises:
        InputError: The shapes differ.
    """
    return _decibels(_noise_to_signal(outputs, reference))


def margin_sqnr_db(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio of the margins that predictions rest on, in decibels.

    A margin is the score of the float model's class minus the highest other score. Unlike the
    outputs themselves, margins suffer where scores tie because they are cut off at one value.

    Args:
        outputs: Scores of shape (n, classes) or (n, classes, 1, 1).
        reference: The float model's scores, of the same shape.

    Returns:
        See :func:`sqnr_db`.

    Raises:
        InputError: The outputs are not scores of classes, or have different shapes.
    """
    _check_same_shape(outputs, reference)
    classes = class_scores(reference).argmax(axis=1)
    return sqnr_db(rank_margins(class_scores(outputs), classes, k=1), margins(reference))


def mean_sqnr_db(
    outputs: Mapping[str, NDArray[Any]], reference: Mapping[str, NDArray[Any]]
) -> float | None:
    """Signal-to-quantization-noise ratio of all outputs together, in decibels.

    The ratios of noise to signal power are averaged over the outputs, so that each counts alike,
    whatever its unit (boxes in pixels beside probabilities). Outputs of whole numbers (classes,
    places) do not count: the difference of two classes says nothing.

    Args:
        outputs: The quantized model's outputs by name.
        reference: The float model's outputs, of the same names and shapes.

    Returns:
        See :func:`sqnr_db`, which it is for one output; None where all are of whole numbers.

    Raises:
        InputError: The shapes differ.
    """
    names = [name for name in outputs if outputs[name].dtype.kind == "f"]
    ratios = [_noise_to_signal(outputs[name], reference[name]) for name in names]
    return _decibels(sum(ratios) / len(ratios)) if ratios else None


def margins(outputs: NDArray[Any]) -> NDArray[np.float64]:
    """Difference of the two highest scores of each input: how much noise its prediction bears.

    Args:
        outputs: Scores of shape (n, classes) or (n, classes, 1, 1).

    Returns:
        Margins of shape (n,), in the unit of the scores, not negative.

    Raises:
        InputError: The outputs are not scores of classes.
    """
    scores = class_scores(outputs)
    return rank_margins(scores, scores.argmax(axis=1), k=1)


def rank_margins(
    scores: NDArray[Any], classes: NDArray[np.int64], *, k: int
) -> NDArray[np.float64]:
    """How far a class is above the k-th highest score of the others.

    Args:
        scores: Shape (n, classes), with more than k classes.
        classes: One class of each input, shape (n,).
        k: Rank, at least 1.

    Returns:
        Shape (n,), in the unit of the scores; positive where the class is among the k highest.
    """
    rows = np.arange(len(scores))
    others = scores.astype(np.float64)
    own = others[rows, classes]
    others[rows, classes] = -np.inf
    return np.asarray(own - np.partition(others, -k, axis=1)[:, -k])


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    Args:
        successes: Number of successes, 0 to n.
        n: Number of trials, at least 1.
        confidence: Probability with which the interval holds the true proportion, 0 to 1.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the interval ends exactly there; rounding would leave it a hair beside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def paired_difference_interval(
    correct_a: ArrayLike, correct_b: ArrayLike, *, confidence: float = 0.95
) -> Interval:
    """Tango's score interval of the difference of two accuracies on the same inputs.

    Two models that see the same inputs mostly err on the same ones; only the inputs on which one
    is right and the other is wrong say which is better. The interval holds every difference
    that the score test does not reject (T. Tango, Statistics in Medicine 17, 1998). Unlike the
    usual normal (Wald) interval it holds what it promises for few inputs, and has a width where
    no input differs at all.

    Args:
        correct_a: Whether the first model is right, booleans of shape (n,).
        correct_b: Whether the second model is right, booleans of shape (n,).
        confidence: Probability with which the interval holds the true difference, 0 to 1.

    Returns:
        Accuracy of the first model minus accuracy of the second, -1 to 1.

    Raises:
        InputError: There are no inputs, or the shapes differ.
    """
    a, b = np.asarray(correct_a, np.bool_), np.asarray(correct_b, np.bool_)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise InputError(
            f"a paired comparison needs the same inputs for both models, not {a.shape} and "
            f"{b.shape}"
        )
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    estimate = (only_a - only_b) / n

    def score(difference: float) -> float:
        return _tango_score(difference, n=n, only_a=only_a, only_b=only_b)

    low = -1.0 if estimate == -1 else _bisect(lambda d: score(d) > z, -1.0, estimate)
    high = 1.0 if estimate == 1 else _bisect(lambda d: score(d) >= -z, estimate, 1.0)
    return Interval(estimate, low, high)


def jackknife_interval(
    value: Callable[[NDArray[np.int64]], float], n: int, *, confidence: float = 0.95
) -> Interval:
    """Confidence interval of any statistic of a set of inputs, by leaving out groups of them.

    The delete-a-group jackknife (P. S. Kott, Journal of Official Statistics 17, 2001): the inputs
    are dealt out into groups at random, and the statistic is computed without each of them in
    turn; Student's t with one degree of freedom less than there are groups gives the interval. It
    needs 20 evaluations where a bootstrap needs a thousand, and is good for smooth statistics
    (means and functions of them, not medians).

    Args:
        value: Gives the statistic of the inputs with given indices, of shape (m,).
        n: Number of inputs, at least 2.
        confidence: Probability with which the interval holds the true value, 0 to 1.

    Returns:
        The statistic of all inputs, with an interval that is infinite where it is not finite.
    """
    groups = min(_JACKKNIFE_GROUPS, n)
    group = np.random.default_rng(0).permutation(n) % groups
    estimate = value(np.arange(n))
    partial = np.array([value(np.flatnonzero(group != left_out)) for left_out in range(groups)])
    if not (math.isfinite(estimate) and np.isfinite(partial).all()):
        return Interval(estimate, -math.inf, math.inf)
    deviation = math.sqrt((groups - 1) * float(np.mean((partial - partial.mean()) ** 2)))
    half = float(stdtrit(groups - 1, (1 + confidence) / 2)) * deviation
    return Interval(estimate, estimate - half, estimate + half)


def near_chance(top1: float, n: int, n_classes: int) -> bool:
    """Say whether a float model's accuracy is so low that its preprocessing is probably wrong.

    With the chance level c = 1 / classes, the accuracy counts as near chance unless it is
    significantly (one-sided 5 %, Wilson's interval) above c + 0.1 (1 - c), a tenth of the way
    from guessing to perfect. Testing against c alone would pass a broken model: at 1,000 classes,
    10 right answers in 1,000 are significantly more than the 1 of chance. With very few inputs
    nothing is significant, and the answer is yes.

    Args:
        top1: Share of right predictions, 0 to 1.
        n: Number of inputs, at least 1.
        n_classes: Number of classes, at least 2.
    """
    chance = 1 / n_classes
    bar = chance + _NEAR_CHANCE * (1 - chance)
    return wilson_interval(round(top1 * n), n, confidence=0.9).low <= bar


def _tango_score(difference: float, *, n: int, only_a: int, only_b: int) -> float:
    """Score statistic of the paired difference, standard normal if ``difference`` is the true one.

    Tango 1998, equations for the restricted maximum likelihood estimate: ``q`` is the probability
    that only b is right, given that only a is right ``difference`` more often.
    """
    linear = -only_a - only_b + (2 * n - only_a + only_b) * difference
    constant = -only_b * difference * (1 - difference)
    q = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    deviation = only_a - only_b - n * difference
    if variance <= 0:  # the difference leaves no room for chance: certain, or impossible
        return 0.0 if deviation == 0 else math.copysign(math.inf, deviation)
    return deviation / math.sqrt(variance)


def _bisect(holds_left: Callable[[float], bool], left: float, right: float) -> float:
    """Give the point between ``left`` and ``right`` where a condition stops to hold."""
    for _ in range(60):  # halves an interval of at most 2 below the spacing of float64
        middle = (left + right) / 2
        if holds_left(middle):
            left = middle
        else:
            right = middle
    return (left + right) / 2


def _noise_to_signal(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
    _check_same_shape(outputs, reference)
    outputs, reference = outputs.ravel(), reference.ravel()
    noise_power = signal_power = 0.0
    # Part by part: float64 of all outputs at once can be more than there is memory.
    for start in range(0, outputs.size, _PART):
        signal = reference[start : start + _PART].astype(np.float64)
        known = np.isfinite(signal)  # an input without numbers says nothing of the model
        signal = signal[known]
        noise = outputs[start : start + _PART].astype(np.float64)[known] - signal
        noise_power += float(noise @ noise)
        signal_power += float(signal @ signal)
    if noise_power == 0:
        return 0.0
    if signal_power == 0 or not math.isfinite(noise_power):
        return math.inf
    return noise_power / signal_power


def _decibels(noise_to_signal: float) -> float:
    if noise_to_signal == 0:
        return math.inf
    return -10 * math.log10(noise_to_signal) if math.isfinite(noise_to_signal) else -math.inf


def _check_same_shape(outputs: NDArray[Any], reference: NDArray[Any]) -> None:
    if outputs.shape != reference.shape:
        raise InputError(
            f"the outputs to compare have the shapes {outputs.shape} and {reference.shape}; both "
            "models must give the same output for the same inputs"
        )
