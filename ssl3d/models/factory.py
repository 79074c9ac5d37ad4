"""Backbones by name, and the contract that every backbone keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssl3d.config import BackboneConfig, Model, validate
from ssl3d.errors import CheckpointError
from ssl3d.plugins import registry
from ssl3d.rng import derive_seed


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

    def minimum_edge(self) -> int:
        """Return the smallest edge, in voxels, of a volume that ``encode`` accepts."""
        return 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (f^g, f^l)."""
        features = self.encode(x)
        return features[-1], self.decode(features)


def build_backbone(config: BackboneConfig, seed: int) -> Backbone:
    """Build a backbone whose initial weights depend on ``config`` and ``seed`` only.

    Raises:
        PluginError: no such backbone.
        ConfigError: an unknown or invalid option.
    """
    cls = registry().backbones.get(config.name).load()
    options = validate(cls.Config, config.options, f"backbone {config.name}")
    with seeded(seed, "backbone"):
        return cls(options)  # type: ignore[call-arg]


class seeded:
    """Context in which torch's global generator is seeded; the former state comes back after it.

    For initialisers of ``torch.nn``, which take no generator. Lower case because it reads as a
    statement: ``with seeded(seed, "head"):``.
    """

    def __init__(self, seed: int, *keys: str | int) -> None:
        self.value = derive_seed(seed, *keys)

    def __enter__(self) -> None:
        self._fork = torch.random.fork_rng(devices=[])
        self._fork.__enter__()
        torch.random.default_generator.manual_seed(self.value)

    def __exit__(self, *exc: Any) -> None:
        self._fork.__exit__(*exc)


HUB = "hf-hub:"


def create_model(name_or_path: str | Path, seed: int = 0) -> Backbone:
    """Return a pretrained backbone, or a registered one with fresh weights.

    Args:
        name_or_path: a folder written by ``ssl3d pretrain``, ``ssl3d import`` or ``ssl3d export``;
            ``hf-hub:OWNER/NAME`` for such an export on the Hugging Face Hub, or in its cache on this machine;
            or the name of a registered backbone, such as ``unet3d``: its default options, **not pretrained**.
        seed: of the fresh weights.

    Raises:
        CheckpointError: the folder holds no finished run, or its weights do not fit; or the Hub cannot be
            asked and its cache has no such model; or it is neither a folder nor a backbone.

    Example::

        backbone = ssl3d.create_model("runs/gvsl")
        global_feature, local_feature = backbone(volume)  # (B, 1, D, H, W) in [0, 1]
    """
    from ssl3d.models.checkpoint import RUN, load_backbone
    from ssl3d.models.export import CONFIG, load_exported

    folder, name = Path(name_or_path), str(name_or_path)
    if name.startswith(HUB):
        from ssl3d.models.hub import download

        return load_exported(download(name.removeprefix(HUB)))
    if not folder.exists():
        if name in registry().backbones:
            return build_backbone(BackboneConfig(name=name), seed)
        known = ", ".join(registry().backbones.names())
        raise CheckpointError(
            f'"{name}" is neither a folder nor a registered backbone ({known}). Give a folder written by ssl3d '
            f"pretrain, import or export, or {HUB}OWNER/NAME."
        )
    exported = (folder / CONFIG).is_file() and not (folder / RUN).is_file()
    return load_exported(folder) if exported else load_backbone(folder)
