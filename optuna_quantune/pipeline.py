"""Work on many cores: an ordered map over a thread pool, and a limit that all work shares.

Decoding images and running batches both spend their time outside the interpreter lock, and both
must not run far ahead, or a large set would end up in memory. Trials that run side by side would
each fill all cores; the limit makes them take turns, batch by batch, and keeps the machine quiet
while latency is measured.
"""

from __future__ import annotations

import contextlib
import os
import threading
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


class CoreLimit:
    """Hands out the cores of this process, in the order in which they are asked for.

    Not reentrant: work that holds cores must not ask for more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._used = 0

    @contextlib.contextmanager
    def take(self, wanted: int | None = None) -> Iterator[None]:
        """Waits for cores and keeps them for a while.

        Args:
            wanted: How many; None, or more than there are, is all of them.
        """
        ticket = object()
        cores = available_cores()
        count = cores if wanted is None else min(wanted, cores)

        def ready() -> bool:
            return self._waiting[0] is ticket and self._used + count <= cores

        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(ready)
                self._used += count
            finally:  # Ctrl-C may end the wait
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


# The one limit of this process.
CORES = CoreLimit()


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
