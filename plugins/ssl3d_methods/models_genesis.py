"""Models Genesis (Zhou et al., MICCAI 2019 and Medical Image Analysis 2021)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.geometry import full_precision
from ssl3d.models.heads import RestorationHead, mean_image_error
from ssl3d.rng import BatchRng
from ssl3d.transforms import BezierIntensity, Flip, InPainting, LocalShuffle, OutPainting
from ssl3d.transforms.appearance import only_where


class ModelsGenesisConfig(MethodConfig):
    """Options of Models Genesis; the defaults are those of the released code."""

    nonlinear_p: float = Field(0.9, ge=0, le=1)
    """Probability of the non-linear intensity curve."""
    invert_p: float = Field(0.5, ge=0, le=1)
    """Probability that such a curve decreases."""
    shuffle_p: float = Field(0.5, ge=0, le=1)
    """Probability of local shuffling."""
    shuffle_boxes: int = Field(10_000, ge=1)
    """Boxes whose voxels are shuffled."""
    shuffle_fraction: float = Field(1 / 10, gt=0, le=1)
    """Largest edge of such a box as a fraction of the crop's edge; each edge is drawn from 1 to that."""
    paint_p: float = Field(0.9, ge=0, le=1)
    """Probability of painting."""
    outpaint_p: float = Field(0.8, ge=0, le=1)
    """Probability that painting is out-painting; in-painting otherwise."""
    flip_p: float = Field(0.4, ge=0, le=1)
    """Probability of a flip along a random axis, and of each further one; at most three."""
    hidden_channels: int = Field(16, ge=1)
    """Width of the restoration head."""


class ModelsGenesis(Method):
    """Restore a volume that was shuffled locally, mapped non-linearly, and painted over.

    Departure from the released code: the restoration head of GVSL's, without a sigmoid at its end,
    so that all restoring methods have one head.
    """

    name = "models_genesis"
    title = "Models Genesis"
    paper = (
        "Zhou et al., Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis, MICCAI 2019"
    )
    trains = "encoder+decoder"
    splits = True
    Config = ModelsGenesisConfig
    config: ModelsGenesisConfig

    def __init__(self, backbone: Any, config: ModelsGenesisConfig) -> None:
        super().__init__(backbone, config)
        self.restoration = RestorationHead(backbone.local_channels, config.hidden_channels)
        self.shuffle = LocalShuffle(
            config.shuffle_p, config.shuffle_boxes, config.shuffle_fraction, random_size=True
        )
        self.nonlinear = BezierIntensity(config.nonlinear_p, config.invert_p)
        # The released code's boxes: five at most, edges 1/6 to 1/3 inside, 3/7 to 4/7 kept outside.
        self.inpaint = InPainting(1.0, max_boxes=5, next_p=0.95, edges=(1 / 6, 1 / 3))
        self.outpaint = OutPainting(1.0, max_boxes=5, next_p=0.95, edges=(3 / 7, 4 / 7))

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Return the damaged volume and its target (B, 1, D, H, W); the flip moves both."""
        x = Flip().apply(x, self.flips(rng.fork("flip")))
        damaged = self.shuffle(x, rng.fork("shuffle"))
        damaged = self.nonlinear(damaged, rng.fork("nonlinear"))
        return {"damaged": self.paint(damaged, rng.fork("paint")), "target": x}

    def flips(self, rng: BatchRng) -> Tensor:
        """Draw which axes are mirrored (B, 3): flips go on while a coin allows, along any axis again."""
        goes_on = rng.bernoulli(self.config.flip_p, (3,)).cumprod(1)  # (B, 3 flips)
        axes = rng.integers(0, 3, (3,))[:, :, None] == rng.constant([0, 1, 2])  # (B, 3 flips, 3 axes)
        return (goes_on[:, :, None] * axes).sum(1) % 2 == 1

    def paint(self, x: Tensor, rng: BatchRng) -> Tensor:
        """Paint over the inside or the outside of boxes, or nothing."""
        painted, outside = rng.bernoulli(self.config.paint_p), rng.bernoulli(self.config.outpaint_p)  # (B,)
        holes = only_where(
            outside, self.outpaint.holes(x, rng.fork("out")), self.inpaint.holes(x, rng.fork("in"))
        )
        holes = only_where(painted, holes, torch.zeros_like(holes))
        return torch.where(holes, rng.uniform(shape=x.shape[1:]), x)

    def chance(self, views: dict[str, Tensor]) -> float:
        return mean_image_error(views["target"])

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["damaged"])  # (B, C, D, H, W)
        restored = self.restoration(local)  # (B, 1, D, H, W)
        return {"mse": F.mse_loss(full_precision(restored), views["target"])}
