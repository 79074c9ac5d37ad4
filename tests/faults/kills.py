"""Kill a process at the n-th thing that it does to the disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What changes a disk: functions of os, through which everything in Python goes.
OPERATIONS = (
    "open", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "ftruncate", "write", "sync", "link",
)  # fmt: skip


class Counter:
    """Counts the operations on files below ``root`` and raises, or kills, at one of them.

    Args:
        root: operations on paths elsewhere are not counted; those on descriptors are.
        at: number of the operation, from 1; 0: only count.
        fault: called before that operation takes place.
    """

    def __init__(self, root: Path, at: int, fault: Callable[[], None]) -> None:
        self.root, self.at, self.fault, self.seen = str(root), at, fault, 0

    def __enter__(self) -> Counter:
        self._real = {name: getattr(os, name) for name in OPERATIONS}
        for name, real in self._real.items():
            setattr(os, name, self._counted(name, real))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else ""
            inside = isinstance(first, int) or str(os.fspath(first)).startswith(self.root)
            reads = name == "open" and not (len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR))
            if inside and not reads:
                self.seen += 1
                if self.seen == self.at:
                    self.fault()
            return real(*args, **kwargs)

        return function


def kill() -> None:
    """Die without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


#: What the system says when it refuses, with a word of the remedy.
CODES = {
    "ENOSPC": "make room",
    "EDQUOT": "quota",
    "EROFS": "can be written to",
    "EACCES": "permissions",
    "EFBIG": "ulimit -f",
}


def refuse(code: str) -> Callable[[], None]:
    def fault() -> None:
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    return fault
