"""Checks of voxels: values, labels, grids of image and labels."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.data.cohort import Dataset
from ssl3d.data.files.findings import Finding
from ssl3d.remedies import COPY_AGAIN, EMPTY_LABEL, LABEL_GRID, LABEL_VALUES, REPLACE

if TYPE_CHECKING:
    from ssl3d.data.files.volume import Volume


GRID_TOLERANCE = 0.1
"""Largest distance between corresponding corners of an image and its label, in voxels."""


def check_voxels(image: Volume) -> list[Finding]:
    """Check the values of an image: finite, and not all the same."""
    bad = image.data.size - int(np.isfinite(image.data).sum())
    if bad:
        nan = int(np.isnan(image.data).sum())
        kinds = " and ".join(f"{n} {name}" for n, name in ((nan, "NaN"), (bad - nan, "infinite")) if n)
        return [Finding(image.path, f"has {kinds} voxels", REPLACE())]
    if image.data.min() == image.data.max():
        return [Finding(image.path, f"is constant: every voxel is {image.data.flat[0]:g}", COPY_AGAIN())]
    return []


_NAMED = 10
"""Unknown values at most that a remedy names."""


def check_labels(label: Volume, dataset: Dataset) -> list[Finding]:
    """Check that a label holds no value unknown to ``dataset``, and something besides background."""
    known = dataset.label_index()
    values = set(np.unique(label.data).tolist())
    unknown = sorted(values - known.keys())
    if not unknown:
        if dataset.empty_labels or any(known[value] for value in values):
            return []
        problem = "is an empty label: it holds no structure, only background"
        return [Finding(label.path, problem, EMPTY_LABEL())]
    names = ", ".join(map(str, unknown[:10])) + ", ..." * (len(unknown) > 10)
    wanted = ", ".join(map(str, sorted({0, *dataset.label_values, *dataset.label_aliases})))
    problem = f"holds label values that {dataset.name} does not know: {names} (known: {wanted})"
    names_of = dict.fromkeys(dataset.label_aliases, "") | dict(dataset.label_values)
    names_of |= {value: f"structure{value}" for value in unknown[:_NAMED]}
    said = ",".join(f"{value}={name or f'structure{value}'}" for value, name in sorted(names_of.items()))
    return [Finding(label.path, problem, LABEL_VALUES(values=said + ",..." * (len(unknown) > _NAMED)))]


def check_grids(image: Volume, label: Volume) -> list[Finding]:
    """Check that an image and its label lie on the same grid, within :data:`GRID_TOLERANCE` voxels."""
    name = image.path.name
    fix = LABEL_GRID(image=name)
    if image.data.shape != label.data.shape:
        ours, theirs = (" x ".join(map(str, volume.data.shape)) for volume in (label, image))
        return [Finding(label.path, f"has {ours} voxels, but its image {name} has {theirs}", fix)]
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], dtype=float)
    corners[:, :3] *= np.array(image.data.shape) - 1  # (8, 4)
    apart_mm = float(np.linalg.norm(corners @ (image.affine - label.affine).T, axis=1).max())
    if apart_mm <= GRID_TOLERANCE * min(image.spacing_mm):
        return []
    problem = f"lies on another grid than its image {name}: corners are up to {apart_mm:.3g} mm apart"
    return [Finding(label.path, problem, fix)]


def voxel_digest(volume: Volume) -> str:
    """Return a hash of shape and voxels in RAS+ orientation, the same for every file format."""
    data = np.ascontiguousarray(volume.data)
    digest = hashlib.blake2b(str((data.shape, data.dtype.str)).encode(), digest_size=16)
    digest.update(data.data)
    return digest.hexdigest()
