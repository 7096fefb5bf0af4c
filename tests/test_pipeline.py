from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from optuna_quantune import pipeline
from optuna_quantune.pipeline import CoreLimit
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


def test_work_that_shares_the_limit_never_uses_more_cores_than_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 3)
    limit, lock, used, most = CoreLimit(), threading.Lock(), 0, []

    def work(wanted: int | None) -> None:
        nonlocal used
        count = 3 if wanted is None or wanted > 3 else wanted
        with limit.take(wanted):
            with lock:
                used += count
                most.append(used)
            time.sleep(0.002)
            with lock:
                used -= count

    list(ordered_map(work, [1, 1, 2, None, 1, 5, 1, 2] * 3, workers=8))
    assert max(most) == 3
    assert used == 0


def test_whoever_wants_all_cores_is_not_kept_waiting_by_later_comers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 2)
    limit, order = CoreLimit(), []
    running = threading.Event()

    def first() -> None:
        with limit.take(1):
            running.set()
            while len(limit._waiting) < 2:
                time.sleep(0.001)

    def want(name: str, cores: int | None, before: int) -> None:
        running.wait(10)
        while len(limit._waiting) < before:
            time.sleep(0.001)
        with limit.take(cores):
            order.append(name)

    threads = [
        threading.Thread(target=first),
        threading.Thread(target=want, args=("all", None, 0)),
        threading.Thread(target=want, args=("one", 1, 1)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == ["all", "one"]


def test_cores_are_given_back_when_the_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 1)
    limit = CoreLimit()
    with pytest.raises(KeyError), limit.take():
        raise KeyError
    with limit.take():
        pass
