"""The contract of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from ssl3d.config import Model


class Features(list[Tensor]):
    """Stage features, finest first; the last is the global feature f^g.

    Attributes:
        size: grid (D, H, W) of the volume that was encoded, to which ``decode`` crops back.
    """

    def __init__(self, stages: Iterable[Tensor], size: Sequence[int]) -> None:
        super().__init__(stages)
        self.size = tuple(size)


class Backbone(nn.Module, ABC):
    """A network that encodes a volume and decodes it to dense features.

    Attributes:
        global_channels: channels of the global feature f^g, the last of ``encode``'s features.
        local_channels: channels of the local feature f^l, returned by ``decode``.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Model]]
    samples_apart: ClassVar[bool] = True
    """Whether a volume's features depend on no other volume of its batch, so that parts of a batch can be taken in turn
    (``pretrain.accumulate``); False for norms over the batch."""
    synchronised: ClassVar[bool] = False
    """Whether a backbone with ``samples_apart = False`` normalises over the volumes of all devices (``--devices``), as the
    norms in :mod:`ssl3d.models.norms` do."""
    global_channels: int
    local_channels: int
    encoder: nn.Module
    decoder: nn.Module

    @abstractmethod
    def encode(self, x: Tensor) -> Features:
        """Return one feature a stage, finest first; the last is f^g.

        Args:
            x: volumes (B, 1, D, H, W), any D, H, W that the depth allows.
        """

    @abstractmethod
    def decode(self, features: Features) -> Tensor:
        """Return f^l (B, local_channels, D, H, W) on the grid of ``encode``'s input."""

    def blocks(self) -> list[nn.Module]:
        """Return the modules that ``encode`` and ``decode`` call one after the other, with tensors.

        ``pretrain.compile`` and ``pretrain.checkpoint_activations`` take them one at a time. Default: the children of
        encoder and decoder where these are lists or sequences, else encoder and decoder themselves.
        """
        found: list[nn.Module] = []
        for part in (self.encoder, self.decoder):
            found += part.children() if isinstance(part, nn.ModuleList | nn.Sequential) else [part]
        return found

    def minimum_edge(self) -> int:
        """Return the smallest edge, in voxels, of a volume that ``encode`` accepts."""
        return 1

    def global_grid(self, size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
        """Return where a stage of ``encode``, such as f^g, lies: (4, 4), its voxel index -> voxel index of the volume.

        As it stands, the stage's voxels share the volume evenly; a backbone that pads the volume says otherwise.

        Args:
            size: grid (D, H, W) of the volume.
            grid: grid (d, h, w) of the stage; the matrix is diagonal but for its last column.
        """
        matrix = np.eye(4)
        for axis, (edge, cells) in enumerate(zip(size, grid, strict=True)):
            matrix[axis, axis] = edge / cells
            matrix[axis, 3] = (edge / cells - 1) / 2
        return matrix

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (f^g, f^l)."""
        features = self.encode(x)
        return features[-1], self.decode(features)
