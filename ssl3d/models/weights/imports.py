"""Weights in: checkpoints of released code become runs that ``ssl3d bench --checkpoint`` evaluates.

gvsl    the state dict that the released GVSL code saves (``GVSL_epoch_1000.pth``). Its ``unet`` is
        :class:`ssl3d.models.unet.UNet3D` under other names::

            unet.inc.double_conv.K            encoder.0.K
            unet.downS.maxpool_conv.1.double_conv.K   encoder.S.K
            unet.upS.conv.double_conv.K       decoder.(S - 1).K

        Heads are left out. The released loaders pass arrays as SimpleITK orders them, (z, y, x), and
        ssl3d volumes are RAS+ (x, y, z): the axes mean something else, which a network trained with
        rotations up to 20 degrees only may notice.

models_genesis    the file of Models Genesis' released PyTorch code (``Genesis_Chest_CT.pt``), a
        dictionary whose ``state_dict`` is :class:`ssl3d.models.genesis.GenesisUNet3D` under other names::

            down_trW.ops.I.conv1.*            encoder.S.(3 I).*        S = 0, 1, 2, 3 for W = 64, 128, 256, 512
            down_trW.ops.I.bn1.*              encoder.S.(3 I + 1).*
            up_trW.up_conv.*                  decoder.S.up.*           S = 0, 1, 2 for W = 256, 128, 64
            up_trW.ops.I.conv1.*, bn1.*       decoder.S.block.(3 I).*, decoder.S.block.(3 I + 1).*

        The last layer (``out_tr``) and the running statistics, which the released network never uses,
        are left out. It was trained on cubes in the order (x, y, z) of LPS+ axes, at the spacing of each
        scan, with [-1000, 1000] HU as [0, 1]; ssl3d prepares RAS+ at one spacing, [-1024, 1024] HU.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl3d.config import BackboneConfig
from ssl3d.environment import environment
from ssl3d.errors import CheckpointError, ConfigError, nearest
from ssl3d.files import write_json
from ssl3d.models.factory import build_backbone
from ssl3d.models.weights.checkpoint import BACKBONE, RUN, load_weights, save_tensors, weights_fingerprint
from ssl3d.models.weights.export import load_pickled

_GVSL_NAMES = (
    (re.compile(r"unet\.inc\.double_conv\.(.+)"), lambda m: f"encoder.0.{m[1]}"),
    (re.compile(r"unet\.down(\d+)\.maxpool_conv\.1\.double_conv\.(.+)"), lambda m: f"encoder.{m[1]}.{m[2]}"),
    (re.compile(r"unet\.up(\d+)\.conv\.double_conv\.(.+)"), lambda m: f"decoder.{int(m[1]) - 1}.{m[2]}"),
)


def _gvsl(tensors: dict[str, Tensor], path: Path) -> tuple[BackboneConfig, dict[str, Tensor]]:
    if any(name.startswith("out_conv.") for name in tensors):
        raise CheckpointError(
            f"{path} is of a network that was fine-tuned on a task (it has an out_conv): give the pretrained one."
        )
    weights = {
        rename(match): tensor
        for name, tensor in tensors.items()
        for pattern, rename in _GVSL_NAMES
        if (match := pattern.fullmatch(name))
    }
    first = sorted(n for n in weights if re.fullmatch(r"encoder\.\d+\.0\.weight", n))
    widths = [len(weights[f"encoder.{stage}.0.weight"]) for stage in range(len(first))]
    return BackboneConfig.model_validate({"name": "unet3d", "channels": widths}), weights


_GENESIS_STAGES = {"down": ("64", "128", "256", "512"), "up": ("256", "128", "64")}
_GENESIS_LAYER = re.compile(r"(down|up)_tr(\d+)\.ops\.([01])\.(conv1|bn1)\.(weight|bias)")
_GENESIS_UP = re.compile(r"up_tr(\d+)\.up_conv\.(weight|bias)")
_GENESIS_UNUSED = re.compile(r"out_tr\..+|.+\.bn1\.(running_mean|running_var|num_batches_tracked)")


def _genesis_name(name: str) -> str:
    """Return ssl3d's name of a parameter; the name as it is where it is none of the released network's."""
    if (match := _GENESIS_UP.fullmatch(name)) and match[1] in _GENESIS_STAGES["up"]:
        return f"decoder.{_GENESIS_STAGES['up'].index(match[1])}.up.{match[2]}"
    match = _GENESIS_LAYER.fullmatch(name)
    if match is None or match[2] not in _GENESIS_STAGES[match[1]]:
        return name
    stage = _GENESIS_STAGES[match[1]].index(match[2])
    part = f"encoder.{stage}" if match[1] == "down" else f"decoder.{stage}.block"
    return f"{part}.{3 * int(match[3]) + (match[4] == 'bn1')}.{match[5]}"


def _genesis(tensors: dict[str, Tensor], path: Path) -> tuple[BackboneConfig, dict[str, Tensor]]:
    weights = {_genesis_name(k): v for k, v in tensors.items() if not _GENESIS_UNUSED.fullmatch(k)}
    width = len(weights["encoder.0.0.weight"])
    return BackboneConfig.model_validate({"name": "genesis_unet3d", "width": width}), weights


@dataclass(frozen=True)
class Source:
    """Released code whose checkpoints can be imported.

    Attributes:
        convert: from a state dict (without ``module.``) and its file to the backbone's configuration and weights.
        example: the name of a convolution's weight that each of its state dicts has.
    """

    convert: Callable[[dict[str, Tensor], Path], tuple[BackboneConfig, dict[str, Tensor]]]
    example: str


SOURCES = {
    "gvsl": Source(_gvsl, "unet.inc.double_conv.0.weight"),
    "models_genesis": Source(_genesis, "down_tr64.ops.0.conv1.weight"),
}
"""Released code by the name of its method."""


def _read(path: Path, source: str | None) -> tuple[str, dict[str, Tensor]]:
    """Return the code that saved a file and the state dict in it, without ``module.`` before its names."""
    chosen = {source: SOURCES[source]} if source else SOURCES
    tensors = {k.removeprefix("module."): v for k, v in load_pickled(path, key="state_dict").items()}
    for name, known in chosen.items():
        if known.example in tensors and tensors[known.example].dim() == 5:
            return name, tensors
    expected = " or ".join(f"{known.example} ({name})" for name, known in chosen.items())
    some = ", ".join(list(tensors)[:3]) or "none"
    raise CheckpointError(f"{path} holds no released network: no name like {expected} (names: {some}).")


def import_checkpoint(path: Path, source: str | None, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Write the backbone of a released checkpoint as a finished run.

    Args:
        path: file saved by ``torch.save``; read with ``weights_only=True``, so nothing of it is run.
        source: which code saved it, a key of ``SOURCES``; None: found out from the names in the file.
        out: new folder of the run.
        steps: optimizer steps it was trained with, for the tables; None: not known.

    Returns:
        The provenance written to ``run.json``. What is not known of the training is None.

    Raises:
        ConfigError: an unknown source, or ``out`` is in use.
        CheckpointError: the file cannot be read, or is not of that source.
    """
    if source is not None and source not in SOURCES:
        raise ConfigError(f'Unknown source "{source}".{nearest(source, list(SOURCES))}')
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    source, tensors = _read(path, source)
    config, weights = SOURCES[source].convert(tensors, path)
    backbone = build_backbone(config, seed=0)
    load_weights(backbone, weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    plain = config.model_dump(mode="json")
    run = {
        "status": "finished", "step": steps, "steps": steps, "method_name": source, "preset": "imported",
        "backbone": plain,
        "identity": {
            "method": {"name": source, "config": None}, "backbone": plain, "seed": None,
            "pretrain": {"data": "imported", "imported": {"source": source, "sha256": digest, "steps": steps}},
        },
        "imported": {"file": path.name, "sha256": digest}, "environment": environment(), "losses": {},
        "seconds": None, "device": None, "voxels_seen": None, "parameters_trained": None, "peak_memory_mib": None,
        "weights_sha256": weights_fingerprint(backbone),
    }  # fmt: skip
    save_tensors(out / BACKBONE, backbone.state_dict())
    write_json(out / RUN, run)
    return run
