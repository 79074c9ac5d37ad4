"""The U-Net of ssl3d as a network that nnU-Net v2 builds from its plans, for ``-pretrained_weights``.

nnU-Net's own PlainConvUNet goes down by strided convolutions and up by transposed ones that halve the
channels, so it cannot compute the features of :class:`ssl3d.models.unet.UNet3D`. nnU-Net builds any class
that its plans name, however; this is one, with the same blocks and the segmentation layers that nnU-Net
trains. ssl3d must be installed beside nnU-Net, in training and in prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.errors import ConfigError
from ssl3d.models.unet import ConvBlock, UNet3D, upsample_and_join


class Decoder(nn.Module):
    """The decoder of the U-Net with a segmentation layer (1x1x1) after each stage.

    Attributes:
        deep_supervision: switched by nnU-Net's trainer: whether every stage's logits are returned.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        fine, coarse = channels[-2::-1], channels[:0:-1]
        self.stages = nn.ModuleList(ConvBlock(c + f, f) for f, c in zip(fine, coarse, strict=True))
        # nnU-Net leaves every weight with ".seg_layers." in its name untouched by -pretrained_weights.
        self.seg_layers = nn.ModuleList(nn.Conv3d(f, num_classes, kernel_size=1) for f in fine)

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Return logits (B, K, D, H, W), or with deep supervision those of each stage, finest first."""
        *skips, x = skips
        logits: list[Tensor] = []
        for number, (stage, layer) in enumerate(zip(self.stages, self.seg_layers, strict=True), start=1):
            x = stage(upsample_and_join(x, skips[-number]))  # (B, C of the skip, the skip's grid)
            if self.deep_supervision or number == len(self.stages):
                logits.append(layer(x))  # (B, K, the skip's grid)
        return logits[::-1] if self.deep_supervision else logits[0]


class NNUNetUNet3D(nn.Module):
    """The U-Net of ssl3d with the arguments, the attributes and the outputs that nnU-Net v2 expects.

    Args:
        input_channels: modalities; ssl3d pretrains with one.
        num_classes: channels of the segmentation.
        channels: width of each stage, finest first.
        strides: one triple a stage, [1, 1, 1] and then [2, 2, 2]; nnU-Net reads from the plans how coarse
            each output is.
        deep_supervision: see :class:`Decoder`.

    Raises:
        ConfigError: other strides than those of the U-Net.
    """

    def __init__(
        self, input_channels: int, num_classes: int, channels: Sequence[int], strides: Sequence[Sequence[int]],
        deep_supervision: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if [list(s) for s in strides] != strides_of(len(channels)):
            raise ConfigError(
                f"strides = {strides}: this network halves every axis between two stages. Fix: write "
                f"{strides_of(len(channels))} in the plans."
            )
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = nn.ModuleList(
            ConvBlock(a, b) for a, b in zip((input_channels, *channels), channels, strict=False)
        )
        self.decoder = Decoder(channels, num_classes, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return what :class:`Decoder` returns, of patches (B, input_channels, D, H, W)."""
        if any(edge % self.factor for edge in x.shape[2:]):
            raise ConfigError(
                f"A patch of {tuple(x.shape[2:])} voxels: the edges must be multiples of {self.factor}. "
                "Fix: correct patch_size in the plans."
            )
        skips = []
        for stage, block in enumerate(self.encoder):
            x = block(F.max_pool3d(x, 2) if stage else x)  # (B, C, D/2^stage, ...)
            skips.append(x)
        logits: Tensor | list[Tensor] = self.decoder(skips)
        return logits


def strides_of(stages: int) -> list[list[int]]:
    """Return the strides of a U-Net with so many stages, as nnU-Net's plans have them."""
    return [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1)


def architecture_of(backbone: UNet3D) -> dict[str, Any]:
    """Return the entry ``architecture`` of a configuration in nnU-Net's plans."""
    channels = list(backbone.config.channels)
    return {
        "network_class_name": f"{NNUNetUNet3D.__module__}.{NNUNetUNet3D.__name__}",
        "arch_kwargs": {"channels": channels, "strides": strides_of(len(channels))},
        "_kw_requires_import": [],
    }


def weights_of(backbone: UNet3D) -> dict[str, Tensor]:
    """Return the weights under the names that :class:`NNUNetUNet3D` has for them."""
    return {
        name.replace("decoder.", "decoder.stages."): tensor for name, tensor in backbone.state_dict().items()
    }
