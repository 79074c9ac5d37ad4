"""Exported backbones through ``huggingface_hub``: ``HubBackbone.from_pretrained(folder)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import Tensor, nn

from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.export import CONFIG, SAFETENSORS


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
        if own := self._network[0].state_dict().keys() - self.state_dict().keys():
            raise CheckpointError(
                f"The backbone {backbone.get('name')} has parameters of its own beside its submodules "
                f"({', '.join(sorted(own))}), which the Hub's mixin would not load: use ssl3d.create_model."
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (f^g, f^l) of volumes (B, 1, D, H, W) in [0, 1]."""
        features: tuple[Tensor, Tensor] = self._network[0](x)
        return features


def download(repository: str) -> Path:
    """Return the folder of an export on the Hugging Face Hub; without a connection, the one in its cache.

    Args:
        repository: ``OWNER/NAME``.

    Raises:
        CheckpointError: no such repository, or neither a connection nor a copy in the cache.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, SAFETENSORS]))
    except Exception as error:  # of many classes: the name, the connection, the cache, the rights
        raise CheckpointError(
            f"hf-hub:{repository} cannot be read from the Hugging Face Hub or its cache: "
            f"{str(error).splitlines()[0]} Fix: check the name OWNER/NAME and the connection, or give a folder."
        ) from error
