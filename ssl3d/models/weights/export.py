"""Weights out: the backbone of a run in the files that other tools read.

An exported folder for ssl3d holds ``config.json`` (the backbone, how its images were prepared, and where it comes
from) and the weights
under the names of the backbone's own parameters: ``model.safetensors``, or ``model.pt`` for torch. For
nnU-Net and MONAI the weights have those tools' names, and ``source.json`` says where they come from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ssl3d.config import BackboneConfig
from ssl3d.data.prepared.facts import preparation_in_words
from ssl3d.errors import CheckpointError, ConfigError, ReadError, nearest
from ssl3d.files import read_json, write_bytes, write_json
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.models.unet import UNet3D
from ssl3d.models.weights.checkpoint import load_backbone, load_tensors, load_weights, read_run, save_tensors

CONFIG, SAFETENSORS, TORCH = "config.json", "model.safetensors", "model.pt"
SOURCE, NNUNET, ARCHITECTURE, MONAI, NETWORK = (
    "source.json", "nnunet.pth", "architecture.json", "monai.pt", "network.py"
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A tool to export to.

    Attributes:
        write: writes the files of a backbone to a folder and returns them; is given what ``facts`` will hold.
        facts: name of the JSON with the backbone's configuration, written last.
    """

    write: Callable[[Backbone, Path, dict[str, Any]], list[Path]]
    facts: str = CONFIG


def export(run: Path, target: str, out: Path) -> list[Path]:
    """Write the backbone of a finished run for another tool.

    Args:
        run: folder of the run.
        target: a key of ``TARGETS``.
        out: folder to write to.

    Returns:
        The files written.

    Raises:
        ConfigError: an unknown target, one that has no such architecture, or ``out`` is in use.
        CheckpointError: no finished run.
    """
    if target not in TARGETS:
        raise ConfigError(f'Unknown target "{target}".{nearest(target, list(TARGETS))}')
    for facts in (CONFIG, SOURCE):
        if (out / facts).exists():
            raise ConfigError(f"{out} holds a {facts} already: choose another folder.")
    backbone, provenance = load_backbone(run), read_run(run)
    config = {
        "backbone": provenance["backbone"],
        "preparation": _portable(provenance.get("preparation")),
        "source": {k: provenance.get(k) for k in ("method_name", "steps", "weights_sha256", "identity")},
    }
    files = TARGETS[target].write(backbone, out, config)
    facts_file = out / TARGETS[target].facts
    write_json(facts_file, config)  # last: without it the folder is not used
    return [*files, facts_file]


def _portable(preparation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the facts of a preparation without the place of a file on this machine."""
    parameters = (preparation or {}).get("parameters", {})
    if preparation is None or "lungmask" not in parameters:
        return preparation
    return {**preparation, "parameters": {**parameters, "lungmask": Path(parameters["lungmask"]).name}}


def load_exported(folder: Path) -> Backbone:
    """Build the backbone of an exported folder. Nothing but tensors is unpickled.

    Raises:
        CheckpointError: the folder is not whole, or its weights do not fit.
    """
    path = folder / CONFIG
    try:
        config = BackboneConfig.model_validate(read_json(path)["backbone"])
    except ReadError as error:
        raise CheckpointError(f"{error} Export it again.") from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is not the configuration of an exported backbone: {error!r}."
        ) from error
    weights = folder / SAFETENSORS
    tensors = load_tensors(weights) if weights.is_file() else load_pickled(folder / TORCH)
    backbone = build_backbone(config, seed=0)
    load_weights(backbone, tensors, folder)
    return backbone


def load_pickled(path: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Read a state dict saved by torch, with ``weights_only=True`` and no way around it.

    Args:
        path: the file.
        key: where the state dict may stand in a dictionary of more, such as the optimizer's state.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything else than tensors.
    """
    if path.exists() and not path.is_file():  # a pipe, for which torch would wait
        raise CheckpointError(f"{path} is no regular file. Fix: remove it, or put the file in its place.")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many classes for a file that it refuses
        raise CheckpointError(
            f"{path} cannot be read as plain tensors: {_why(error)}. Nothing of it was run. Fix: load it where you trust "
            "it and save its state dict alone, or get the file again."
        ) from error
    if key is not None and isinstance(found, dict) and isinstance(found.get(key), dict):
        found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise CheckpointError(f"{path} holds no state dict (names and tensors).")
    return found


def _why(error: Exception) -> str:
    """Return what torch found in a file, without its advice to switch the safety off."""
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it names {named[1]}, which is code"
    if unknown := re.search(r"Unsupported \w+ \d+", text):
        return f"it is a pickle of more than tensors ({unknown[0].lower()})"
    return text.splitlines()[0].rstrip(".")


def _safetensors(backbone: Backbone, out: Path, config: dict[str, Any]) -> list[Path]:
    save_tensors(out / SAFETENSORS, backbone.state_dict())
    return [out / SAFETENSORS]


def _torch(backbone: Backbone, out: Path, config: dict[str, Any]) -> list[Path]:
    return [_pickled(out / TORCH, _plain(backbone.state_dict()))]


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _pickled(path: Path, content: Any) -> Path:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())
    return path


_CARD = """---
library_name: ssl3d
tags: [medical, 3d, self-supervised]
---

A 3D backbone, to be loaded offline or from the Hub:

    from ssl3d.models.weights.hub import HubBackbone
    global_feature, local_feature = HubBackbone.from_pretrained("PATH")(volume)  # (B, 1, D, H, W) in [0, 1]

or by `ssl3d.create_model`, of the path of a folder or of "hf-hub:OWNER/NAME".

How it was pretrained: {method}. `config.json` has all of it.

How an image is prepared for it (`ssl3d.load("PATH").features("scan.nii.gz")` does so):

{preparation}
"""


def _huggingface(backbone: Backbone, out: Path, config: dict[str, Any]) -> list[Path]:
    source = config["source"]
    method = f"{source['method_name']}, {source['steps'] if source['steps'] is not None else 'an unknown number of'} steps"
    steps = "\n".join(f"- {line}" for line in preparation_in_words(config["preparation"]))
    write_bytes(out / "README.md", _CARD.format(method=method, preparation=steps).encode())
    return [*_safetensors(backbone, out, config), out / "README.md"]


def _nnunet(backbone: Backbone, out: Path, config: dict[str, Any]) -> list[Path]:
    from ssl3d.models.weights.nnunet import architecture_of, weights_of

    unet = _unet(backbone, "nnunet")
    _pickled(out / NNUNET, {"network_weights": _plain(weights_of(unet))})
    write_json(out / ARCHITECTURE, architecture_of(unet))
    return [out / NNUNET, out / ARCHITECTURE]


def _monai(backbone: Backbone, out: Path, config: dict[str, Any]) -> list[Path]:
    from ssl3d.models.weights import basic_unet

    unet = _unet(backbone, "monai")
    stages = len(unet.config.channels)
    if stages != basic_unet.STAGES:
        raise ConfigError(
            f"The run cannot be exported to monai: MONAI's BasicUNet has {basic_unet.STAGES} stages, and this "
            f"backbone has {stages} ({list(unet.config.channels)}). Fix: pretrain with {basic_unet.STAGES} "
            "backbone.channels, or export to torch or safetensors."
        )
    weights = {_monai_name(name): tensor for name, tensor in unet.state_dict().items()}
    write_bytes(out / NETWORK, Path(basic_unet.__file__).read_bytes())
    return [_pickled(out / MONAI, _plain(weights)), out / NETWORK]


def _monai_name(name: str) -> str:
    """Return BasicUNet's name of a parameter: ``encoder.2.4.weight`` is ``down_2.convs.conv_1.adn.N.weight``."""
    from ssl3d.models.weights.basic_unet import STAGES

    side, place, layer, kind = name.split(".")
    if side == "decoder":
        part = f"upcat_{STAGES - 1 - int(place)}.convs"
    else:
        part = f"down_{place}.convs" if int(place) else "conv_0"
    # A block is (convolution, norm, activation) twice.
    conv, role = divmod(int(layer), 3)
    return f"{part}.conv_{conv}.{'adn.N' if role else 'conv'}.{kind}"


def _unet(backbone: Backbone, target: str) -> UNet3D:
    if not isinstance(backbone, UNet3D):
        raise ConfigError(
            f"The run cannot be exported to {target}: that is for the backbone {UNet3D.name}, and this is "
            f"{backbone.name}. Fix: export to torch or safetensors."
        )
    return backbone


TARGETS = {
    "safetensors": Target(_safetensors),
    "torch": Target(_torch),
    "huggingface": Target(_huggingface),
    "nnunet": Target(_nnunet, SOURCE),
    "monai": Target(_monai, SOURCE),
}
"""Tools by name."""
