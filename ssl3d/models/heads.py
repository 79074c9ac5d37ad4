"""Heads that several pretext methods put on the backbone; none of them is kept after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from ssl3d.errors import ConfigError

Norm = Literal["batch", "layer"]
"""Normalisation in projectors and predictors: over all views of all crops of a step, or within each
sample. See :class:`MLP`."""


class RestorationHead(nn.Sequential):
    """3x3x3 convolution, GroupNorm with 4 channels a group, LeakyReLU 0.2, 1x1x1 convolution.

    The head R of GVSL's released code: local feature (B, C, D, H, W) -> volume (B, 1, D, H, W).

    Args:
        channels: channels C of the local feature.
        hidden: width of the hidden layer.
    """

    def __init__(self, channels: int, hidden: int = 16) -> None:
        groups = max(g for g in range(1, max(1, hidden // 4) + 1) if hidden % g == 0)
        super().__init__(
            nn.Conv3d(channels, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.LeakyReLU(0.2),
            nn.Conv3d(hidden, 1, 1),
        )


class MLP(nn.Sequential):
    """Projector or predictor of a contrastive method: linear layers with a norm and ReLU between them.

    (B, widths[0]) -> (B, widths[-1]).

    Batch norm over 2 samples maps every channel to +1 and -1, whatever it was: the embeddings of two
    volumes become each other's negative, and no gradient is left. 3D batches are that small, so a
    method must pass both views of all crops at once, (2B, C): 4 samples for a batch of 2. (SimCLR's
    released code does so; BYOL and SimSiam normalise each view apart, over thousands of samples.)

    Layer norm works on any batch, but keeps what all samples have in common, which is nearly all of a
    pooled feature: measured on batches of 2 and 4, BYOL and SimSiam then map every volume to one
    embedding within 100 steps at a learning rate of 1e-3, and SimCLR stays at the loss of chance.

    Args:
        widths: features of the input, of each hidden layer, and of the output.
        norm: norm after each hidden linear layer.
        last: norm after the output too, without affine parameters; None for none.
    """

    def __init__(self, widths: Sequence[int], norm: Norm, last: Norm | None = None) -> None:
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            hidden = i < len(widths) - 2
            after = norm if hidden else last
            # Batch norm subtracts a bias again, which would never get a gradient.
            layers.append(nn.Linear(c_in, c_out, bias=after != "batch"))
            if after == "layer":
                layers.append(nn.LayerNorm(c_out, elementwise_affine=hidden))
            elif after == "batch":
                layers.append(nn.BatchNorm1d(c_out, affine=hidden))
            if hidden:
                layers.append(nn.ReLU())
        super().__init__(*layers)


def check_norm(method: str, norm: Norm, batch_size: int) -> None:
    """Raise ConfigError for a batch norm over the two views of one crop: it leaves no gradient."""
    if norm == "batch" and batch_size < 2:
        raise ConfigError(
            f"{method}.norm=batch needs pretrain.batch_size of at least 2, not {batch_size}: normalised over its own "
            f"two views alone, a crop has no gradient. Use a larger batch, or --set {method}.norm=layer."
        )
