"""Backbones by name, and the contract that every backbone keeps."""

from __future__ import annotations

from typing import Any

import torch

from ssl3d.config import BackboneConfig, validate
from ssl3d.models.backbone import Backbone
from ssl3d.registry.registry import registry
from ssl3d.rng import derive_seed


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
