"""Affines and files of volumes on any grid, for tests of what reads, prepares and writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk


def affine_of(
    spacing: Sequence[float],
    codes: str = "RAS",
    rotation: np.ndarray | None = None,
    origin: Sequence[float] = (-11.0, 5.0, 40.0),
) -> np.ndarray:
    """Affine of an array whose axes run towards ``codes``, for example "LPS"."""
    axes = np.zeros((3, 3))
    for column, (axis, sign) in enumerate(nibabel.orientations.axcodes2ornt(tuple(codes))):
        axes[int(axis), column] = sign * spacing[column]
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ axes
    affine[:3, 3] = origin
    return affine


def write_itk(path: Path, data: np.ndarray, affine: np.ndarray, compress: bool = True) -> None:
    """Write an array with a RAS+ affine by SimpleITK, which wants LPS+."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=compress)
