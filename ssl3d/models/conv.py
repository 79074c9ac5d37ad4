"""3D convolutions that are fast for a single volume, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 20480
"""Up to so many values in channels times D times H, torch gives one float32 volume on the CPU to its own plain loops, and
more volumes, or larger ones, to oneDNN (``use_mkldnn`` in torch's ``aten/src/ATen/native/Convolution.cpp``)."""


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, in which one small volume on the CPU passes as two slabs, for which torch takes oneDNN.

    (B, c_in, D, H, W) -> (B, c_out, D', H', W'), the values of ``nn.Conv3d`` up to rounding. Evaluation meets one volume at
    a time: 8 to 32 channels at 16^3 to 32^3, forward and backward, took 4 to 10 times as long in one piece.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._in_slabs(x) if self._is_slow(x) else super().forward(x)

    def _is_slow(self, x: Tensor) -> bool:
        usual = self.kernel_size == (3, 3, 3) and self.padding == (1, 1, 1) and self.padding_mode == "zeros"
        usual = usual and self.stride == self.dilation == (1, 1, 1) and self.groups == 1
        small = x.dim() == 5 and len(x) == 1 and x.shape[1] * x.shape[2] * x.shape[3] <= SMALL
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return usual and small and plain

    def _in_slabs(self, x: Tensor) -> Tensor:
        """Convolve the halves of D, each with the plane beyond its border."""
        size = x.shape[2]
        half = -(-size // 2)
        x = F.pad(x, (0, 0, 0, 0, 1, 1 + 2 * half - size))  # (1, C, 2 half + 2, H, W)
        slabs = torch.cat([x[:, :, : half + 2], x[:, :, half:]])  # (2, C, half + 2, H, W)
        slabs = slabs.contiguous(memory_format=torch.channels_last_3d)
        y = F.conv3d(slabs, self.weight, self.bias, padding=(0, 1, 1))  # (2, c_out, half, H, W)
        return torch.cat([y[:1], y[1:]], dim=2)[:, :, :size]  # (1, c_out, D, H, W)
