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


def padded_grid(size: Sequence[int], factor: int) -> np.ndarray:
    """Return where the voxels of a grid ``factor`` times coarser lie in a volume that was padded for it.

    Args:
        size: grid (D, H, W) of the volume before :func:`pad_to_multiple`.
        factor: the padding's, and the ratio of the two grids.

    Returns:
        (4, 4), voxel index of the coarse grid -> voxel index of the volume.
    """
    matrix = np.diag([factor, factor, factor, 1.0])
    before = _padding(tuple(size), factor)[4::-2]
    matrix[:3, 3] = [(factor - 1) / 2 - left for left in before]
    return matrix


def _padding(size: tuple[int, ...], factor: int) -> list[int]:
    """Return F.pad's (left, right) pairs, last axis first; the odd voxel goes right."""
    pads: list[int] = []
    for edge in reversed(size):
        missing = -edge % factor
        pads += [missing // 2, missing - missing // 2]
    return pads
