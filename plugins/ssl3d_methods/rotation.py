"""Rotation prediction (Komodakis & Gidaris, ICLR 2018; in 3D: Taleb et al., NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.errors import ConfigError
from ssl3d.models.heads import PooledLinear, pool
from ssl3d.rng import BatchRng

Turn = tuple[int, int]
"""(axis, quarter turns): d, h, w are the axes 0, 1, 2; a quarter turn about h takes w to d."""

_IN_PLANE = ((1, 2), (2, 0), (0, 1))  # of the rotation about each axis, in cyclic order

# Identity; 90, 180 and 270 degrees about each axis.
ROTATIONS_10: tuple[tuple[Turn, ...], ...] = ((), *(((axis, k),) for axis in range(3) for k in (1, 2, 3)))

# The whole group of the cube: six directions for axis d, times four turns about it. The class
# numbers are not those of the ten.
ROTATIONS_24: tuple[tuple[Turn, ...], ...] = tuple(
    (tilt, (0, spin)) for tilt in ((2, 0), (2, 1), (2, 2), (2, 3), (1, 1), (1, 3)) for spin in range(4)
)


def rotate(x: Tensor, turns: Sequence[Turn]) -> Tensor:
    """Return ``x`` (..., D, H, W) rotated by ``turns``, one after the other; no interpolation."""
    for axis, k in turns:
        first, second = _IN_PLANE[axis]
        x = torch.rot90(x, k, (first - 3, second - 3))
    return x


class RotationConfig(MethodConfig):
    """Options of rotation prediction."""

    classes: Literal[10, 24] = Field(10)
    """10: the identity and 90, 180, 270 degrees about each axis (Taleb et al.); 24: all rotations of a cube."""


class Rotation(Method):
    """Recognise by how much a volume was rotated.

    Crops lie inside the volumes, so no padding tells the class; they must be cubes, so that their
    shape does not. Departure from Komodakis & Gidaris: one random class a crop, as Taleb et al.,
    instead of all classes of each image in a batch. Departure from Taleb et al.: one linear layer after
    the norm, instead of two hidden ones with batch norm.
    """

    name = "rotation"
    title = "Rotation"
    paper = (
        "Komodakis & Gidaris, Unsupervised Representation Learning by Predicting Image Rotations, ICLR 2018; "
        "Taleb et al., 3D Self-Supervised Methods for Medical Imaging, NeurIPS 2020"
    )
    trains = "encoder"
    Config = RotationConfig
    config: RotationConfig

    def __init__(self, backbone: Any, config: RotationConfig) -> None:
        super().__init__(backbone, config)
        self.rotations = ROTATIONS_10 if config.classes == 10 else ROTATIONS_24
        self.classifier = PooledLinear(backbone.global_channels, len(self.rotations))

    def check(self, crop: Sequence[int], items: int) -> None:
        if len(set(crop)) > 1:
            raise ConfigError(
                f"rotation needs cubic crops, not pretrain.crop = {tuple(crop)}: a rotated box has another shape, "
                f"which would tell the class. Use --set pretrain.crop={min(crop)}."
            )

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        labels = rng.on_host().integers(0, len(self.rotations)).tolist()
        rotated = [rotate(v, self.rotations[label]) for v, label in zip(x, labels, strict=True)]
        return {"rotated": torch.stack(rotated), "label": rng.constant(labels)}  # (B, 1, D, H, W), (B,)

    def chance(self, views: dict[str, Tensor]) -> float:
        return math.log(len(self.rotations))

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = pool(self.backbone.encode(views["rotated"]))  # (B, C)
        return {"cross_entropy": F.cross_entropy(self.classifier(pooled), views["label"])}
