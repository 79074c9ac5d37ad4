"""The course of a run: JSON lines, and the loggers that are wanted."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ssl3d.config import PretrainConfig
from ssl3d.errors import PluginError, ReadError, printable
from ssl3d.files import explained, read_bytes, write_bytes
from ssl3d.models.weights.checkpoint import read_run
from ssl3d.pretrain.logger import End, Logger
from ssl3d.progress import say
from ssl3d.registry.registry import registry

__without_effect__ = "it is told what was computed"

_wanted: ContextVar[tuple[str, ...]] = ContextVar(
    "loggers", default=PretrainConfig.model_fields["loggers"].default
)


def check_loggers(names: Collection[str]) -> None:
    """Raise PluginError for a logger that does not exist, or that lacks a package."""
    for name in names:
        _load(name)


@contextmanager
def logged_by(names: Collection[str]) -> Iterator[None]:
    """Tell runs inside to the loggers ``names`` (``pretrain.loggers``).

    It surrounds a run, as its progress does, and is not handed to it: no number of the run may depend on it.

    Raises:
        PluginError: one does not exist, or lacks a package.
    """
    check_loggers(names)
    token = _wanted.set(tuple(dict.fromkeys(names)))
    try:
        yield
    finally:
        _wanted.reset(token)


def check_logger(name: str, cls: Any) -> None:
    """Raise PluginError for a logger class that cannot be used, or that lacks a package."""
    if not (isinstance(cls, type) and issubclass(cls, Logger)):
        raise PluginError(f"The logger {name} is no subclass of ssl3d.Logger.")
    requires: Any = cls.requires
    if not (
        isinstance(requires, Mapping) and all(isinstance(t, str) for pair in requires.items() for t in pair)
    ):
        raise PluginError(f"The logger {name}: requires = {requires!r}; write {{module: what pip installs}}.")
    lacking = {pip for module, pip in requires.items() if not _there(module)}
    if lacking:
        needed = " ".join(f"'{pip}'" for pip in sorted(lacking))
        raise PluginError(
            f"The logger {name} needs a package that is not installed. Fix: pip install {needed}, or leave {name} out of "
            "pretrain.loggers."
        )


def _load(name: str) -> type[Logger]:
    cls = registry().loggers.get(name).load()
    check_logger(name, cls)
    return cls


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is not there, or it is half imported
        return False


class Log:
    """The course of a run: JSON lines, which are part of it, and loggers.

    Lines after step ``start`` are dropped on opening: a resumed run writes them again.
    """

    def __init__(self, out: Path, start: int) -> None:
        classes = {name: _load(name) for name in _wanted.get()}
        self.path = out / "log.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        kept = [(line, values) for line, values in self._lines() if values["step"] <= start] if start else []
        write_bytes(self.path, "".join(f"{line}\n" for line, _ in kept).encode())
        self._before_training = [values for _, values in kept if values["step"] == 0]
        with explained(out):
            self._file = self.path.open("a", encoding="utf-8")
        self._loggers = Loggers(classes, out, start)
        self._told: set[str] = set()

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the lines up to the first that is damaged: the one that was being written when the run was killed."""
        try:
            data = read_bytes(self.path)
        except ReadError:
            return
        for line in data.decode(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(values, dict) or type(values.get("step")) is not int:
                return
            yield line, values

    def __enter__(self) -> Log:
        return self

    def before_training(self, name: str) -> float | None:
        """Return what was written as ``name`` of step 0, also before an interruption; None if the log was lost."""
        return next((line[name] for line in self._before_training if name in line), None)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step == 0:
            self._before_training.append(values)
        with explained(self.path):
            self._file.write(json.dumps({**self._finite(values, step), "step": step}, allow_nan=False) + "\n")
        self._loggers.tell(lambda logger: logger.write(step, dict(values)))

    def _finite(self, values: dict[str, float], step: int) -> dict[str, float | None]:
        """Return the values with None for what is not finite, which JSON has no word for; each is told once."""
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        for name in wrong.keys() - self._told:
            say(
                f"{name} = {wrong[name]} at step {step}: a measure, which trains nothing; {self.path} has null."
            )
        self._told |= wrong.keys()
        return {name: None if name in wrong else value for name, value in values.items()}

    def flush(self) -> None:
        with explained(self.path):
            self._file.flush()
        self._loggers.tell(lambda logger: logger.flush())

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        end: End = "finished" if kind is None else "stopped" if stopped else "failed"
        try:
            with explained(self.path):
                self._file.close()
        finally:
            self._loggers.tell(lambda logger: logger.finish(end))


class NoLog(Log):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        pass

    def before_training(self, name: str) -> float | None:
        return None

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        pass


class Loggers:
    """Those of one run. One that raises is named, once, and asked no more: a logger costs no run.

    Args:
        classes: by name.
        out: folder of the run.
        start: steps that are done.
    """

    def __init__(self, classes: Mapping[str, type[Logger]], out: Path, start: int) -> None:
        run = json.dumps(read_run(out)) if classes else ""
        self._loggers: dict[str, Logger] = {}
        for name, cls in classes.items():
            with self._guarded(name):
                logger = cls()
                logger.start(out, json.loads(run), start)  # each has a copy of its own
                self._loggers[name] = logger

    def tell(self, what: Callable[[Logger], None]) -> None:
        """Call ``what`` with each of them."""
        for name, logger in list(self._loggers.items()):
            with self._guarded(name):
                what(logger)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self._loggers.pop(name, None)
            first = (str(error).strip().splitlines() or [""])[0]
            say(
                f"The logger {name} fails, and the run goes on without it: {type(error).__name__}: {printable(first)}"
            )
