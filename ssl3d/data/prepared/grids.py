"""Grids: resampling to isotropic spacing, and back to the grid of the file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

SPACING_TOLERANCE_MM = 1e-3
"""Volumes whose spacing is as wanted within this are not resampled."""


def isotropic_grid(
    affine: np.ndarray, shape: Sequence[int], spacing_mm: float
) -> tuple[np.ndarray, tuple[int, int, int]] | None:
    """Return affine and shape of the isotropic grid that covers a volume, or None if it has one.

    The grid keeps the orientation of the volume (an oblique scan stays oblique; of a sheared one the
    nearest rotation is kept) and starts at the centre of its first voxel, so whole ratios of spacings
    sample voxel centres.

    Args:
        affine: (4, 4), voxel index -> mm.
        shape: (D, H, W).
        spacing_mm: of the new grid.
    """
    axes = affine[:3, :3]
    left, _, right = np.linalg.svd(axes / np.linalg.norm(axes, axis=0))
    rotation = left @ right  # nearest orthogonal matrix (polar decomposition)
    steps = rotation.T @ axes  # diagonal unless sheared
    if np.abs(steps - spacing_mm * np.eye(3)).max() <= SPACING_TOLERANCE_MM:
        return None
    corners = (
        np.array(list(product(*((0, edge - 1) for edge in shape)))) @ steps.T
    )  # (8, 3) mm, along the new axes
    low, high = corners.min(axis=0), corners.max(axis=0)
    d, h, w = (int(edge) for edge in np.rint((high - low) / spacing_mm) + 1)
    grid = np.eye(4)
    grid[:3, :3] = rotation * spacing_mm
    grid[:3, 3] = affine[:3, 3] + rotation @ low
    return grid, (d, h, w)


def resample(
    data: np.ndarray, affine: np.ndarray, spacing_mm: float, *, labels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Resample to isotropic spacing; a volume that has it already is returned as it is.

    Images: trilinear, after a Gaussian of sigma = (ratio - 1) / 2 voxels along every axis that is
    made coarser by more than 1.2 (no aliasing). Labels: nearest neighbour, because interpolation of
    one-hot labels followed by the largest vote deletes whatever is thinner than half a new voxel,
    coronary arteries first. scipy does both: the inverse (:func:`to_native_grid`) is the same
    function with the inverse matrix.

    Args:
        data: (D, H, W), float32 or an integer type.
        affine: (4, 4), voxel index -> mm.
        spacing_mm: of the result.
        labels: whether the values are names, not amounts.

    Returns:
        The resampled array (D', H', W') of the same type, and its affine.
    """
    from scipy import ndimage

    grid = isotropic_grid(affine, data.shape, spacing_mm)
    if grid is None:
        return data, affine
    new_affine, shape = grid
    if labels:
        return _sample(data, np.linalg.inv(affine) @ new_affine, shape, order=0), new_affine
    ratios = spacing_mm / np.linalg.norm(affine[:3, :3], axis=0)
    sigmas = [(ratio - 1) / 2 if ratio > 1.2 else 0.0 for ratio in ratios]
    if any(sigmas):
        data = ndimage.gaussian_filter(data, sigmas, mode="nearest")
    return _sample(data, np.linalg.inv(affine) @ new_affine, shape, order=1), new_affine


def to_native_grid(
    labels: np.ndarray, prepared_affine: np.ndarray, native_affine: np.ndarray, native_shape: Sequence[int]
) -> np.ndarray:
    """Put a segmentation of a prepared volume on the grid of the file it came from.

    Args:
        labels: (D, H, W) integers on the prepared grid.
        prepared_affine: (4, 4) of the prepared grid (``PreparedCase.affine``).
        native_affine: (4, 4) of the file as stored (``PreparedCase.native_affine``): any orientation.
        native_shape: shape of the file as stored.

    Returns:
        Array of ``native_shape`` and the type of ``labels``: nearest neighbour, 0 outside the crop.
    """
    return _sample(labels, np.linalg.inv(prepared_affine) @ native_affine, native_shape, order=0)


def logits_to_native_grid(
    logits: np.ndarray, prepared_affine: np.ndarray, native_affine: np.ndarray, native_shape: Sequence[int]
) -> np.ndarray:
    """Return the likeliest class at every voxel of the file that a prepared volume came from.

    Logits are interpolated linearly before the classes are compared, so that borders on a fine native
    grid do not show the steps of a coarse prepared one. Class by class: two native volumes in memory.

    Args:
        logits: (K + 1, D, H, W) float on the prepared grid; class 0 is background.
        prepared_affine: (4, 4) of the prepared grid.
        native_affine: (4, 4) of the file as stored: any orientation.
        native_shape: shape of the file as stored.

    Returns:
        Array of ``native_shape``, uint8 0..K, 0 outside the prepared grid.
    """
    matrix = np.linalg.inv(prepared_affine) @ native_affine
    best = _sample(logits[0], matrix, native_shape, order=1)
    result = np.zeros(best.shape, dtype=np.uint8)
    for k in range(1, len(logits)):
        values = _sample(logits[k], matrix, native_shape, order=1)
        larger = values > best
        result[larger] = k
        best[larger] = values[larger]
    inside = _sample(np.ones(logits.shape[1:], dtype=np.uint8), matrix, native_shape, order=0)
    return result * inside


def _sample(data: np.ndarray, matrix: np.ndarray, shape: Sequence[int], order: int) -> np.ndarray:
    """Sample ``data`` at ``matrix`` @ index: order 0 with zeros outside, order 1 with the edge repeated."""
    from scipy import ndimage

    linear: np.ndarray = matrix[:3, :3]
    diagonal = np.diagonal(linear)
    if np.abs(linear - np.diag(diagonal)).max() < 1e-9:
        linear = diagonal  # scipy then works axis by axis, which is faster
    return ndimage.affine_transform(
        data, linear, matrix[:3, 3], output_shape=tuple(shape), order=order,
        mode="nearest" if order else "grid-constant", prefilter=False,
    )  # fmt: skip
