"""Damage and deformation of volumes, against loops over blocks and other libraries' transforms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from compare import Case, Run, Setting, peer
from torch import Tensor

from ssl3d.rng import BatchRng
from ssl3d.transforms import InPainting, LocalShuffle, RandomSpatial

BATCH = 2


def batches(transform: Callable[[Tensor, BatchRng], Tensor], x: Tensor) -> Run:
    """Return a run of our transform on a batch, each time with other numbers."""
    steps = itertools.count()
    return lambda: transform(x, BatchRng(0, next(steps), range(len(x)), x.device)) is None


def one_by_one(transform: Callable[[Tensor], object], x: Tensor) -> Run:
    """Return a run of a library's transform on each volume (C, D, H, W) of a batch."""

    def run() -> None:
        for volume in x:
            transform(volume)

    return run


def volumes(edge: int) -> Tensor:
    return torch.rand(BATCH, 1, edge, edge, edge, generator=torch.Generator().manual_seed(0))


def shuffle_by_blocks(x: Tensor, boxes: int, largest: int) -> Run:
    """Models Genesis' released form: a loop over blocks of random edges, each read from the undamaged volume."""
    rng = np.random.default_rng(0)

    def shuffle(volume: Tensor) -> np.ndarray:
        original = volume[0].numpy()
        damaged = original.copy()
        for _ in range(boxes):
            edges = rng.integers(1, largest + 1, 3)
            starts = [rng.integers(0, n - e + 1) for n, e in zip(original.shape, edges, strict=True)]
            box = tuple(slice(s, s + e) for s, e in zip(starts, edges, strict=True))
            window = original[box].flatten()
            rng.shuffle(window)
            damaged[box] = window.reshape(tuple(edges))
        return damaged

    return one_by_one(shuffle, x)


def shuffle(setting: Setting) -> Iterator[Case]:
    """MONAI keeps what an earlier box did, TorchIO swaps pairs of boxes: as many boxes, not the same result."""
    edge, boxes = setting.of((64, 10_000), (20, 50))
    x, largest = volumes(edge), max(2, edge // 10)

    def monai() -> Run:
        from monai.transforms import RandCoarseShuffle

        return one_by_one(RandCoarseShuffle(boxes, spatial_size=1, max_spatial_size=largest, prob=1.0), x)

    def torchio() -> Run:
        from torchio import RandomSwap

        return one_by_one(RandomSwap(patch_size=largest, num_iterations=boxes // 2), x)

    yield Case(
        f"local shuffling, {BATCH} x {edge}^3, {boxes} boxes",
        batches(LocalShuffle(1.0, boxes, 1 / 10, random_size=True), x),
        {
            "loop over blocks (Models Genesis)": shuffle_by_blocks(x, boxes, largest),
            "MONAI RandCoarseShuffle": peer(monai),
            "TorchIO RandomSwap": peer(torchio),
        },
        # Of each entry of a box its key, rank, place and value once.
        bytes=BATCH * boxes * ((largest + 1) / 2) ** 3 * 4 * 4,
    )


def paint_by_blocks(x: Tensor, boxes: int, low: int, high: int) -> Run:
    """Models Genesis' released form: a loop over holes."""
    rng = np.random.default_rng(0)

    def paint(volume: Tensor) -> np.ndarray:
        damaged = volume[0].numpy().copy()
        for _ in range(boxes):
            if rng.random() >= 0.95:
                break
            edges = rng.integers(low, high + 1, 3)
            starts = [rng.integers(0, n - e + 1) for n, e in zip(damaged.shape, edges, strict=True)]
            box = tuple(slice(s, s + e) for s, e in zip(starts, edges, strict=True))
            damaged[box] = rng.random(tuple(edges))
        return damaged

    return one_by_one(paint, x)


def paint(setting: Setting) -> Iterator[Case]:
    edge, boxes = setting.of((96, 30), (20, 5))
    x = volumes(edge)
    low, high = max(1, edge // 10), max(2, edge // 5)

    def monai() -> Run:
        from monai.transforms import RandCoarseDropout

        return one_by_one(
            RandCoarseDropout(
                boxes, spatial_size=low, max_spatial_size=high, fill_value=(0.0, 1.0), prob=1.0
            ),
            x,
        )

    yield Case(
        f"in-painting, {BATCH} x {edge}^3, up to {boxes} holes",
        batches(InPainting(1.0, boxes, 0.95, (1 / 10, 1 / 5)), x),
        {
            "loop over holes (Models Genesis)": paint_by_blocks(x, boxes, low, high),
            "MONAI RandCoarseDropout": peer(monai),
        },
        bytes=BATCH * edge**3 * 2 * 4,
    )


def spatial(setting: Setting) -> Iterator[Case]:
    """Affine and elastic in one resampling; batchgeneratorsv2 has no shear."""
    edge = setting.of(96, 20)
    x, ours, scale = volumes(edge), RandomSpatial(), edge / 128

    def monai() -> Run:
        from monai.transforms import Rand3DElastic

        shear, shift = np.tan(ours.shear), ours.translation * edge
        return one_by_one(
            Rand3DElastic(
                sigma_range=tuple(s * scale for s in ours.sigma), magnitude_range=tuple(a * scale**2.5 for a in ours.alpha),
                prob=1.0, rotate_range=[ours.rotation] * 3, shear_range=[shear] * 6, translate_range=[shift] * 3,
                scale_range=[0.25] * 3, padding_mode="zeros",
            ), x,
        )  # fmt: skip

    def batchgenerators() -> Run:
        from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

        transform = SpatialTransform(
            (edge,) * 3, 0, False, p_elastic_deform=1, elastic_deform_scale=(10 / 128, 13 / 128),
            elastic_deform_magnitude=(0, 4), p_rotation=1, rotation=(-ours.rotation, ours.rotation), p_scaling=1,
            scaling=ours.scale, p_synchronize_scaling_across_axes=0,
        )  # fmt: skip
        return one_by_one(lambda volume: transform(image=volume), x)

    yield Case(
        f"affine and elastic deformation, {BATCH} x {edge}^3",
        batches(ours, x),
        {"MONAI Rand3DElastic": peer(monai), "batchgeneratorsv2": peer(batchgenerators)},
        # Three coordinates written and read, eight neighbours read, one value written.
        bytes=BATCH * edge**3 * 4 * (3 * 2 + 8 + 1),
    )
