from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.metrics import agreement
from optuna_quantune.evaluation.metrics import Interval
from optuna_quantune.evaluation.metrics import jackknife_interval
from optuna_quantune.evaluation.metrics import margin_sqnr_db
from optuna_quantune.evaluation.metrics import margins
from optuna_quantune.evaluation.metrics import measure
from optuna_quantune.evaluation.metrics import near_chance
from optuna_quantune.evaluation.metrics import paired_difference_interval
from optuna_quantune.evaluation.metrics import rank_margins
from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.evaluation.metrics import top_k_accuracy
from optuna_quantune.evaluation.metrics import wilson_interval


RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(size=(200, 10)).astype(np.float32)
REFERENCE = OUTPUTS + RNG.normal(scale=0.1, size=(200, 10)).astype(np.float32)
LABELS = np.where(RNG.random(200) < 0.7, OUTPUTS.argmax(1), RNG.integers(0, 10, 200))


def paired(only_a: int, only_b: int, n: int, both: int = 0) -> tuple[Any, Any]:
    """Outcomes of n inputs with the given numbers of discordant ones."""
    a = np.zeros(n, bool)
    b = np.zeros(n, bool)
    a[:only_a] = True
    b[only_a : only_a + only_b] = True
    a[only_a + only_b :][:both] = b[only_a + only_b :][:both] = True
    return a, b


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_top_k_counts_the_labels_among_the_k_highest(k: int) -> None:
    highest = np.argsort(-OUTPUTS, axis=1)[:, :k]
    expected = np.mean([label in row for label, row in zip(LABELS, highest, strict=True)])
    assert top_k_accuracy(OUTPUTS, LABELS, k) == pytest.approx(expected)


def test_equal_scores_rank_as_argmax_ranks_them() -> None:
    ties = np.round(OUTPUTS * 2)  # as coarse as a badly quantized output
    for labels in (LABELS, ties.argmax(1), ties.argmax(1)[::-1]):
        assert top_k_accuracy(ties, labels, 1) == np.mean(ties.argmax(1) == labels)
    assert top_k_accuracy(np.zeros((1, 4)), [1], 1) == 0
    assert top_k_accuracy(np.zeros((1, 4)), [1], 2) == 1


def test_an_output_that_is_not_a_number_is_never_right_and_never_agrees() -> None:
    broken = np.full_like(OUTPUTS, np.nan)
    assert top_k_accuracy(broken, LABELS, 5) == 0
    assert agreement(broken, broken) == 0
    assert sqnr_db(broken, REFERENCE) == -math.inf


def test_agreement_is_the_share_of_equal_predictions() -> None:
    expected = np.mean(OUTPUTS.argmax(1) == REFERENCE.argmax(1))
    assert 0.5 < expected < 1
    assert agreement(OUTPUTS, REFERENCE) == pytest.approx(expected)


def test_noise_of_large_outputs_needs_no_copy_of_them() -> None:
    reference = np.ones((64, 64, 64, 16), np.float32)
    outputs = reference + np.float32(0.1)
    tracemalloc.start()
    assert sqnr_db(outputs, reference) == pytest.approx(20.0, abs=1e-3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < outputs.nbytes


def test_sqnr_is_ten_decibels_for_a_tenth_of_the_power() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 0.0]])
    noisy = reference + np.array([[0.0, 0.0], [1.5, np.sqrt(0.25)]])
    assert sqnr_db(noisy, reference) == pytest.approx(10.0)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(np.ones(3), np.zeros(3)) == -math.inf


def test_margins_are_the_difference_of_the_two_highest_scores() -> None:
    assert margins(np.array([[1.0, 5.0, 3.5], [2.0, 2.0, -1.0]])).tolist() == [1.5, 0.0]


def test_measure_puts_them_together_also_without_labels() -> None:
    spatial = OUTPUTS[:, :, None, None]
    measured = measure(spatial, reference=REFERENCE[:, :, None, None], labels=LABELS)
    assert measured.n == 200
    assert measured.top1 == pytest.approx(np.mean(OUTPUTS.argmax(1) == LABELS))
    assert measured.top5 == top_k_accuracy(OUTPUTS, LABELS, 5)
    assert measured.agreement == agreement(OUTPUTS, REFERENCE)
    assert measured.sqnr_db == sqnr_db(OUTPUTS, REFERENCE)
    unlabelled = measure(OUTPUTS, reference=REFERENCE, labels=None)
    assert unlabelled.top1 is None
    assert unlabelled.top5 is None


def test_top5_of_five_classes_says_nothing_and_is_left_out() -> None:
    scores = np.random.default_rng(0).normal(size=(8, 6))
    labels = np.zeros(8, np.int64)
    assert measure(scores, reference=scores, labels=labels).top5 is not None
    assert measure(scores[:, :5], reference=scores[:, :5], labels=labels).top5 is None


@pytest.mark.parametrize("shape", [(4,), (4, 1), (0, 3), (4, 3, 2, 2), (4, 3, 2)])
def test_outputs_that_are_no_scores_of_classes_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="metric of your own"):
        measure(np.zeros(shape), reference=np.zeros(shape), labels=None)


def test_outputs_of_different_shapes_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="shapes"):
        sqnr_db(OUTPUTS, REFERENCE[:, :5])
    with pytest.raises(InputError, match="shapes"):
        agreement(OUTPUTS, REFERENCE[:5])


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(InputError, match=r"label 12 of input 1 .* 10 classes \(0 to 9\), 2 such"):
        top_k_accuracy(OUTPUTS[:3], [0, 12, -1], 1)
    with pytest.raises(InputError, match="label 10 of input 2 .* shifted by one"):
        top_k_accuracy(OUTPUTS[:3], [1, 5, 10], 1)
    with pytest.raises(InputError, match="2 labels for 3 inputs"):
        top_k_accuracy(OUTPUTS[:3], [0, 1], 1)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 10), (721, 1000), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_is_scipys(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    interval = wilson_interval(successes, n, confidence=confidence)
    assert interval.estimate == successes / n
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_interval_is_the_published_one() -> None:
    # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables, 2017, chapter 8:
    # complete response before and after consolidation therapy (Cavo et al., 2012). The figures
    # are those of the tests of the authors' R package contingencytables.
    interval = paired_difference_interval(*paired(6, 16, 161, both=59))
    assert interval.estimate == pytest.approx(-0.0621, abs=5e-5)
    assert interval.low == pytest.approx(-0.1240, abs=5e-5)
    assert interval.high == pytest.approx(-0.0054, abs=5e-5)


def brute_force_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Invert the score test with the restricted maximum likelihood found numerically."""

    def z(difference: float) -> float:
        low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
        if low >= high:
            return math.copysign(math.inf, (only_a - only_b) / n - difference)

        def loss(q: float) -> float:
            p, rest = q + difference, 1 - 2 * q - difference
            terms = ((only_a, p), (only_b, q), (n - only_a - only_b, rest))
            return -sum(c * math.log(max(x, 1e-300)) for c, x in terms if c)

        q = optimize.minimize_scalar(
            loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
        ).x
        variance = max(2 * q + difference - difference**2, 1e-300)
        return (only_a - only_b - n * difference) / math.sqrt(n * variance)

    limit = stats.norm.ppf(0.975)
    estimate = (only_a - only_b) / n
    return (
        optimize.brentq(lambda d: z(d) - limit, -1 + 1e-9, estimate),
        optimize.brentq(lambda d: z(d) + limit, estimate, 1 - 1e-9),
    )


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(1, 7, 21), (12, 9, 1000), (5, 0, 50), (3, 3, 30), (40, 20, 160)]
)
def test_paired_interval_is_the_inverted_score_test(only_a: int, only_b: int, n: int) -> None:
    interval = paired_difference_interval(*paired(only_a, only_b, n))
    expected = brute_force_interval(only_a, only_b, n)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-6)


def test_without_discordant_inputs_the_interval_still_has_its_width() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    for n in (5, 100, 1000):
        interval = paired_difference_interval(*paired(0, 0, n, both=n // 2))
        assert interval.estimate == 0
        # With no discordant pair the score equation is n d / (1 - d) = z^2.
        assert interval.high == pytest.approx(z2 / (n + z2), abs=1e-9)
        assert interval.low == pytest.approx(-interval.high, abs=1e-9)


def test_swapping_the_models_mirrors_the_interval_and_extremes_stay_in_range() -> None:
    for only_a, only_b, n in ((1, 7, 21), (20, 0, 20), (0, 3, 3)):
        a, b = paired(only_a, only_b, n)
        ab, ba = paired_difference_interval(a, b), paired_difference_interval(b, a)
        assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low), abs=1e-9)
        assert -1 <= ab.low <= ab.estimate <= ab.high <= 1
    assert paired_difference_interval(*paired(20, 0, 20)).high == 1


@pytest.mark.parametrize(
    ("n", "p_only_a", "p_only_b"),
    [(20, 0.1, 0.05), (50, 0.02, 0.02), (200, 0.01, 0.03), (1000, 0.012, 0.01), (30, 0.3, 0.05)],
)
def test_paired_interval_covers_the_true_difference(
    n: int, p_only_a: float, p_only_b: float
) -> None:
    simulations = 2000
    rng = np.random.default_rng(1)
    counts = rng.multinomial(n, [p_only_a, p_only_b, 1 - p_only_a - p_only_b], simulations)
    intervals: dict[tuple[int, int], Interval] = {}
    covered = 0
    for only_a, only_b, _ in counts.tolist():
        if (only_a, only_b) not in intervals:
            intervals[only_a, only_b] = paired_difference_interval(*paired(only_a, only_b, n))
        interval = intervals[only_a, only_b]
        covered += interval.low <= p_only_a - p_only_b <= interval.high
    # 95 % less 1.5 points, which is three standard errors of 2,000 simulations.
    assert covered / simulations >= 0.935


def test_a_paired_comparison_needs_the_same_inputs() -> None:
    with pytest.raises(InputError, match="same inputs"):
        paired_difference_interval([True], [True, False])
    with pytest.raises(InputError, match="same inputs"):
        paired_difference_interval([], [])


@pytest.mark.parametrize(
    ("top1", "n", "classes", "expected"),
    [
        (0.001, 1000, 1000, True),
        (0.01, 1000, 1000, True),  # significantly above 1 in 1,000, and broken all the same
        (0.05, 300, 1000, True),  # EfficientNet-Lite0 fed with 0..255
        (0.40, 100, 1000, False),
        (0.53, 300, 1000, False),
        (0.10, 10_000, 10, True),
        (0.75, 500, 10, False),
        (0.52, 1000, 2, True),
        (0.80, 200, 2, False),
        (1.0, 8, 10, False),
        (1.0, 1, 2, True),  # one input shows nothing
    ],
)
def test_near_chance_tells_broken_preprocessing_from_weak_models(
    top1: float, n: int, classes: int, expected: bool
) -> None:
    assert near_chance(top1, n, classes) is expected


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    values = RNG.normal(size=20)
    interval = jackknife_interval(lambda indices: float(values[indices].mean()), 20)
    expected = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected)
    assert interval.estimate == pytest.approx(values.mean())


def test_the_jackknife_of_a_ratio_holds_the_true_value_as_often_as_it_says() -> None:
    def held(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        x = rng.gamma(2.0, size=300)
        y = 3.0 * x + rng.normal(size=300)
        interval = jackknife_interval(lambda i: float(y[i].sum() / x[i].sum()), 300)
        return interval.low <= 3.0 <= interval.high

    # 95 % of 400 with a standard deviation of 1.1 points.
    assert 0.92 <= np.mean([held(seed) for seed in range(400)]) <= 0.98


def test_a_statistic_that_is_not_finite_has_no_interval() -> None:
    interval = jackknife_interval(lambda indices: math.inf, 5)
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_the_margin_of_a_rank_says_whether_a_class_is_among_the_highest() -> None:
    rng = np.random.default_rng(0)
    scores, classes = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)
    for k in (1, 5):
        among = [c in np.argsort(-row)[:k] for row, c in zip(scores, classes, strict=True)]
        assert ((rank_margins(scores, classes, k=k) > 0) == among).all()


def test_noise_of_margins_is_that_of_the_float_models_class_against_the_next() -> None:
    reference = np.array([[4.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    outputs = np.array([[3.0, 1.0, 0.0], [0.0, 2.0, 2.5]])  # margins 2 of 3, -0.5 of 1
    expected = 10 * math.log10((3.0**2 + 1.0**2) / (1.0**2 + 1.5**2))
    assert margin_sqnr_db(outputs, reference) == pytest.approx(expected)
    assert measure(outputs, reference=reference, labels=None).margin_sqnr_db == pytest.approx(
        expected
    )
    assert margin_sqnr_db(reference + 7.0, reference) == math.inf  # no prediction changes


def test_scores_that_are_cut_off_are_noise_of_margins_more_than_of_outputs() -> None:
    reference = np.array([[10.0, 9.0, -10.0, -10.0]])
    cut_off = np.minimum(reference, 9.0)
    assert sqnr_db(cut_off, reference) > 20
    assert margin_sqnr_db(cut_off, reference) == pytest.approx(0.0)


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_float_says_nothing_of_the_noise(nothing: float) -> None:
    reference = np.array([1.0, 2.0, nothing])
    assert sqnr_db(np.array([1.1, 2.2, nothing]), reference) == pytest.approx(20.0)
    assert sqnr_db(np.array([1.1, nothing, nothing]), reference) == -math.inf
