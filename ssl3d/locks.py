"""Locks between processes that share a store, or the folder of a run."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

from ssl3d.errors import DataError, ReadError, WriteError
from ssl3d.files import explained, read_bytes, real

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__without_effect__ = "who waits for whom"

_POLL_SECONDS = 0.2
_SAY_AFTER_SECONDS = 2.0
_MOST_BYTES = 4096  # of a lock's file, which names its owner

_UNKNOWN = "a process that left no name"

_log = logging.getLogger(__name__)


def this_process(process: int | None = None) -> str:
    """Return the name under which a process of this machine, or this one, holds locks: "process 12 on host"."""
    return f"process {os.getpid() if process is None else process} on {socket.gethostname()}"


class Held:
    """A lock of this thread, by a file: ``with Held(path, wait=False) as mine: ...`` yields whether it is held.

    The lock is a POSIX record lock, so the kernel frees it at the moment its owner dies, however it dies, and a worker
    process forked by the owner does not keep it (as it would a ``flock``). It also works between machines over NFS.

    Args:
        path: of the lock's file, which exists only while somebody holds it.
        wait: wait for another owner; otherwise yield False at once when there is one.
        what: what is held, for the line that says who is waited for.

    Raises:
        DataError: the file system has no locks.
        WriteError: the file cannot be made.
        RuntimeError: this thread holds it already.
    """

    # POSIX locks do not exclude threads of one process, so those are kept apart here. The process
    # is part of the key because a forked child copies this table but none of the locks.
    _mine: dict[tuple[int, str], int] = {}  # noqa: RUF012
    _guard = threading.Lock()

    def __init__(self, path: Path, wait: bool, what: str = "this cell") -> None:
        self.path, self.wait, self.what = path, wait, what
        self.key = (os.getpid(), str(real(path)))
        self.descriptor: int | None = None
        self._others: list[str] = []  # names of the same file

    def __enter__(self) -> bool:
        began, said = time.monotonic(), False
        while not self._try():
            if not self.wait:
                return False
            if not said and time.monotonic() - began > _SAY_AFTER_SECONDS:
                _log.warning("Waiting for another process, which holds %s: %s", self.what, self.owner())
                said = True
            time.sleep(_POLL_SECONDS)
        return True

    def __exit__(self, *_: object) -> None:
        if self.descriptor is None:
            return
        # Deleted while still locked, so nobody can lock the file between the two.
        for name in (*self._others, str(self.path)):
            with suppress(OSError):
                os.unlink(name)  # noqa: PTH108
        os.close(self.descriptor)
        with self._guard:
            for name in self._others:
                del self._mine[self.key[0], name]
            del self._mine[self.key]

    def also(self, name: str) -> bool:
        """Hold another lock in the same folder, too, until this one is freed; return whether it is held.

        Its file is another name of this lock's own. Thousands of files of their own take long to make: ext4 looks
        through all that were deleted in the last minutes for each. A lock of which a file is there, held or left by a
        killed process, is not taken; :class:`Held` knows which.

        Args:
            name: of the lock's file.

        Raises:
            RuntimeError: this thread holds it already.
        """
        path = f"{self.key[1].rpartition(os.sep)[0]}{os.sep}{name}"
        with self._guard:
            if self._mine.get((self.key[0], path)) == threading.get_ident():
                raise RuntimeError(f"{path} is claimed twice by one thread")
            try:
                os.link(self.key[1], path)  # fails where there is one; not every file system has links
            except OSError:
                return False
            self._mine[self.key[0], path] = threading.get_ident()
        self._others.append(path)
        return True

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
        with suppress(OSError):  # of a full disk: it is held without a name, too
            name = f"{this_process()}\n".encode()
            os.write(self.descriptor, name)
            # Not to 0 and before: ext4 takes what was cut to nothing for replaced, and writes it to the disk when closed.
            os.ftruncate(self.descriptor, len(name))
        return True

    def _lock(self) -> int | None:
        """Return the descriptor of the lock's file, locked; None: another process holds it."""
        descriptor = self._lock_file()
        if descriptor is None or os.fstat(descriptor).st_nlink < 2:
            return descriptor
        # Left by a process that was killed while it held several (see also): free, but each by a file of its own.
        with explained(self.path):
            try:
                os.unlink(self.path)  # noqa: PTH108
            except FileNotFoundError:
                pass
            finally:
                os.close(descriptor)
        return self._lock_file()

    def _lock_file(self) -> int | None:
        if fcntl is None:
            raise DataError(
                "This system has no POSIX file locks, which keep two processes from computing one thing. "
                "Fix: use Linux, macOS, or Windows with WSL."
            )
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Never through a link, whose target would be overwritten by the owner's name.
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            except FileNotFoundError:  # the folder was removed just now
                return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError(f"{self.path} is no regular file, so it cannot be a lock. Fix: remove it.")
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

    def owner(self) -> str:
        """Return who holds it, as far as is known."""
        with self._guard:
            # Not to be opened then: closing any descriptor of a file frees the process's lock on it.
            if self.key in self._mine:
                return f"another thread of process {os.getpid()}"
            try:
                return read_bytes(self.path, _MOST_BYTES).decode(errors="replace").strip() or _UNKNOWN
            except ReadError:
                return _UNKNOWN


def forget_lock(path: Path) -> None:
    """Remove the file of a lock that a killed process has left, where that can be done; one that is held stays."""
    if path.exists():
        with suppress(WriteError, DataError), Held(path, wait=False):
            pass
