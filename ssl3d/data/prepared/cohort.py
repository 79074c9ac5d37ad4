"""Cohorts of prepared volumes on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.cohort import Subset
from ssl3d.data.prepared.arrays import Where, read_array
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.data.prepared.stored import read_manifest
from ssl3d.errors import DataError, nearest

PREPARATION_VERSION = 1
"""Part of every fingerprint; raised when a change of the code changes prepared voxels."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """One prepared case.

    Attributes:
        id, subject, subset, target, classes, value: as in :class:`ssl3d.data.cohort.Case`.
        has_label: whether a segmentation is stored.
        shape: (D, H, W) of the prepared volume.
        affine: (4, 4), prepared voxel index -> RAS+ mm.
        spacing_mm: isotropic spacing.
        source: the image file it was made from.
        native_shape, native_affine: grid of that file, as stored (see :func:`to_native_grid`).
    """

    id: str
    subject: str
    subset: Subset | None
    target: int | None
    has_label: bool
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing_mm: float
    source: Path
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    classes: tuple[int, ...] | None = None
    value: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether a segmentation, a class or a number is known."""
        return self.has_label or any(known is not None for known in (self.target, self.classes, self.value))


class PreparedCohort:
    """A cohort of prepared volumes on disk, compressed (see :mod:`ssl3d.data.prepared.arrays`).

    Args:
        folder: made by :func:`prepare`.
        manifest: what its manifest holds, where that was read already.

    Attributes:
        folder: where it is.
        dataset: name of the data set.
        label_names: names of the structures; label value k is ``label_names[k - 1]``, 0 is background.
        label_values: what the source files hold for each of them.
        cases: the cases, in the order of the arrays.
        fingerprint: hash of source contents and parameters (64 hexadecimal digits); the same on
            every machine and wherever the files lie.
        preparation: the parameters.
        intensity: the scaling and offset that were applied.
        skipped: cases left out by the policy "skip": ``id``, ``path``, ``problem`` and ``fix`` of each.
        target_names: class -> name, for classification.
        records: what the manifest says of each case.

    Raises:
        DataError: the folder is not a complete prepared cohort.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
        manifest = read_manifest(folder, PREPARATION_VERSION) if manifest is None else manifest
        if manifest is None:
            raise DataError(f"{folder} is not a complete prepared cohort. Fix: prepare it again.")
        self.folder = folder
        self.dataset: str = manifest["dataset"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self.label_values: tuple[int, ...] = tuple(manifest["label_values"])
        self.fingerprint: str = manifest["fingerprint"]
        self.preparation = Preparation.model_validate(manifest["preparation"])
        self.intensity = Intensity(**manifest["intensity"])
        self.skipped: list[dict[str, str]] = manifest.get("skipped", [])
        self.target_names = {int(k): str(v) for k, v in manifest.get("target_names", {}).items()}
        self.records: Sequence[dict[str, Any]] = manifest["cases"]
        self.cases = self._opened()

    def _opened(self) -> Sequence[PreparedCase]:
        """Return a case for each record."""
        return [_prepared_case(record, self.preparation.spacing_mm) for record in self.records]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {case.id: i for i, case in enumerate(self.cases)}

    @property
    def num_classes(self) -> int:
        """Structures and background: the channels of a segmentation head."""
        return len(self.label_names) + 1

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def taken_for(self) -> str:
        """What the volumes were taken for, and how that was decided."""
        return f"{self.intensity.taken_for or self.intensity.scaling} ({self.intensity.rule})"

    def source_digests(self, i: int) -> tuple[str, str]:
        """Return hashes of the image file of case ``i`` and of its voxels (as they were in the file)."""
        record = self.records[i]
        return record["sources"]["image"]["sha256"], record["voxels"]["image"]

    def index(self, case_id: str) -> int:
        """Return the position of a case.

        Raises:
            DataError: no such case.
        """
        if case_id not in self._index:
            raise DataError(f'{self.dataset} has no case "{case_id}".{nearest(case_id, self._index)}')
        return self._index[case_id]

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        """Return the image of case ``i``, or a box of it: (D, H, W) float32 in [0, 1].

        Raises:
            DataError: what is stored is damaged; see :func:`read_array`.
        """
        return self._array(i, "image", where)

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        """Return the label of case ``i``, or a box of it: (D, H, W) uint8 in 0..K.

        Raises:
            DataError: the case has no label, or what is stored is damaged.
        """
        if not self.cases[i].has_label:
            raise DataError(
                f"Case {self.cases[i].id} of {self.dataset} has no label ({self.cases[i].source})."
            )
        return self._array(i, "label", where)

    def _array(self, i: int, kind: str, where: Where) -> np.ndarray:
        array = self.records[i]["arrays"][kind]
        return read_array(self.folder / array["name"], where, array.get("sha256"))


def _prepared_case(record: dict[str, Any], spacing_mm: float) -> PreparedCase:
    return PreparedCase(
        id=record["id"], subject=record["subject"], subset=record["subset"], target=record["target"],
        has_label=record["arrays"]["label"] is not None, shape=tuple(record["shape"]),
        affine=np.array(record["affine"]), spacing_mm=spacing_mm,
        source=Path(record["sources"]["image"]["path"]),
        native_shape=tuple(record["native_shape"]), native_affine=np.array(record["native_affine"]),
        classes=None if record["classes"] is None else tuple(record["classes"]), value=record["value"],
    )  # fmt: skip
