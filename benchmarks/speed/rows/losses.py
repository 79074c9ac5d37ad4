"""Local normalised cross-correlation, and the contrastive loss, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from compare import Case, Run, Setting, peer
from torch import Tensor

from ssl3d.losses import ncc_loss
from ssl3d.losses.contrastive import nt_xent

LARGEST_DENSE = 32
"""Edge in voxels up to which the dense form is waited for."""
SUMS, AXES = 8, 3
"""Volumes of NCC to be summed over windows, five forward and three backward, along three axes."""


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Run:
    """Return a run of ``loss``, forward and backward to ``a``; it gives the loss."""

    def run() -> Tensor:
        x = a.detach().requires_grad_()
        value = loss(x, b)
        value.backward()
        return value

    return run


def dense_ncc(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """Local NCC by five dense convolutions, as in GVSL's released code."""
    ones, n = a.new_ones(1, 1, window, window, window), window**3
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = (
        F.conv3d(x, ones, padding=window // 2) for x in (a, b, a * a, b * b, a * b)
    )
    mean_a, mean_b = sum_a / n, sum_b / n
    cross = sum_ab - mean_b * sum_a - mean_a * sum_b + mean_a * mean_b * n
    var_a = sum_aa - 2 * mean_a * sum_a + mean_a * mean_a * n
    var_b = sum_bb - 2 * mean_b * sum_b + mean_b * mean_b * n
    return 1 - (cross * cross / (var_a * var_b + 1e-5)).mean()


def ncc(setting: Setting) -> Iterator[Case]:
    """MONAI divides each variance by eps where ours adds it to their product, and its values are shifted by 1."""
    for edge in setting.of((96, 64, 32), (12,)):
        a, b = torch.rand(2, 1, 1, edge, edge, edge, generator=torch.Generator().manual_seed(edge))

        def monai(a: Tensor = a, b: Tensor = b) -> Run:
            from monai.losses import LocalNormalizedCrossCorrelationLoss

            loss = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=9)
            return with_gradient(lambda x, y: 1 + loss(x, y), a, b)

        peers = {"MONAI": peer(monai)}
        if edge <= LARGEST_DENSE:
            peers["released dense form"] = with_gradient(dense_ncc, a, b)
        yield Case(
            f"NCC, window 9^3, forward and backward, {edge}^3", with_gradient(ncc_loss, a, b), peers,
            bytes=SUMS * AXES * 2 * 4 * edge**3, same=tuple(peers),
        )  # fmt: skip


def ntxent(setting: Setting) -> Iterator[Case]:
    n, c = setting.of((256, 128), (8, 16))
    a, b = torch.randn(2, n, c, generator=torch.Generator().manual_seed(0))

    def lightly() -> Run:
        from lightly.loss import NTXentLoss

        return with_gradient(NTXentLoss(temperature=0.1), a, b)

    yield Case(
        f"NT-Xent, {n} pairs of {c}, forward and backward",
        with_gradient(lambda x, y: nt_xent(x, y, 0.1), a, b),
        {"lightly": peer(lightly)},
        flops=3 * 2 * (2 * n) ** 2 * c,
        same=("lightly",),
    )
