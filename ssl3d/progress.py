"""Progress of anything longer than two seconds: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

__without_effect__ = "it says how far a job is"

LINE_EVERY_S = 10.0
QUIET_S = 2.0

SEND_EVERY_S = 0.5

_silent = False
_send: Callable[[Message], None] | None = None


class Message(NamedTuple):
    """What a process tells the one that shows the progress of several: a line, how far its job is, or that it has
    ended."""

    line: str = ""
    title: str = ""
    done: int = 0
    total: int = 0
    rate: str = ""
    note: str = ""
    ended: bool = False


@contextmanager
def sending(send: Callable[[Message], None]) -> Iterator[None]:
    """Hand progress to ``send`` inside, instead of showing it."""
    global _send
    before, _send = _send, send
    try:
        yield
    finally:
        _send = before


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress inside, and hand none on, for callers that print their own."""
    global _silent, _send
    before, (_silent, _send) = (_silent, _send), (True, None)
    try:
        yield
    finally:
        _silent, _send = before


def say(text: str) -> None:
    """Print a line about the progress."""
    if _send is not None:
        _send(Message(line=text))
    elif not _silent:
        print(text, file=sys.stderr, flush=True)


class Track:
    """Progress of one job: ``with Track("Pretraining gvsl", total=100) as track: track.update(...)``.

    Args:
        title: what is being done.
        total: number of steps.
        unit: name of a step, for the rate.
    """

    def __init__(self, title: str, total: int, unit: str = "step") -> None:
        self.title, self.total, self.unit = title, total, unit
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = self._last_line = time.monotonic()
        self._first: int | None = None
        self._note = ""
        self._done = 0

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if _send is not None:
            _send(Message(title=self.title, total=self.total))
        elif self._console.is_terminal and not _silent:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.title, total=self.total, rate="", note="")
            self._bar.start()
        return self

    def update(self, done: int, values: Mapping[str, float] | None = None, note: str = "") -> None:
        """Report that ``done`` of the steps are done, with named values to show."""
        if self._first is None:
            self._first = done - 1  # a resumed job does not start at 0
        self._done = done
        if values is not None or note:
            self._note = note or " ".join(f"{name} {value:.4g}" for name, value in (values or {}).items())
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=done, rate=f"{rate:.3g} {self.unit}/s", note=Text(self._note)
            )
        elif _send is not None:
            if now - self._last_line >= SEND_EVERY_S:
                self._last_line = now
                _send(Message("", self.title, done, self.total, f"{rate:.3g} {self.unit}/s", self._note))
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            left = (self.total - done) / max(rate, 1e-9)
            self._line(f"{rate:.3g} {self.unit}/s, {duration(left)} left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if _send is not None:
            _send(Message(title=self.title, ended=True))
        elapsed = time.monotonic() - self._start
        if kind is None and elapsed > QUIET_S:
            self._line(f"done in {duration(elapsed)}")

    def _line(self, timing: str) -> None:
        note = f" | {self._note}" if self._note else ""
        say(f"{self.title}: {self._done}/{self.total}, {timing}{note}")


def duration(seconds: float) -> str:
    """Return ``seconds`` for people.

    >>> duration(4), duration(75), duration(7300)
    ('4 s', '1 min 15 s', '2 h 01 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Board:
    """The progress of several processes in one place: a bar for each in a terminal, one line for all elsewhere.

    Args:
        others: connections on which other processes send each :class:`Message`; one that has ended is left out. What
            comes in another way is given to :meth:`show`.

    Example::

        with Board(connections) as board, sending(board.mine):
            ...
    """

    def __init__(self, others: Sequence[Connection]) -> None:
        self._others = list(others)
        self._console = Console(stderr=True)
        self._lock = threading.Lock()
        self._last: dict[int, Message] = {}
        self._tasks: dict[int, TaskID] = {}
        self._bars: Progress | None = None
        self._printed = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[note]}"),
                console=self._console, transient=True,
            )  # fmt: skip
            self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._bars is not None:
            self._bars.stop()

    def mine(self, message: Message) -> None:
        """Show a message of this process."""
        self.show(0, message)

    def _listen(self) -> None:
        places = {connection: place for place, connection in enumerate(self._others, 1)}
        while places and not (self._ending.is_set() and not wait(list(places), timeout=0)):
            for connection in wait(list(places), timeout=SEND_EVERY_S):
                assert isinstance(connection, Connection)
                try:
                    self.show(places[connection], connection.recv())
                except (EOFError, OSError):  # it has ended, perhaps within a message
                    del places[connection]

    def show(self, place: int, message: Message) -> None:
        """Show a message of the process of that number; 0 is this one."""
        with self._lock:
            if message.line:
                self._print(message.line)
                return
            if message.ended:
                self._last.pop(place, None)
                if self._bars is not None and place in self._tasks:
                    self._bars.update(self._tasks[place], visible=False)
                return
            self._last[place] = message
            if self._bars is not None:
                if place not in self._tasks:
                    self._tasks[place] = self._bars.add_task("", rate="", note="")
                self._bars.update(
                    self._tasks[place], description=message.title, completed=message.done, total=message.total,
                    rate=message.rate, note=Text(message.note), visible=True,
                )  # fmt: skip
            elif time.monotonic() - self._printed >= LINE_EVERY_S:
                self._printed = time.monotonic()
                self._print(
                    "; ".join(f"{m.title}: {m.done}/{m.total}" for _, m in sorted(self._last.items()))
                )

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Tracker:
    """Adapts (done, total, what) callbacks of the data layer to one progress display per job."""

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._track: Track | None = None
        return self._report

    def _report(self, done: int, total: int, what: str) -> None:
        if self._track is None or self._track.title != what or self._track.total != total:
            self.__exit__()
            self._track = Track(what, total, unit="file")
            self._track.__enter__()
        self._track.update(done)

    def __exit__(self, *exc: Any) -> None:
        if self._track is not None:
            failed = exc and exc[0] is not None
            self._track.__exit__(exc[0] if failed else None, None, None)
            self._track = None
