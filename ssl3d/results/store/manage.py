"""Work on whole stores: merge them, export them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl3d.errors import ConfigError, DataError, nearest
from ssl3d.files import write_all, write_bytes
from ssl3d.results.store.record import Cases, Record, canonical_json, decode_record, no_garbage_collection
from ssl3d.results.store.store import File, ResultStore, contents
from ssl3d.results.table.caption import flatten
from ssl3d.spreadsheet import csv_text

# What an evaluation found out, against when, where and how fast it did.
RESULT_FIELDS = ("metric", "score", "per_case", "excluded", "validation", "best_step")


@dataclass
class Merged:
    """What a merge did.

    Attributes:
        copied: records that the target had not.
        known: records that it had, with the same result (timings may differ; the target's stay).
        conflicts: a line for each identity with two different results; neither was touched.
        problems: a line for each record that could not be read.
    """

    copied: int = 0
    known: int = 0
    conflicts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def differing_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the fields in which two records of one identity found different things.

    >>> differing_results({"score": 1.0, "created": "now"}, {"score": 1.0, "created": "then"})
    []
    """
    return [f for f in RESULT_FIELDS if not _same(a.get(f), b.get(f))]


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON; the cases of two records are parsed only where their texts differ."""
    if isinstance(a, Cases) and isinstance(b, Cases) and a.has_text_of(b):
        return True
    a, b = (list(value) if isinstance(value, Cases) else value for value in (a, b))
    return canonical_json(a) == canonical_json(b)


def merge(target: ResultStore, sources: Sequence[ResultStore]) -> Merged:
    """Copy the records of ``sources`` into ``target``; one that is there already is not replaced.

    Each cell is claimed while it is copied, so a bench may run on the target meanwhile. Runs and
    checkpoints stay where they are.

    Raises:
        DataError: a source does not exist or has no sound record.
    """
    for source in sources:  # before anything is written
        source.check()
    result = Merged()
    for source in sources:
        with no_garbage_collection():
            busy: list[str] = []
            for some in _together(source, result):
                busy += _merge_some(target, some, result)
        for path in busy:
            _merge_busy(target, source, path, result)
    target.tidy_finished()
    return result


_TOGETHER = 1000
"""Records that wait for the disk together."""

_TOGETHER_BYTES = 64 * 2**20
"""And the bytes that do: all of them are in memory."""


def _together(source: ResultStore, result: Merged) -> Iterator[list[File]]:
    """Yield the sound records of ``source``, some at a time; note those that are not.

    What is written are the bytes that were checked: no file is read a second time.
    """
    some: list[File] = []
    size = 0
    for found in source.files(lazy=True):
        if isinstance(found, str):
            result.problems.append(found)
            continue
        some.append(found)
        size += len(found.data)
        if len(some) == _TOGETHER or size >= _TOGETHER_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _merge_some(target: ResultStore, some: Sequence[File], result: Merged) -> list[str]:
    """Merge some records; return the paths of those whose cells another process holds, or that lie there twice."""
    busy, missing, new = [], {}, {}
    for file in some:
        ours = target.path_for(file.record["identity"], file.digest)
        if _holds(ours, file.data):
            result.known += 1
        elif file.digest in missing:
            busy.append(file.path)
        else:
            missing[file.digest] = (ours, file)
    with target.claim_many(missing) as held:
        for digest, (ours, file) in missing.items():
            if digest not in held:
                busy.append(file.path)
            elif os.path.lexists(ours):
                _merge_one(target, file, result)
            else:
                new[ours] = file.data
        write_all(new)
    result.copied += len(new)
    return busy


def _merge_busy(target: ResultStore, source: ResultStore, path: str, result: Merged) -> None:
    """Merge a record whose cell another process held; wait for that."""
    try:
        file = source.file(path)
    except DataError as error:  # since it was first read
        result.problems.append(str(error))
        return
    with target.claim(file.record["identity"]):
        _merge_one(target, file, result)


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file has just these contents."""
    try:
        return contents(str(path)) == data
    except (DataError, OSError):
        return False


def _merge_one(target: ResultStore, theirs: File, result: Merged) -> None:
    """Merge a record whose cell is claimed, and of which the target may have a file with other content."""
    identity = theirs.record["identity"]
    ours = target.path_for(identity, theirs.digest)
    if not ours.exists():
        write_bytes(ours, theirs.data)
        result.copied += 1
        return
    other = _sound(target, ours)
    record = theirs.record
    try:
        if other is None:
            target.write(decode_record(theirs.data))  # the damaged file stays beside it
            result.copied += 1
            return
        fields = differing_results(other, record)
    except DataError as error:  # of the cases, which nobody has looked at before
        result.problems.append(f"{theirs.path}: {error}")
        return
    if fields:
        result.conflicts.append(
            f"Two results for one identity, scores {other['score']} and {record['score']}, differing in "
            f"{', '.join(fields)}: {ours} and {theirs.path}. Neither was changed: delete the wrong one."
        )
    else:
        result.known += 1


def _sound(store: ResultStore, path: Path) -> Record | None:
    """Return the record in a file; None: it is damaged."""
    try:
        return store.file(str(path), lazy=True).record
    except DataError:
        return None


def find(store: ResultStore, text: str) -> Path:
    """Return the path of the record that ``text`` names: a file, its name, or the start of its hash.

    Raises:
        DataError: none or several.
    """
    if Path(text).is_file():
        return Path(text)
    if not store.folder.is_dir():
        raise DataError(f"The store {store.root} does not exist or has no records.")
    paths = sorted(store.folder.glob("*.json"))
    found = [
        p for p in paths if text in (p.name, p.stem) or (text and p.stem.rpartition("-")[2].startswith(text))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(
            f'No record in {store.root} is called "{text}". {len(paths)} are there: ssl3d store ls.'
        )
    names = "\n".join(p.name for p in found[:10])
    raise DataError(f'"{text}" names {len(found)} records; give more of the hash:\n{names}')


# --- Failures --------------------------------------------------------------------------------------

_SAME_CELL = ("method", "task", "mode", "seed", "split", "label_fraction", "pretrain_step")


def overtaken(failures: Sequence[Record], records: Sequence[Record]) -> dict[int, list[str]]:
    """Return the failures whose cell was computed since with other settings, by place: what differs in the newest record.

    The cell is the same where method, task, mode, seed, split, share of labels and step of pretraining are.

    Args:
        failures: of a store.
        records: of the same store.
    """
    newest: dict[tuple[Any, ...], Record] = {}
    for record in records:
        cell = tuple(record["identity"].get(key) for key in _SAME_CELL)
        if str(record.get("created", "")) >= str(newest.get(cell, {}).get("created", "")):
            newest[cell] = record
    found = {}
    for place, failure in enumerate(failures):
        then = newest.get(tuple(failure["identity"].get(key) for key in _SAME_CELL))
        if then is None or str(then.get("created", "")) < str(failure["created"]):
            continue
        old, new = flatten(failure["identity"]), flatten(then["identity"])
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        found[place] = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys]
    return found


def prune(store: ResultStore) -> list[Record]:
    """Forget the failures whose cell was computed since (:func:`overtaken`), and return them.

    Raises:
        DataError: there is no store.
    """
    failures, (records, _) = store.failures(), store.records(lazy=True)
    gone = [failures[place] for place in overtaken(failures, records)]
    for failure in gone:
        store.forget_failure(failure["identity"])
    return gone


# --- Export ----------------------------------------------------------------------------------------

WHAT = ("records", "cases")


def rows(records: Sequence[Record], what: str = "records") -> Iterator[dict[str, Any]]:
    """Yield flat rows: one a record, or one a case with the metrics of that case.

    Nested parts of the identity are canonical JSON, so that they can be compared as text.

    Raises:
        ConfigError: ``what`` is neither.
    """
    if what not in WHAT:
        raise ConfigError(f'--what "{what}".{nearest(what, WHAT)}')
    for record in records:
        identity = {
            key: canonical_json(value) if isinstance(value, dict | list) else value
            for key, value in record["identity"].items()
        }
        shared = {
            **identity, "title": record["method"]["title"], "trains": record["method"].get("trains"),
            "preset": record.get("preset"), "metric": record["metric"],
        }  # fmt: skip
        if what == "records":
            environment = record.get("environment") or {}
            yield {
                **shared, "score": record["score"], "cases": len(record["per_case"]),
                "best_step": record.get("best_step"), **(record.get("cost") or {}),
                "ssl3d": (environment.get("versions") or {}).get("ssl3d"),
                "git_commit": environment.get("git_commit"), "created": record.get("created"),
                "record_sha256": record.get("record_sha256"),
            }  # fmt: skip
        else:
            for case in record["per_case"]:
                structures = case.get("structures") or {}
                yield {
                    **shared,
                    **{key: value for key, value in case.items() if key != "structures"},
                    **{
                        f"{name}.{key}": value for name, of in structures.items() for key, value in of.items()
                    },
                }


def export(records: Sequence[Record], path: Path, what: str = "records") -> int:
    """Write :func:`rows` to ``path`` (.csv or .parquet), atomically, and return their number.

    Raises:
        ConfigError: another ending, or Parquet without pyarrow.
    """
    found = list(rows(records, what))
    columns = list(dict.fromkeys(key for row in found for key in row))
    if path.suffix == ".csv":
        write_bytes(path, csv_text(columns, found).encode())
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ConfigError(
                f'{path}: Parquet needs pyarrow; pip install "ssl3d[parquet]", or export to a .csv file.'
            ) from None
        # By column over all rows: a metric may be missing in the first ones.
        table = pyarrow.table({column: [row.get(column) for row in found] for column in columns})
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        write_bytes(path, sink.getvalue().to_pybytes())
    else:
        raise ConfigError(f'{path}: the ending "{path.suffix}" is neither .csv nor .parquet.')
    return len(found)
