"""Being asked to stop, by SIGTERM, SIGUSR1 or Ctrl-C: after a checkpoint where there is one to save, else at once.

Schedulers send SIGTERM, or SIGUSR1 some time before it, when the time of a job is over. The command line handles them
(:func:`handled`); a loop that can save what it has done listens (:func:`listening`). A second signal, or the end of the
grace, stops it at once: what was saved before is whole, and the command goes on from there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__without_effect__ = "a run that was stopped ends with the same numbers"

GRACE_S = 25.0
"""Longest time from a signal to the end: Slurm and Kubernetes kill 30 s after theirs."""

RESUMABLE = 75
"""Exit status of a command that was stopped and goes on when it is started again; EX_TEMPFAIL of sysexits.h."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

PASSED_ON = getattr(signal, "SIGUSR2", signal.SIGTERM)
"""What a process sends to those that it has started when it is asked to stop."""

_asked: int | None = None
_seen: set[int] = set()
_started = False
_listeners = 0
_others: list[int] = []
_putting_off = 0
_put_off: list[int] = []


class Stopped(KeyboardInterrupt):
    """The process was asked to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def handled(started: bool = False) -> Iterator[None]:
    """Handle the signals inside; in threads other than the main one, or where it is done already, change nothing.

    Args:
        started: by another process that passes its signals on. A terminal and a scheduler send theirs to both, so one is
            a second request only where it comes a second time.
    """
    global _asked, _started
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _stop:
        yield
        return
    before: dict[int, Any] = {
        number: signal.signal(number, _stop) for number in (*STOPPING, *([PASSED_ON] if started else []))
    }
    _asked, _started = None, started
    _seen.clear()
    _put_off.clear()
    try:
        yield
    finally:
        _disarm()
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextmanager
def listening() -> Iterator[None]:
    """Leave it to the block to look at :func:`asked` in time, and to end when it has saved what it has done."""
    global _listeners
    _listeners += 1
    try:
        yield
    finally:
        _listeners -= 1
        _disarm()


@contextmanager
def passed_on(processes: Iterable[int]) -> Iterator[None]:
    """Pass each signal on to other processes inside, as :data:`PASSED_ON`.

    Args:
        processes: their ids, of children that are joined after the block only: an id is not used again before that.
    """
    mine = list(processes)
    _others.extend(mine)
    try:
        yield
    finally:
        for process in mine:
            _others.remove(process)


@contextmanager
def put_off() -> Iterator[None]:
    """Put the signals off inside; a process that is started there puts them off until it calls :func:`receive`.

    So one that comes before a process handles it is neither lost nor a trace on the screen.
    """
    global _putting_off
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, PASSED_ON))
    _putting_off += 1
    try:
        yield
    finally:
        _putting_off -= 1
        receive()
        while _put_off and not _putting_off:
            _stop(_put_off.pop(0), None)


def receive() -> None:
    """Take signals again that were put off when this process was started, and those that have come since."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, PASSED_ON))


def asked() -> bool:
    """Return whether the process was asked to stop."""
    return _asked is not None


def number() -> int:
    """Return the number of the signal by which the process was asked to stop; 0: it was not."""
    return _asked or 0


def check() -> None:
    """Stop, if that was asked for.

    Raises:
        Stopped: it was.
    """
    if _asked is not None:
        raise Stopped(_asked)


def _stop(number: int, _: FrameType | None) -> None:
    global _asked
    if _putting_off:  # another thread, which blocks nothing, was given it
        _put_off.append(number)
        return
    first, again = _asked is None, number in _seen
    _seen.add(number)
    if _started and not first and not again:
        return
    _asked = _asked or number
    for process in _others:
        with suppress(OSError):  # it has ended
            os.kill(process, PASSED_ON)
    if not first or not _listeners:
        raise Stopped(_asked)
    # Not print(): the main thread may be inside of one, and cannot be entered twice.
    with suppress(OSError):
        os.write(2, f"\nStopping after this step, in {GRACE_S:.0f} s at most; once more: at once.\n".encode())
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)


def _too_late(number: int, _: FrameType | None) -> None:
    raise Stopped(_asked or number)


def _disarm() -> None:
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)
