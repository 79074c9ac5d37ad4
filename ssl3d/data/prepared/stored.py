"""What a cache says of itself: manifests of cohorts and notes of cases, each with a digest of its own, checked when read.

    CACHE/prepared/<data set>-<fingerprint>/manifest.json     written last: without it the folder is no cohort
    CACHE/prepared/<data set>-<fingerprint>/cases-*.parquet   what it says of the cases, where they are many
    CACHE/prepared/<data set>-<fingerprint>/sources-<key>.json   which folder the source files lie in
    CACHE/prepared/<data set>-<fingerprint>/<case>.json       what the manifest will say of the case
    CACHE/prepared/<data set>-<fingerprint>/<case>.image.b2nd, .label.b2nd

A file that is damaged is as one that is not there: its case, or its cohort, is built again. Caches of earlier versions,
without digests, are taken as they are.

Arrays of a cohort that stands in its manifest are there and as long as they were written, or it is built again. Those of
a cohort with an index (:mod:`ssl3d.data.prepared.index`) are looked at when they are read; where one is found missing
or damaged then, all of them are looked at by the next call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ssl3d.data.prepared.arrays import LOOK_AGAIN
from ssl3d.data.prepared.index import Index, needs_index, stream, write_shards
from ssl3d.errors import ReadError
from ssl3d.files import MOST_JSON_BYTES, parse_json, read_bytes, write_json

__without_effect__ = "what was written comes back as it was written, or not at all"

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DIGEST = "digest"
_SOURCES_OF = "sources-"


class _Array(BaseModel):
    name: str
    bytes: int
    sha256: str | None = None


class _Source(BaseModel):
    path: str
    size: int
    mtime_ns: int
    sha256: str


class _Note(BaseModel):
    """What is stored of a case."""

    model_config = ConfigDict(strict=True)

    id: str
    subject: str
    subset: str | None
    target: int | None
    classes: list[int] | None
    value: float | None
    sources: dict[str, _Source | None]
    arrays: dict[str, _Array | None]
    intensity: list[Any]
    voxels: dict[str, str | None]
    shape: list[int]
    affine: list[list[float]]
    native_shape: list[int]
    native_affine: list[list[float]]


class _Shard(BaseModel):
    name: str
    rows: int
    sha256: str


class _Manifest(BaseModel):
    """What is stored of a cohort, without its cases."""

    model_config = ConfigDict(strict=True)

    format: int
    fingerprint: str
    dataset: str
    label_names: list[str]
    label_values: list[int]
    preparation: dict[str, Any]
    target_names: dict[str, str] = {}
    intensity: dict[str, Any]
    skipped: list[dict[str, str]] = []
    cases: list[dict[str, Any]] = []
    shards: list[_Shard] | None = None


def read_manifest(folder: Path, version: int) -> dict[str, Any] | None:
    """Return the manifest of a complete cohort; else None, with a word if there is one.

    Its ``cases`` are a list, or an :class:`~ssl3d.data.prepared.index.Index` of which nothing has been read.

    Args:
        folder: of the cohort.
        version: of the preparation.

    Raises:
        ConfigError: it has an index, and pyarrow is not installed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = _sealed(path)
        _Manifest.model_validate(manifest)
        complete = manifest["format"] == version
        indexed = manifest.get("shards") is not None
        if indexed:
            manifest["cases"] = Index(folder, manifest.pop("shards"))
        elif not isinstance(manifest.get("cases"), list):
            raise ReadError("it is damaged: it names no cases")
        if complete and (not indexed or (folder / LOOK_AGAIN).exists()):
            for record in stream(manifest["cases"]):
                complete = complete and _is_note(record) and _arrays_exist(folder, record)
    except (ReadError, ValidationError) as error:
        logger.warning("%s: %s; its cohort is built again", path, _first_line(error))
        return None
    if not complete:
        logger.warning(
            "%s is of an earlier version, or arrays are missing or cut short; it is built again", path
        )
        return None
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a cohort; the cases of more than :data:`~ssl3d.data.prepared.index.MANY` into an index.

    Raises:
        ConfigError: it needs an index, and pyarrow is not installed.
        WriteError: the system refuses.
    """
    cases = manifest["cases"]
    if not isinstance(cases, Index) or cases.looked_through:
        for path in folder.glob(f"{_SOURCES_OF}*.json"):  # where they were
            path.unlink(missing_ok=True)
        root = _common_folder(cases)
        _seal(folder / f"{_SOURCES_OF}{_key(root)}.json", {"below": str(root)})
    if needs_index(len(cases)):
        manifest = {key: value for key, value in manifest.items() if key != "cases"}
        manifest["shards"] = write_shards(folder, cases)
    _seal(folder / MANIFEST, manifest)
    (folder / LOOK_AGAIN).unlink(missing_ok=True)


def _common_folder(cases: Iterable[Mapping[str, Any]]) -> Path:
    """Return the folder that all source files lie below."""
    paths = (source["path"] for record in cases for source in record["sources"].values() if source)
    folders = {path.rpartition(os.sep)[0] for path in paths}
    return Path(os.path.commonpath(folders)) if folders else Path("/")


def _key(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def read_note(folder: Path, stem: str) -> dict[str, Any] | None:
    """Return what was stored of a case whose arrays are there and as long as they were written; else None."""
    path = folder / f"{stem}.json"
    if not path.is_file():
        return None
    try:
        record = _sealed(path)
    except ReadError as error:
        logger.warning("%s: %s; its case is built again", path, _first_line(error))
        return None
    return record if _is_note(record) and _arrays_exist(folder, record) else None


def write_note(folder: Path, stem: str, record: Mapping[str, Any]) -> None:
    """Write down what was stored of a case, after its arrays."""
    _seal(folder / f"{stem}.json", record, sync=False)  # its digest tells whether it is whole


def _is_note(record: Any) -> bool:
    try:
        _Note.model_validate(record)
    except ValidationError:
        return False
    return True


def _arrays_exist(folder: Path, record: Mapping[str, Any]) -> bool:
    arrays = [array for array in record["arrays"].values() if array]
    return bool(record["arrays"].get("image")) and all(
        Path(array["name"]).name == array["name"]  # nothing outside of the folder
        and (folder / array["name"]).is_file()
        and (folder / array["name"]).stat().st_size == array["bytes"]
        for array in arrays
    )


def _seal(path: Path, value: Mapping[str, Any], sync: bool = True) -> None:
    plain = {key: part for key, part in value.items() if key != _DIGEST}
    write_json(path, {**plain, _DIGEST: _digest_of(plain)}, sync)


def _sealed(path: Path) -> dict[str, Any]:
    """Return what a file holds, without its digest.

    Raises:
        ReadError: it is damaged.
    """
    try:
        value = parse_json(read_bytes(path, MOST_JSON_BYTES))
    except ValueError as error:
        raise ReadError(f"it is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ReadError("it is damaged: it holds no object")
    digest = value.pop(_DIGEST, None)
    if digest is not None and digest != _digest_of(value):
        raise ReadError("it is damaged: it is not what was written")
    return value


def _digest_of(value: Mapping[str, Any]) -> str:
    # Through JSON once: a tuple is written as a list, and a key as text.
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# --- Hashes of sources -----------------------------------------------------------------------------

_hash_all: ContextVar[bool] = ContextVar("hash_all", default=False)


@contextmanager
def hashing_all_sources() -> Iterator[None]:
    """Hash every source file inside, also one whose size and time say that it has not changed."""
    token = _hash_all.set(True)
    try:
        yield
    finally:
        _hash_all.reset(token)


class KnownDigests:
    """(path, size, modification time) -> SHA-256 of source files, of the manifests of cohorts below whose folders they lie.

    Others are never read: a preparation reads what is known of its own data, however many cohorts there are. Manifests of
    earlier versions, which do not say where their files lie, are read at the first question. Threads may share it.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._folders: dict[str, list[Path]] = {}
        self._known: dict[tuple[str, int, int], str] = {}
        self._clashing: set[tuple[str, int, int]] = set()
        self._answered: set[str] = set()
        self._lock = threading.Lock()
        for path in sorted(cache_dir.glob(f"*/{MANIFEST}")):
            marks = [mark.stem.removeprefix(_SOURCES_OF) for mark in path.parent.glob(f"{_SOURCES_OF}*.json")]
            for key in marks or [""]:
                self._folders.setdefault(key, []).append(path.parent)

    def get(self, key: tuple[str, int, int]) -> str | None:
        """Return the hash, or None: not known, or two manifests say different things of the file.

        Such a file was changed behind size and time.
        """
        folder = key[0].rpartition(os.sep)[0]
        if folder not in self._answered:
            with self._lock:
                if folder not in self._answered:
                    self._read("")
                    for parent in (Path(folder), *Path(folder).parents):
                        self._read(_key(parent))
                    self._answered.add(folder)
        return self._known.get(key)

    def _read(self, key: str) -> None:
        for folder in self._folders.pop(key, ()):
            try:
                for source in _sources_of(folder):
                    said = source.path, source.size, source.mtime_ns
                    if (
                        said not in self._clashing
                        and self._known.setdefault(said, source.sha256) != source.sha256
                    ):
                        self._clashing.add(said)
                        del self._known[said]
            except (ReadError, ValidationError, KeyError, TypeError, AttributeError) as error:
                logger.warning("%s: %s; its cohort is not reused", folder / MANIFEST, _first_line(error))


class _NothingKnown(KnownDigests):
    def __init__(self) -> None:
        self._known = {}

    def get(self, key: tuple[str, int, int]) -> str | None:
        return None


def known_digests(cache_dir: Path) -> KnownDigests:
    """Return what manifests say of source files; nothing inside :func:`hashing_all_sources`."""
    return _NothingKnown() if _hash_all.get() else KnownDigests(cache_dir)


def cohorts_of(folder: Path, cache_dir: Path) -> list[Path]:
    """Return the cohorts in a cache whose source files have ``folder`` as their deepest common folder, newest first."""
    found = [mark.parent for mark in cache_dir.glob(f"*/{_SOURCES_OF}{_key(folder)}.json")]
    whole = [(path / MANIFEST).stat().st_mtime_ns if (path / MANIFEST).is_file() else 0 for path in found]
    return [path for when, path in sorted(zip(whole, found, strict=True), reverse=True) if when]


def _sources_of(folder: Path) -> Iterator[_Source]:
    manifest = _sealed(folder / MANIFEST)
    if manifest.get("shards") is not None:
        for source in Index(folder, manifest["shards"]).sources():
            yield _Source.model_construct(**source)  # of types that the columns have
        return
    for record in manifest["cases"]:
        for source in record["sources"].values():
            if source:
                yield _Source.model_validate(source, strict=True)
