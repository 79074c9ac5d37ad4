"""What a scanner and a moving patient do to an image: thick slices, motion, metal. Labels stay as they are.

Every function returns a new image of the same shape (D, H, W), axes RAS, in the units of its input.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
METAL_HU = 2500.0


def thick_slices(image: FloatArray, thickness_mm: float, spacing_mm: float) -> FloatArray:
    """Average over axial slices of ``thickness_mm`` and interpolate linearly between their centres.

    Clinical cardiac CT is read at 0.5 to 3 mm, chest CT at 1 to 8 mm (STOIC: up to 5), T1 at 1 to 5 mm.

    Args:
        image: (D, H, W); the last axis is superior.
        thickness_mm: of a slice; nothing changes up to one voxel.
        spacing_mm: of the grid.
    """
    size = thickness_mm / spacing_mm
    if size <= 1:
        return image
    depth = image.shape[2]
    edges = np.linspace(0, depth, max(1, round(depth / size)) + 1)
    total = np.concatenate([np.zeros((*image.shape[:2], 1), image.dtype), np.cumsum(image, axis=2)], axis=2)
    low = np.floor(edges).astype(int)
    share = (edges - low).astype(image.dtype)
    sums = total[..., low] + share * (total[..., np.minimum(low + 1, depth)] - total[..., low])
    slices = np.diff(sums, axis=2) / np.diff(edges).astype(image.dtype)  # (D, H, S)
    centres = (edges[:-1] + edges[1:]) / 2 - 0.5
    at = np.clip(np.interp(np.arange(depth), centres, np.arange(len(centres))), 0, len(centres) - 1)
    lower = np.minimum(at.astype(int), max(len(centres) - 2, 0))
    upper = np.minimum(lower + 1, len(centres) - 1)
    weight = (at - lower).astype(image.dtype)
    return slices[..., lower] * (1 - weight) + slices[..., upper] * weight


def double_contour(image: FloatArray, rng: np.random.Generator, reach_vox: float) -> FloatArray:
    """Mix the image with itself, moved: what gated CT shows of a heart that moved between two beats.

    Args:
        image: (D, H, W).
        rng: draws direction, distance up to ``reach_vox`` and the share (0.25 to 0.5) of the moved image.
        reach_vox: coronary arteries move by 5 to 20 mm in a beat, most of it gated away.
    """
    from scipy.ndimage import shift

    direction = rng.normal(size=3)
    moved = shift(
        image,
        direction / np.linalg.norm(direction) * rng.uniform(0.4, 1) * reach_vox,
        order=1,
        mode="nearest",
    )
    share = image.dtype.type(rng.uniform(0.25, 0.5))
    return (1 - share) * image + share * moved


def ghosts(image: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Add faint copies along the phase-encoding axis, as periodic motion does in MR (5 to 15 % of the signal)."""
    axis, parts = int(rng.integers(2)), int(rng.integers(2, 5))
    copies = sum(np.roll(image, k * image.shape[axis] // parts, axis=axis) for k in range(1, parts)) / (
        parts - 1
    )
    share = image.dtype.type(rng.uniform(0.05, 0.15))
    return (1 - share) * image + share * copies


def metal_streaks(
    image: FloatArray, centres_vox: NDArray[np.float64], rng: np.random.Generator, spacing_mm: float
) -> FloatArray:
    """Put metal along a path, with bright and dark streaks in the axial slices that it passes.

    Args:
        image: (D, H, W) in HU.
        centres_vox: the path (M, 3) in voxels, about one voxel apart or closer; points outside are left out.
        rng: draws strength (150 to 450 HU beside the metal) and number of the streaks.
        spacing_mm: of the grid; streaks fade over 40 mm.
    """
    image = image.copy()
    shape = np.array(image.shape)
    path = np.rint(centres_vox).astype(int)
    path = np.unique(path[((path >= 0) & (path < shape)).all(axis=1)], axis=0)
    amplitude, lobes, phase = rng.uniform(150, 450), int(rng.integers(4, 9)), rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    for z in np.unique(path[:, 2]):
        x0, y0 = path[path[:, 2] == z, :2].mean(axis=0)
        radius = np.hypot(x - x0, y - y0) * spacing_mm
        streaks = np.cos(lobes * np.arctan2(y - y0, x - x0) + phase + 0.3 * z) * np.exp(-radius / 40)
        image[:, :, z] += (amplitude * streaks).astype(image.dtype)
    image[tuple(path.T)] = METAL_HU
    return image


def signal_void(image: FloatArray, rng: np.random.Generator, spacing_mm: float) -> FloatArray:
    """Let the signal vanish around dental metal: a hole of 15 to 35 mm at the front of the lowest slices (MR)."""
    shape = np.array(image.shape)
    centre = shape * (rng.uniform(0.35, 0.65), rng.uniform(0.8, 0.95), rng.uniform(0.0, 0.1))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    distance = np.linalg.norm(grid - centre, axis=-1) * spacing_mm
    keep = 1 / (1 + np.exp(np.clip(-(distance - rng.uniform(15, 35)) / 4, -30, 30)))
    return image * keep.astype(image.dtype)
