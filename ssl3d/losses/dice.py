"""Soft Dice as GVSL's authors compute it, alone and with cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.geometry import full_precision, no_autocast

SMOOTH = 1.0
"""Added to both sides of the fraction in a soft Dice, in voxels."""


def soft_dice_loss(
    probabilities: Tensor, labels: Tensor, smooth: float = SMOOTH, weights: Tensor | None = None
) -> Tensor:
    """Return 1 - mean over samples and classes of (2 sum(y p) + smooth) / (sum(y^2) + sum(p^2) + smooth), in [0, 1].

    ``dice_loss`` of GVSL's released code (He et al., CVPR 2023): squares in the denominator, the sums over the
    voxels of one sample, the background a class like the others. MONAI's ``DiceLoss`` is another function: no
    squares, smooth = 1e-5. With smooth = 1, a class that a crop does not hold asks for probabilities near 0
    and weighs little beyond.

    Args:
        probabilities: (B, K, D, H, W) in [0, 1].
        labels: integers in {0, ..., K - 1}, (B, 1, D, H, W).
        smooth: in voxels.
        weights: how many voxels each one stands for (B, 1, D, H, W); default: itself.

    Raises:
        ConfigError: shapes that do not belong together.
    """
    if probabilities.shape[:1] + probabilities.shape[2:] != labels[:, 0].shape or labels.shape[1] != 1:
        raise ConfigError(
            f"Soft Dice of probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}: use "
            "(B, K, D, H, W) and (B, 1, D, H, W)."
        )
    with no_autocast(probabilities):
        p = full_precision(probabilities)  # (B, K, D, H, W)
        y = _is_class(labels, p)  # (B, K, D, H, W)
        axes = (2, 3, 4)
        if weights is None:
            both, true, predicted = (
                torch.where(y, p, 0).sum(axes),
                y.sum(axes),
                p.square().sum(axes),
            )  # (B, K) each
        else:
            both = (torch.where(y, p, 0) * weights).sum(axes)
            true, predicted = torch.where(y, weights, 0).sum(axes), (p.square() * weights).sum(axes)
        return 1 - ((2 * both + smooth) / (true + predicted + smooth)).mean()


def has_entropy(name: str) -> bool:
    """Return whether the loss that the configuration calls ``name`` adds cross-entropy to soft Dice.

    Raises:
        ConfigError: no such loss.
    """
    if name not in ("dice", "dice_ce"):
        raise ConfigError(f'Segmentation loss "{name}": use dice or dice_ce.')
    return name == "dice_ce"


def segmentation_loss(name: str, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the loss that the configuration calls ``name``.

    Args:
        name: ``dice``: :func:`soft_dice_loss` of the softmax, the released loss; ``dice_ce``: its sum with the
            mean cross-entropy over voxels.
        logits: (B, K, D, H, W).
        labels: integers in {0, ..., K - 1}, (B, 1, D, H, W).
        weights: how many voxels each one stands for (B, 1, D, H, W); default: itself.

    Raises:
        ConfigError: no such loss, or shapes that do not belong together.
    """
    entropy_too = has_entropy(name)
    with no_autocast(logits):
        log_p = torch.log_softmax(full_precision(logits), dim=1)  # (B, K, D, H, W)
        loss = soft_dice_loss(log_p.exp(), labels, weights=weights)
        if entropy_too:
            entropy = -torch.where(_is_class(labels, log_p), log_p, 0).sum(1, keepdim=True)  # (B, 1, D, H, W)
            loss += entropy.mean() if weights is None else (entropy * weights).sum() / weights.sum()
        return loss


def _is_class(labels: Tensor, like: Tensor) -> Tensor:
    """Return where each of the K classes of ``like`` (B, K, D, H, W) is the label: bool, the same shape."""
    return labels == torch.arange(like.shape[1], device=labels.device)[:, None, None, None]
