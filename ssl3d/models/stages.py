"""All stages of an encoder as one feature, for evaluation that does not pass through the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.models.backbone import Backbone, Features


class AllStages(Backbone):
    """A backbone whose f^l is every stage of an encoder, interpolated to the volume's grid (hypercolumns: Hariharan et
    al., CVPR 2015), and whose f^g is every stage, averaged down to the grid of the last.

    Methods that pretrain the encoder alone leave the decoder at its random start, and f^l with it; what their stages know
    is read here. The decoder is never run.

    Args:
        backbone: on its device; its weights are shared.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.local_channels = self.global_channels = sum(stage_channels(backbone))

    def minimum_edge(self) -> int:
        return self.backbone.minimum_edge()

    def global_grid(self, size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
        return self.backbone.global_grid(size, grid)

    def encode(self, x: Tensor) -> Features:
        stages = self.backbone.encode(x)
        d, h, w = stages[-1].shape[2:]
        together = torch.cat([F.adaptive_avg_pool3d(stage, (d, h, w)) for stage in stages], dim=1)
        return Features([*stages, together], size=stages.size)  # the last: (B, all C, d, h, w)

    def decode(self, features: Features) -> Tensor:
        size = features.size
        columns = [
            resample(stage, self.backbone.global_grid(size, stage.shape[2:]), size) for stage in features[:-1]
        ]
        return torch.cat(columns, dim=1)  # (B, all C, D, H, W)


@torch.no_grad()
def stage_channels(backbone: Backbone) -> list[int]:
    """Return the channels of each stage of ``encode``, finest first, by a look at an empty volume."""
    parameter = next(backbone.parameters())
    edge, was = backbone.minimum_edge(), backbone.training
    backbone.eval()
    try:
        return [stage.shape[1] for stage in backbone.encode(parameter.new_zeros(1, 1, edge, edge, edge))]
    finally:
        backbone.train(was)


def resample(stage: Tensor, place: np.ndarray, size: Sequence[int]) -> Tensor:
    """Interpolate a stage (B, C, d, h, w) to the volume's grid, trilinearly: (B, C, D, H, W).

    Args:
        stage: features.
        place: (4, 4), voxel index of the stage -> voxel index of the volume, diagonal but for its last column; beyond the
            centres of the outermost voxels their value holds.
        size: grid (D, H, W) of the volume.
    """
    for axis, (edge, cells) in enumerate(zip(size, stage.shape[2:], strict=True)):
        index = (np.arange(edge) - place[axis, 3]) / place[axis, axis]  # in voxels of the stage
        index = np.clip(index, 0, cells - 1)
        low = np.minimum(index.astype(np.int64), max(0, cells - 2))
        high = np.minimum(low + 1, cells - 1)
        share = torch.from_numpy(index - low).to(stage).view(-1, *[1] * (2 - axis))  # (edge, 1, ...)
        before, after = (
            stage.index_select(2 + axis, torch.from_numpy(i).to(stage.device)) for i in (low, high)
        )
        stage = torch.lerp(before, after, share)
    return stage
