"""Concatenation along channels whose gradients keep their memory layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.channels = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        layout = torch.channels_last_3d
        if not grad.is_contiguous(memory_format=layout):
            layout = torch.contiguous_format
        return tuple(part.contiguous(memory_format=layout) for part in grad.split(ctx.channels, dim=1))


def join(*parts: Tensor) -> Tensor:
    """Concatenate volumes (B, c_i, D, H, W) along the channels: (B, sum of c_i, D, H, W).

    As ``torch.cat``, but each gradient comes back in the layout of the whole. A slice of channels of a channels_last
    volume is in neither layout, and the backward pass of what made the part takes a slow road: on a CPU trilinear
    interpolation and this together take a third of the time (32 channels to 32^3: 56 -> 18 ms).
    """
    joined: Tensor = _Join.apply(*parts)
    return joined
