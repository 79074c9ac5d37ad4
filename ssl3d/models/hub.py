"""Exported backbones through ``huggingface_hub``: ``HubBackbone.from_pretrained(folder)``."""

from __future__ import annotations

from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ssl3d.config import BackboneConfig
from ssl3d.models.factory import build_backbone


class HubBackbone(nn.Module, PyTorchModelHubMixin):
    """A registered backbone whose weights and configuration lie in an exported folder.

    Its parameters have the names of the backbone's own, so the folder serves both.

    Args:
        backbone: name and options, the key ``backbone`` of ``config.json``.
    """

    def __init__(self, backbone: dict[str, Any]) -> None:
        super().__init__()
        self._network = [build_backbone(BackboneConfig.model_validate(backbone), seed=0)]
        for name, child in self._network[0].named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (f^g, f^l) of volumes (B, 1, D, H, W) in [0, 1]."""
        features: tuple[Tensor, Tensor] = self._network[0](x)
        return features
