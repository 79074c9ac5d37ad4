"""ssl3d's U-Net as MONAI's BasicUNet. This file needs MONAI and torch only: an export contains a copy.

BasicUNet's constructor knows one number of groups for all widths, and halves the channels before it
interpolates. Its building blocks know more, so the parts of a BasicUNet are replaced by the same blocks
with other options. Features are those of ssl3d for volumes whose edges are multiples of 16.

    model = load("monai.pt", out_channels=4)  # everything pretrained but model.final_conv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import BasicUNet
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

STAGES = 5


def basic_unet(channels: Sequence[int], out_channels: int) -> BasicUNet:
    """Return a BasicUNet that computes what ssl3d's U-Net computes, with fresh weights.

    Args:
        channels: width of each of the five stages, finest first.
        out_channels: channels of the last layer, ``final_conv``.
    """
    act = ("LeakyReLU", {"negative_slope": 0.2})

    def norm(width: int) -> tuple[str, dict[str, int]]:
        return "group", {"num_groups": max(1, width // 8)}

    net = BasicUNet(3, 1, out_channels, features=(*channels, channels[0]), act=act)
    net.conv_0 = TwoConv(3, 1, channels[0], act, norm(channels[0]), bias=True)
    for stage in range(1, STAGES):
        fine, coarse = channels[stage - 1], channels[stage]
        down = Down(3, fine, coarse, act, norm(coarse), bias=True)
        up = UpCat(3, coarse, fine, fine, act, norm(fine), bias=True, upsample="nontrainable", pre_conv=None)
        setattr(net, f"down_{stage}", down)
        setattr(net, f"upcat_{stage}", up)
    return net


def load(path: str | Path, out_channels: int) -> BasicUNet:
    """Return a BasicUNet with the weights of an exported file and a fresh ``final_conv``.

    Raises:
        RuntimeError: the file holds other weights.
    """
    weights = torch.load(path, map_location="cpu", weights_only=True)
    parts = ["conv_0"] + [f"down_{stage}.convs" for stage in range(1, STAGES)]
    net = basic_unet([len(weights[f"{part}.conv_0.conv.weight"]) for part in parts], out_channels)
    fresh = {f"final_conv.{name}": value for name, value in net.final_conv.state_dict().items()}
    net.load_state_dict({**weights, **fresh})
    return net
