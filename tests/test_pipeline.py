from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from optuna_quantune.pipeline import ordered_map


def test_results_come_in_the_order_of_the_items_whatever_finishes_first() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(ordered_map(slow_first, range(10), workers=4)) == [i * i for i in range(10)]


def test_items_are_worked_on_side_by_side() -> None:
    both = threading.Barrier(2, timeout=10)
    assert len(list(ordered_map(lambda _: both.wait(), range(4), workers=2))) == 4


def test_it_reads_no_further_ahead_than_its_workers() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = ordered_map(lambda item: item, items(), workers=3)
    next(results)
    assert len(read) == 4
    results.close()  # type: ignore[attr-defined]  # a generator
    assert len(read) == 4


def test_an_exception_is_raised_at_its_place() -> None:
    def fail_at_3(item: int) -> int:
        if item == 3:
            raise KeyError(item)
        return item

    results = ordered_map(fail_at_3, range(10), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
