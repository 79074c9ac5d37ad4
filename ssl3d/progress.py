"""Progress of anything longer than two seconds: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 10.0
QUIET_S = 2.0

_silent = False


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress inside, for callers that print their own."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def say(text: str) -> None:
    """Print a line about the progress."""
    if not _silent:
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
        if self._console.is_terminal and not _silent:
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
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            left = (self.total - done) / max(rate, 1e-9)
            self._line(f"{rate:.3g} {self.unit}/s, {duration(left)} left")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
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
