"""Smoothness of a displacement field."""

from __future__ import annotations

from torch import Tensor

from ssl3d.geometry import full_precision


def smoothness_loss(displacement: Tensor) -> Tensor:
    """Return the mean squared forward difference, averaged over the three axes.

    Args:
        displacement: in voxels (B, 3, D, H, W), each edge at least 2.
    """
    u = full_precision(displacement)
    return sum((u.diff(dim=axis).square().mean() for axis in (2, 3, 4)), start=u.new_zeros(())) / 3
