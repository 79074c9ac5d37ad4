"""How much memory there is, and a budget that threads share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl3d.errors import MemoryFault

__without_effect__ = "who waits for whom"

SHARE = 0.8
"""Of the memory that is free when a budget is made."""

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUPS = (  # (limit, use) of version 2, and of version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available() -> int | None:
    """Return the bytes that this process can still have, of its machine, container or own limit; None: not known."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = _MEMINFO.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for limit, use in _CGROUPS:
        with suppress(OSError, ValueError):  # also the limit "max"
            found.append(max(0, int(limit.read_text()) - int(use.read_text())))
    with suppress(ImportError, OSError, ValueError, IndexError):  # ulimit -v
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(_STATM.read_text().split()[0])
            found.append(max(0, most - pages * resource.getpagesize()))
    return min(found, default=None)


class Budget:
    """Bytes that threads share: who does not fit waits for the others; one alone always fits.

    Args:
        total: bytes; None: a share of what is available, as far as that is known.

    Example::

        with budget.reserved(volume.nbytes):
            ...
    """

    def __init__(self, total: int | None = None) -> None:
        free = available() if total is None else None
        self.total = total if total is not None else None if free is None else int(SHARE * free)
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes inside; waits until they are free."""
        with self._changed:
            while self.total is not None and self._used and self._used + size > self.total:
                self._changed.wait()
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the machine or of a device is used up."""
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


NO_ROOM = "end other programs, use a machine with more memory, or leave the file out"
"""What helps where one file is too much."""


@contextmanager
def explained(what: str, fix: str) -> Iterator[None]:
    """Turn running out of memory inside into an error meant for users.

    Args:
        what: did not fit, with its sizes.
        fix: which options make it smaller.

    Raises:
        MemoryFault: in the place of what the system or torch raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or ["no memory is left"]
        raise MemoryFault(f"{what} does not fit into memory ({lines[0][:200]}). Fix: {fix}.") from error
