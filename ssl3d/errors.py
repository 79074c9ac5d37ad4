"""Errors meant for users: each names the culprit, the value and the fix.

The command line prints them without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CellsFailed",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "PluginError",
    "SSL3DError",
    "TrainingError",
    "WriteError",
]

__without_effect__ = "messages"


class SSL3DError(Exception):
    """Base of every error that a user can cause and repair."""


class ConfigError(SSL3DError):
    """A configuration key or value that cannot be used."""


class DataError(SSL3DError):
    """Input data that cannot be used; lists every bad file found, not only the first."""


class PluginError(SSL3DError):
    """A plugin that is missing, broken, or in conflict with another one."""


class CheckpointError(SSL3DError):
    """A checkpoint that is missing, damaged, or of another architecture."""


class WriteError(SSL3DError):
    """A file that cannot be written: the disk is full, the folder is read-only, a quota is used up."""


class ReadError(SSL3DError):
    """A file that cannot be read: it is missing, damaged, no regular file, or larger than anything ssl3d writes there."""


class BusyError(SSL3DError):
    """Another process is at work in the same folder."""


class MemoryFault(SSL3DError):
    """Something did not fit into the memory of the machine or the device."""


class TrainingError(SSL3DError):
    """Training that cannot go on, for example because a loss is not finite."""


class LostError(SSL3DError):
    """Another process that trains the same network has ended, or cannot be reached."""


class CellsFailed(SSL3DError):
    """Cells of a bench that failed while the others were computed.

    Args:
        failed: a line for each, with its name and why.
    """

    def __init__(self, failed: list[str]) -> None:
        self.failed = failed
        super().__init__(
            "\n".join([f"{count(len(failed), 'cell')} failed; the same command tries again:", *failed])
        )


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    >>> count(1, "case"), count(2, "case"), count(2, "entry", "entries")
    ('1 case', '2 cases', '2 entries')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def are(number: int) -> str:
    """Return the verb that goes with a number of things.

    >>> are(1), are(2)
    ('is', 'are')
    """
    return "is" if number == 1 else "are"


def printable(text: str) -> str:
    """Return a text with control characters and bytes that are no UTF-8 escaped, for file names above all.

    >>> printable("scan\\x1b[31m.nii")
    'scan\\\\x1b[31m.nii'
    """
    return "".join(
        char if char in "\n\t" or (char.isprintable() and not "\ud800" <= char <= "\udfff")
        else char.encode("unicode_escape", "backslashreplace").decode("ascii")
        for char in text
    )  # fmt: skip


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the closest of ``choices``, else the whole list.

    >>> nearest("gvls", ["gvsl", "byol"])
    ' Did you mean "gvsl"?'
    >>> nearest("qqqq", ["gvsl", "byol"])
    ' Choose from: byol, gvsl.'
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Choose from: {', '.join(choices)}." if choices else " None is available."


def in_words(error: BaseException) -> str:
    """Return class and message of an error; of one whose message cannot be made, that it cannot."""
    try:
        text = str(error)
    except Exception:
        text = "an error that cannot be printed"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
