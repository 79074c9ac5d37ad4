"""Appearance transforms: they change intensities and leave every structure where it is.

Each is a frozen set of parameters called as ``transform(x, rng)`` with volumes ``x``
(B, 1, D, H, W) in [0, 1], any edges, on any device; the result has the same shape and range, and
``x`` is not changed. All randomness comes from ``rng``, one independent stream a sample, so a
sample's result does not depend on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl3d.geometry import filter_axes
from ssl3d.rng import BatchRng
from ssl3d.transforms import shuffling

Range = tuple[float, float]


def only_where(chosen: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    """Return ``changed`` for the samples that are ``chosen`` (B,) bool, and ``x`` for the others."""
    return torch.where(chosen[:, None, None, None, None], changed, x)


def _edges(size: Sequence[int], fraction: float) -> list[int]:
    """Return ``fraction`` of each edge in whole voxels, rounded down (1e-9: 0.1 * 30 is 3, not 2.99)."""
    return [int(n * fraction + 1e-9) for n in size]


@dataclass(frozen=True)
class LocalShuffle:
    """Permute the voxels inside many small boxes: texture is lost, structure stays.

    As in the code of Models Genesis (Zhou et al. 2019) and GVSL: every box reads the UNDAMAGED
    volume, and where boxes overlap the last one wins. So a voxel's new value always comes from
    within one box of it, and the result is exactly that of the plain loop over boxes; the multiset
    of intensities is kept within a box, not over boxes that overlap. Each box has a permutation of
    its own, as in Models Genesis; GVSL's released code draws one for all boxes of a volume.

    Attributes:
        p: probability for a volume.
        boxes: boxes a volume.
        fraction: edge of a box as a fraction of the volume's edge; rounded down, at least 2 voxels.
            Where that enlarges a box, fewer are used, so that they cover the same share of the volume.
        random_size: draw each edge of each box from {1, ..., largest} (Models Genesis), instead of
            taking the largest (GVSL).
    """

    p: float = 0.8
    boxes: int = 5000
    fraction: float = 1 / 20
    random_size: bool = False

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        index = self.source_voxels(x.shape[2:], rng)[:, None]  # (B, 1, DHW)
        return only_where(chosen, x.flatten(2).gather(2, index).view_as(x), x)

    def source_voxels(self, size: Sequence[int], rng: BatchRng) -> Tensor:
        """Return the flat index of the voxel that each voxel takes its value from: (B, D*H*W) int64."""
        starts, edges = self.draw_boxes(size, rng)
        return shuffling.source_voxels(size, starts, edges, self.largest(size), rng, not self.random_size)

    def largest(self, size: Sequence[int]) -> list[int]:
        """Return the largest edges (d, h, w) of a box in voxels."""
        return [min(n, max(2, e)) for n, e in zip(size, _edges(size, self.fraction), strict=True)]

    def draw_boxes(self, size: Sequence[int], rng: BatchRng) -> tuple[Tensor, Tensor]:
        """Return the first voxel and the edges of each box, both (B, n, 3) int64."""
        largest, share = self.largest(size), 1.0
        for n, edge in zip(size, largest, strict=True):
            share *= min(1.0, n * self.fraction / edge)
        count = max(1, round(self.boxes * share))
        edges = rng.constant(largest).expand(len(rng), count, 3)
        if self.random_size:
            edges = 1 + (rng.uniform(shape=(count, 3)) * edges).long()
        room = rng.constant(list(size)) - edges + 1  # (B, n, 3)
        return (rng.uniform(shape=(count, 3)) * room).long(), edges


@dataclass(frozen=True)
class BezierIntensity:
    """Map intensities through a random monotonic cubic Bezier curve (Models Genesis).

    The curve runs from (0, 0) to (1, 1) with two control points U(0, 1)^2; inverted, from (0, 1) to
    (1, 0). Control points in the unit square make both coordinates monotonic, so no sorting is
    needed. Evaluated at ``points`` parameters, with straight lines between.

    Attributes:
        p: probability for a volume.
        invert_p: probability that the curve decreases: 0 for GVSL, 0.5 for Models Genesis.
        points: parameters at which the curve is evaluated.
    """

    p: float = 0.9
    invert_p: float = 0.0
    points: int = 1000

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        xs, ys = self.curve(rng)
        values = x.flatten(1).contiguous()  # (B, DHW)
        right = torch.searchsorted(xs, values).clamp(1, self.points - 1)
        x0, x1 = xs.gather(1, right - 1), xs.gather(1, right)
        y0, y1 = ys.gather(1, right - 1), ys.gather(1, right)
        weight = ((values - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)
        return only_where(chosen, torch.lerp(y0, y1, weight).view_as(x), x)

    def curve(self, rng: BatchRng) -> tuple[Tensor, Tensor]:
        """Return points of each sample's curve, x ascending: two (B, points) tensors."""
        control = rng.uniform(shape=(2, 2))  # (B, point, x or y)
        inverted = rng.bernoulli(self.invert_p)
        t = torch.linspace(0, 1, self.points, device=control.device)
        basis = torch.stack([3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2])  # (2, points); (0, 0) adds nothing
        xs, ys = (control.transpose(1, 2) @ basis + t**3).unbind(1)  # (B, points) each
        ys = torch.where(inverted[:, None], 1 - ys, ys)
        # Rounding may break the order by one unit in the last place.
        return xs.cummax(1).values.contiguous(), ys


@dataclass(frozen=True)
class InPainting:
    """Fill boxes with U(0, 1) noise, to be restored from what surrounds them.

    GVSL's values. Boxes may touch the border (the released code keeps 3 voxels away from it).

    Attributes:
        p: probability for a volume.
        max_boxes: most boxes a volume.
        next_p: probability of each further box, the first one included.
        edges: smallest and largest edge of a box as fractions of the volume's edge; drawn for each
            axis, in whole voxels, at least 1.
    """

    p: float = 1.0
    max_boxes: int = 30
    next_p: float = 0.95
    edges: Range = (1 / 10, 1 / 5)

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        holes = self.holes(x, rng)
        return torch.where(holes, rng.uniform(shape=x.shape[1:]), x)

    def holes(self, x: Tensor, rng: BatchRng) -> Tensor:
        """Return where ``x`` is painted over: (B, 1, D, H, W) bool."""
        chosen = rng.bernoulli(self.p)
        count = rng.bernoulli(self.next_p, (self.max_boxes,)).cumprod(1).sum(1) * chosen  # (B,)
        return _boxes(x, rng, count, self.max_boxes, self.edges)


@dataclass(frozen=True)
class OutPainting:
    """Keep a few large boxes and fill all around them with U(0, 1) noise (Models Genesis).

    Attributes:
        p: probability for a volume.
        max_boxes: most boxes a volume; there is at least one.
        next_p: probability of each box after the first.
        edges: smallest and largest edge of a box as fractions of the volume's edge.
    """

    p: float = 1.0
    max_boxes: int = 5
    next_p: float = 0.95
    edges: Range = (3 / 7, 4 / 7)

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        holes = self.holes(x, rng)
        return torch.where(holes, rng.uniform(shape=x.shape[1:]), x)

    def holes(self, x: Tensor, rng: BatchRng) -> Tensor:
        """Return where ``x`` is painted over: (B, 1, D, H, W) bool."""
        chosen = rng.bernoulli(self.p)
        count = 1 + rng.bernoulli(self.next_p, (self.max_boxes - 1,)).cumprod(1).sum(1)  # (B,)
        kept = _boxes(x, rng, count, self.max_boxes, self.edges)
        return only_where(chosen, ~kept, torch.zeros_like(kept))


def _boxes(x: Tensor, rng: BatchRng, count: Tensor, most: int, edges: Range) -> Tensor:
    """Return the union of ``count`` (B,) random boxes of each sample: (B, 1, D, H, W) bool."""
    size = rng.constant(list(x.shape[2:]))
    low = rng.constant(_edges(x.shape[2:], edges[0])).clamp(min=1)
    high = rng.constant(_edges(x.shape[2:], edges[1])).clamp(min=1)
    edge = low + (rng.uniform(shape=(most, 3)) * (high - low + 1)).long()  # (B, most, 3)
    start = (rng.uniform(shape=(most, 3)) * (size - edge + 1)).long()  # (B, most, 3)
    union = _union_by_slices if rng.device.type == "cpu" else _union_by_products
    return union(x.shape[2:], start, start + edge, count)[:, None]


def _union_by_slices(size: Sequence[int], start: Tensor, end: Tensor, count: Tensor) -> Tensor:
    """Return where the first ``count`` (B,) boxes from ``start`` to ``end`` (B, most, 3) are: (B, D, H, W) bool."""
    union = torch.zeros(len(count), *size, dtype=torch.bool, device=start.device)
    for sample, n in enumerate(count.tolist()):
        for (d0, h0, w0), (d1, h1, w1) in zip(
            start[sample, :n].tolist(), end[sample, :n].tolist(), strict=True
        ):
            union[sample, d0:d1, h0:h1, w0:w1] = True
    return union


def _union_by_products(size: Sequence[int], start: Tensor, end: Tensor, count: Tensor) -> Tensor:
    """:func:`_union_by_slices` for a device that must not be waited for: nothing is read back."""
    used = torch.arange(start.shape[1], device=start.device) < count[:, None]  # (B, most)
    inside = []  # for each axis whether its voxels are in each box: (B, most, N)
    for axis, n in enumerate(size):
        place = torch.arange(n, device=start.device)
        inside.append((place >= start[:, :, axis, None]) & (place < end[:, :, axis, None]))
    d = (inside[0] & used[:, :, None]).float().mT  # (B, D, most)
    hw = (inside[1][:, :, :, None] & inside[2][:, :, None]).float().flatten(2)  # (B, most, HW)
    return (d @ hw > 0.5).unflatten(2, tuple(size[1:]))  # how many boxes cover a voxel, exactly: (B, D, H, W)


@dataclass(frozen=True)
class GaussianNoise:
    """Add white noise N(0, sigma^2).

    Attributes:
        p: probability for a volume.
        sigma: smallest and largest standard deviation on the [0, 1] scale; drawn for each volume.
        clip: clip the result to [0, 1]; without it the noise stays Gaussian, and the result may leave
            that range.
    """

    p: float = 1.0
    sigma: Range = (0.0, 0.1)
    clip: bool = True

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        sigma = rng.uniform(*self.sigma, shape=(1, 1, 1, 1))  # (B, 1, 1, 1, 1)
        noisy = x + sigma * rng.normal(x.shape[1:])
        return only_where(chosen, noisy.clamp(0, 1) if self.clip else noisy, x)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a Gaussian; at the border the mean of what lies inside.

    Attributes:
        p: probability for a volume.
        sigma: smallest and largest standard deviation in voxels; drawn for each volume.
    """

    p: float = 0.5
    sigma: Range = (0.5, 1.5)

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        sigma = rng.uniform(*self.sigma)
        kernels = [gaussian_kernel(n, sigma, self.sigma[1]) for n in x.shape[2:]]
        kernels = [k / k.sum(2, keepdim=True) for k in kernels]
        return only_where(chosen, filter_axes(x, kernels).clamp(0, 1), x)


def gaussian_kernel(n: int, sigma: Tensor, largest: float, nodes: int | None = None) -> Tensor:
    """Return the (B, n, nodes) matrices that smooth n voxels with Gaussians, zeros beyond the border.

    Truncated at 4 sigma, weights summing to 1 before the border cuts them, as the 1D convolution of
    the released GVSL code.

    Args:
        n: voxels along the axis.
        sigma: standard deviations in voxels (B,), > 0.
        largest: what no sigma exceeds.
        nodes: white noise to be smoothed is given at so many evenly spaced nodes, each in the place of
            n / nodes voxels of noise; the smoothed field has the same covariance while the nodes are
            closer than a sigma. None: n, a value for each voxel.
    """
    nodes = nodes or n
    step = n / nodes
    sigma = sigma[:, None]  # (B, 1)
    radius = (4 * sigma + 0.5).floor()
    voxel = torch.arange(n, device=sigma.device)
    node = voxel if nodes == n else (torch.arange(nodes, device=sigma.device) + 0.5) * step - 0.5
    reach = torch.arange(int(4 * largest + 1.5), device=sigma.device)
    tail = torch.exp(-0.5 * (reach / sigma) ** 2) * (reach <= radius)  # (B, reach)
    distance = (voxel[:, None] - node).abs()  # (n, nodes)
    weights = torch.exp(-0.5 * (distance / sigma[:, :, None]) ** 2) * (distance <= radius[:, :, None])
    return math.sqrt(step) * weights / (2 * tail.sum(1) - 1)[:, None, None]  # (B, n, nodes)


@dataclass(frozen=True)
class BrightnessContrast:
    """x -> mean + contrast (x - mean) + brightness, clipped to [0, 1].

    Attributes:
        p: probability for a volume.
        brightness: smallest and largest shift on the [0, 1] scale.
        contrast: smallest and largest factor about the volume's mean.
    """

    p: float = 0.8
    brightness: Range = (-0.2, 0.2)
    contrast: Range = (0.75, 1.25)

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        shift = rng.uniform(*self.brightness, shape=(1, 1, 1, 1))  # (B, 1, 1, 1, 1)
        factor = rng.uniform(*self.contrast, shape=(1, 1, 1, 1))
        mean = x.mean((1, 2, 3, 4), keepdim=True)
        return only_where(chosen, (mean + factor * (x - mean) + shift).clamp(0, 1), x)


@dataclass(frozen=True)
class Gamma:
    """x -> x^gamma.

    Attributes:
        p: probability for a volume.
        gamma: smallest and largest exponent, > 0; its logarithm is drawn uniformly.
    """

    p: float = 0.5
    gamma: Range = (0.7, 1.5)

    def __call__(self, x: Tensor, rng: BatchRng) -> Tensor:
        chosen = rng.bernoulli(self.p)
        low, high = map(math.log, self.gamma)
        exponent = rng.uniform(low, high, shape=(1, 1, 1, 1)).exp()  # (B, 1, 1, 1, 1)
        return only_where(chosen, x.clamp(0, 1) ** exponent, x)
