"""Local normalised cross-correlation (He et al. 2023, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl3d.errors import ConfigError
from ssl3d.models.spatial import filter_axes, full_precision, no_autocast


def ncc_loss(warped: Tensor, fixed: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Return 1 - mean over voxels of cross^2 / (var_A var_B + eps), in [0, 1] up to rounding.

    With sums over the cube of ``window``^3 = n voxels around each voxel, zeros beyond the border::

        cross = sum(AB) - sum(A) sum(B) / n        var_A = sum(A^2) - sum(A)^2 / n

    The sums are separable: three products with band matrices (at 96^3, batch 2, forward and
    backward on two cores: 0.12 s; cumulative sums 0.18 s, average pools 0.59 s). In float32,
    sum(A^2) - sum(A)^2 / n turns slightly negative in flat regions; the product of two variances
    would then pass through zero and the loss explode, so each is clamped at 0. Computed in float32
    at least, also under autocast.

    Args:
        warped: (B, 1, D, H, W).
        fixed: the same shape; what it is compared with.
        window: edge of the cube in voxels; odd.
        eps: added to the product of the variances, which is in units of intensity^4 n^2.

    Raises:
        ConfigError: an even window, or shapes that differ.
    """
    if window % 2 == 0 or window < 1:
        raise ConfigError(f"NCC window {window}: use an odd number of voxels, for example 9.")
    if warped.shape != fixed.shape:
        raise ConfigError(f"NCC of {tuple(warped.shape)} and {tuple(fixed.shape)}: use one shape.")
    with no_autocast(warped):
        a, b = full_precision(warped), full_precision(fixed)
        if torch.get_float32_matmul_precision() != "highest":
            a, b = a.double(), b.double()  # TF32 keeps 11 bits of a product; the variances need all 24
        n = window**3
        # `fixed` apart: when it needs no gradient, two of the five sums need no backward pass.
        b_sum, bb_sum = _window_sum(b, window), _window_sum(b * b, window)
        a_sum, aa_sum, ab_sum = _window_sum(a, window), _window_sum(a * a, window), _window_sum(a * b, window)
        cross = ab_sum - a_sum * b_sum / n
        a_var = (aa_sum - a_sum * a_sum / n).clamp(min=0)
        b_var = (bb_sum - b_sum * b_sum / n).clamp(min=0)
        return 1 - (cross * cross / (a_var * b_var + eps)).mean()


def _window_sum(x: Tensor, window: int) -> Tensor:
    """Sum ``x`` (B, 1, D, H, W) over the cube around each voxel; the same shape."""
    return filter_axes(x, [_band(n, window, x) for n in x.shape[2:]])


def _band(n: int, window: int, like: Tensor) -> Tensor:
    """Return the (n, n) matrix that sums ``window`` neighbours: 1 where |i - j| <= window // 2."""
    i = torch.arange(n, device=like.device)
    return ((i[:, None] - i).abs() <= window // 2).to(like.dtype)
