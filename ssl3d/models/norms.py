"""Batch norms over the batch of all devices (:mod:`ssl3d.ranks`); on one device they are torch's own, to the bit.

torch's ``SyncBatchNorm`` works on CUDA only, and in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl3d.errors import ConfigError
from ssl3d.geometry import full_precision, no_autocast
from ssl3d.models.backbone import Backbone
from ssl3d.ranks import gather, mine, share, total


def several() -> bool:
    """Whether this process has a part of the step's items only."""
    return share() < 1


class BatchNorm1d(nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over the rows (B, C) of all devices."""

    def forward(self, x: Tensor) -> Tensor:
        # Each normalises the rows of all, which are few numbers, and keeps its own.
        return mine(super().forward(gather(x))) if self.training else super().forward(x)


class BatchNorm3d(nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` over the volumes (B, C, D, H, W) of all devices; of these only sums are exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and several()):
            return super().forward(x)
        mean, variance, n = statistics(x)  # (C,) each
        if self.track_running_stats:
            self._follow(mean, variance * (n / (n - 1)))
        return normalised(x, mean, variance, self.weight, self.bias, self.eps)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch does."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, newest in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - weight).add_(weight * newest)


def statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean and variance (C,) over the volumes of all devices and their voxels, with gradient, and how many these are.

    Args:
        x: this process's volumes (B, C, D, H, W), of one size on all devices.
    """
    with no_autocast(x):
        x = full_precision(x)
        n = round(x.numel() // x.shape[1] / share())
        mean = total(x.sum((0, 2, 3, 4))) / n  # (C,)
        apart = x - mean.view(-1, 1, 1, 1)
        return mean, total(apart.square().sum((0, 2, 3, 4))) / n, n


def normalised(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return ``x`` (B, C, D, H, W) centred and scaled, channel by channel; parameters are (C,)."""
    with no_autocast(x):
        scale = (variance + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        y = (full_precision(x) - mean.view(-1, 1, 1, 1)) * scale.view(-1, 1, 1, 1)
        return (y if bias is None else y + bias.view(-1, 1, 1, 1)).to(x.dtype)


def check_norms(method: nn.Module, name: str, backbone: Backbone) -> None:
    """Refuse norms that would take the items of one device for the batch.

    Args:
        method: with its backbone.
        name: of the method.
        backbone: of the method.

    Raises:
        ConfigError: there is one; names it.
    """
    for place, part in method.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(
            part, BatchNorm1d | BatchNorm3d
        ):
            raise ConfigError(
                f"--devices: {place} of {name} is a {type(part).__name__}, which normalises over the items of one device. "
                "Use BatchNorm1d or BatchNorm3d of ssl3d.models.norms there, which take those of all, or one device."
            )
    if not backbone.samples_apart and not backbone.synchronised:
        raise ConfigError(
            f"--devices: backbone {backbone.name} normalises over the volumes of a batch (samples_apart = False), and does "
            "not say that it does so over those of all devices (synchronised = True; ssl3d.models.norms has such norms). "
            "Use one device."
        )
