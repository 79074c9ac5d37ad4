"""What a check finds, where in the plugin, and what to do about it; the run over all checks of a plugin."""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from ssl3d.errors import ConfigError, SSL3DError, nearest

F = TypeVar("F", bound=Callable[..., str])


class Fault(AssertionError):
    """What a check found wrong.

    Args:
        seen: what was seen, in one sentence.
        at: the part of the plugin that is at fault: the name of an attribute, a function or class, or an error that
            it raised.
        hint: what to do.
    """

    def __init__(self, seen: str, at: Any = None, hint: str = "") -> None:
        super().__init__(seen)
        self.at, self.hint = at, hint


def demand(holds: bool, seen: str, at: Any = None, hint: str = "") -> None:
    """Raise :class:`Fault` unless ``holds``."""
    if not holds:
        raise Fault(seen, at, hint)


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: of the check.
        passed: whether nothing was found wrong; False, too, where it could not be run.
        seen: what was seen.
        where: ``file:line in function`` of the plugin, for a failure.
        hint: what to do about it.
        blocked: the failed check without which this one has no meaning; its fault is told once, there.
    """

    name: str
    passed: bool
    seen: str = ""
    where: str = ""
    hint: str = ""
    blocked: str = ""

    @property
    def failed(self) -> bool:
        """Whether a fault was found, one that no earlier check has told."""
        return not self.passed and not self.blocked

    def told(self) -> str:
        """Return what was seen, where, and the hint, as lines of text."""
        lines = [self.seen, self.where and f"at {self.where}", self.hint and f"hint: {self.hint}"]
        return "\n".join(line for line in lines if line)


@dataclass
class Report:
    """The results of all checks of one plugin: what it is, its name, and one :class:`Check` each."""

    kind: str
    name: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures()

    def failures(self) -> list[str]:
        """Return the names of the checks that failed."""
        return [check.name for check in self.checks if check.failed]

    def assert_passed(self) -> None:
        """Raise AssertionError listing every check that failed, what was seen, where, and what to do."""
        failed = [check for check in self.checks if check.failed]
        if failed:
            told = "\n".join(f"  {c.name}: " + c.told().replace("\n", "\n    ") for c in failed)
            raise AssertionError(f"{self.name} fails {len(failed)} checks:\n{told}")


def needs(*names: str) -> Callable[[F], F]:
    """Mark a check that has no meaning where one of the checks ``names`` (of functions) has failed."""

    def mark(check: F) -> F:
        setattr(check, "needs", names)  # noqa: B010 - functions have no such attribute for mypy
        return check

    return mark


class Checks:
    """The checks of one plugin: methods that return what was seen, or raise :class:`Fault`.

    Attributes:
        kind: what the plugin is.
        order: names of the checks, in the order in which they are run.
        essential: those without which no later one has a meaning.
    """

    kind: ClassVar[str]
    order: ClassVar[tuple[str, ...]]
    essential: ClassVar[tuple[str, ...]] = ()

    @property
    def subject(self) -> Any:
        """The plugin: the class, or the object."""
        raise NotImplementedError

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all checks, as they are printed."""
        return [_title(name) for name in cls.order]

    def chosen(self) -> Sequence[str]:
        """Return those of :attr:`order` that this plugin is put to."""
        return self.order

    def run(self, only: Collection[str] = (), skip: Collection[str] = ()) -> Iterator[Check]:
        """Yield the result of one check after another; a fault is told once, by the first that finds it.

        Args:
            only: names of the checks to run; empty: all.
            skip: names of checks to leave out.

        Raises:
            ConfigError: there is no such check.
        """
        for name in (*only, *skip):
            if name not in self.names():
                raise ConfigError(f'Unknown check "{name}" of a {self.kind}.{nearest(name, self.names())}')
        failed: dict[str, str] = {}  # function -> the check that told of it
        told: dict[tuple[str, ...], str] = {}  # a fault -> the check that told of it
        for function in self.chosen():
            title = _title(function)
            if title in skip or (only and title not in only):
                continue
            check = getattr(self, function)
            lacks = [n for n in (*self.essential, *getattr(check, "needs", ())) if n in failed]
            if lacks:
                first = failed[lacks[0]]
                result = Check(title, False, f'not run, for "{first}" fails', blocked=first)
            else:
                result, fault = self._result(title, check)
                if result.failed and fault in told:
                    result = replace(result, seen=f'stops as "{told[fault]}" does', blocked=told[fault])
                elif result.failed:
                    told[fault] = title
            if not result.passed:
                failed[function] = result.blocked or title
            yield result

    def _result(self, title: str, check: Callable[[], str]) -> tuple[Check, tuple[str, ...]]:
        """Return the result of one check, and what tells its fault from others."""
        try:
            return Check(title, True, check()), ()
        except Fault as fault:
            where = place_of(self.subject, fault.at)
            return Check(title, False, str(fault), where, fault.hint), (str(fault),)
        except (Exception, SystemExit) as error:
            where = _own_frame(error.__traceback__, own_modules(self.subject))
            told_as = f"{type(error).__name__}: {error}"
            text = str(error) if isinstance(error, SSL3DError) else told_as
            hint = hint_of(error)
            # The same line with the same kind of error is the same fault, whatever sizes the text names.
            fault_key = (type(error).__name__, where) if where else (text,)
            return Check(title, False, text, where, hint), fault_key


HINTS = (
    ("Module.__init__() call", "begin __init__ with super().__init__(backbone, config)"),
    (
        "modified by an inplace operation",
        "detach what is kept from one step to the next, and change nothing in place",
    ),
    ("backward through the graph a second time", "detach what is kept from one step to the next"),
    ("NotImplementedError", "write this function; docs/plugins.md shows all of them"),
    ("mat1 and mat2 shapes", "take widths from backbone.global_channels and backbone.local_channels"),
    (
        "must match the size of tensor",
        "make it work for this size, or raise ssl3d.errors.ConfigError in check()",
    ),
    (
        "",
        "it stops the same way in a run: mend it, or refuse what it cannot do with ssl3d.errors.ConfigError",
    ),
)
"""Part of an error's text -> what to do; the first that fits."""


def hint_of(error: BaseException) -> str:
    """Return what to do about an error that a plugin raises."""
    told = f"{type(error).__name__}: {error}"
    return next(hint for part, hint in HINTS if part in told)


def _title(function: str) -> str:
    return function.replace("_", " ")


# --- Where it stands -------------------------------------------------------------------------------


def own_modules(subject: Any) -> set[str]:
    """Return the modules that the author of a plugin wrote: its package, or one module where that is ssl3d's.

    Args:
        subject: a class, a function, or an object of a class.
    """
    if inspect.isfunction(subject):
        names = {subject.__module__}
    else:
        cls = subject if isinstance(subject, type) else type(subject)
        foreign = ("ssl3d", "torch", "builtins", "abc")
        names = {c.__module__ for c in cls.__mro__ if c.__module__.partition(".")[0] not in foreign}
        names.add(cls.__module__)
    return {name if name.partition(".")[0] == "ssl3d" else name.partition(".")[0] for name in names}


def _is_own(module: str, own: Collection[str]) -> bool:
    return module in own or module.partition(".")[0] in own


def _own_frame(trace: TracebackType | None, own: Collection[str]) -> str:
    """Return the innermost place of a traceback that the plugin's author wrote; empty without one."""
    places = [
        f"{_short(frame.f_code.co_filename)}:{line} in {frame.f_code.co_qualname.partition('.<locals>')[0]}"
        for frame, line in traceback.walk_tb(trace)
        if _is_own(frame.f_globals.get("__name__", ""), own)
    ]
    return places[-1] if places else ""


def place_of(subject: Any, at: Any = None) -> str:
    """Return ``file:line in function`` of a part of a plugin; empty where that has no source.

    Args:
        subject: the plugin, a class or an object.
        at: the name of one of its attributes, a function or class, or an error; None: the plugin itself.
    """
    owner = subject if isinstance(subject, type) or inspect.isfunction(subject) else type(subject)
    own = own_modules(subject)
    if isinstance(at, BaseException):
        return _own_frame(at.__traceback__, own)
    thing, label = at, ""
    if isinstance(at, str):
        for cls in getattr(owner, "__mro__", ()):
            if at in vars(cls) and _is_own(cls.__module__, own):
                thing, owner = vars(cls)[at], cls
                break
        else:
            thing = getattr(subject, at, None)
        label = at
    thing = inspect.unwrap(thing) if callable(thing) else thing
    for candidate in (thing, owner):
        try:
            file, (lines, start) = inspect.getsourcefile(candidate), inspect.getsourcelines(candidate)
        except (TypeError, OSError):
            continue
        if candidate is owner and label:  # an attribute that is no function: its line in the class body
            start += next(
                (n for n, line in enumerate(lines) if line.split("=")[0].split(":")[0].strip() == label), 0
            )
        name = label or getattr(candidate, "__qualname__", getattr(candidate, "__name__", ""))
        return f"{_short(file or '?')}:{start} in {name}"
    return ""


def _short(path: str) -> str:
    """Return a path from the working directory where it lies below it."""
    try:
        return os.fspath(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return path


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number and finite; a tensor of one element counts."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
