"""Heads on the backbone: the readout of pooled features, projectors, and the restoration head.

A bare linear layer on the pooled f^g starves. GroupNorm fixes the mean of every group of channels, so that f^g averaged
over voxels is nearly the same vector for every volume: at initialisation 99.6 % of its energy is common to all. What
tells volumes apart is the rest, and a layer that sees it at a sixteenth of the size of the common part follows the
common part (an optimizer's first hundreds of steps go into it, and so does what they do to the encoder). So every head
on pooled features centres and scales each channel first: :class:`PooledNorm`, or the batch norm in an :class:`MLP`. It is
what the original codes have:

    rotation      Taleb et al.: batch norm throughout the encoder, and after both layers of the head (2048, 1024)
    SimCLR        batch norm after every layer of the projector, its output (without offset) included
    BYOL          batch norm after the hidden layers of projector and predictor, none on their outputs
    SimSiam       batch norm after every layer of the projector (its output: without scale and offset) and the
                  predictor's hidden layer
    DeepCluster   batch norm throughout the encoder (AlexNet or VGG-16 with it); whitened features for k-means

None of the heads in this module is kept after pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ssl3d.errors import ConfigError
from ssl3d.geometry import full_precision, no_autocast
from ssl3d.models.conv import Conv3d
from ssl3d.models.norms import BatchNorm1d
from ssl3d.ranks import gather

Norm = Literal["batch", "layer"]
"""Normalisation in projectors and predictors: over all views of all crops of a step, or within each
sample. See :class:`MLP`."""


def pool(features: Sequence[Tensor]) -> Tensor:
    """Return the mean over voxels of the global feature f^g, (B, C) in float32 at least.

    Args:
        features: what ``backbone.encode`` returns; the last is f^g (B, C, D, H, W).
    """
    return full_precision(features[-1]).mean((2, 3, 4))


class PooledNorm(nn.Module):
    """Centre and scale each channel of pooled features, whatever the batch: (B, C) -> (B, C).

    The statistics are those of the batch and of what came before it, pooled: the past counts as ``memory`` samples, the
    batch as its B. So a batch of one is defined (it is compared with those before it), and for B far above ``memory``
    this is batch norm. The gradient passes the batch's own share of the statistics, as in batch norm: without it nothing
    holds the common part in its place, and an encoder that moves it leaves running statistics behind.

    At evaluation the statistics are the stored ones and do not move: a sample's output depends on itself alone. They
    are buffers, so a resumed run goes on bit for bit. Before the first batch there is no past: the first batch, or
    :meth:`calibrate`, sets them.

    Args:
        channels: C.
        memory: samples that the past counts as, at most.
        eps: added to the variance.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, channels: int, memory: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        self.memory, self.eps = memory, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Forget the past: the statistics become those of ``features`` (N, C), which count as N samples."""
        features = features.detach().to(self.mean)
        self.mean.copy_(features.mean(0))
        self.variance.copy_(features.var(0, correction=0))
        self.seen.fill_(len(features))

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            x = full_precision(x)
            mean, variance = self.mean, self.variance
            if self.training:
                batch = gather(x)  # (B of all devices, C)
                share = len(batch) / (self.seen.clamp(max=self.memory) + len(batch))
                # Two groups of samples as one: their means differ, which is variance, too.
                apart = batch.mean(0) - mean
                variance = (1 - share) * (variance + share * apart.square()) + share * batch.var(
                    0, correction=0
                )
                mean = mean + share * apart
                with torch.no_grad():
                    self.mean.copy_(mean)
                    self.variance.copy_(variance)
                    self.seen += len(batch)
            return (x - mean) / (variance + self.eps).sqrt()


class PooledLinear(nn.Module):
    """The readout of pooled features: :class:`PooledNorm` (B, C), then a linear layer -> (B, outputs)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = PooledNorm(channels)
        self.linear = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y

    def calibrate(self, features: Tensor) -> None:
        """See :meth:`PooledNorm.calibrate`."""
        self.norm.calibrate(features)

    @torch.no_grad()
    def restart(self, generator: torch.Generator, std: float = 0.01) -> None:
        """Forget what the linear layer learnt: small random weights, no bias."""
        weight = torch.empty(self.linear.weight.shape).normal_(std=std, generator=generator)
        self.linear.weight.copy_(weight)
        self.linear.bias.zero_()


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
            Conv3d(channels, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.LeakyReLU(0.2),
            nn.Conv3d(hidden, 1, 1),
        )


def mean_image_error(x: Tensor, over: Tensor | None = None) -> float:
    """Return the mean squared error of the best restoration that ignores its input: the mean image.

    It is estimated without bias from the images themselves: their variance in each voxel, with N - 1
    degrees of freedom. Of a single image that is undefined, and its best constant takes its place.

    Args:
        x: images (N, 1, D, H, W).
        over: where the error counts (N, 1, D, H, W) bool; None: everywhere.
    """
    x = full_precision(x)
    n = len(x)
    error = (x - x.mean(0)).square() * (n / (n - 1)) if n > 1 else (x - x.mean()).square()
    return float(error.mean() if over is None else error[over].mean())


class Scale(nn.Module):
    """A trained factor for each channel, 1 at first: (B, C) -> (B, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class MLP(nn.Sequential):
    """Projector or predictor of a contrastive method: linear layers with a norm and ReLU between them.

    (B, widths[0]) -> (B, widths[-1]).

    Batch norm over 2 samples maps every channel to +1 and -1, whatever it was: the embeddings of two
    volumes become each other's negative, and no gradient is left. 3D batches are small, so a
    method must pass both views of all crops at once, (2B, C), and have many of them (`RandomViews.edge`).
    (SimCLR's released code passes both at once; BYOL and SimSiam normalise each view apart, over
    thousands of samples.)

    Layer norm works on any batch, but keeps what all samples have in common, which is nearly all of a
    pooled feature: measured on batches of 2 and 4, BYOL and SimSiam then map every volume to one
    embedding within 100 steps at a learning rate of 1e-3, and SimCLR stays at the loss of chance.

    Args:
        widths: features of the input, of each hidden layer, and of the output.
        norm: norm after each hidden linear layer.
        last: norm after the output too, without affine parameters; None for none.
        last_scale: a factor for each channel after that norm, but no offset (SimCLR's released code).
    """

    def __init__(
        self, widths: Sequence[int], norm: Norm, last: Norm | None = None, last_scale: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            hidden = i < len(widths) - 2
            after = norm if hidden else last
            # Batch norm subtracts a bias again, which would never get a gradient.
            layers.append(nn.Linear(c_in, c_out, bias=after != "batch"))
            if after == "layer":
                layers.append(nn.LayerNorm(c_out, elementwise_affine=hidden))
            elif after == "batch":
                layers.append(BatchNorm1d(c_out, affine=hidden))
            if hidden:
                layers.append(nn.ReLU())
        if last_scale:
            layers.append(Scale(widths[-1]))
        super().__init__(*layers)


def check_norm(method: str, norm: Norm, items: int) -> None:
    """Raise ConfigError for a batch norm over the two views of one crop: it leaves no gradient."""
    if norm == "batch" and items < 2:
        raise ConfigError(
            f"{method}.norm=batch needs at least 2 crops a step, not {items}: normalised over its own two views alone, a "
            f"crop has no gradient. Use a larger pretrain.batch_size, smaller views (--set {method}.views.edge=0.5), or "
            f"--set {method}.norm=layer."
        )
