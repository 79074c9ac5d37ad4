"""What pretraining sees of a cohort, as a type, and the same for arrays in memory.

A pretext method, and the :class:`~ssl3d.pretrain.source.CropSource` it is given, can ask for images and for nothing that
:class:`Volumes` does not name: there is no label, class or number in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import numpy as np

from ssl3d.data.prepared.arrays import Where


class VolumeCase(Protocol):
    """One volume without its voxels."""

    @property
    def id(self) -> str:
        """Unique in its cohort."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Edges (D, H, W) in voxels."""

    @property
    def spacing_mm(self) -> float:
        """Isotropic spacing."""


class Volumes(Protocol):
    """Unlabelled volumes; :class:`~ssl3d.data.prepared.cohort.PreparedCohort` is the one on disk."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the voxels; equal fingerprints, equal voxels."""

    @property
    def taken_for(self) -> str:
        """What the volumes were taken for (CT, MR), and how that was decided."""

    @property
    def cases(self) -> Sequence[VolumeCase]:
        """The volumes in order."""

    def __len__(self) -> int: ...

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        """Return volume ``i``, or a box of it: (D, H, W) float32 in [0, 1]."""


@dataclass(frozen=True)
class ArrayCase:
    """One volume of :class:`ArrayVolumes`, see :class:`VolumeCase`."""

    id: str
    shape: tuple[int, int, int]
    spacing_mm: float


@dataclass
class ArrayVolumes:
    """:class:`Volumes` in memory.

    Attributes:
        images: (D, H, W) float32 in [0, 1] each.
        spacing_mm: isotropic spacing of all.
        dataset, fingerprint, taken_for: see :class:`Volumes`.
    """

    images: Sequence[np.ndarray]
    _: KW_ONLY
    spacing_mm: float = 2.0
    dataset: str = "memory"
    fingerprint: str = "memory"
    taken_for: str = "made up"

    @property
    def cases(self) -> Sequence[VolumeCase]:
        """A case for each array: ``case0``, ``case1`` and so on."""
        return [self._case(i) for i in range(len(self.images))]

    def _case(self, i: int) -> VolumeCase:
        depth, height, width = self.images[i].shape
        return ArrayCase(f"case{i}", (depth, height, width), self.spacing_mm)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        """Return volume ``i``, or a box of it: (D, H, W)."""
        return self.images[i][where]

    def index(self, case_id: str) -> int:
        """Return the place of a case."""
        return [case.id for case in self.cases].index(case_id)
