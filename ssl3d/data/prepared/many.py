"""Cohorts of many volumes: opened by their index without looking at a file, and grown by what is new.

:class:`~ssl3d.data.prepared.cohort.PreparedCohort` makes an object of every case when it is opened: microseconds for each
that ten thousand cases do not feel and a million do.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssl3d.data.cohort import Case, Dataset
from ssl3d.data.files.volume_file import VolumeFile
from ssl3d.data.prepared.arrays import Where, read_array
from ssl3d.data.prepared.cohort import PREPARATION_VERSION, PreparedCase, PreparedCohort
from ssl3d.data.prepared.index import Index, stream
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.prepared.stored import MANIFEST, cohorts_of, read_manifest
from ssl3d.errors import DataError

__without_effect__ = "it opens what is stored; what was written comes back as it was written"


class IndexedCase(PreparedCase):
    """One case of an index: what is asked for is read from its columns."""

    _index: Index
    _at: int

    def __init__(self, index: Index, at: int, spacing_mm: float) -> None:
        vars(self).update(_index=index, _at=at, spacing_mm=spacing_mm)

    def _text(self, column: str) -> Any:
        return self._index.value(column, self._at)

    def _numbers(self, column: str, dtype: Any) -> np.ndarray:
        return self._index.numbers(column, dtype)[self._at]

    id = property(lambda self: self._text("id"))  # type: ignore[assignment]
    subject = property(lambda self: self._text("subject"))  # type: ignore[assignment]
    subset = property(lambda self: self._text("subset"))  # type: ignore[assignment]
    target = property(lambda self: self._text("target"))  # type: ignore[assignment]
    value = property(lambda self: self._text("value"))  # type: ignore[assignment]
    classes = property(lambda self: _tuple(self._text("classes")))  # type: ignore[assignment]
    has_label = property(lambda self: self._text("label_name") is not None)  # type: ignore[assignment]
    source = property(lambda self: Path(self._text("image_source_path")))  # type: ignore[assignment]
    shape = property(lambda self: tuple(self._numbers("shape", np.int32).tolist()))  # type: ignore[assignment]
    native_shape = property(lambda self: tuple(self._numbers("native_shape", np.int32).tolist()))  # type: ignore[assignment]
    affine = property(lambda self: self._numbers("affine", np.float64).reshape(4, 4))  # type: ignore[assignment]
    native_affine = property(lambda self: self._numbers("native_affine", np.float64).reshape(4, 4))  # type: ignore[assignment]


def _tuple(values: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


class IndexedCases(Sequence[PreparedCase]):
    """The cases of an index, each made when it is asked for."""

    def __init__(self, index: Index, spacing_mm: float) -> None:
        self.index_, self.spacing_mm = index, spacing_mm

    def __len__(self) -> int:
        return len(self.index_)

    @overload
    def __getitem__(self, at: int) -> PreparedCase: ...
    @overload
    def __getitem__(self, at: slice) -> list[PreparedCase]: ...
    def __getitem__(self, at: int | slice) -> PreparedCase | list[PreparedCase]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(f"case {at} of {len(self)}")
        return IndexedCase(self.index_, place, self.spacing_mm)

    def __iter__(self) -> Iterator[PreparedCase]:
        return (IndexedCase(self.index_, place, self.spacing_mm) for place in range(len(self)))


class IndexedCohort(PreparedCohort):
    """A :class:`PreparedCohort` of many cases; :func:`open_prepared` returns one where it is right.

    Args:
        folder: of the cohort.
        manifest: its manifest, with an index.
    """

    records: Index  # type: ignore[assignment]

    def _opened(self) -> Sequence[PreparedCase]:
        return IndexedCases(self.records, self.preparation.spacing_mm)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {case_id: i for i, case_id in enumerate(self.records.values("id"))}

    def source_digests(self, i: int) -> tuple[str, str]:
        """Return hashes of the image file of case ``i`` and of its voxels (as they were in the file)."""
        return self.records.value("image_source_sha256", i), self.records.value("image_voxels", i)

    def _array(self, i: int, kind: str, where: Where) -> np.ndarray:
        name, digest = (self.records.value(f"{kind}_{key}", i) for key in ("name", "sha256"))
        return read_array(self.folder / name, where, digest)


def open_prepared(folder: Path) -> PreparedCohort:
    """Return the prepared cohort in a folder.

    Raises:
        DataError: it is not a complete prepared cohort.
        ConfigError: it has an index, and pyarrow is not installed.
    """
    manifest = read_manifest(folder, PREPARATION_VERSION)
    if manifest is not None and isinstance(manifest["cases"], Index):
        return IndexedCohort(folder, manifest)
    return PreparedCohort(folder, manifest)


def is_prepared(folder: Path) -> bool:
    """Whether a folder is a prepared cohort, complete or not, and no folder of images."""
    return (folder / MANIFEST).is_file() and any(folder.glob("sources-*.json"))


def find_prepared(fingerprint: str, cache_dir: Path) -> PreparedCohort | None:
    """Return the stored cohort with this fingerprint, or None."""
    for folder in sorted(cache_dir.glob(f"*-{fingerprint[:16]}")):
        try:
            cohort = open_prepared(folder)
        except DataError:
            continue
        if cohort.fingerprint == fingerprint:
            return cohort
    return None


# --- Growing -----------------------------------------------------------------------------------------


def grown_from(
    cases: Sequence[Case], dataset: Dataset, preparation: Preparation, cache_dir: Path
) -> PreparedCohort | None:
    """Return a stored cohort of the same folder whose volumes can be taken over, with the records of these alone.

    That is, the newest one that was prepared in the same way and holds some of the cases; None where there is none, and
    where it holds all of them as their files are now: it is found by its fingerprint then. Only volumes without labels: a
    manifest does not say what the values of these were taken for.

    Args:
        cases: what is to be prepared.
        dataset: the adapter.
        preparation: the parameters.
        cache_dir: where prepared cohorts are kept.
    """
    if not cases or preparation.lungmask is not None or any(c.label or c.mask for c in cases):
        return None
    root = Path(os.path.commonpath({str(case.image.parent) for case in cases}))
    wanted = {case.id: case for case in cases}
    for folder in cohorts_of(root, cache_dir):
        manifest = read_manifest(folder, PREPARATION_VERSION)
        if (
            manifest is None
            or manifest["dataset"] != dataset.name
            or manifest.get("reading") != asdict(dataset.reading())
        ):
            continue
        cohort = open_prepared(folder)
        if cohort.preparation != preparation or cohort.label_names:
            continue
        same = [record for record in stream(cohort.records) if _is_of(record, wanted.get(record["id"]))]
        if len(same) == len(cases) == len(cohort) and all(_unchanged(record) for record in same):
            return None
        if same:
            found = copy.copy(cohort)
            found.records = same
            return found
    return None


def _is_of(record: Mapping[str, Any], case: Case | None) -> bool:
    """Whether a record says of a case what the adapter says of it."""
    return case is not None and (
        (record["subject"], record["subset"], record["target"], record["value"], record["classes"])
        == (case.subject, case.subset, case.target, case.value, case.classes and list(case.classes))
        and record["sources"]["image"]["path"] == str(case.image)
        and record["arrays"]["label"] is None
    )


def _unchanged(record: Mapping[str, Any]) -> bool:
    source = record["sources"]["image"]
    return VolumeFile(Path(source["path"])).stat() == (source["size"], source["mtime_ns"])
