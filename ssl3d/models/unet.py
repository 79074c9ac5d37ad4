"""The 3D U-Net that all methods share (He et al., CVPR 2023, figure 12 a)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor, nn

from ssl3d.config import Model, PositiveInt
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone, Features
from ssl3d.models.conv import Conv3d
from ssl3d.models.join import join
from ssl3d.models.padding import crop_to, pad_to_multiple, padded_grid


class ConvBlock(nn.Sequential):
    """Two times (3x3x3 convolution, GroupNorm with C/8 groups, LeakyReLU 0.2).

    (B, c_in, D, H, W) -> (B, c_out, D, H, W).
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [
                Conv3d(c, c_out, kernel_size=3, padding=1),
                nn.GroupNorm(max(1, c_out // 8), c_out),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers)


class DecoderBlock(ConvBlock):
    """:class:`ConvBlock` of a skip and, behind its channels, what comes from the coarser grid.

    (B, c, D, H, W) and (B, c_skip, 2 D, 2 H, 2 W) -> (B, c_out, 2 D, 2 H, 2 W). The parameters have the names of a
    :class:`ConvBlock`'s.
    """

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(upsample_and_join(x, skip))
        return y


def upsample_and_join(x: Tensor, skip: Tensor) -> Tensor:
    """Interpolate ``x`` to twice its grid and put it behind the skip's channels.

    (B, c, D, H, W) and (B, c_skip, 2 D, 2 H, 2 W) -> (B, c_skip + c, 2 D, 2 H, 2 W).
    """
    x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
    return join(skip, x)


class UNet3D(Backbone):
    """3D U-Net with GroupNorm: max-pooling down, trilinear up, concatenated skips.

    As released: Kaiming-normal convolutions, input zero-padded to a multiple of 2^(stages - 1)
    and the output cropped back. With the paper's widths it has 23.5 M parameters.
    """

    name = "unet3d"

    class Config(Model):
        """Options of the U-Net."""

        channels: tuple[PositiveInt, ...] = (32, 64, 128, 256, 512)
        """Width of each encoder stage, finest first; the decoder mirrors them."""

        @field_validator("channels")
        @classmethod
        def _usable(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
            if len(channels) < 2:
                raise ValueError("at least two stages are needed")
            if bad := [c for c in channels if c > 8 and c % (c // 8)]:
                raise ValueError(f"{bad} cannot be divided into C/8 groups; use multiples of 8")
            return channels

    decoder: nn.ModuleList
    encoder: nn.ModuleList

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        config = config or self.Config()
        widths = config.channels
        self.config = config
        self.local_channels, self.global_channels = widths[0], widths[-1]
        # Each edge is halved (stages - 1) times.
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = nn.ModuleList(ConvBlock(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.decoder = nn.ModuleList(
            DecoderBlock(coarse + fine, fine)
            for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    def minimum_edge(self) -> int:
        return self.factor

    def global_grid(self, size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
        return padded_grid(size, grid, self.factor)

    def encode(self, x: Tensor) -> Features:
        if min(x.shape[2:]) < self.factor:
            raise ConfigError(
                f"A volume of {tuple(x.shape[2:])} voxels is too small for a U-Net of {len(self.encoder)} stages, "
                f"which needs edges of at least {self.factor}: use larger crops or fewer backbone.channels."
            )
        features = Features([], size=x.shape[2:])
        x = pad_to_multiple(x, self.factor)  # (B, 1, D', H', W')
        for stage, block in enumerate(self.encoder):
            if stage:
                x = F.max_pool3d(x, 2)  # (B, C, D'/2^stage, ...)
            x = block(x)
            features.append(x)
        return features

    def decode(self, features: Features) -> Tensor:
        *skips, x = features
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(x, skip)  # (B, C of the skip, the skip's grid)
        return crop_to(x, features.size, self.factor)  # (B, C, D, H, W)
