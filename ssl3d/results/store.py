"""The store: one JSON record a cell, whole or absent, shared by any number of processes.

    STORE/records/<method>-<task>-<mode>-s<seed>-<hash of the identity>.json
    STORE/failures/<the same name>.json          why a cell could not be computed, until it is
    STORE/locks/<hash of the identity>.lock      only while a cell is being computed

A record's file is its canonical JSON (sorted keys, no spaces) with ``record_sha256`` in front: the
hash of the rest. So the hash is checked over the bytes as they lie, which costs nothing next to
parsing, and it survives a tool that only reformats the file.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import from_json  # twice as fast as the standard library's

from ssl3d.errors import DataError
from ssl3d.files import write_bytes, write_json

Record = dict[str, Any]

SCHEMA = 2
"""Raised when records are kept in another way, or when all numbers change: 2 since Philox draws them."""
_HASH_KEY = "record_sha256"
_HASH_DIGITS = 20
_PREFIX = f'{{"{_HASH_KEY}":"'.encode()
_POLL_SECONDS = 0.2
_SAY_AFTER_SECONDS = 2.0

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)

_log = logging.getLogger(__name__)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not have.

    >>> canonical_json({"b": [1, 2.0], "a": None})
    '{"a":null,"b":[1,2.0]}'
    """
    return _CANONICAL.encode(value)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return 20 hexadecimal digits of the SHA-256 of ``identity`` in canonical JSON.

    >>> identity_hash({"task": "shc", "seed": 0}) == identity_hash({"seed": 0, "task": "shc"})
    True
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:_HASH_DIGITS]


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record's file, its content hash included.

    Raises:
        DataError: a field is missing or of the wrong type, or a number is NaN or infinite.
    """
    body = {key: value for key, value in record.items() if key != _HASH_KEY}
    problem = _problem(body)
    if problem:
        raise DataError(f"A record cannot be written: {problem}. {_describe(body)}")
    try:
        text = canonical_json(body)
    except ValueError:
        path = _first_not_finite(body)
        raise DataError(
            f"A record cannot be written: {path} is not a finite number. {_describe(body)} "
            "Write null for a metric that does not exist, for example for an empty structure."
        ) from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _PREFIX + f'{digest}",{text[1:]}\n'.encode()


class Cases(Sequence[Any]):
    """The ``per_case`` list of a record, parsed when it is first looked at.

    It is nearly all of a record's text, and a table of means needs none of it. Only for the bytes of
    a record whose hash was checked, so parsing cannot fail.
    """

    def __init__(self, data: bytes) -> None:
        self._data: bytes | None = data
        self._cases: list[Any] = []

    def _parsed(self) -> list[Any]:
        if self._data is not None:
            self._cases, self._data = json.loads(self._data), None
        return self._cases

    def __getitem__(self, place: Any) -> Any:
        return self._parsed()[place]

    def __len__(self) -> int:
        return len(self._parsed())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parsed())

    def __eq__(self, other: object) -> bool:
        return self._parsed() == (other._parsed() if isinstance(other, Cases) else other)

    __hash__ = None  # type: ignore[assignment]


_CASES, _AFTER_LIST, _AFTER_CASES, _IDENTITY_TEXT = b'"per_case":[', b'],"', b'],"preset":', '"identity":{'
_DECODER = json.JSONDecoder()


def _decode_without_cases(data: bytes) -> tuple[Record, str] | None:
    """Return the record in ``data`` with :class:`Cases`, and the hash of its identity; None where that
    needs a whole look.

    The text between the first ``"per_case":[`` and the next ``],"``, which must go on with ``preset":``, is
    set aside and ``null`` put in its place. What is left is JSON with a top-level ``per_case`` of null only if
    the text set aside began as that very value and ended at the top level too: else brackets would not
    match, or the null would stand elsewhere. It holds no ``],"``, so it does not reach over another key.
    Strings cannot deceive, since their quotes are escaped.

    The identity is set aside and checked in the same way; its own text, which is canonical in a file as
    :func:`encode_record` writes it, gives its hash without being encoded again.
    """
    stored = data[len(_PREFIX) : len(_PREFIX) + 64].decode("ascii", "replace")
    start = data.find(_CASES) + len(_CASES) - 1
    end = data.find(_AFTER_LIST, start) + 1
    if start < len(_CASES) or not data.startswith(_AFTER_CASES, end - 1):
        return None
    if not _hash_of_bytes_matches(data, stored):
        return None
    try:
        text = (data[:start] + b"null" + data[end:]).decode()
        place = text.find(_IDENTITY_TEXT) + len(_IDENTITY_TEXT) - 1
        identity, after = _DECODER.raw_decode(text, place)
        record = from_json(f"{text[:place]}null{text[after:]}", allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return None
    if record.get("per_case", 0) is not None or record.get("identity", 0) is not None:
        return None
    if record.get("schema") != SCHEMA or "scored" not in record:
        return None
    record["identity"], record["per_case"] = identity, Cases(data[start:end])
    return record, hashlib.sha256(text[place:after].encode()).hexdigest()[:_HASH_DIGITS]


def decode_record(data: bytes) -> Record:
    """Return the record in ``data``, checked: its hash, its schema and the fields that tables need.

    Args:
        data: of the file.

    Raises:
        DataError: what is wrong and what can be done, without the file's name.
    """
    try:
        record = json.loads(data)
    except ValueError as error:  # of which JSONDecodeError and UnicodeDecodeError are kinds
        raise DataError(
            f"not valid JSON, perhaps truncated ({error}); delete it, and bench computes it again"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}, not a record; delete it")
    schema = record.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        fix = "update ssl3d to read it" if newer else "delete it, and bench computes it again"
        raise DataError(f"schema {schema!r}, but this ssl3d reads schema {SCHEMA}; {fix}")
    stored = record.get(_HASH_KEY)
    if not (isinstance(stored, str) and _hash_matches(data, record, stored)):
        raise DataError(
            f"its content does not match its {_HASH_KEY}, so it was altered after it was written; "
            "restore it, or delete it, and bench computes it again"
        )
    problem = _problem(record)
    if problem:
        raise DataError(f"{problem}; delete it, and bench computes it again")
    return record


def _hash_of_bytes_matches(data: bytes, stored: str) -> bool:
    """Return whether ``data`` is a file as :func:`encode_record` writes it, its hash included."""
    if not data.startswith(_PREFIX):
        return False
    start = len(_PREFIX) + len(stored) + 2  # behind the closing quote and the comma
    digest = hashlib.sha256(b"{")
    digest.update(memoryview(data)[start : len(data) - data.endswith(b"\n")])
    return digest.hexdigest() == stored


def _hash_matches(data: bytes, record: Record, stored: str) -> bool:
    if _hash_of_bytes_matches(data, stored):
        return True
    try:
        text = canonical_json({key: value for key, value in record.items() if key != _HASH_KEY})
    except ValueError:
        return False
    return hashlib.sha256(text.encode()).hexdigest() == stored


_IDENTITY_FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str, "method_config": dict, "task": str, "split": str, "mode": str, "seed": int,
}  # fmt: skip
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "identity": dict, "method": dict, "metric": str, "score": (int, float), "per_case": Sequence,
}  # fmt: skip


def _problem(record: Mapping[str, Any]) -> str | None:
    """Return what keeps ``record`` from standing in a table, or None."""
    if record.get("schema") != SCHEMA:
        return f"schema is {record.get('schema')!r}, not {SCHEMA}"
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            return f'the field "{field}" is missing or not a {_kind(kind)}'
    for field, kind in _IDENTITY_FIELDS.items():
        if not isinstance(record["identity"].get(field), kind):
            return f'the field "identity.{field}" is missing or not a {_kind(kind)}'
    if not isinstance(record["method"].get("title"), str):
        return 'the field "method.title" is missing or not a str'
    cases = record["per_case"]
    if not isinstance(cases, Cases) and not all(isinstance(case, dict) and "case" in case for case in cases):
        return 'an entry of "per_case" has no "case"'
    if not math.isfinite(record["score"]):
        return f"score = {record['score']}: not one test case could be scored"
    return None


def _kind(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def _describe(record: Mapping[str, Any]) -> str:
    identity = record.get("identity")
    if not isinstance(identity, dict):
        return "It has no identity."
    return (
        f"Cell: {', '.join(f'{k} {identity.get(k)}' for k in ('method', 'task', 'mode', 'seed', 'split'))}."
    )


def _first_not_finite(value: Any, path: str = "") -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    for key, item in items:
        found = _first_not_finite(item, f"{path}.{key}" if path else str(key))
        if found:
            return found
    return None


_FAILURE_FIELDS = ("schema", "identity", "method", "preset", "metric", "error", "session", "run", "created")


def failure_of(
    head: Mapping[str, Any], error: BaseException | Mapping[str, Any], session: str, run: str | None
) -> Record:
    """Return what is written down of a cell that could not be computed.

    Args:
        head: what a table needs to know of the cell, see :attr:`ssl3d.cell.Cell.head`.
        error: what happened, or its ``{"type", "message"}``.
        session: the call of bench that it happened in.
        run: name of the pretraining that failed; None: the evaluation did.
    """
    if isinstance(error, BaseException):
        error = {"type": type(error).__name__, "message": str(error)}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {**head, "error": dict(error), "session": session, "run": run, "created": created}


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pause the collection of cycles: over millions of small objects that all stay, it frees nothing
    and takes as long as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class ResultStore:
    """A folder of records. Creating the object touches nothing on disk.

    Args:
        root: the store's folder; made by the first :meth:`write` or :meth:`claim`.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def folder(self) -> Path:
        """The folder of the records' files."""
        return self.root / "records"

    def path_for(self, identity: Mapping[str, Any]) -> Path:
        """Return where the record of ``identity`` lies, or would lie."""
        parts = (identity["method"], identity["task"], identity["mode"], f"s{identity['seed']}")
        # The hash names the cell; the rest is for people, so no character may surprise a shell.
        readable = "-".join(re.sub(r"[^A-Za-z0-9_.+]", "_", str(part))[:40] for part in parts).lstrip(".")
        return self.folder / f"{readable}-{identity_hash(identity)}.json"

    # --- Failures ---

    def failures(self) -> list[Record]:
        """Return why cells could not be computed, by file name; see :func:`failure_of`.

        Raises:
            DataError: a file is damaged.
        """
        found = []
        for path in sorted((self.root / "failures").glob("*.json")):
            try:
                failure = json.loads(path.read_text(encoding="utf-8"))
                found.append({field: failure[field] for field in _FAILURE_FIELDS})
            except FileNotFoundError:  # another process has computed the cell
                continue
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path} is damaged; delete it, and bench tries the cell again.") from None
        return found

    def write_failure(self, failure: Mapping[str, Any]) -> Path:
        """Write down that a cell could not be computed. No result: the next bench tries it again."""
        path = self._failure_path(failure["identity"])
        write_json(path, dict(failure))
        return path

    def forget_failure(self, identity: Mapping[str, Any]) -> None:
        """Remove what was written down of a failed cell, which has been computed since."""
        self._failure_path(identity).unlink(missing_ok=True)

    def _failure_path(self, identity: Mapping[str, Any]) -> Path:
        return self.root / "failures" / self.path_for(identity).name

    # --- Runs ---

    def place_of(self, folder: Path) -> str:
        """Return how a record names ``folder``: from the store's root where it lies inside, so that a store can move."""
        inside = folder.is_relative_to(self.root)
        return folder.relative_to(self.root).as_posix() if inside else str(folder)

    def run_folder(self, record: Mapping[str, Any]) -> Path | None:
        """Return the folder of the pretraining behind ``record``, or None if it is not there.

        A store that was moved still holds its runs under the same names.
        """
        folder = Path(str(record.get("checkpoint") or ""))
        places = (self.root / folder, self.root / "runs" / folder.name)
        return next((place for place in places if folder.name and place.is_dir()), None)

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Return whether the cell is finished: its record is there, whole and unaltered."""
        try:
            self.read(self.path_for(identity))
        except DataError:
            return False
        return True

    def read(self, path: Path, lazy: bool = False) -> Record:
        """Return the record in ``path``.

        Args:
            path: of the file.
            lazy: ``per_case`` may be :class:`Cases`; its entries were checked when the record was written.

        Raises:
            DataError: the file is missing, damaged, altered, of another schema, or lies under a
                name that is not its identity's; names the file.
        """
        return self._read(str(path), lazy)

    def _read(self, path: str, lazy: bool) -> Record:
        """See :meth:`read`; with text for a path, which thousands of records make worthwhile."""
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read()
            if lazy and (found := _decode_without_cases(data)) is not None:
                record, digest = found
                if path.endswith(f"-{digest}.json") and _problem(record) is None:
                    return record
            record = decode_record(data)
        except FileNotFoundError:
            raise DataError(f"{path}: no such record") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if not Path(path).stem.endswith(f"-{identity_hash(record['identity'])}"):
            raise DataError(
                f"{path}: its name is not the hash of its identity; delete the copy, or rename it back"
            )
        return record

    def write(self, record: Mapping[str, Any], replace: bool = False) -> Path:
        """Write ``record`` atomically (temporary name, sync, rename) and return its path.

        A damaged file under the same name is kept beside it as ``*.damaged``.

        Args:
            record: schema 1; ``record_sha256`` is added.
            replace: overwrite a finished cell, for one that is recomputed on request.

        Raises:
            DataError: the record is not valid, or the cell is finished already with another content.
        """
        data = encode_record(record)
        path = self.path_for(record["identity"])
        if path.exists():
            if not self.has(record["identity"]):
                path.replace(path.with_name(path.name + ".damaged"))
            elif path.read_bytes() == data:
                return path
            elif not replace:
                raise DataError(
                    f"{path}: this cell is finished, with another result or another run's timings. "
                    "Two results for one identity are never merged: delete the file to compute it again."
                )
        write_bytes(path, data)
        return path

    def records(self, lazy: bool = False) -> tuple[list[Record], list[str]]:
        """Return every sound record, by file name, and a line for each one that is left out.

        Args:
            lazy: parse the metrics of the cases only when they are looked at: several times faster for
                a table, but such a record cannot be written or turned into JSON.

        Raises:
            DataError: there is no store, it has neither records nor failures, or not one of its records is sound.
        """
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise DataError(f"The store {self.root} {what}. Make one: ssl3d bench --store {self.root}")
        records, problems = [], []
        with no_garbage_collection():
            # By name: sorting paths and opening them through pathlib takes as long as parsing.
            folder = str(self.folder)
            names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []  # noqa: PTH208
            for name in names:
                if not name.endswith(".json") or name.startswith("."):
                    continue
                try:
                    records.append(self._read(f"{folder}{os.sep}{name}", lazy))
                except DataError as error:
                    problems.append(str(error))
        if not records and not any((self.root / "failures").glob("*.json")):
            if problems:
                raise DataError("\n".join([f"Not one record in the store {self.root} is sound:", *problems]))
            raise DataError(
                f"The store {self.root} holds no records. Compute some: ssl3d bench --store {self.root}"
            )
        return records, problems

    @contextmanager
    def claim(self, identity: Mapping[str, Any], wait: bool = True) -> Iterator[bool]:
        """Hold ``identity`` for this process; yield whether it is held.

        Check :meth:`has` inside: the owner before may have finished the cell. The lock is a POSIX
        record lock, so the kernel frees it at the moment its owner dies, however it dies, and a
        worker process forked by the owner does not keep it (as it would a ``flock``). It also
        works on a store shared by machines over NFS.

        Args:
            identity: of a cell, or of anything else that must be made once.
            wait: wait for another owner; otherwise yield False at once when there is one.

        Raises:
            DataError: the file system has no locks.
            RuntimeError: this thread holds it already.
        """
        path = self.root / "locks" / f"{identity_hash(identity)}.lock"
        with _Held(path, wait) as held:
            yield held


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
