"""Differentiable affine maps, displacement fields and warping.

Conventions, the same everywhere in ssl3d:

- A map psi takes OUTPUT positions to SAMPLING positions in the moving image: the warped image is
  x(psi(p)).
- Positions and displacements are in voxels, (B, 3, D, H, W), channels (d, h, w) in the order of the
  tensor's axes; voxel centres are the integers.
- An affine matrix (B, 3, 4) has rows and columns (x, y, z), x being the LAST axis of the tensor
  (w), y = h, z = d, as in ``torch.nn.functional.affine_grid``. It acts on positions measured from
  the centre of the volume in units of half the LONGEST edge, so that a rotation stays a rotation
  in a volume that is not a cube; for a cube it equals affine_grid's theta.
- ``align_corners=False``: a volume of N voxels spans N voxels, from -1/2 to N - 1/2. (The released
  GVSL code normalises displacements for True and samples with False.)

Everything is computed in float32 at least, also under autocast; float64 passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.device import constant

AffineOrder = Literal["released", "paper"]
Fusion = Literal["released", "eq12"]
Padding = Literal["zeros", "border", "reflection"]


def full_precision(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 when it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which nothing on the device of ``x`` is autocast."""
    return torch.autocast(x.device.type, enabled=False)


def affine_matrix(
    rotation: Tensor, scaling: Tensor, shearing: Tensor, translation: Tensor, order: AffineOrder = "released"
) -> Tensor:
    """Compose affine matrices from their 15 values (He et al. 2023, eq. 11), with gradient.

    R = Rz Ry Rx, the standard rotations (eq. 11's rotation block has misprints); S = diag(scaling);
    H = shear matrix with ones on the diagonal and tan(angle) off it.

    Args:
        rotation: angles about (x, y, z) in radians (B, 3).
        scaling: factors along (x, y, z), 1 for none (B, 3).
        shearing: angles xy, xz, yx, yz, zx, zy in radians, |angle| < pi/2 (B, 6).
        translation: along (x, y, z) in units of half the longest edge (B, 3).
        order: ``released``: [H S R | t], as the authors' code; ``paper``: [R S H | R S H t], the
            product "rotation x scaling x shearing x translation" of eq. 11.

    Returns:
        Matrices (B, 3, 4), rows and columns (x, y, z).
    """
    with no_autocast(rotation):
        rotation, scaling = full_precision(rotation), full_precision(scaling)
        shearing, translation = full_precision(shearing), full_precision(translation)
        (cx, cy, cz), (sx, sy, sz) = rotation.cos().unbind(1), rotation.sin().unbind(1)
        xy, xz, yx, yz, zx, zy = shearing.tan().unbind(1)
        o, i = torch.zeros_like(cx), torch.ones_like(cx)
        about_x = _matrix(i, o, o, o, cx, -sx, o, sx, cx)
        about_y = _matrix(cy, o, sy, o, i, o, -sy, o, cy)
        about_z = _matrix(cz, -sz, o, sz, cz, o, o, o, i)
        turn = about_z @ about_y @ about_x
        scale = torch.diag_embed(scaling)
        shear = _matrix(i, xy, xz, yx, i, yz, zx, zy, i)
        shift = translation[:, :, None]  # (B, 3, 1)
        if order == "released":
            return torch.cat([shear @ scale @ turn, shift], dim=2)
        linear = turn @ scale @ shear
        return torch.cat([linear, linear @ shift], dim=2)


def _matrix(*entries: Tensor) -> Tensor:
    """Stack nine (B,) entries, row by row, to (B, 3, 3)."""
    return torch.stack(entries, dim=1).unflatten(1, (3, 3))


def identity_matrix(batch: int, like: Tensor) -> Tensor:
    """Return identity matrices (B, 3, 4) on the device of ``like``, in its (full) precision."""
    return torch.eye(3, 4, device=like.device, dtype=full_precision(like).dtype).expand(batch, 3, 4)


def identity_coords(size: Sequence[int], like: Tensor) -> Tensor:
    """Return the position of every voxel, (1, 3, D, H, W), on the device of ``like``.

    Args:
        size: (D, H, W).
        like: gives device and (full) precision.
    """
    axes = [torch.arange(n, device=like.device, dtype=full_precision(like).dtype) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def transform_coords(matrix: Tensor, coords: Tensor) -> Tensor:
    """Apply affine matrices to positions.

    Args:
        matrix: (B, 3, 4), see the module's conventions.
        coords: positions in voxels (B or 1, 3, D, H, W); D, H, W also fix the centre and the unit.

    Returns:
        Positions in voxels (B, 3, D, H, W).
    """
    with no_autocast(matrix):
        matrix, coords = full_precision(matrix), full_precision(coords)
        size = coords.shape[2:]
        centre = constant([[(n - 1) / 2] for n in size], coords.device).to(coords.dtype)  # (3, 1)
        linear = matrix[:, :, :3].flip(1, 2)  # (B, 3, 3), rows and columns (d, h, w)
        shift = matrix[:, :, 3:].flip(1) * (max(size) / 2)  # (B, 3, 1), voxels
        points = coords.flatten(2).expand(len(matrix), -1, -1)  # (B, 3, DHW)
        # A (p - c) + c + t = A p + (c - A c + t): one pass over the volume.
        moved = torch.baddbmm(centre - linear @ centre + shift, linear, points)
        return moved.unflatten(2, size)  # (B, 3, D, H, W)


def affine_coords(matrix: Tensor, size: Sequence[int]) -> Tensor:
    """Return psi^g(p) for every voxel p of a volume of ``size`` (D, H, W): (B, 3, D, H, W)."""
    return transform_coords(matrix, identity_coords(size, matrix))


def compose(matrix: Tensor, displacement: Tensor, order: Fusion = "released") -> Tensor:
    """Fuse an affine map psi^g and a displacement field psi^l into ONE sampling position a voxel.

    Args:
        matrix: psi^g (B, 3, 4).
        displacement: psi^l in voxels (B, 3, D, H, W).
        order: ``released``: psi^g(p + psi^l(p)), what the authors' code reaches by two resamplings
            (first x by psi^g, then the result by psi^l); psi^l lives on the aligned grid, on which
            it is predicted. ``eq12``: p^ + psi^l(p^) with p^ = psi^g(p), the paper's eq. 12 to the
            letter: psi(p) = psi^l(p^) + p^ - p, sampled at p + psi(p). There psi^l is interpolated
            at p^, outside of the volume from its border.

    Returns:
        Sampling positions in voxels (B, 3, D, H, W).
    """
    displacement = full_precision(displacement)
    size = displacement.shape[2:]
    if order == "released":
        return transform_coords(matrix, identity_coords(size, displacement) + displacement)
    aligned = affine_coords(matrix, size)
    return aligned + warp(displacement, aligned, padding_mode="border")


def warp(
    image: Tensor,
    coords: Tensor,
    mode: Literal["bilinear", "nearest"] = "bilinear",
    padding_mode: Padding = "zeros",
) -> Tensor:
    """Sample ``image`` at ``coords``: output(p) = image(coords(p)).

    Args:
        image: (B, C, D, H, W).
        coords: positions in voxels of ``image`` (B, 3, D', H', W').
        mode: ``bilinear`` is trilinear in 3D; ``nearest`` for labels.
        padding_mode: what lies outside of the image. ``zeros`` as the released code: 0 is air in a
            prepared CT and background in a prepared MR.

    Returns:
        (B, C, D', H', W').
    """
    with no_autocast(image):
        image, coords = full_precision(image), full_precision(coords)
        # grid_sample wants (x, y, z) in the last axis, -1 and 1 being the outer faces.
        grid = torch.stack(
            [(2 * coords[:, axis] + 1) / image.shape[2 + axis] - 1 for axis in (2, 1, 0)], dim=-1
        )  # (B, D', H', W', 3)
        return F.grid_sample(image, grid, mode=mode, padding_mode=padding_mode, align_corners=False)


def jacobian_determinant(coords: Tensor) -> Tensor:
    """Return the Jacobian determinant of a map by forward differences.

    Args:
        coords: sampling positions in voxels (B, 3, D, H, W); of a displacement field alone:
            ``identity_coords(...) + displacement``.

    Returns:
        (B, D-1, H-1, W-1); 1 for the identity, <= 0 where the map folds.
    """
    corner = coords[:, :, :-1, :-1, :-1]
    along_d = coords[:, :, 1:, :-1, :-1] - corner
    along_h = coords[:, :, :-1, 1:, :-1] - corner
    along_w = coords[:, :, :-1, :-1, 1:] - corner
    return (along_d * torch.linalg.cross(along_h, along_w, dim=1)).sum(1)


def filter_axes(x: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """Multiply each spatial axis by a matrix: a separable filter as three matrix products.

    For the edges of volumes (N up to a few hundred) this is faster than pooling, cumulative sums or
    one-dimensional convolutions, forward and backward.

    Args:
        x: (B, C, D, H, W).
        kernels: for d, h, w: (N', N), or (B, N', N) for a filter of its own for each sample.

    Returns:
        (B, C, D', H', W').
    """
    k_d, k_h, k_w = (k if k.dim() == 2 else k[:, None] for k in kernels)  # (N', N) or (B, 1, N', N)
    k_h, k_w = (k if k.dim() == 2 else k[:, None] for k in (k_h, k_w))  # (N', N) or (B, 1, 1, N', N)
    x = x @ k_w.mT  # (B, C, D, H, W')
    x = k_h @ x  # (B, C, D, H', W')
    return (k_d @ x.flatten(3)).unflatten(3, x.shape[3:])  # (B, C, D', H', W')
