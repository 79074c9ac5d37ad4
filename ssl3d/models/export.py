"""Weights out: the backbone of a run in the files that other tools read.

An exported folder holds ``config.json`` (the backbone and where it comes from) and the weights under
the names of the backbone's own parameters: ``model.safetensors``, or ``model.pt`` for torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError, ConfigError, nearest
from ssl3d.files import write_bytes, write_json
from ssl3d.models.checkpoint import load_backbone, load_tensors, load_weights, read_run, save_tensors
from ssl3d.models.factory import Backbone, build_backbone

CONFIG, SAFETENSORS, TORCH = "config.json", "model.safetensors", "model.pt"

IMPOSSIBLE = {
    "nnunet": "nnU-Net's PlainConvUNet goes down by strided convolutions, up by transposed ones, and normalises "
    "each instance",
    "monai": "MONAI's UNet and BasicUNet have no trilinear up-sampling without a convolution of its own, and one "
    "number of groups for every width",
}
"""Targets whose networks cannot hold the weights of a backbone of ssl3d, and why."""


def export(run: Path, target: str, out: Path) -> list[Path]:
    """Write the backbone of a finished run for another tool.

    Args:
        run: folder of the run.
        target: ``safetensors``, ``torch`` or ``huggingface``.
        out: folder to write to.

    Returns:
        The files written.

    Raises:
        ConfigError: an unknown target, one that has no such architecture, or ``out`` is in use.
        CheckpointError: no finished run.
    """
    if target in IMPOSSIBLE:
        provenance = read_run(run)
        raise ConfigError(
            f"{run} cannot be exported to {target}: {IMPOSSIBLE[target]}, while {provenance['backbone']['name']} "
            "pools, interpolates and normalises groups, so the same weights would compute other features. "
            f"Choose from: {', '.join(sorted(TARGETS))}."
        )
    if target not in TARGETS:
        raise ConfigError(f'Unknown target "{target}".{nearest(target, [*TARGETS, *IMPOSSIBLE])}')
    if (out / CONFIG).exists():
        raise ConfigError(f"{out} holds a {CONFIG} already: choose another folder.")
    backbone, provenance = load_backbone(run), read_run(run)
    files = TARGETS[target](backbone, out)
    config = {
        "backbone": provenance["backbone"],
        "source": {k: provenance.get(k) for k in ("method_name", "steps", "weights_sha256", "identity")},
    }
    write_json(out / CONFIG, config)  # last: without it the folder is not used
    return [*files, out / CONFIG]


def load_exported(folder: Path) -> Backbone:
    """Build the backbone of an exported folder. Nothing but tensors is unpickled.

    Raises:
        CheckpointError: the folder is not whole, or its weights do not fit.
    """
    path = folder / CONFIG
    try:
        config = BackboneConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))["backbone"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is not the configuration of an exported backbone: {error!r}."
        ) from error
    weights = folder / SAFETENSORS
    tensors = load_tensors(weights) if weights.is_file() else load_pickled(folder / TORCH)
    backbone = build_backbone(config, seed=0)
    load_weights(backbone, tensors, folder)
    return backbone


def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict saved by torch, with ``weights_only=True`` and no way around it.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything else than tensors.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many classes for a file that it refuses
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: {str(error).splitlines()[0]} Nothing of it was run."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors).")
    return found


def _safetensors(backbone: Backbone, out: Path) -> list[Path]:
    save_tensors(out / SAFETENSORS, backbone.state_dict())
    return [out / SAFETENSORS]


def _torch(backbone: Backbone, out: Path) -> list[Path]:
    buffer = io.BytesIO()
    torch.save({k: v.contiguous() for k, v in backbone.state_dict().items()}, buffer)
    write_bytes(out / TORCH, buffer.getvalue())
    return [out / TORCH]


_CARD = """---
library_name: ssl3d
tags: [medical, 3d, self-supervised]
---

A 3D backbone, to be loaded offline or from the Hub:

    from ssl3d.models.hub import HubBackbone
    global_feature, local_feature = HubBackbone.from_pretrained("PATH")(volume)  # (B, 1, D, H, W) in [0, 1]

or, from a folder, by `ssl3d.create_model("PATH")`. `config.json` says how it was pretrained.
"""


def _huggingface(backbone: Backbone, out: Path) -> list[Path]:
    write_bytes(out / "README.md", _CARD.encode())
    return [*_safetensors(backbone, out), out / "README.md"]


TARGETS: dict[str, Callable[[Backbone, Path], list[Path]]] = {
    "safetensors": _safetensors,
    "torch": _torch,
    "huggingface": _huggingface,
}
