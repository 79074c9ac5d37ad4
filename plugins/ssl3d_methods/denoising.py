"""Denoising autoencoder (Vincent et al., JMLR 2010)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig
from ssl3d.geometry import full_precision
from ssl3d.models.heads import RestorationHead, mean_image_error
from ssl3d.rng import BatchRng
from ssl3d.transforms import GaussianNoise, RandomSpatial


class DenoisingConfig(MethodConfig):
    """Options of denoising. The GVSL paper, whose table 1 has this row, does not state its settings."""

    sigma: float = Field(0.1, gt=0, le=1)
    """Standard deviation of the noise on the [0, 1] scale."""
    clip: bool = False
    """Clip the noisy volume to [0, 1]. Off: the noise stays Gaussian where the volume is 0 or 1, as in air."""
    spatial: bool = False
    """Deform the volume by GVSL's random map first; the deformed volume is then the target."""
    hidden_channels: int = Field(16, ge=1)
    """Width of the restoration head."""


class Denoising(Method):
    """Restore a volume from a copy with Gaussian noise.

    Departures from the paper: one deep network instead of stacked layers trained one by one, and
    convolutions instead of tied dense weights.
    """

    name = "denoising"
    title = "Denoising"
    paper = "Vincent et al., Stacked Denoising Autoencoders, JMLR 2010"
    trains = "encoder+decoder"
    splits = True
    Config = DenoisingConfig
    config: DenoisingConfig

    def __init__(self, backbone: Any, config: DenoisingConfig) -> None:
        super().__init__(backbone, config)
        self.restoration = RestorationHead(backbone.local_channels, config.hidden_channels)
        self.spatial = RandomSpatial()
        self.noise = GaussianNoise(p=1.0, sigma=(config.sigma, config.sigma), clip=config.clip)

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        if self.config.spatial:
            x = self.spatial(x, rng.fork("spatial"))
        # Noise last: interpolation would average it away.
        return {"noisy": self.noise(x, rng), "clean": x}  # (B, 1, D, H, W) each

    def chance(self, views: dict[str, Tensor]) -> float:
        return mean_image_error(views["clean"])

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        _, local = self.backbone(views["noisy"])  # (B, C, D, H, W)
        restored = self.restoration(local)  # (B, 1, D, H, W)
        return {"mse": F.mse_loss(full_precision(restored), views["clean"])}
