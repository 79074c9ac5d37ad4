"""Files that are either whole or absent: a temporary name, synced to the disk, renamed. And a reader that is never hung.

Everything that ssl3d writes goes through this module. Temporary names are random and created exclusively, so
that threads, processes and machines that share a disk never meet, and a link in their place is not followed.
What the system refuses (a full disk, a read-only folder, a quota) becomes one error that names path and remedy.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ssl3d.errors import ReadError, WriteError

__without_effect__ = "bytes are written as they are"

STALE_S = 24 * 3600.0
"""Age from which a temporary file is taken for that of a process that was killed."""

MOST_JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read: a record of 100,000 cases has some 20 MiB."""

_MOST_DIGITS = 400  # of a number in JSON; a float64 in full has 309 before its point

_LONGEST_NAME = 50  # characters of a name that go into a temporary one; systems allow 255 bytes in all


def write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Write ``data`` to ``path``: afterwards it holds all of them, or what it held before.

    Args:
        path: the file.
        data: its contents.
        sync: wait for the disk; without it the file may be cut after a power failure, so only for what carries a hash of
            its own and can be made again.

    Raises:
        WriteError: the system refuses; says why and what to do.
    """
    temporary = path.with_name(f".{path.name[:_LONGEST_NAME]}.{secrets.token_hex(8)}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _create(temporary) as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if sync:
            sync_folder(path.parent)


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write many files as :func:`write_bytes` does, but wait for the disk once, not once a file.

    Each is whole or what it was before; after an error some may be written and others not. A disk that fails while it
    is waited for says so to nobody, so only for what carries a hash of its own, as records do.

    Raises:
        WriteError: as :func:`write_bytes`.
    """
    folders = {path.parent for path in files}
    for folder in folders:
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    unfinished: dict[str, Path] = {}  # by their temporary names
    at = None
    try:
        for at, data in files.items():
            name = f"{at.parent}{os.sep}.{at.name[:_LONGEST_NAME]}.{secrets.token_hex(8)}.tmp"
            unfinished[name] = at
            with _create(name) as file:
                file.write(data)
        _sync_all(unfinished)
        for name, at in list(unfinished.items()):
            os.replace(name, at)  # noqa: PTH105
            del unfinished[name]
        for at in folders:
            sync_folder(at)
    except OSError as error:
        raise WriteError(explanation(at, error)) from error
    finally:
        for name in unfinished:
            with suppress(OSError):
                os.unlink(name)  # noqa: PTH108


def _sync_all(names: Mapping[str, Path]) -> None:
    """Bring the contents of files to the disk.

    Args:
        names: their temporary ones, and their own.

    Raises:
        WriteError: the system refuses.
    """
    if sys.platform == "linux":
        os.sync()  # everything at once; elsewhere it may return before that is done
        return
    for name, path in names.items():
        with explained(path):
            _sync(Path(name))


def write_json(path: Path, value: Any, sync: bool = True) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically; NaN is refused.

    Args:
        path: the file.
        value: of plain types.
        sync: as of :func:`write_bytes`.

    Raises:
        WriteError: as :func:`write_bytes`.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), sync)


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return the contents of a regular file.

    A pipe, a device or a folder of that name is refused and never waited for; a link counts as what it leads to.

    Args:
        path: the file.
        most: the largest size, in bytes.

    Raises:
        ReadError: there is no such file, it is none, it is too large, or the system refuses. A file that is missing is the
            error's ``__cause__``, a FileNotFoundError.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # a folder among them, which fdopen refuses and leaves open
            os.close(descriptor)
            raise ReadError(f"{path} is no regular file. Fix: remove it, or put the file in its place.")
        with os.fdopen(descriptor, "rb") as file:
            if most is not None and status.st_size > most:
                raise ReadError(
                    f"{path} has {status.st_size / 2**20:.1f} MiB; nothing that ssl3d writes there is larger than "
                    f"{most / 2**20:.1f} MiB. Fix: remove it."
                )
            return file.read() if most is None else file.read(most)
    except FileNotFoundError as error:
        raise ReadError(f"{path}: no such file.") from error
    except OSError as error:
        raise ReadError(
            f"{path} cannot be read: {error.strerror or error}. Fix: look after it and its permissions."
        ) from error


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> Any:
    """Return what a JSON file holds.

    Raises:
        ReadError: as :func:`read_bytes`; or it is no JSON of finite numbers in UTF-8, or nested too deeply.
    """
    data = read_bytes(path, most)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ReadError(f"{path} is damaged: {error}.") from error


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON text says; stricter than :func:`json.loads`.

    Raises:
        ValueError: it is no JSON in UTF-8, nested too deeply, or holds a number that is not finite.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=_not_finite, parse_float=_finite, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _not_finite(text: str) -> float:
    raise ValueError(f"it holds the number {text}")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text[:20])


def _integer(text: str) -> int:
    return int(text) if len(text) <= _MOST_DIGITS else int(_not_finite(f"{text[:20]}..."))


MOST_YAML_BYTES = 2**20
_MOST_NODES = 100_000  # of a YAML text with its aliases written out


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ReadError: as :func:`read_bytes`.
        ValueError: as :func:`parse_yaml`.
    """
    return parse_yaml(read_bytes(path, MOST_YAML_BYTES).decode("utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says: plain values only, nothing is constructed or run.

    Raises:
        ValueError: it is no YAML, nested too deeply, or its aliases stand for more than anybody writes.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _nodes(node, {}) > _MOST_NODES:
                raise ValueError(f"it stands for more than {_MOST_NODES} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Return how many values a node stands for, aliases written out; an alias costs no time here."""
    if id(node) not in known:
        pairs = [] if isinstance(node.value, str) else node.value
        parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def set_aside(path: Path) -> Path:
    """Rename a damaged file to ``NAME.damaged`` (``NAME.damaged-1`` and so on where that exists) and return its new path.

    Raises:
        WriteError: the system refuses.
    """
    number = 0
    while True:
        new = path.with_name(f"{path.name}.damaged{f'-{number}' if number else ''}")
        if not os.path.lexists(new):
            break
        number += 1
    with explained(new):
        path.replace(new)
    return new


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Let another library write ``path``: yields the same name in a temporary folder beside it.

    When the block ends without an error, every file in that folder is synced and moved beside ``path``,
    which comes last: the voxels of a detached header are there before it is. After an error nothing is.

    Raises:
        WriteError: the system refuses, or the block has written no such file.
    """
    folder = path.parent / f".{secrets.token_hex(8)}.tmp"
    with explained(path):
        folder.mkdir(parents=True)
        try:
            inside = folder / path.name
            yield inside
            if not inside.is_file():
                raise WriteError(f"{path} was not written. Fix: try again, or choose another format.")
            written = sorted(folder.iterdir(), key=lambda file: file == inside)  # itself last
            for file in written:
                _sync(file)
            for file in written:
                file.replace(path.with_name(file.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sync_folder(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says about writing ``path`` into an error meant for users.

    Raises:
        WriteError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(explanation(path, error)) from error


def explanation(path: Path | None, error: OSError) -> str:
    """Return what the system says of a file, and what to do about it.

    Args:
        path: of the file; None: the output, or a file that the system did not name.
        error: what it said.
    """
    code, words = error.errno, error.strerror or str(error)
    fixes = {
        errno.ENOSPC: f"make room on its disk ({_free(path or Path.cwd())} free), or choose another place",
        errno.EDQUOT: "make room within your quota there, or choose another place",
        errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
        errno.EROFS: "choose a place that can be written to",
        errno.EACCES: "choose a folder that you may write to, or change its permissions",
        errno.EPERM: "choose a folder that you may write to, or change its permissions",
        errno.ENOTDIR: "one of the folders in this path is a file: choose another place",
        errno.EEXIST: "one of the folders in this path is a file: choose another place",
        errno.EISDIR: "there is a folder of this name: choose another name, or remove it",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ELOOP: "remove the link of this name",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "close other programs: the system has no more open files",
        errno.EIO: "look after its disk, which fails",
        errno.ESTALE: "mount its file system again",
    }
    fix = fixes.get(code or 0, "choose another place, or look after its file system")
    return f"{path or 'The output'} cannot be written: {words}. Fix: {fix}."


def _free(path: Path) -> str:
    """Return the room on the disk of ``path`` in MiB, or "nothing known to be"."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB"
    return "nothing known to be"


def _create(path: Path | str) -> Any:
    """Open a file that does not exist yet for writing; links are not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def real(path: Path) -> Path:
    """Return a path without links; one that leads back to itself stays, which ``Path.resolve`` raises RuntimeError for."""
    return Path(os.path.realpath(path))


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(path: Path) -> bool:
    """Whether a name is that of a file or folder that is being written, or was when a process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_leftovers(folder: Path, older_than_s: float = STALE_S) -> None:
    """Remove temporary files and folders of killed processes from ``folder``; younger ones stay."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process has just removed it
            status = path.lstat()
            if time.time() - status.st_mtime <= older_than_s:
                continue
            if stat.S_ISDIR(status.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
