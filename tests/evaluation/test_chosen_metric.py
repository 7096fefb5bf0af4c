from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.chosen_metric import ChosenMetric
from optuna_quantune.evaluation.metrics import can_be_class_scores


RNG = np.random.default_rng(0)
BOXES = RNG.normal(100.0, 50.0, size=(20, 4)).astype(np.float32)
SCORES = RNG.random((20, 3)).astype(np.float32)
EVERYTHING = np.arange(20)


def own(function: Any, direction: Any = "maximize") -> ChosenMetric:
    return ChosenMetric.of(function, None, direction, labels=False)


def test_a_model_with_one_output_gives_arrays_to_the_users_function() -> None:
    def mean_error(outputs: NDArray[Any], reference: NDArray[Any]) -> float:
        return float(np.abs(outputs - reference).mean())

    metric = own(mean_error, "minimize")
    measured = metric.measure(
        {"boxes": BOXES + 2.0}, {"boxes": BOXES}, labels=None, indices=EVERYTHING
    )
    assert metric.value(measured) == pytest.approx(2.0, abs=1e-4)
    assert (metric.name, metric.sign) == ("mean_error", -1.0)
    # Embeddings and boxes are no classes, even where their shape is (n, k).
    assert measured.agreement is None
    assert measured.top1 is None


def test_a_model_with_several_outputs_gives_mappings_by_name() -> None:
    seen: list[set[str]] = []

    def count(outputs: dict[str, NDArray[Any]], reference: dict[str, NDArray[Any]]) -> int:
        seen.append(set(outputs) & set(reference))
        return len(outputs["boxes"])

    both = {"boxes": BOXES, "scores": SCORES}
    measured = own(count).measure(both, both, labels=None, indices=EVERYTHING)
    assert (measured.own, seen) == (20, [{"boxes", "scores"}])
    assert measured.sqnr_db == math.inf


def test_labels_and_indices_are_given_to_a_function_that_asks_for_them() -> None:
    def ask(
        outputs: Any, reference: Any, *, labels: NDArray[np.int64], indices: NDArray[np.int64]
    ) -> float:
        return float(labels.sum() * 100 + indices.sum())

    measured = own(ask).measure(
        {"scores": SCORES}, {"scores": SCORES}, labels=np.ones(20, int), indices=EVERYTHING + 5
    )
    assert measured.own == 2000 + EVERYTHING.sum() + 100
    assert measured.top1 == np.mean(SCORES.argmax(axis=1) == 1)  # there are labels


def test_the_noise_of_all_outputs_counts_alike_whatever_their_unit() -> None:
    metric = ChosenMetric.of("sqnr_db", None, "maximize", labels=False)

    def sqnr(boxes: float, scores: float) -> float | None:
        noisy = {
            "boxes": BOXES * (1 + boxes),
            "scores": SCORES * (1 + scores),
            "classes": SCORES.argmax(axis=1),
        }
        exact = {"boxes": BOXES, "scores": SCORES, "classes": np.zeros(20, np.int64)}
        return metric.measure(noisy, exact, labels=None, indices=EVERYTHING).sqnr_db

    assert sqnr(0.1, 0.0) == pytest.approx(sqnr(0.0, 0.1), abs=0.01)
    assert sqnr(0.1, 0.1) == pytest.approx(20.0, abs=0.01)  # whole numbers do not count
    assert sqnr(0.0, 0.1) == pytest.approx(20.0 + 10 * math.log10(2), abs=0.01)


def test_whole_numbers_have_no_noise_ratio() -> None:
    metric = ChosenMetric.of(lambda *_: 1.0, None, "maximize", labels=False)
    classes = {"classes": SCORES.argmax(axis=1)}
    assert metric.measure(classes, classes, labels=None, indices=EVERYTHING).sqnr_db is None


@pytest.mark.parametrize(
    ("shape", "metric"),
    [
        ((None, 10), "agreement"),
        ((1, 10, 1, 1), "agreement"),
        ((), "agreement"),  # of no known rank
        ((None, 10, 32, 32), "sqnr_db"),
        ((None, 10, None, None), "sqnr_db"),
        ((None, 1), "sqnr_db"),
        ((None,), "sqnr_db"),
    ],
)
def test_the_default_is_what_the_outputs_can_be(
    shape: tuple[int | None, ...], metric: str
) -> None:
    def default(labels: bool) -> str:
        classifies = can_be_class_scores(shape)
        return ChosenMetric.of(None, None, "maximize", labels=labels, classifies=classifies).name

    assert default(labels=False) == metric
    assert default(labels=True) == "top1"


@pytest.mark.parametrize("answer", [None, "good", float("nan"), np.zeros(3)])
def test_a_function_that_gives_no_number_is_named(answer: object) -> None:
    def judge(outputs: Any, reference: Any) -> Any:
        return answer

    with pytest.raises(ValueError, match="the metric gave .*not a number"):
        own(judge).measure({"s": SCORES}, {"s": SCORES}, labels=None, indices=EVERYTHING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("f1", None, "maximize"), "metric 'f1': use one of top1, top5, agreement, sqnr_db, or a"),
        (("top1", None, "maximize"), "metric 'top1': the evaluation inputs have no labels"),
        (("agreement", None, "minimize"), "metric 'agreement': is maximized"),
        ((max, None, "up"), "direction 'up': use 'maximize' or 'minimize'"),
        ((max, min, "maximize"), "metric and evaluate: give one of them"),
        ((None, "min", "maximize"), "evaluate: must be a function"),
    ],
)
def test_contradictions_are_named(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ChosenMetric.of(*arguments, labels=False)


def test_a_function_cannot_pass_for_a_metric_by_name() -> None:
    def top1(outputs: Any, reference: Any) -> float:
        return 1.0

    def latency(session: object) -> float:
        return 0.0

    with pytest.raises(InputError, match="cannot be named 'latency'"):
        ChosenMetric.of(None, latency, "minimize", labels=False)
    with pytest.raises(InputError, match="cannot be named 'top1'"):
        own(top1)
    assert own(lambda outputs, reference: 1.0).name == "metric"
