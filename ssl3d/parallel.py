"""A map over items in threads, with progress and the first error in order of the items."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what was done last)."""


T = TypeVar("T")


R = TypeVar("R")


def run_parallel(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None = None,
    progress: Progress | None = None,
    message: str = "",
) -> list[R]:
    """Apply ``function`` to every item in threads; results come in the order of the items.

    Threads are enough: decompression, filtering and interpolation release the interpreter's lock.
    An exception stops what has not started and is raised.
    """
    results: list[R] = []
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                results.append(future.result())
                if progress is not None:
                    progress(len(results), len(items), message)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results
