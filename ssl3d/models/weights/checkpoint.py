"""Checkpoints: safetensors weights and a JSON of provenance. Nothing is ever unpickled.

A run's folder holds::

    run.json              provenance; written last, so a folder with status "finished" is whole
    backbone.safetensors  the backbone's weights
    state-00001000.safetensors   everything needed to go on from step 1000 (the newest only)
    backbone-00001000.safetensors  the backbone after step 1000, with pretrain.keep_checkpoints
    log.jsonl, tensorboard/      the course of the run
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError
from ssl3d.files import write_bytes
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone

RUN, BACKBONE, STATE = "run.json", "backbone.safetensors", "state-*.safetensors"
BACKBONE_AT = "backbone-{step:08d}.safetensors"


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to ``path`` atomically."""
    write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Run the pretraining again.") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy ``tensors`` into ``module``.

    Raises:
        CheckpointError: names or shapes differ; the first differences are named.
    """
    own = module.state_dict()
    problems = [f"  {k}: missing in the file" for k in own if k not in tensors]
    problems += [f"  {k}: unknown to the model" for k in tensors if k not in own]
    problems += [
        f"  {k}: {tuple(tensors[k].shape)} in the file, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} holds another architecture:\n" + "\n".join(problems[:5]) + more + "\n"
            "Use the preset and the backbone that it was pretrained with."
        )
    module.load_state_dict(tensors)


def weights_fingerprint(module: nn.Module) -> str:
    """Return a hash of all weights, independent of memory format and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # Flat first: a 1x1x1 convolution in channels_last counts as contiguous, but its last stride is not 1.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_run(folder: Path) -> dict[str, Any]:
    """Return the provenance of a run.

    Raises:
        CheckpointError: there is no run in ``folder``, or its run.json is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise CheckpointError(f'{folder} holds no {RUN}; give a folder written by "ssl3d pretrain --out".')
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Run the pretraining again.") from error
    return dict(run)


def load_backbone(folder: Path, expected: BackboneConfig | None = None, step: int | None = None) -> Backbone:
    """Build the backbone of a finished run and load its weights.

    Args:
        folder: folder of the run.
        expected: the architecture the caller is about to use, if it matters.
        step: the weights after that many steps, kept with ``pretrain.keep_checkpoints``; None: the last.

    Raises:
        CheckpointError: no finished run, no weights of that step, damaged weights, or another
            architecture than ``expected``.
    """
    run = read_run(folder)
    if run.get("status") != "finished":
        raise CheckpointError(
            f"{folder} is at step {run.get('step')}: finish it with ssl3d pretrain --resume."
        )
    config = BackboneConfig.model_validate(run["backbone"])
    if expected is not None and config != expected:
        raise CheckpointError(
            f"{folder} holds another architecture: it was pretrained with backbone {config.model_dump()}, but the "
            f"preset asks for {expected.model_dump()}. Use the same preset, or {override_of(config)}."
        )
    path = folder / (BACKBONE if step is None else BACKBONE_AT.format(step=step))
    if step is not None and not path.is_file():
        kept = ", ".join(
            str(int(p.stem.removeprefix("backbone-"))) for p in sorted(folder.glob("backbone-*.safetensors"))
        )
        raise CheckpointError(
            f"{folder} keeps no weights of step {step} (kept: {kept or 'none'}): pretrain with "
            "--set pretrain.keep_checkpoints=true and a pretrain.checkpoint_every that divides it."
        )
    backbone = build_backbone(config, seed=0)
    load_weights(backbone, load_tensors(path), path)
    return backbone


def override_of(config: BackboneConfig) -> str:
    """Return the option of the command line that asks for this backbone."""
    return f"--set 'backbone={json.dumps(config.model_dump(mode='json'))}'"


def save_state(folder: Path, step: int, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write everything that a resumed run needs, then remove the older state."""
    tensors = {f"method.{k}": v for k, v in method.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value)
    path = folder / STATE.replace("*", f"{step:08d}")
    save_tensors(path, tensors)
    for old in folder.glob(STATE):
        if old != path:
            old.unlink()


def load_method(folder: Path, method: nn.Module) -> bool:
    """Load the weights of a method, heads included, from the newest state of its run.

    Returns:
        Whether the run keeps a state; one that was imported from elsewhere does not.
    """
    paths = sorted(folder.glob(STATE))
    if not paths:
        return False
    tensors = load_tensors(paths[-1])
    weights = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    load_weights(method, weights, paths[-1])
    return True


def load_state(folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest state into ``method`` and ``optimizer`` and return its step; 0 without one."""
    paths = sorted(folder.glob(STATE))
    if not paths:
        return 0
    tensors = load_tensors(paths[-1])
    weights = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
    load_weights(method, weights, paths[-1])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(paths[-1].stem.removeprefix("state-"))
