"""Spatial transforms: they move structures.

Each is a frozen set of parameters with ``sample(..., rng) -> parameters`` and
``apply(x, parameters)``, so that several volumes (an image, its damaged copy, its target) can share
one draw; ``transform(x, rng)`` does both. Volumes are (B, C, D, H, W) on any device; all randomness
comes from ``rng``, one independent stream a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ssl3d.device import constant
from ssl3d.errors import ConfigError
from ssl3d.geometry import Padding, affine_coords, affine_matrix, compose, filter_axes, identity_coords, warp
from ssl3d.rng import BatchRng
from ssl3d.transforms.appearance import Range, gaussian_kernel

NODES_PER_SIGMA = 1.5
"""Nodes of noise to the smallest standard deviation of the elastic field's smoothing."""


@dataclass(frozen=True)
class SpatialParameters:
    """One draw of :class:`RandomSpatial`.

    Attributes:
        matrix: affine map (B, 3, 4), see :mod:`ssl3d.geometry`.
        displacement: elastic field in voxels (B, 3, D, H, W), or None.
        coords: sampling positions of both together, in voxels (B, 3, D, H, W).
    """

    matrix: Tensor
    displacement: Tensor | None
    coords: Tensor


@dataclass(frozen=True)
class RandomSpatial:
    """Random affine map and elastic deformation in ONE resampling, psi^g(p + u(p)).

    Released GVSL's values. The elastic field is U(-1, 1) noise in each voxel, smoothed with a
    Gaussian and multiplied by alpha. With sigma 11.5 and alpha 512 its standard deviation is about
    1.1 voxels. Noise finer than the Gaussian would be smoothed away, so it is drawn at nodes two thirds of
    the smallest sigma apart: a covariance within 3e-4 of the variance (1 % next to the border), from 260
    times fewer numbers at 128 voxels.

    Attributes:
        rotation: largest |angle| about each axis in radians.
        scale: smallest and largest factor along each axis.
        translation: largest |shift| along each axis as a fraction of the longest edge. (The released
            code's normalisation makes its 0.1 a twentieth of the edge.)
        shear: largest |angle| of the six shears in radians.
        alpha: smallest and largest amplitude of the elastic field; (0, 0) switches it off.
        sigma: smallest and largest standard deviation of its smoothing, in voxels.
        reference_edge: edge in voxels for which ``alpha`` and ``sigma`` are meant. For a volume whose
            longest edge is s times that, sigma is multiplied by s and the displacement too (alpha by
            s^2.5, since smoothing white noise divides it by sigma^1.5), so that a small volume is
            bent in the same proportion. None: voxels as they are, the released code's behaviour.
        padding_mode: what lies outside of the volume; ``zeros`` as the released code.
    """

    rotation: float = math.pi / 9
    scale: Range = (0.75, 1.25)
    translation: float = 0.1
    shear: float = math.pi / 18
    alpha: Range = (0.0, 512.0)
    sigma: Range = (10.0, 13.0)
    reference_edge: int | None = 128
    padding_mode: Padding = "zeros"

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        return self.apply(x, self.sample(x.shape[2:], rng))

    def sample(self, size: Sequence[int], rng: BatchRng) -> SpatialParameters:
        """Draw the parameters for volumes of ``size`` (D, H, W), one set a sample."""
        matrix = affine_matrix(
            rng.uniform(-self.rotation, self.rotation, (3,)),
            rng.uniform(*self.scale, shape=(3,)),
            rng.uniform(-self.shear, self.shear, (6,)),
            2 * rng.uniform(-self.translation, self.translation, (3,)),  # in half edges
        )  # (B, 3, 4)
        if self.alpha == (0.0, 0.0):
            return SpatialParameters(matrix, None, affine_coords(matrix, size))
        displacement = self.elastic(size, rng)
        return SpatialParameters(matrix, displacement, compose(matrix, displacement))

    def elastic(self, size: Sequence[int], rng: BatchRng) -> Tensor:
        """Draw elastic fields in voxels (B, 3, D, H, W)."""
        s = max(size) / self.reference_edge if self.reference_edge else 1.0
        alpha = rng.uniform(*self.alpha, shape=(1, 1, 1, 1)) * s**2.5  # (B, 1, 1, 1, 1)
        sigma = rng.uniform(*self.sigma) * s  # (B,)
        apart = max(1.0, self.sigma[0] * s / NODES_PER_SIGMA)  # voxels
        nodes = [math.ceil(n / apart) for n in size]
        noise = rng.uniform(-1, 1, (3, *nodes))  # (B, 3, D', H', W')
        smooth = [gaussian_kernel(n, sigma, self.sigma[1] * s, m) for n, m in zip(size, nodes, strict=True)]
        return alpha * filter_axes(noise, smooth)  # (B, 3, D, H, W)

    def apply(
        self, x: Tensor, parameters: SpatialParameters, mode: Literal["bilinear", "nearest"] = "bilinear"
    ) -> Tensor:
        """Return ``x`` (B, C, D, H, W) deformed; ``nearest`` for labels."""
        return warp(x, parameters.coords, mode, self.padding_mode)


@dataclass(frozen=True)
class Flip:
    """Mirror each axis with its own coin.

    Attributes:
        p: probability for each axis.
    """

    p: float = 0.5

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        return self.apply(x, self.sample(rng))

    def sample(self, rng: BatchRng) -> Tensor:
        """Return which of the axes (d, h, w) are mirrored: (B, 3) bool."""
        return rng.bernoulli(self.p, (3,))

    def apply(self, x: Tensor, flips: Tensor) -> Tensor:
        """Return ``x`` (B, C, D, H, W) mirrored."""
        for axis in range(3):
            x = torch.where(flips[:, axis, None, None, None, None], x.flip(2 + axis), x)
        return x


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random box out of each volume and resample it to one size (trilinear).

    The box lies inside the volume, so there is no padding that could give its place away. It has the
    proportions of ``size``. A crop larger than ``size`` is not low-pass filtered before.

    Attributes:
        size: edges (D', H', W') of the result in voxels.
        scale: smallest and largest edge of the box relative to the largest box of those proportions
            that fits, in (0, 1]; SimCLR's area fraction of 0.08 corresponds to an edge of 0.43 in 3D.
    """

    size: tuple[int, int, int]
    scale: Range = (0.4, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"RandomResizedCrop scale {self.scale}: use 0 < smallest <= largest <= 1.")

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        return self.apply(x, self.sample(x.shape[2:], rng))

    def sample(self, size: Sequence[int], rng: BatchRng) -> Tensor:
        """Draw boxes in volumes of ``size``: (B, 2, 3), first face and edges (d, h, w) in voxels."""
        available = rng.constant([float(n) for n in size])
        wanted = rng.constant([float(n) for n in self.size])
        largest = wanted * (available / wanted).min()
        edges = rng.uniform(*self.scale, shape=(1,)) * largest  # (B, 3)
        return torch.stack([rng.uniform(shape=(3,)) * (available - edges), edges], dim=1)

    def apply(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes of ``x`` (B, C, D, H, W), resampled: (B, C, D', H', W')."""
        faces, edges = (v[:, :, None, None, None] for v in boxes.unbind(1))  # (B, 3, 1, 1, 1) each
        wanted = constant(self.size, x.device)[:, None, None, None]  # (3, 1, 1, 1)
        # The centre of voxel i of the result lies (i + 1/2) / D' of the way through the box.
        coords = faces + (identity_coords(self.size, x) + 0.5) / wanted * edges - 0.5
        return warp(x, coords, padding_mode="border")
