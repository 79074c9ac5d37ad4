"""A backbone for the checks of methods, unlike the bundled ones, and a method for those of backbones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.config import Model
from ssl3d.models.backbone import Backbone, Features
from ssl3d.pretrain.method import Method
from ssl3d.rng import BatchRng


class Plain(Backbone):
    """Two convolutions: one stage at half the grid, 12 global and 6 local channels.

    What a method takes for granted of the U-Net (a number of stages, their widths, a norm) does not hold here.
    """

    name = "plain"

    class Config(Model):
        """It has no options."""

    def __init__(self) -> None:
        super().__init__()
        self.global_channels, self.local_channels = 12, 6
        self.encoder = nn.Sequential(nn.Conv3d(1, 12, 3, stride=2, padding=1), nn.LeakyReLU(0.2))
        self.decoder = nn.Conv3d(12, 6, 1)

    def encode(self, x: Tensor) -> Features:
        return Features([self.encoder(x)], size=x.shape[2:])  # (B, 12, D/2, H/2, W/2)

    def decode(self, features: Features) -> Tensor:
        x = self.decoder(features[-1])  # (B, 6, D/2, H/2, W/2)
        return F.interpolate(x, features.size, mode="trilinear", align_corners=False)  # (B, 6, D, H, W)


def plain(seed: int = 0) -> Plain:
    """Return one whose weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain()


class Restore(Method):
    """Restore a volume from a noisy copy: what a backbone is trained with to see that it can be."""

    name = "conformance_restore"
    title = "Restoration"
    trains = "encoder+decoder"

    def __init__(self, backbone: Backbone, config: Any) -> None:
        super().__init__(backbone, config)
        self.head = nn.Conv3d(backbone.local_channels, 1, 1)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        return {"noisy": x + 0.1 * rng.normal(x.shape[1:]), "x": x}  # (B, 1, D, H, W) each

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["noisy"])  # (B, C, D, H, W)
        return {"mse": F.mse_loss(self.head(local), views["x"])}

    def chance(self, views: dict[str, Tensor]) -> float:
        return float(views["x"].var())
