"""Memory: threads that prepare large volumes share one budget, and what does not fit is named with its size."""

from __future__ import annotations

import threading
import time

from ssl3d.memory import Budget, available


def test_threads_share_a_budget_and_one_alone_always_fits() -> None:
    budget, now, most = Budget(100), [0], [0]
    guard = threading.Lock()

    def work(size: int) -> None:
        with budget.reserved(size):
            with guard:
                now[0] += size
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with guard:
                now[0] -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (60, 60, 30, 40, 100, 10, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] <= 100
    with budget.reserved(10_000):
        pass


def test_what_is_available_is_known_here() -> None:
    found = available()
    assert found is None or 2**20 < found < 2**50
