"""What the preparation does to one volume, in memory: the parameters, the crop, the scaling.

The order of the steps is in :mod:`ssl3d.data.prepared.build`, which stores the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ssl3d.config import Model
from ssl3d.data.files.findings import MAX_BYTES
from ssl3d.data.files.volume import Volume
from ssl3d.data.prepared.arrays import Box
from ssl3d.data.prepared.grids import isotropic_grid, resample
from ssl3d.data.prepared.lungs import lungs_by_network
from ssl3d.remedies import COARSER, CROP_OF_CT, GIVE_LABEL, GIVE_MASK, OTHER_CROP, Fix

CT_RANGE = 2048.0
"""CT is clipped to [0, 2048] after the offset, and divided by 2048 (spec, table 2)."""

BODY_LEVEL = 724.0
"""Between air and body in a CT after the offset: -300 HU."""

_COARSE_MM = 2.0  # boxes are found on a grid of about this spacing

Z_RANGE = 5.0
"""Deviations from the mean that become 0 and 1 under z-score scaling."""


class Preparation(Model):
    """The parameters of the preparation; part of the fingerprint of the data."""

    spacing_mm: float = Field(default=1.0, gt=0)
    """Isotropic spacing, in mm. Equal spacing (within 1e-3 mm) is not resampled."""
    scaling: Literal["auto", "ct", "minmax", "zscore"] = "auto"
    """`ct`: add the offset, clip to [0, 2048], divide by 2048. `minmax`: each volume from its minimum
    to its maximum. `zscore`: mean and deviation of each volume's foreground (above Otsu's level); five
    deviations below the mean become 0 and five above it 1. `auto`: by the data set's modality."""
    intensity_offset: float | None = None
    """Added to the stored values of CT so that air is near 0, instead of the data set's own constant.
    Every volume is checked: air (where there is any) and tissue must be where they belong."""
    crop: Literal["none", "foreground", "lungs", "center", "label", "mask"] = "none"
    """`foreground`: box of the body (CT: largest component above -300 HU; else above Otsu's level).
    `lungs`: box of the air inside the body (CT only). `center`: central box of `center_mm`, padded with
    zeros. `label`: box of the labelled structures (uses labels: results are marked). `mask`: box of a
    mask that the user supplies for every image."""
    margin_mm: float = Field(default=10.0, ge=0)
    """Added on each side of a foreground, lungs, label or mask box, in mm."""
    center_mm: tuple[float, float, float] | None = None
    """Edges (D, H, W) of the central box, in mm."""
    lungmask: Path | None = None
    """A file of weights of the package lungmask: crop `lungs` is then the box of the lungs that its
    network finds, consolidated parts included."""

    @model_serializer(mode="wrap")
    def _as_before_without_lungmask(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the key out where it is not used: fingerprints of earlier versions stay as they are."""
        content: dict[str, Any] = handler(self)
        if self.lungmask is None:
            content.pop("lungmask", None)
        return content

    @model_validator(mode="after")
    def _center_needs_size(self) -> Self:
        if (self.crop == "center") != (self.center_mm is not None):
            raise ValueError('crop "center" and center_mm belong together: give both or none')
        if self.center_mm is not None and min(self.center_mm) <= 0:
            raise ValueError(f"center_mm must be positive, not {self.center_mm}")
        if self.crop == "lungs" and self.scaling in {"minmax", "zscore"}:
            raise ValueError('crop "lungs" needs CT, so scaling must be "ct" or "auto"')
        if self.lungmask is not None and self.crop != "lungs":
            raise ValueError(f'lungmask belongs to crop "lungs", not to crop "{self.crop}"')
        return self

    @property
    def uses_labels(self) -> bool:
        """Whether a prepared image depends on its label."""
        return self.crop == "label"


@dataclass(frozen=True)
class Intensity:
    """How the values of a cohort become [0, 1].

    Attributes:
        scaling: "ct", "minmax" or "zscore".
        offset: added to stored values (CT).
        checked: whether the offset is compared with every volume.
        rule: how this was decided, for the manifest.
        taken_for: what the volumes are, as far as that is known: "CT in HU", "MR", "not CT in HU", ...
    """

    scaling: Literal["ct", "minmax", "zscore"]
    offset: float
    checked: bool
    rule: str
    taken_for: str = ""


class CaseError(Exception):
    """A case that cannot be prepared with these parameters: (problem, fix)."""

    def __init__(self, problem: str, fix: Fix) -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix


def prepare_arrays(
    image: Volume,
    label: np.ndarray | None,
    preparation: Preparation,
    intensity: Intensity,
    mask: np.ndarray | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Prepare one volume that is in memory; the same for training and prediction.

    Args:
        image: as :func:`ssl3d.data.checks.file.read_volume` returns it.
        label: (D, H, W) uint8 0..K on the image's grid, or None.
        preparation: the parameters.
        intensity: scaling and offset of the cohort.
        mask: (D, H, W) bool on the image's grid, for crop "mask".
        max_bytes: largest prepared volume allowed, in bytes as float32: a spacing that lies in the header would
            otherwise ask for any amount of memory.

    Raises:
        CaseError: it cannot be prepared like this.

    Returns:
        The image (D', H', W') float32 in [0, 1], the label uint8 on the same grid or None, and the
        affine (4, 4) of that grid, voxel index -> RAS+ mm.
    """
    data, affine = image.data, image.affine
    if intensity.scaling == "ct":
        data = np.clip(data + np.float32(intensity.offset), 0, CT_RANGE, dtype=np.float32)
    if preparation.crop not in {"none", "center"}:
        box = _find_box(data, label, mask, image.spacing_mm, preparation, intensity.scaling)
        data, affine = data[box], _shift(affine, [s.start for s in box])  # (D, H, W) -> the box
        label = None if label is None else label[box]
    labels_affine = affine
    _check_target(data.shape, affine, preparation, max_bytes)
    data, affine = resample(data, affine, preparation.spacing_mm)  # -> (D', H', W') isotropic
    if label is not None:
        label, _ = resample(label, labels_affine, preparation.spacing_mm, labels=True)
    if intensity.scaling == "ct":
        data = data / np.float32(CT_RANGE)
    if preparation.center_mm is not None:
        edges = [max(1, round(edge / preparation.spacing_mm)) for edge in preparation.center_mm]
        start = [(have - want) // 2 for have, want in zip(data.shape, edges, strict=True)]
        label = None if label is None else _window(label, start, edges)
        inside = _window(np.ones(data.shape, dtype=bool), start, edges)
        data, affine = _window(data, start, edges), _shift(affine, start)  # -> edges, zeros outside
    else:
        inside = None
    if intensity.scaling in {"minmax", "zscore"}:
        values = data if inside is None else data[inside]
        low, high = float(values.min()), float(values.max())
        if intensity.scaling == "zscore" and low < high:
            from skimage.filters import threshold_otsu

            bright = values[values > threshold_otsu(values)]
            mean, reach = float(bright.mean()), Z_RANGE * float(bright.std())
            low, high = mean - reach, mean + reach  # the wider range of volumes with bright outliers is cut
        if low == high:
            raise CaseError("is constant inside its crop", OTHER_CROP())
        data = (data - np.float32(low)) / np.float32(high - low)
        if inside is not None:
            data[~inside] = 0
    return np.clip(data, 0, 1, dtype=np.float32), label, affine


def _check_target(
    shape: tuple[int, ...], affine: np.ndarray, preparation: Preparation, max_bytes: int
) -> None:
    """Raise CaseError where the resampled volume, or the box in it, would be larger than the budget."""
    grid = isotropic_grid(affine, shape, preparation.spacing_mm)
    sizes = [shape if grid is None else grid[1]]
    if preparation.center_mm is not None:
        d, h, w = (round(edge / preparation.spacing_mm) for edge in preparation.center_mm)
        sizes.append((d, h, w))
    largest = max(sizes, key=math.prod)
    if math.prod(largest) * 4 > max_bytes:
        spacing = " x ".join(f"{step:.4g}" for step in np.linalg.norm(affine[:3, :3], axis=0))
        raise CaseError(
            f"has voxels of {spacing} mm, and would have {' x '.join(map(str, largest))} at "
            f"{preparation.spacing_mm:g} mm, {math.prod(largest) * 4 / 2**30:.3g} GiB (limit {max_bytes / 2**30:.3g} GiB)",
            COARSER(),
        )


def _shift(affine: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """Return the affine of an array that begins at voxel ``start`` of the old one."""
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ np.asarray(start, dtype=float)
    return shifted


def _window(data: np.ndarray, start: Sequence[int], edges: Sequence[int]) -> np.ndarray:
    """Cut ``edges`` voxels from ``start`` (which may be negative), zero where there is nothing."""
    result = np.zeros(edges, dtype=data.dtype)
    # First and last + 1 voxel of the old array.
    spans = [(max(0, s), min(n, s + e)) for s, e, n in zip(start, edges, data.shape, strict=True)]
    source = tuple(slice(low, high) for low, high in spans)
    target = tuple(slice(low - s, high - s) for (low, high), s in zip(spans, start, strict=True))
    result[target] = data[source]
    return result


# --- boxes ----------------------------------------------------------------------------------------


def _find_box(
    data: np.ndarray,
    label: np.ndarray | None,
    given: np.ndarray | None,
    spacing_mm: tuple[float, float, float],
    preparation: Preparation,
    scaling: str,
) -> Box:
    """Return the box of the crop, with its margin, clipped to the volume."""
    if preparation.crop == "label":
        if label is None:
            raise CaseError('has no label, which crop "label" needs', GIVE_LABEL())
        mask, steps = label > 0, (1, 1, 1)
        missing = "no labelled structure"
    elif preparation.crop == "mask":
        if given is None:
            raise CaseError('has no mask, which crop "mask" needs', GIVE_MASK())
        mask, steps, missing = given, (1, 1, 1), "an empty mask"
    else:
        # Every second millimetre is enough to find a box to which a margin is added.
        d, h, w = (max(1, int(_COARSE_MM / s)) for s in spacing_mm)
        coarse, steps = data[::d, ::h, ::w], (d, h, w)
        if preparation.crop == "lungs" and scaling != "ct":
            raise CaseError('is not CT, which crop "lungs" needs', CROP_OF_CT())
        if preparation.lungmask is not None:
            mask, steps = lungs_by_network(data[:, :, ::w], preparation.lungmask), (1, 1, w)  # whole slices
            missing = "no lungs that lungmask finds"
        elif preparation.crop == "lungs":
            mask, missing = lungs_mask(coarse), "no air inside the body"
        else:
            mask, missing = foreground_mask(coarse, scaling), "no foreground"
    if not mask.any():
        raise CaseError(f'has {missing}, which crop "{preparation.crop}" needs', OTHER_CROP())
    box = []
    for axis in range(3):
        along = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        margin = int(np.ceil(preparation.margin_mm / spacing_mm[axis]))
        low, high = along[0] * steps[axis], along[-1] * steps[axis] + steps[axis]
        box.append(slice(max(0, int(low) - margin), min(data.shape[axis], int(high) + margin)))
    return box[0], box[1], box[2]


def foreground_mask(data: np.ndarray, scaling: str) -> np.ndarray:
    """Return the body: the largest connected component above a level: (D, H, W) bool.

    The level is -300 HU for CT (after the offset), else Otsu's threshold.
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    parts, count = ndimage.label(data > (BODY_LEVEL if scaling == "ct" else threshold_otsu(data)))
    if count == 0:
        return np.zeros(data.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def lungs_mask(data: np.ndarray) -> np.ndarray:
    """Return the lungs of a CT after the offset: (D, H, W) bool.

    Air (below -300 HU) inside the body: components that touch a face of the volume to the left,
    right, front or back are the room. Faces above and below do not count, for a scan may end within
    the lungs. The largest component is kept, and the second if it is a fifth of the first or more
    (both lungs are one component where the airways join them). Components below 0.5 % of the volume
    are no lungs. Where none are left, the field of view may have cut the chest, and a lung with it: then only
    what touches an edge between two of these faces is the room.
    """
    from scipy import ndimage

    parts, count = ndimage.label(data < BODY_LEVEL)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    faces = np.concatenate([parts[[0, -1]].ravel(), parts[:, [0, -1]].ravel()])
    edges = parts[[0, 0, -1, -1], [0, -1, 0, -1]].ravel()
    kept: list[np.intp] = []
    for room in faces, edges:
        inside = sizes.copy()
        inside[np.unique(room)] = 0
        order = np.argsort(inside)[::-1][:2]
        kept = [part for part in order if inside[part] >= max(0.005 * data.size, 0.2 * inside[order[0]])]
        if kept:
            break
    return np.isin(parts, kept) if kept else np.zeros(data.shape, dtype=bool)
