"""Locks between processes that share a store."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from pathlib import Path

from ssl3d.errors import DataError

_POLL_SECONDS = 0.2


_SAY_AFTER_SECONDS = 2.0


_log = logging.getLogger(__name__)


class _Held:
    """The lock behind :meth:`ResultStore.claim`."""

    # POSIX locks do not exclude threads of one process, so those are kept apart here. The process
    # is part of the key because a forked child copies this table but none of the locks.
    _mine: dict[tuple[int, str], int] = {}  # noqa: RUF012
    _guard = threading.Lock()

    def __init__(self, path: Path, wait: bool) -> None:
        self.path, self.wait = path, wait
        self.key = (os.getpid(), str(path.resolve()))
        self.descriptor: int | None = None

    def __enter__(self) -> bool:
        began, said = time.monotonic(), False
        while not self._try():
            if not self.wait:
                return False
            if not said and time.monotonic() - began > _SAY_AFTER_SECONDS:
                _log.warning("Waiting for another process, which holds this cell: %s", self._owner())
                said = True
            time.sleep(_POLL_SECONDS)
        return True

    def __exit__(self, *_: object) -> None:
        if self.descriptor is None:
            return
        # Deleted while still locked, so nobody can lock the file between the two.
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        with self._guard:
            del self._mine[self.key]

    def _try(self) -> bool:
        with self._guard:
            if self._mine.get(self.key) == threading.get_ident():
                raise RuntimeError(f"{self.path} is claimed twice by one thread")
            if self.key in self._mine:
                return False
            self.descriptor = self._lock()
            if self.descriptor is None:
                return False
            self._mine[self.key] = threading.get_ident()
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return True

    def _lock(self) -> int | None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before deleted the file; whoever opened it before that locked nothing.
            if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                return descriptor
        except (BlockingIOError, PermissionError, FileNotFoundError):
            pass
        except OSError as error:
            os.close(descriptor)
            raise DataError(
                f"{self.path}: the file system cannot lock files ({error.strerror}). "
                "Put the store on one that can; two processes could otherwise compute one cell."
            ) from error
        os.close(descriptor)
        return None

    def _owner(self) -> str:
        with self._guard:
            # Not to be opened then: closing any descriptor of a file frees the process's lock on it.
            if self.key in self._mine:
                return f"another thread of process {os.getpid()}"
            try:
                return self.path.read_text().strip() or "unknown"
            except OSError:
                return "unknown"
