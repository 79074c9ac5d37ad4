"""The store: one JSON record a cell, whole or absent, shared by any number of processes.

    STORE/records/<method>-<task>-<mode>-s<seed>-<hash of the identity>.json
    STORE/failures/<the same name>.json          why a cell could not be computed, until it is
    STORE/locks/<hash of the identity>.lock      only while a cell is being computed

A record's file is its canonical JSON (sorted keys, no spaces) with ``record_sha256`` in front: the
hash of the rest. So the hash is checked over the bytes as they lie, which costs nothing next to
parsing, and it survives a tool that only reformats the file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ssl3d.errors import DataError, ReadError, WriteError
from ssl3d.files import MOST_JSON_BYTES, explained, read_json, write_bytes, write_json
from ssl3d.locks import Held, forget_lock
from ssl3d.results.store.model import FAILURE, problem_of
from ssl3d.results.store.record import (
    Record,
    _decode_without_cases,
    decode_record,
    encode_record,
    identity_hash,
    no_garbage_collection,
)

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.+]")

_FAILURE_FIELDS = ("schema", "identity", "method", "preset", "metric", "error", "session", "run", "created")


def failure_of(
    head: Mapping[str, Any], error: BaseException | Mapping[str, Any], session: str, run: str | None
) -> Record:
    """Return what is written down of a cell that could not be computed.

    Args:
        head: what a table needs to know of the cell, see :attr:`ssl3d.bench.cell.Cell.head`.
        error: what happened, or its ``{"type", "message"}``.
        session: the call of bench that it happened in.
        run: name of the pretraining that failed; None: the evaluation did.
    """
    if isinstance(error, BaseException):
        error = {"type": type(error).__name__, "message": str(error)}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {**head, "error": dict(error), "session": session, "run": run, "created": created}


class File(NamedTuple):
    """A sound record as it lies in a store.

    Attributes:
        path: of the file.
        digest: hash of the identity, which ends the file's name.
        record: what it says.
        data: its bytes, which were checked.
    """

    path: str
    digest: str
    record: Record
    data: bytes


def contents(path: str) -> bytes:
    """Return the bytes of a regular file of a record's size; see :func:`ssl3d.files.read_bytes`, which takes longer.

    Raises:
        DataError: it is none.
        OSError: the system refuses.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("no regular file; remove it")
        if status.st_size > MOST_JSON_BYTES:
            raise DataError(f"{status.st_size / 2**20:.0f} MiB, more than any record has; remove it")
        data = os.read(descriptor, status.st_size)
        while len(data) < status.st_size and (more := os.read(descriptor, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


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

    def path_for(self, identity: Mapping[str, Any], digest: str | None = None) -> Path:
        """Return where the record of ``identity`` lies, or would lie.

        Args:
            identity: of a cell.
            digest: its hash, where that is known.
        """
        parts = (identity["method"], identity["task"], identity["mode"], f"s{identity['seed']}")
        # The hash names the cell; the rest is for people, so no character may surprise a shell.
        readable = "-".join(_UNUSUAL.sub("_", str(part))[:40] for part in parts).lstrip(".")
        return self.folder / f"{readable}-{digest or identity_hash(identity)}.json"

    # --- Failures ---

    def failures(self) -> list[Record]:
        """Return why cells could not be computed, by file name; see :func:`failure_of`.

        Raises:
            DataError: a file is damaged.
        """
        found, problems = self.sound_failures()
        if problems:
            raise DataError("\n".join(problems))
        return found

    def sound_failures(self) -> tuple[list[Record], list[str]]:
        """Return :meth:`failures`, and a line for each file that is damaged and left out."""
        found, problems = [], []
        for path in sorted((self.root / "failures").glob("*.json")):
            try:
                failure = read_json(path)
            except ReadError as error:
                if not isinstance(
                    error.__cause__, FileNotFoundError
                ):  # another process has computed the cell
                    problems.append(f"{error} Delete it, and bench tries the cell again.")
                continue
            problem = problem_of(FAILURE, failure)
            if problem is None:
                found.append({field: failure.get(field) for field in _FAILURE_FIELDS})
            else:
                problems.append(f"{path} is damaged ({problem}); delete it, and bench tries the cell again.")
        return found, problems

    def write_failure(self, failure: Mapping[str, Any]) -> Path:
        """Write down that a cell could not be computed. No result: the next bench tries it again."""
        path = self._failure_path(failure["identity"])
        write_json(path, dict(failure))
        return path

    def forget_failure(self, identity: Mapping[str, Any]) -> None:
        """Remove what was written down of a failed cell, which has been computed since."""
        path = self._failure_path(identity)
        with explained(path):
            path.unlink(missing_ok=True)

    def _failure_path(self, identity: Mapping[str, Any]) -> Path:
        return self.root / "failures" / self.path_for(identity).name

    # --- Runs ---

    def place_of(self, folder: Path) -> str:
        """Return how a record names ``folder``: from the store's root where it lies inside, so that a store can move."""
        folder, root = folder.absolute(), self.root.absolute()
        return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else str(folder)

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
        return self.file(str(path), lazy).record

    def file(self, path: str, lazy: bool = False) -> File:
        """Return the record in ``path`` with its bytes, see :meth:`read`.

        A text for a path, which thousands of records make worthwhile.
        """
        try:
            data = contents(path)
            if lazy and (found := _decode_without_cases(data)) is not None:
                record, digest = found
                if path.endswith(f"-{digest}.json"):
                    record["per_case"].where = path
                    return File(path, digest, record, data)
            record = decode_record(data)
        except FileNotFoundError:
            raise DataError(f"{path}: no such record") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        digest = identity_hash(record["identity"])
        if not Path(path).stem.endswith(f"-{digest}"):
            raise DataError(
                f"{path}: its name is not the hash of its identity; delete the copy, or rename it back"
            )
        return File(path, digest, record, data)

    def files(self, lazy: bool = False) -> Iterator[File | str]:
        """Yield every sound record, by file name, and a line for each one that is left out.

        Args:
            lazy: see :meth:`records`.

        Raises:
            DataError: there is no store.
        """
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise DataError(f"The store {self.root} {what}. Make one: ssl3d bench --store {self.root}")
        # By name: sorting paths and opening them through pathlib takes as long as parsing.
        folder = str(self.folder)
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []  # noqa: PTH208
        for name in names:
            if not name.endswith(".json") or name.startswith("."):
                continue
            try:
                yield self.file(f"{folder}{os.sep}{name}", lazy)
            except DataError as error:
                yield str(error)

    def check(self) -> None:
        """Look whether there is anything to read.

        Raises:
            DataError: there is not, see :meth:`records`.
        """
        problems = []
        for found in self.files(lazy=True):
            if isinstance(found, File):
                return
            problems.append(found)
        self._explain_nothing(problems)

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

    def records(
        self, lazy: bool = False, keep: Callable[[Record], Record] | None = None
    ) -> tuple[list[Record], list[str]]:
        """Return every sound record, by file name, and a line for each one that is left out.

        Args:
            lazy: parse the metrics of the cases only when they are looked at: several times faster for
                a table, but such a record cannot be written or turned into JSON.
            keep: returns the part of a record that is kept in memory, for those who read thousands; None: all of it.

        Raises:
            DataError: there is no store, it has neither records nor failures, or not one of its records is sound.
        """
        records, problems = [], []
        with no_garbage_collection():
            for found in self.files(lazy):
                if isinstance(found, str):
                    problems.append(found)
                else:
                    records.append(found.record if keep is None else keep(found.record))
        if not records:
            self._explain_nothing(problems)
        return records, problems

    def _explain_nothing(self, problems: Sequence[str]) -> None:
        """Say why there is no record where there is no failure either.

        Raises:
            DataError: always, then.
        """
        if any((self.root / "failures").glob("*.json")):
            return
        if problems:
            raise DataError("\n".join([f"Not one record in the store {self.root} is sound:", *problems]))
        raise DataError(
            f"The store {self.root} holds no records. Compute some: ssl3d bench --store {self.root}"
        )

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
        with Held(self._lock(identity), wait) as held:
            yield held

    @contextmanager
    def claim_many(self, digests: Iterable[str]) -> Iterator[set[str]]:
        """Hold many cells for this process, as :meth:`claim` does without waiting; yield which of them are held.

        Args:
            digests: hashes of their identities, each once.

        Raises:
            DataError, RuntimeError: as :meth:`claim`.
        """
        folder, held = self.root / "locks", set()
        with ExitStack() as stack:
            first: Held | None = None
            for digest in digests:
                name = f"{digest}.lock"
                if first is not None and first.also(name):
                    held.add(digest)
                    continue
                lock = Held(folder / name, wait=False)
                if stack.enter_context(lock):
                    held.add(digest)
                    first = first or lock
            yield held

    def holder(self, identity: Mapping[str, Any]) -> str | None:
        """Return which process has claimed ``identity`` (:func:`ssl3d.locks.this_process`); None: nobody.

        One that was killed is named until the next one claims it.
        """
        path = self._lock(identity)
        return Held(path, wait=False).owner() if path.exists() else None

    def tidy(self, identity: Mapping[str, Any], *others: Mapping[str, Any]) -> None:
        """Remove what a process that was killed as it finished a cell has left, where that can be done.

        Args:
            identity: of the cell.
            others: what else was claimed for it.
        """
        for claimed in (identity, *others):
            forget_lock(self._lock(claimed))
        with suppress(WriteError):
            self.forget_failure(identity)

    def tidy_finished(self) -> None:
        """Remove locks of finished cells that killed processes have left, where that can be done; held ones stay."""
        locks = self.root / "locks"
        left = {path.stem: path for path in locks.glob("*.lock")}
        if left:
            names = os.listdir(self.folder) if self.folder.is_dir() else []  # noqa: PTH208
            for digest in left.keys() & {name.removesuffix(".json").rpartition("-")[2] for name in names}:
                forget_lock(left[digest])

    def _lock(self, identity: Mapping[str, Any]) -> Path:
        return self.root / "locks" / f"{identity_hash(identity)}.lock"
