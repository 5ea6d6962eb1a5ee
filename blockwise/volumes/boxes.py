"""Run a function over many boxes of a volume, few at a time, in threads or on a dask client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import product
from typing import Any, TypeVar

from agq.blockwise.volumes.triples import Box, triple

T = TypeVar("T")
R = TypeVar("R")


def boxes(start: Sequence[int], stop: Sequence[int], size: Sequence[int]) -> list[Box]:
    """Cut the box `start` to `stop` into boxes of at most `size` voxels, in C order."""
    ranges = [range(a, b, s) for a, b, s in zip(start, stop, size, strict=True)]
    return [
        (triple(corner), triple(min(c + s, b) for c, s, b in zip(corner, size, stop, strict=True)))
        for corner in product(*ranges)
    ]


def unordered(
    task: Callable[[T], R], items: Iterable[T], *, client: Any = None, workers: int | None = None
) -> Iterator[R]:
    """Yield the result of a task for each item as it ends, in any order.

    Only a few tasks and results exist at a time. The first error stops the rest and is raised.

    Parameters
    ----------
    task
        Called with one item; on a client it must be picklable and repeatable.
    client
        A `distributed.Client`; None: threads of this process.
    workers
        Threads; by default one per processor this process may use. Ignored with a client.
    """
    if client is not None:
        yield from _on_client(task, items, client)
        return
    count = workers or len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(count)
    try:
        waiting: set[Future[R]] = set()
        for item in items:
            waiting.add(pool.submit(task, item))
            if len(waiting) > 2 * count:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_client(task: Callable[[T], R], items: Iterable[T], client: Any) -> Iterator[R]:
    from distributed import as_completed

    window = 4 * max(1, sum(client.nthreads().values()))
    pending = as_completed()
    held = 0
    for item in items:
        # pure=False: the same block of a volume changed meanwhile must be computed again.
        pending.add(client.submit(task, item, pure=False))
        held += 1
        if held >= window:
            yield next(pending).result()
            held -= 1
    for future in pending:
        yield future.result()
