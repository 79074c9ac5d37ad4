"""Volumes of any size through networks that halve their grid: zeros around, and the same voxels cut off again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """Return ``x`` (B, C, D, H, W) with zeros around it, so that every edge is a multiple of ``factor``."""
    return F.pad(x, _padding(tuple(x.shape[2:]), factor))  # (B, C, D', H', W')


def crop_to(x: Tensor, size: tuple[int, ...], factor: int) -> Tensor:
    """Undo :func:`pad_to_multiple`: (B, C, D', H', W') -> (B, C, *size)."""
    d, h, w = _padding(size, factor)[4::-2]
    return x[:, :, d : d + size[0], h : h + size[1], w : w + size[2]]  # (B, C, D, H, W)


def padded_grid(size: Sequence[int], grid: Sequence[int], factor: int) -> np.ndarray:
    """Return where the voxels of a stage's grid lie in the volume, which was padded for the coarsest.

    Args:
        size: grid (D, H, W) of the volume before :func:`pad_to_multiple`.
        grid: grid (d, h, w) of the stage, which covers the padded volume.
        factor: the padding's.

    Returns:
        (4, 4), voxel index of the coarse grid -> voxel index of the volume.
    """
    padding = _padding(tuple(size), factor)
    before, after = padding[4::-2], padding[5::-2]
    ratios = [
        (edge + left + right) / cells
        for edge, left, right, cells in zip(size, before, after, grid, strict=True)
    ]
    matrix = np.diag([*ratios, 1.0])
    matrix[:3, 3] = [(ratio - 1) / 2 - left for ratio, left in zip(ratios, before, strict=True)]
    return matrix


def _padding(size: tuple[int, ...], factor: int) -> list[int]:
    """Return F.pad's (left, right) pairs, last axis first; the odd voxel goes right."""
    pads: list[int] = []
    for edge in reversed(size):
        missing = -edge % factor
        pads += [missing // 2, missing - missing // 2]
    return pads
