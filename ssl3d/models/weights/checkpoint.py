"""Checkpoints: safetensors weights and a JSON of provenance. Nothing is ever unpickled.

A run's folder holds::

    run.json              provenance; written first, and last: a folder with status "finished" is whole
    backbone.safetensors  the backbone's weights
    state-00001000.safetensors   everything needed to go on from step 1000 (the newest pretrain.keep of them)
    backbone-00001000.safetensors  the backbone after step 1000, with pretrain.keep_checkpoints
    log.jsonl, tensorboard/      the course of the run

Beside each file of tensors lies its digest, ``NAME.sha256`` as sha256sum writes and checks it, and it is compared
whenever the file is read. A state says which run it is of. One that is damaged is renamed and passed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ssl3d.config import BackboneConfig, validate
from ssl3d.errors import CheckpointError, ConfigError, ReadError
from ssl3d.files import explained, parse_json, read_bytes, read_json, set_aside, write_bytes
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.progress import say

__without_effect__ = "tensors come back as they were written: a digest says so"

RUN, BACKBONE, STATE = "run.json", "backbone.safetensors", "state-*.safetensors"
BACKBONE_AT = "backbone-{step:08d}.safetensors"


RUN_FORMAT = 2
"""Since 2, every state has a digest beside it."""

_MOST_FACTS_BYTES = 100 * 2**20  # of a header of safetensors, which the library limits so, too


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to ``path`` atomically, and their file's digest beside it.

    Args:
        path: of the file.
        tensors: by name.
        metadata: what else the file says.

    Raises:
        WriteError: the system refuses.
    """
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    # The digest first: a file of tensors is never without, and one without its file harms nobody.
    write_bytes(digest_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
    write_bytes(path, data)


def digest_file(path: Path) -> Path:
    """Return where the digest of a file of tensors lies; ``sha256sum -c`` reads it."""
    return path.with_name(f"{path.name}.sha256")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors; where a digest lies beside them, the file must have it.

    Raises:
        CheckpointError: the file is missing, truncated, altered or no safetensors file.
    """
    return _tensors(path, _verified(path))


class _DamagedError(CheckpointError):
    """The file was read, and is not what was written."""


def _verified(path: Path, required: bool = False) -> bytes:
    """Return the bytes of a file of tensors after comparing them with the digest beside it.

    Args:
        path: of the file.
        required: whether a file without a digest is refused.
    """
    place = digest_file(path)
    try:
        data = read_bytes(path)
        if not required and not place.exists():
            return data
        words = read_bytes(place, 4096).decode("ascii", "replace").split() if place.exists() else []
    except ReadError as error:
        refused = isinstance(error.__cause__, OSError)  # which says nothing of what the file holds
        kind = CheckpointError if refused else _DamagedError
        raise kind(f"{path} cannot be read: {error} Run the pretraining again.") from error
    found = hashlib.sha256(data).hexdigest()
    if words[:1] != [found]:
        raise _DamagedError(
            f"{path} is damaged: its SHA-256 is {found[:12]}, and {place.name} says {''.join(words[:1])[:12] or 'nothing'}. "
            "Restore both files, or run the pretraining again."
        )
    return data


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{path} cannot be read: {error}. Run the pretraining again.") from error


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
    return _fingerprint(module.state_dict())


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        # Flat first: a 1x1x1 convolution in channels_last counts as contiguous, but its last stride is not 1.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_whole(folder: Path, run: Mapping[str, Any]) -> bool:
    """Return whether a finished run's backbone is there and is what ``run``, its provenance, says."""
    try:
        tensors = load_tensors(folder / BACKBONE)
    except CheckpointError:
        return False
    return run.get("weights_sha256") in (None, _fingerprint(tensors))


class _Method(BaseModel):
    name: str
    config: dict[str, Any] | None


class _Identity(BaseModel):
    model_config = ConfigDict(strict=True)

    method: _Method
    backbone: dict[str, Any]
    pretrain: dict[str, Any] | None
    seed: int | None


class _Run(BaseModel):
    """What every reader of run.json may rely on; fields that are not named here may be there, too."""

    model_config = ConfigDict(strict=True)

    status: Literal["running", "finished"]
    step: int | None
    steps: int | None
    method_name: str
    preset: str | None = None
    title: str | None = None
    trains: str | None = None
    backbone: dict[str, Any]
    identity: _Identity
    environment: dict[str, Any] = {}
    code: str | None = None
    code_by_step: dict[str, str] = {}
    losses: dict[str, float] = {}
    seconds: float | None = None
    device: str | None = None
    voxels_seen: int | None = None
    parameters_trained: int | None = None
    peak_memory_mib: float | None = None
    weights_sha256: str | None = None
    excluded: list[str] = []
    pretext: dict[str, Any] = {}
    format: int = 1


def read_run(folder: Path) -> dict[str, Any]:
    """Return the provenance of a run.

    Raises:
        CheckpointError: there is no run in ``folder``, or its run.json is damaged.
    """
    path = folder / RUN
    try:
        run = read_json(path)
        _Run.model_validate(run)
    except ReadError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(
                f'{folder} holds no {RUN}; give a folder written by "ssl3d pretrain --out".'
            ) from None
        raise CheckpointError(f"{error} Restore it, or run the pretraining again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise CheckpointError(
            f"{path} is damaged: {where}: {first['msg']}. Restore it, or run the pretraining again."
        ) from None
    return dict(run)


def load_backbone(folder: Path, expected: BackboneConfig | None = None, step: int | None = None) -> Backbone:
    """Build the backbone of a finished run and load its weights.

    Args:
        folder: folder of the run.
        expected: the architecture the caller is about to use, if it matters.
        step: the weights after that many steps, kept with ``pretrain.keep_checkpoints``; None: the last.

    Raises:
        CheckpointError: no finished run, no weights of that step, weights that are damaged or not those that the
            run ended with, or another architecture than ``expected``.
    """
    run = read_run(folder)
    if run.get("status") != "finished":
        raise CheckpointError(
            f"{folder} is at step {run.get('step')}: finish it with ssl3d pretrain --resume."
        )
    config = backbone_of(run, folder)
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
    digest, said = weights_fingerprint(backbone), run.get("weights_sha256")
    if step is None and said is not None and digest != said:
        raise CheckpointError(
            f"{folder}: the weights are not those that its run.json describes (hash {digest[:12]}, not {said[:12]}): "
            "one of the two files was replaced. Restore it, or pretrain again."
        )
    return backbone


def backbone_of(run: Mapping[str, Any], folder: Path) -> BackboneConfig:
    """Return the configuration of a run's backbone.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return validate(BackboneConfig, run["backbone"], f"backbone of {folder / RUN}")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def override_of(config: BackboneConfig) -> str:
    """Return the option of the command line that asks for this backbone."""
    return f"--set 'backbone={json.dumps(config.model_dump(mode='json'))}'"


@dataclass(frozen=True)
class State:
    """All that a run needs to go on.

    Attributes:
        path: its file.
        step: optimizer steps that were done.
        run: of which run it is, as :func:`save_state` was told; None: of an earlier version, which did not say.
        facts: what was known then of the course of the run: ``losses`` and ``seconds``.
        tensors: of the method and the optimizer.
    """

    path: Path
    step: int
    run: str | None
    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def load(self, method: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy it into the method and the optimizer.

        Raises:
            CheckpointError: the method has other tensors.
        """
        weights = {k.removeprefix("method."): v for k, v in self.tensors.items() if k.startswith("method.")}
        load_weights(method, weights, self.path)
        if optimizer is None:
            return
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in self.tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def save_state(
    folder: Path, step: int, method: nn.Module, optimizer: torch.optim.Optimizer, *,
    run: str = "", facts: Mapping[str, Any] | None = None, keep: int = 1,
) -> None:  # fmt: skip
    """Write everything that a resumed run needs, then remove older states.

    Args:
        folder: of the run.
        step: optimizer steps that are done.
        method, optimizer: what to keep.
        run: of which run it is; another one will not take it.
        facts: what is known of the course of the run, for JSON.
        keep: number of states that stay, this one included.

    Raises:
        WriteError: the system refuses; the older states are untouched.
    """
    tensors = {f"method.{k}": v for k, v in method.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if value is not None:
                tensors[f"optimizer.{index}.{slot}"] = torch.as_tensor(value)
    path = folder / STATE.replace("*", f"{step:08d}")
    save_tensors(path, tensors, {"run": run, "step": str(step), "facts": json.dumps(facts or {})})
    others = [old for old in _states(folder) if old != path]
    for old in others[max(keep - 1, 0) :]:
        with explained(old):
            old.unlink(missing_ok=True)
            digest_file(old).unlink(missing_ok=True)


def newest_state(folder: Path, *, undigested: bool = False) -> State | None:
    """Return the newest state that is whole; damaged ones are renamed, and named, on the way to it.

    Args:
        folder: of the run.
        undigested: take one without a digest, too, as earlier versions wrote them.

    Raises:
        CheckpointError: one cannot be read, which does not mean that it is damaged.
        WriteError: a damaged one cannot be renamed.
    """
    for path in _states(folder):
        try:
            return _read_state(path, undigested)
        except _DamagedError as error:
            new = set_aside(path)
            say(
                f"{error}\nIt is now called {new.name}; the run goes on from the state before it, if there is one."
            )
            place = digest_file(path)
            with explained(place):
                set_aside(place) if place.is_dir() else place.unlink(missing_ok=True)
    return None


def has_state(folder: Path) -> bool:
    """Return whether a run has got as far as its first state."""
    return bool(_states(folder))


def _states(folder: Path) -> list[Path]:
    """Return the files of states, the newest first."""
    numbered = [(_step_of(path), path) for path in folder.glob(STATE)]
    return [path for step, path in sorted(numbered, reverse=True) if step >= 0]


def _step_of(path: Path) -> int:
    """Return the step in the name of a state; -1 for a name that save_state does not give."""
    step = path.stem.removeprefix("state-")
    return int(step) if step.isascii() and step.isdecimal() and len(step) < 19 else -1


def _read_state(path: Path, undigested: bool) -> State:
    data = _verified(path, required=not undigested)
    tensors = _tensors(path, data)
    length = int.from_bytes(data[:8], "little")  # the format: length of a JSON header, header, tensors
    try:
        metadata = parse_json(data[8 : 8 + min(length, _MOST_FACTS_BYTES)]).get("__metadata__") or {}
        facts = parse_json(metadata.get("facts", "{}"))
    except (ValueError, AttributeError) as error:
        raise _DamagedError(f"{path} is damaged: {error}") from error
    if metadata.get("step", said := str(_step_of(path))) != said:  # one of an earlier version does not say
        raise _DamagedError(f"{path} holds the state of step {metadata['step']}: it was copied or renamed.")
    return State(path, _step_of(path), metadata.get("run"), dict(facts), tensors)


def load_method(folder: Path, method: nn.Module) -> bool:
    """Load the weights of a method, heads included, from the newest state of its run.

    Returns:
        Whether the run keeps a state; one that was imported from elsewhere does not.

    Raises:
        CheckpointError: the state is damaged; an older one would be other weights.
    """
    paths = _states(folder)
    if not paths:
        return False
    _read_state(paths[0], undigested=not digest_file(paths[0]).exists()).load(method)
    return True


def load_state(folder: Path, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest state into ``method`` and ``optimizer`` and return its step; 0 without one."""
    state = newest_state(folder)
    if state is None:
        return 0
    state.load(method, optimizer)
    return state.step
