"""The index of a large cohort: what its manifest says of the cases, in columns, in shards of Parquet files.

A JSON manifest of :data:`MANY` cases has 25 MB and is read whole. That of more cases has none in it, but names shards
``cases-00000.parquet`` of :data:`ROWS` cases each, with the SHA-256 of each. A column is read when something of it is
first asked for; a case is made of its row when somebody looks at it. No array is looked at before it is read.

pyarrow is needed for large cohorts only: ``pip install 'ssl3d[parquet]'``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from ssl3d.errors import ConfigError, ReadError, count
from ssl3d.files import read_bytes, write_bytes

__without_effect__ = "what was written comes back as it was written, or not at all"

MANY = 10_000
"""Cases from which on a cohort has an index; fewer stand in its manifest."""
ROWS = 65_536
"""Cases of a shard."""
_MOST_BYTES = 2**30  # of a shard

_KINDS = {"image": ("name", "bytes", "sha256"), "label": ("name", "bytes", "sha256")}
_SOURCES = ("image", "label", "mask")
_SOURCE = ("path", "size", "mtime_ns", "sha256")
_GRIDS = ("affine", "native_affine")

Record = dict[str, Any]
T = TypeVar("T")


def _pyarrow(cases: int) -> Any:
    """Return the package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"A cohort of {count(cases, 'case')} has an index in Parquet, as all of more than {MANY:,} have, and pyarrow "
            "is not installed. Fix: pip install 'ssl3d[parquet]'."
        ) from None
    return pyarrow


def check_room_for(cases: int) -> None:
    """Raise ConfigError where a cohort of so many cases needs pyarrow and it is not installed; before hours of work."""
    if needs_index(cases):
        _pyarrow(cases)


def needs_index(cases: int) -> bool:
    """Whether so many cases are kept in an index."""
    return cases > MANY


# --- Rows --------------------------------------------------------------------------------------------


def _schema(pyarrow: Any) -> Any:
    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    kinds = {"name": text, "bytes": whole, "sha256": text, "path": text, "size": whole, "mtime_ns": whole}
    fields = {
        "id": text,
        "subject": text,
        "subset": text,
        "target": whole,
        "classes": pyarrow.list_(whole),
        "value": real,
    }
    fields |= {f"{kind}_{key}": kinds[key] for kind, keys in _KINDS.items() for key in keys}
    fields |= {f"{kind}_source_{key}": kinds[key] for kind in _SOURCES for key in _SOURCE}
    fields |= {
        "masked": pyarrow.bool_(),
        "scaling": text,
        "offset": real,
        "image_voxels": text,
        "label_voxels": text,
    }
    fields |= {key: pyarrow.list_(pyarrow.int32(), 3) for key in ("shape", "native_shape")}
    fields |= {key: pyarrow.list_(real, 16) for key in _GRIDS}
    return pyarrow.schema(list(fields.items()))


def _row(record: Mapping[str, Any]) -> Record:
    """Return what a manifest says of a case as one value a column."""
    row = {
        key: record[key]
        for key in ("id", "subject", "subset", "target", "classes", "value", "shape", "native_shape")
    }
    for kind, keys in _KINDS.items():
        array = record["arrays"].get(kind) or {}
        row |= {f"{kind}_{key}": array.get(key) for key in keys}
        row[f"{kind}_voxels"] = record["voxels"].get(kind)
    for kind in _SOURCES:
        source = record["sources"].get(kind) or {}
        row |= {f"{kind}_source_{key}": source.get(key) for key in _SOURCE}
    row["masked"] = "mask" in record["sources"]
    row["scaling"], row["offset"] = record["intensity"]
    return row | {key: [value for line in record[key] for value in line] for key in _GRIDS}


def _record(row: Mapping[str, Any]) -> Record:
    """Return what the manifest said; see :func:`_row`."""
    kept = ("id", "subject", "subset", "target", "classes", "value")
    record: Record = {key: row[key] for key in kept}
    sources = _SOURCES if row["masked"] else _SOURCES[:2]
    record["sources"] = {kind: _part(row, f"{kind}_source", _SOURCE) for kind in sources}
    arrays = {kind: _part(row, kind, keys) for kind, keys in _KINDS.items()}
    for array in arrays.values():
        if array is not None and array["sha256"] is None:
            del array["sha256"]  # of a cache that has no digests
    record["arrays"] = arrays
    record["intensity"] = [row["scaling"], row["offset"]]
    record["voxels"] = {kind: row[f"{kind}_voxels"] for kind in _KINDS}
    for key in ("", "native_"):
        record[f"{key}shape"] = list(row[f"{key}shape"])
        flat = row[f"{key}affine"]
        record[f"{key}affine"] = [list(flat[4 * line : 4 * line + 4]) for line in range(4)]
    return record


def _part(row: Mapping[str, Any], kind: str, keys: Sequence[str]) -> Record | None:
    return None if row[f"{kind}_{keys[0]}"] is None else {key: row[f"{kind}_{key}"] for key in keys}


# --- Shards ------------------------------------------------------------------------------------------


def write_shards(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Write what a manifest says of its cases, and return name, rows and SHA-256 of each shard.

    A shard is called by what is in it, so that one that is being read is never written over.

    Raises:
        ConfigError: pyarrow is not installed.
        WriteError: the system refuses.
    """
    if isinstance(records, Index) and records.folder == folder and not records.looked_through:
        return records.shards
    pyarrow = _pyarrow(len(records))
    schema, shards = _schema(pyarrow), []
    for number, start in enumerate(range(0, len(records), ROWS)):
        rows = [_row(record) for record in records[start : start + ROWS]]
        sink = BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink, compression="zstd")
        data = sink.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        name = f"cases-{number:05d}-{digest[:8]}.parquet"
        write_bytes(folder / name, data)
        shards.append({"name": name, "rows": len(rows), "sha256": digest})
    kept = {shard["name"] for shard in shards}
    for path in folder.glob("cases-*.parquet"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
    return shards


class Index(Sequence[Record]):
    """What a manifest says of many cases, read by column; as a sequence, one record a case.

    Whoever goes through all records with ``for`` gets ones that stay, as those of a list do, and may change them; they
    take some 3 kB each. :func:`stream` keeps none. Threads may share it.

    Args:
        folder: of the cohort.
        shards: of :func:`write_shards`.

    Raises:
        ReadError: a shard is missing, damaged, or has another number of cases.
        ConfigError: pyarrow is not installed.
    """

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self.shards = folder, [dict(shard) for shard in shards]
        self._length = sum(shard["rows"] for shard in self.shards)
        self._pyarrow = _pyarrow(self._length)
        self._columns: dict[str, Any] = {}
        self._tables: dict[int, Any] = {}  # the last shard of which whole rows were asked for
        self._records: list[Record] | None = None
        self._lock = threading.RLock()
        for shard in self.shards:
            path = folder / shard["name"]
            if Path(shard["name"]).name != shard["name"]:
                raise ReadError(f"{path} lies outside of its folder")
            data = read_bytes(path, _MOST_BYTES)
            if hashlib.sha256(data).hexdigest() != shard["sha256"]:
                raise ReadError(f"{path.name} is damaged: it is not what was written")

    def __len__(self) -> int:
        return self._length

    def column(self, name: str) -> Any:
        """Return a column of all cases, as one Arrow array; kept."""
        with self._lock:
            if name not in self._columns:
                parts = [self._read(shard, [name]).column(0) for shard in self.shards]
                kind = (
                    self._pyarrow.large_string() if parts[0].type == self._pyarrow.string() else parts[0].type
                )
                chunks = [chunk.cast(kind) for part in parts for chunk in part.chunks]
                self._columns[name] = self._pyarrow.concat_arrays(chunks)
            return self._columns[name]

    def numbers(self, name: str, dtype: Any) -> np.ndarray:
        """Return a column of lists of one length as an array (N, length)."""
        key = f"{name} as numbers"
        with self._lock:
            if key not in self._columns:
                flat = self.column(name).flatten().to_numpy(zero_copy_only=False)
                self._columns[key] = np.asarray(flat, dtype).reshape(self._length, -1)
                del self._columns[name]
            found: np.ndarray = self._columns[key]
            return found

    def value(self, name: str, i: int) -> Any:
        """Return one value of a column."""
        return self.column(name)[i].as_py()

    def values(self, name: str) -> list[Any]:
        """Return all values of a column; not kept."""
        parts = [self._read(shard, [name]).column(0).to_pylist() for shard in self.shards]
        return [value for part in parts for value in part]

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"case {i} of {len(self)}")
        if self._records is not None:
            return self._records[i]
        number, row = divmod(i, ROWS)
        with self._lock:
            if number not in self._tables:
                self._tables = {number: self._read(self.shards[number])}
            table = self._tables[number]
        return _record(table.slice(row, 1).to_pylist()[0])

    @property
    def looked_through(self) -> bool:
        """Whether its records were made, and may have been changed."""
        return self._records is not None

    def __iter__(self) -> Iterator[Record]:
        with self._lock:
            if self._records is None:
                self._records = list(self.stream())
        return iter(self._records)

    def stream(self) -> Iterator[Record]:
        """Yield the record of each case as it was written; keeps none."""
        for shard in self.shards:
            for batch in self._read(shard).to_batches(max_chunksize=1024):
                yield from map(_record, batch.to_pylist())

    def sources(self) -> Iterator[Record]:
        """Yield path, size, time and SHA-256 of every source file."""
        for shard in self.shards:
            for kind in _SOURCES:
                table = self._read(shard, [f"{kind}_source_{key}" for key in _SOURCE])
                for row in zip(*(table.column(n).to_pylist() for n in range(len(_SOURCE))), strict=True):
                    if row[0] is not None:
                        yield dict(zip(_SOURCE, row, strict=True))

    def _read(self, shard: Mapping[str, Any], columns: list[str] | None = None) -> Any:
        try:
            table = self._pyarrow.parquet.read_table(
                self.folder / shard["name"], columns=columns, partitioning=None
            )
        except (OSError, self._pyarrow.ArrowException) as error:
            raise ReadError(
                f"{self.folder / shard['name']} cannot be read: {error}. Fix: prepare the cohort again."
            ) from error
        return table


def stream(cases: Sequence[Record]) -> Iterator[Record]:
    """Yield the records of a manifest's ``cases``, whatever their form, without keeping them."""
    return cases.stream() if isinstance(cases, Index) else iter(cases)
