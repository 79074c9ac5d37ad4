"""Local normalised cross-correlation (He et al. 2023, eq. 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl3d.errors import ConfigError
from ssl3d.geometry import full_precision, no_autocast

_CACHED = 2**18
"""Numbers that the parts of a volume hold which are worked on at a time, for each thread of a CPU."""


def ncc_loss(warped: Tensor, fixed: Tensor, window: int = 9, eps: float = 1e-5) -> Tensor:
    """Return 1 - mean over voxels of cross^2 / (var_A var_B + eps), in [0, 1] up to rounding.

    With sums over the cube of ``window``^3 = n voxels around each voxel, zeros beyond the border::

        cross = sum(AB) - sum(A) sum(B) / n        var_A = sum(A^2) - sum(A)^2 / n

    The sums are separable, and each axis doubles its way to the window (2, 4, 8, 9 neighbours are four additions); the
    gradient is written out, since the derivative of a window sum is a window sum. At 96^3 on one core: 45 ms, band matrices
    84, MONAI's 550 (220 where freed memory is kept, as ``ssl3d pretrain`` does; row ncc of benchmarks/speed).

    In float32, sum(A^2) - sum(A)^2 / n turns slightly negative in flat regions; the product of two variances would then
    pass through zero and the loss explode, so each is clamped at 0. Computed in float32 at least, also under autocast. It
    can be differentiated once.

    Args:
        warped: (B, 1, D, H, W).
        fixed: the same shape; what it is compared with.
        window: edge of the cube in voxels; odd, at least 3.
        eps: added to the product of the variances, which is in units of intensity^4 n^2.

    Raises:
        ConfigError: an even window or one of a single voxel, or shapes that differ.
    """
    if window % 2 == 0 or window < 3:
        raise ConfigError(f"NCC window {window}: use an odd number of voxels from 3 on, for example 9.")
    if warped.shape != fixed.shape:
        raise ConfigError(f"NCC of {tuple(warped.shape)} and {tuple(fixed.shape)}: use one shape.")
    with no_autocast(warped):
        a, b = full_precision(warped), full_precision(fixed)
        dtype = torch.promote_types(a.dtype, b.dtype)
        wanted = tuple(x.requires_grad and torch.is_grad_enabled() for x in (a, b))
        loss: Tensor = _LocalNCC.apply(a.to(dtype), b.to(dtype), window, eps, wanted)
        return loss


class _LocalNCC(torch.autograd.Function):
    """The loss, and in the same passes over the volumes its gradient, where one is wanted."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, window: int, eps: float, wanted: tuple[bool, bool]) -> Tensor:
        gradients = [torch.empty_like(x) if mine else None for x, mine in zip((a, b), wanted, strict=True)]
        total = a.new_zeros(())
        for i in range(len(a)):
            total += _one_pair(
                a[i, 0], b[i, 0], window, eps, [None if g is None else g[i, 0] for g in gradients]
            )
        ctx.wanted = wanted
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        return 1 - total / a.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # half of the derivatives of the sum of r
        scale = -2 / ctx.saved_tensors[0].numel() * grad
        return *(scale * next(saved) if mine else None for mine in ctx.wanted), None, None, None


def _one_pair(a: Tensor, b: Tensor, window: int, eps: float, gradients: list[Tensor | None]) -> Tensor:
    """Return the sum of r = cross^2 / (var_A var_B + eps) over the voxels of two volumes (D, H, W).

    Three passes over the volumes, each in pieces that stay in a core's cache: sums along w and h, plane by plane; along
    d, row by row, where r is computed and the sums of its derivatives begin; along h and w.

    Args:
        a, b: volumes.
        window: odd.
        eps: see :func:`ncc_loss`.
        gradients: where to write half of the derivatives by a and by b; None where not wanted.
    """
    d, h, w = a.shape
    radius, wanted = window // 2, [g is not None for g in gradients]
    inner = (slice(radius, radius + h), slice(radius, radius + w))
    padded = (h + 2 * radius, w + 2 * radius)
    sums = a.new_empty(5, d + 2 * radius, h, w)  # of A, B, AB, AA, BB
    sums[:, :radius] = sums[:, radius + d :] = 0  # beyond the border along d
    for i in _pieces(d, 5 * h * w, a):
        x = a.new_empty(5, i.stop - i.start, *padded)
        x[:2] = 0
        x[0, :, *inner], x[1, :, *inner] = a[i], b[i]
        torch.mul(x[0], x[1], out=x[2])
        torch.mul(x[:2], x[:2], out=x[3:])
        sums[:, radius + i.start : radius + i.stop] = _sum_in_planes(x, window)
    count = 1 + 2 * sum(wanted)
    by_sums = a.new_zeros(d, count, *padded) if count > 1 else sums
    total = []
    for i in _pieces(h, 5 * d * w, a):
        x = _sum_along(sums[:, :, i].flatten(2), window, 1, d)  # (5, D, rows * W)
        derivatives = a.new_zeros(count, d + 2 * radius, x.shape[2])
        total.append(_derivatives(x, window**3, eps, wanted, derivatives[:, radius : radius + d]))
        if count > 1:
            x = _sum_along(derivatives, window, 1, d).unflatten(2, (-1, w))  # (count, D, rows, W)
            by_sums[:, :, inner[0], inner[1]][:, :, i] = x.transpose(0, 1)
    for i in _pieces(d, count * h * w, a) if count > 1 else ():
        by_cross, *others = _sum_in_planes(by_sums[i], window).unbind(1)  # (planes, H, W) each
        for out, mine, other in zip(gradients, (a, b), (b, a), strict=True):
            if out is not None:
                by_sum, by_var, *others = others
                torch.addcmul(by_sum, other[i], by_cross, out=out[i]).addcmul_(mine[i], by_var, value=2)
    return torch.stack(total).sum()


def _derivatives(sums: Tensor, n: int, eps: float, wanted: list[bool], out: Tensor) -> Tensor:
    """Return the sum of r over voxels; write half of its derivatives in each voxel.

    Args:
        sums: of A, B, AB, AA, BB over n voxels (5, ...).
        n: voxels of a window.
        eps: see :func:`ncc_loss`.
        wanted: whether derivatives by the sums of A, and by those of B, are wanted.
        out: gets the derivatives by sum(AB), by sum(A) and sum(AA), by sum(B) and sum(BB), those that are wanted.
    """
    sum_a, sum_b, sum_ab = sums[:3]
    cross = torch.addcmul(sum_ab, sum_a, sum_b, value=-1 / n)
    var_a, var_b = torch.addcmul(sums[3:], sums[:2], sums[:2], value=-1 / n).clamp_(min=0)
    ratio = torch.div(cross, torch.mul(var_a, var_b).add_(eps), out=out[0])
    r = cross.mul_(ratio).sum()
    places = iter(out[1:])
    for mine, sum_x, sum_y, var_x, var_y in (
        (wanted[0], sum_a, sum_b, var_a, var_b),
        (wanted[1], sum_b, sum_a, var_b, var_a),
    ):
        if mine:
            by_sum, by_var = next(places), next(places)
            # By var_X, and so by sum(XX): -ratio^2 var_Y / 2; nothing where the variance was clamped.
            slope = torch.mul(ratio, ratio).mul_(var_y).mul_(-0.5)
            by_var.copy_(torch.ops.aten.threshold_backward(slope, var_x, 0))
            # sum(X) is in cross, by -sum(Y) / n, and in var_X, by -2 sum(X) / n.
            torch.mul(ratio, sum_y, out=by_sum).addcmul_(by_var, sum_x, value=2).mul_(-1 / n)
    return r


def _pieces(n: int, size: int, like: Tensor) -> list[slice]:
    """Return slices of range(n), whose elements hold ``size`` numbers each: small enough for the cache of a core."""
    most = n if like.device.type != "cpu" else max(1, _CACHED * torch.get_num_threads() // size)
    return [slice(i, min(n, i + most)) for i in range(0, n, most)]


def _sum_in_planes(x: Tensor, window: int) -> Tensor:
    """Sum over the square of ``window``^2 around each voxel of a plane; zeros beyond the border.

    As one long vector, a neighbour along w is one place away and one along h a row. Sums that begin near the end of a row
    or a plane are meaningless; the view leaves them out.

    Args:
        x: (M, P, H + window - 1, W + window - 1), contiguous: planes with half a window of zeros around them.

    Returns:
        (M, P, H, W), a view.
    """
    m, p, h, w = x.shape
    edge = window - 1
    flat = x.view(1, -1, 1)
    flat = _sum_along(flat, window, 1, flat.shape[1] - edge)
    flat = _sum_along(flat, window, w, flat.shape[1] - edge * w)
    return flat.as_strided((m, p, h - edge, w - edge), (p * h * w, h * w, w, 1))


def _sum_along(x: Tensor, count: int, step: int, length: int) -> Tensor:
    """Return x[:, i] + x[:, i + step] + ... (``count`` terms) for ``length`` places i: 9 terms are 4 additions."""
    half, terms = x, 1
    if count > 3:
        terms = count // 2
        half = _sum_along(x, terms, step, length + (count - terms - count % 2) * step)
    total = half[:, :length] + half[:, terms * step : terms * step + length]
    return total.add_(x[:, (count - 1) * step : (count - 1) * step + length]) if count % 2 else total
