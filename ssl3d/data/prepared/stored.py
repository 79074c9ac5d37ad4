"""What a cache says of itself: manifests of cohorts and notes of cases, each with a digest of its own, checked when read.

    CACHE/prepared/<data set>-<fingerprint>/manifest.json     written last: without it the folder is no cohort
    CACHE/prepared/<data set>-<fingerprint>/<case>.json       what the manifest will say of the case
    CACHE/prepared/<data set>-<fingerprint>/<case>.image.b2nd, .label.b2nd

A file that is damaged is as one that is not there: its case, or its cohort, is built again. Caches of earlier versions,
without digests, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ssl3d.errors import ReadError
from ssl3d.files import MOST_JSON_BYTES, parse_json, read_bytes, write_json

__without_effect__ = "what was written comes back as it was written, or not at all"

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DIGEST = "digest"


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
    cases: list[dict[str, Any]]


def read_manifest(folder: Path, version: int) -> dict[str, Any] | None:
    """Return the manifest of a complete cohort: its arrays are there and as long as they were written; else None.

    Args:
        folder: of the cohort.
        version: of the preparation.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = _sealed(path)
        _Manifest.model_validate(manifest)
        complete = manifest["format"] == version
        for record in manifest["cases"]:
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
    """Write the manifest of a cohort."""
    _seal(folder / MANIFEST, manifest)


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
    _seal(folder / f"{stem}.json", record)


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


def _seal(path: Path, value: Mapping[str, Any]) -> None:
    plain = {key: part for key, part in value.items() if key != _DIGEST}
    write_json(path, {**plain, _DIGEST: _digest_of(plain)})


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


def known_digests(cache_dir: Path) -> dict[tuple[str, int, int], str]:
    """Return (path, size, modification time) -> SHA-256 of the source files of all manifests.

    A file of which two manifests say different things is not among them: it was changed behind size and time.
    """
    if _hash_all.get():
        return {}
    said: dict[tuple[str, int, int], set[str]] = {}
    for path in sorted(cache_dir.glob(f"*/{MANIFEST}")):
        try:
            for source in _sources(_sealed(path)["cases"]):
                said.setdefault((source.path, source.size, source.mtime_ns), set()).add(source.sha256)
        except (ReadError, ValidationError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: %s; its cohort is not reused", path, _first_line(error))
    return {key: digests.pop() for key, digests in said.items() if len(digests) == 1}


def _sources(cases: Sequence[Mapping[str, Any]]) -> list[_Source]:
    found = [source for record in cases for source in record["sources"].values() if source]
    return [_Source.model_validate(source, strict=True) for source in found]
