"""Fixed affine scaling of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Fixed centring and scaling of each channel: (x - mean) / std. An affine map.

    A deviation below ``FLOOR`` of the mean is rounding, or nearly: it is not blown up.
    """

    FLOOR = 1e-4
    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (C,)
        self.register_buffer("scale", torch.maximum(std, self.FLOOR * mean.abs()).clamp_min(1e-6))  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.scale.view(shape)


class Whiten(nn.Module):
    """Fixed centring and decorrelation of the channels: (x - mean) C^(-1/2), C the covariance. An affine map.

    The root is the symmetric one, so that each channel stays as near to itself as it can be. ``RIDGE`` of the
    largest eigenvalue is added to all: channels that say nothing are not blown up.
    """

    RIDGE = 1e-5
    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariance.double())  # (C,) ascending, (C, C)
        scale = (values.clamp_min(0) + self.RIDGE * values[-1].clamp_min(1e-12)).rsqrt()
        self.register_buffer("mean", mean)  # (C,)
        self.register_buffer("matrix", (vectors * scale @ vectors.T).float())  # (C, C)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.einsum("kc,bc...->bk...", self.matrix, x - self.mean.view(shape))
