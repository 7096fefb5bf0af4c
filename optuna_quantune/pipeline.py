"""A map over a thread pool that keeps the order and stays a few items ahead of its consumer.

Decoding images and running batches both spend their time outside the interpreter lock, and both
must not run far ahead, or a large set would end up in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Give the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: respects taskset and container CPU sets
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """Apply a function to items in a thread pool and give the results in the items' order.

    While the consumer handles one result, the next ones are already being worked on. ``items``
    is read in the consumer's thread, at most ``workers + 1`` items ahead. When the consumer
    stops early, what has not begun is dropped.

    Args:
        function: Called in a pool thread; its exception is raised at the consumer.
        items: What to apply it to.
        workers: Number of threads, at least 1.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
