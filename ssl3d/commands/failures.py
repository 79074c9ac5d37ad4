"""The one place where an error becomes a message and an exit status.

| status | what happened |
|---|---|
| 1 | cells failed, findings, or a check that did not pass: the command says which |
| 2 | an error that a user, or a plugin's author, can repair: its message says how |
| 70 | a fault of ssl3d: the trace is in a file that is named (EX_SOFTWARE of sysexits.h) |
| 75 | stopped by a signal; the command that is named goes on (EX_TEMPFAIL) |
| 128 + n | stopped by signal n; started again, the command begins anew |
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from ssl3d.errors import MemoryFault, PluginError, SSL3DError, printable
from ssl3d.files import explanation
from ssl3d.memory import is_out_of_memory

USER, SOFTWARE = 2, 70


def report(error: BaseException, arguments: Sequence[str], debug: bool) -> int:
    """Print an error and return the exit status.

    Args:
        error: with its traceback.
        arguments: of the command.
        debug: print the traceback, too.
    """
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    known = _known(error)
    if known is not None:
        _print(str(known))
        if isinstance(known, PluginError) and known is not error and not debug:
            _print_trace(error, arguments)
        return USER
    _print(f"this is a fault of ssl3d, not yours: {type(error).__name__}: {_first_line(error)}")
    if not debug:
        _print_trace(error, arguments)
    return SOFTWARE


def _known(error: BaseException) -> SSL3DError | None:
    """Return what is said of an error that somebody can repair; None: it is a fault of ssl3d."""
    if isinstance(error, SSL3DError):
        return error
    if is_out_of_memory(error):
        what = f": {_first_line(error)}" if str(error) else ""
        return MemoryFault(
            f"The memory is used up{what}. Fix: smaller crops or batches (pretrain.crop, pretrain.batch_size, "
            "downstream.crop), fewer --jobs, or a machine with more memory."
        )
    with suppress(Exception):  # the registry itself may be what fails
        from ssl3d.registry.blame import plugin_fault

        if (fault := plugin_fault(error)) is not None:
            return fault
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        place = Path(os.fsdecode(error.filename)) if error.filename is not None else None
        return SSL3DError(explanation(place, error))
    return None


_SYSTEM = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


def _print(message: str) -> None:
    with suppress(OSError):  # an output for errors that is closed or full, too: the status is left to tell
        click.echo(f"{click.style('Error:', fg='red', bold=True)} {printable(message)}", err=True)


def _print_trace(error: BaseException, arguments: Sequence[str]) -> None:
    """Write the traceback to a file of its own and name it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("ssl3d")
    except PackageNotFoundError:
        release = "unknown"
    text = (
        f"ssl3d {release}, Python {platform.python_version()}, {platform.platform()}\n"
        f"ssl3d {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    )
    try:
        descriptor, name = tempfile.mkstemp(prefix="ssl3d-trace-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        click.echo(f"The trace is in {name}: report it with that file; ssl3d --debug shows it.", err=True)
    except OSError:
        click.echo("ssl3d --debug shows the trace.", err=True)


def _first_line(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        return "an error that cannot be printed"
    return lines[0][:500] if lines else "no message"


def survive_any_output() -> None:
    """Escape what an output that is no UTF-8 cannot show, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
