"""Scans of one release that are there as several subjects: resampled, saved again, scaled, turned in storage.

``ssl3d data verify`` keeps a small copy of every volume that it reads, and compares these as
:mod:`ssl3d.data.checks.overlap` compares prepared volumes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.data.checks.intensity import subsample
from ssl3d.data.checks.overlap import COARSE_MM, COARSEST_MM, same_scans
from ssl3d.data.cohort import Case
from ssl3d.data.files.findings import Finding
from ssl3d.data.people import guess_people, subject_of
from ssl3d.data.prepared.arrays import SUFFIX, Where, read_array, save_array
from ssl3d.data.prepared.grids import resample
from ssl3d.errors import are, count
from ssl3d.parallel import Progress
from ssl3d.remedies import ONE_SCAN

if TYPE_CHECKING:
    from ssl3d.data.files.volume import Volume

logger = logging.getLogger(__name__)

_MOST_VOXELS = 2_000_000  # of a copy: 500 x 500 x 1000 mm at 5 mm
_LEAST_ML = 160.0  # 2,500 voxels of the coarse grid; of less, bodies that differ look alike
_PERCENTILES = (1.0, 99.5)  # become 0 and 1, so that units and metal do not matter


@dataclass(frozen=True, eq=False)
class KeptScan:
    """One copy, see :class:`ssl3d.data.checks.overlap.ScanCase`."""

    id: str
    subject: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing_mm: float
    native_affine: np.ndarray


class KeptScans:
    """Small copies of volumes, for :func:`ssl3d.data.checks.overlap.same_scans`; threads may add to them.

    Args:
        folder: where to keep them; the caller deletes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: Sequence[KeptScan] = ()
        self._sources: Sequence[Case] = ()
        self._grids: dict[Path, tuple[tuple[int, int, int], np.ndarray, float, np.ndarray]] = {}

    def keep(self, image: Volume) -> None:
        """Keep a copy of ``image``: isotropic, in [0, 1], of two million voxels at most."""
        size_mm = np.multiply(image.data.shape, image.spacing_mm)  # (3,)
        spacing_mm = max(min(image.spacing_mm), float(size_mm.prod() / _MOST_VOXELS) ** (1 / 3))
        small, affine = _block_means(image.data, image.affine, spacing_mm)
        small, affine = resample(small, affine, spacing_mm)
        low, high = np.percentile(subsample(small), _PERCENTILES)
        small = np.clip((small - low) / max(float(high - low), 1e-6), 0, 1).astype(np.float32)
        save_array(self._place(image.path), small)
        shape = (small.shape[0], small.shape[1], small.shape[2])
        self._grids[image.path] = (shape, affine, spacing_mm, image.affine)

    def find(self, cases: Sequence[Case], progress: Progress | None = None) -> dict[Case, list[Finding]]:
        """Return a finding for each case that shows a scan which another subject has, too: of a pair the later one.

        Args:
            cases: whose images were kept; others are passed over.
            progress: told about every image that was compared.
        """
        known = [case for case in cases if case.image in self._grids]
        fine = [case for case in known if self._shows_enough(case)]
        if others := len(known) - len(fine):
            logger.warning(
                "%s %s too coarse or too small to be found resampled under another subject; files and voxels are compared",
                count(others, "volume"), are(others),
            )  # fmt: skip
        self._sources = fine
        self.cases = [KeptScan(case.id, case.subject, *self._grids[case.image]) for case in fine]
        spacing_mm = max((COARSE_MM, *(case.spacing_mm for case in self.cases)))
        guess = guess_people([case.id for case in cases])
        found: dict[Case, list[Finding]] = {}
        for i, j, score in same_scans(self, range(len(fine)), spacing_mm, progress):
            one, other = fine[i], fine[j]
            people = [guess and subject_of(case.id, guess.pattern) for case in (one, other)]
            pattern = guess.pattern if guess and people[0] == people[1] else "REGEX"
            problem = f"shows the same scan as {one.image}, of another subject (correlation {score:.2f})"
            found.setdefault(other, [Finding(other.image, problem, ONE_SCAN(pattern=pattern))])
        return found

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        """Return copy ``i``, or a box of it: (D, H, W) float32 in [0, 1]."""
        return read_array(self._place(self._sources[i].image), where)

    def _shows_enough(self, case: Case) -> bool:
        shape, _, spacing_mm, _ = self._grids[case.image]
        return bool(spacing_mm <= COARSEST_MM and np.prod(shape) * spacing_mm**3 >= 1000 * _LEAST_ML)

    def _place(self, path: Path) -> Path:
        return self.folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}{SUFFIX}"


def _block_means(data: np.ndarray, affine: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Return means over blocks of voxels (D', H', W') float32 no longer than ``spacing_mm``, and their affine.

    What is left to do is then cheap, and there is no aliasing.
    """
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    blocks = [max(1, min(int(spacing_mm / step), edge)) for step, edge in zip(steps, data.shape, strict=True)]
    whole = data[tuple(slice(edge // n * n) for edge, n in zip(data.shape, blocks, strict=True))]
    d, h, w = (edge // n for edge, n in zip(whole.shape, blocks, strict=True))
    means = whole.reshape(d, blocks[0], h, blocks[1], w, blocks[2]).mean(axis=(1, 3, 5), dtype=np.float32)
    matrix = affine @ np.diag([*blocks, 1.0])
    matrix[:3, 3] = affine[:3, 3] + affine[:3, :3] @ ((np.array(blocks) - 1) / 2)
    return means, matrix
