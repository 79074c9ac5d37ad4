"""Weights in: checkpoints of released code become runs that ``ssl3d bench --checkpoint`` evaluates.

gvsl    the state dict that the released GVSL code saves (``GVSL_epoch_1000.pth``). Its ``unet`` is
        :class:`ssl3d.models.unet.UNet3D` under other names::

            unet.inc.double_conv.K            encoder.0.K
            unet.downS.maxpool_conv.1.double_conv.K   encoder.S.K
            unet.upS.conv.double_conv.K       decoder.(S - 1).K

        Heads are left out. The released loaders pass arrays as SimpleITK orders them, (z, y, x), and
        ssl3d volumes are RAS+ (x, y, z): the axes mean something else, which a network trained with
        rotations up to 20 degrees only may notice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl3d.config import BackboneConfig
from ssl3d.environment import environment
from ssl3d.errors import CheckpointError, ConfigError, nearest
from ssl3d.files import write_json
from ssl3d.models.checkpoint import BACKBONE, RUN, load_weights, save_tensors, weights_fingerprint
from ssl3d.models.export import load_pickled
from ssl3d.models.factory import build_backbone

_GVSL_NAMES = (
    (re.compile(r"unet\.inc\.double_conv\.(.+)"), lambda m: f"encoder.0.{m[1]}"),
    (re.compile(r"unet\.down(\d+)\.maxpool_conv\.1\.double_conv\.(.+)"), lambda m: f"encoder.{m[1]}.{m[2]}"),
    (re.compile(r"unet\.up(\d+)\.conv\.double_conv\.(.+)"), lambda m: f"decoder.{int(m[1]) - 1}.{m[2]}"),
)


def _gvsl(tensors: dict[str, Tensor], path: Path) -> tuple[BackboneConfig, dict[str, Tensor]]:
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
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
    if not first:
        some = ", ".join(list(tensors)[:3]) or "none"
        raise CheckpointError(
            f"{path} holds no released GVSL network: no name like unet.inc.double_conv.0.weight (names: {some})."
        )
    widths = [len(weights[f"encoder.{stage}.0.weight"]) for stage in range(len(first))]
    return BackboneConfig.model_validate({"name": "unet3d", "channels": widths}), weights


SOURCES: dict[str, Callable[[dict[str, Tensor], Path], tuple[BackboneConfig, dict[str, Tensor]]]] = {
    "gvsl": _gvsl
}
"""Source -> function from the state dict of a file to the backbone's configuration and weights."""


def import_checkpoint(path: Path, source: str, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Write the backbone of a released checkpoint as a finished run.

    Args:
        path: file saved by ``torch.save``; read with ``weights_only=True``, so nothing of it is run.
        source: which code saved it, a key of ``SOURCES``.
        out: new folder of the run.
        steps: optimizer steps it was trained with, for the tables; None: not known.

    Returns:
        The provenance written to ``run.json``. What is not known of the training is None.

    Raises:
        ConfigError: an unknown source, or ``out`` is in use.
        CheckpointError: the file cannot be read, or is not of that source.
    """
    if source not in SOURCES:
        raise ConfigError(f'Unknown source "{source}".{nearest(source, list(SOURCES))}')
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out.")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    config, weights = SOURCES[source](load_pickled(path), path)
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
