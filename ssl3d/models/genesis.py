"""The 3D U-Net of Models Genesis' released PyTorch code (Zhou et al., MICCAI 2019), for its checkpoints.

It differs from :class:`ssl3d.models.unet.UNet3D` in every part: four stages with another width after
each convolution, batch norm over the batch at hand, ReLU, transposed convolutions, and skips behind the
up-sampled features. :mod:`ssl3d.models.weights.imports` has the names of the released state dict.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.config import Model, PositiveInt
from ssl3d.errors import ConfigError
from ssl3d.models.backbone import Backbone, Features
from ssl3d.models.conv import Conv3d
from ssl3d.models.join import join
from ssl3d.models.norms import normalised, several, statistics
from ssl3d.models.padding import crop_to, pad_to_multiple, padded_grid

STAGES = 4


class BatchStatisticsNorm(nn.Module):
    """Batch norm with mean and variance of the batch at hand, in training and in evaluation alike.

    (B, C, D, H, W) -> the same shape. The released norm (``ContBatchNorm3d``) does so too: it keeps
    running statistics and never uses them. One volume alone is thus normalised by its own statistics.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not several():
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        mean, variance, _ = statistics(x)  # (C,) each
        return normalised(x, mean, variance, self.weight, self.bias, 1e-5)


class ConvPair(nn.Sequential):
    """Two times (3x3x3 convolution, norm, ReLU): (B, c_in, D, H, W) -> (B, c_out, D, H, W)."""

    def __init__(self, c_in: int, c_between: int, c_out: int) -> None:
        layers: list[nn.Module] = []
        for a, b in ((c_in, c_between), (c_between, c_out)):
            layers += [Conv3d(a, b, kernel_size=3, padding=1), BatchStatisticsNorm(b), nn.ReLU()]
        super().__init__(*layers)


class Up(nn.Module):
    """Transposed convolution to twice the grid, then a :class:`ConvPair` over it and the skip.

    (B, c, D, H, W) and (B, c_skip, 2 D, 2 H, 2 W) -> (B, c_skip, 2 D, 2 H, 2 W).
    """

    def __init__(self, c: int, c_skip: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(c, c, kernel_size=2, stride=2)
        self.block = ConvPair(c + c_skip, c_skip, c_skip)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.block(join(self.up(x), skip))  # (B, c_skip, the skip's grid)
        return y


class GenesisUNet3D(Backbone):
    """The released network without its last layer (a 1x1x1 convolution and a sigmoid).

    f^g is what the released code pools for classification (512 channels), f^l what its last layer reads
    (64 channels). Departure: volumes are zero-padded to multiples of 8 and features cropped back, where
    the released code asks for multiples of 16. Initial weights are PyTorch's defaults, as released.
    """

    name = "genesis_unet3d"
    samples_apart = False
    synchronised = True

    class Config(Model):
        """Options of Models Genesis' U-Net."""

        width: PositiveInt = 32
        """Channels of the first convolution; the released network has 32."""

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or self.Config()
        # Stage s has width * 2^s channels after its first convolution, and twice as many after its second.
        widths = [self.config.width * 2 ** (s + 1) for s in range(STAGES)]
        self.local_channels, self.global_channels = widths[0], widths[-1]
        self.factor = 2 ** (STAGES - 1)
        self.encoder = nn.ModuleList(
            ConvPair(a, b // 2, b) for a, b in zip((1, *widths), widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            Up(coarse, fine) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )

    def minimum_edge(self) -> int:
        # One voxel a channel has no variance: the last stage needs two along an edge.
        return 2 * self.factor

    def global_grid(self, size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
        return padded_grid(size, grid, self.factor)

    def encode(self, x: Tensor) -> Features:
        if min(x.shape[2:]) < self.minimum_edge():
            raise ConfigError(
                f"A volume of {tuple(x.shape[2:])} voxels is too small for {self.name}, which needs edges of at "
                f"least {self.minimum_edge()}: use larger crops."
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
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x = up(x, skip)  # (B, C of the skip, the skip's grid)
        return crop_to(x, features.size, self.factor)  # (B, C, D, H, W)
