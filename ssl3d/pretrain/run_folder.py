"""The folder of one pretraining: whose it is, how far it is, and who is at work on it.

A folder is of one run from the moment that ``run.json`` stands in it, before the first step; a state says by itself
which run it is of. So a state is never taken for that of another run, and a run that was killed before its first state
is begun again by the same command.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl3d import ranks
from ssl3d.config import PretrainConfig
from ssl3d.errors import BusyError, CheckpointError
from ssl3d.files import explained, is_temporary, remove_leftovers, set_aside, write_json
from ssl3d.locks import Held, forget_lock
from ssl3d.models.weights.checkpoint import (
    BACKBONE,
    BACKBONE_AT,
    RUN,
    RUN_FORMAT,
    STATE,
    State,
    has_state,
    is_whole,
    newest_state,
    read_run,
    save_state,
    save_tensors,
)
from ssl3d.pretrain.run_log import Log, NoLog
from ssl3d.progress import say

__without_effect__ = "a run that was interrupted ends with the weights of one that was not"

LOCK = "run.lock"
"""Exists while a process is at work on the run."""


def check_folder(out: Path, resume: bool) -> None:
    """Raise CheckpointError for what is known of the folder of a run before its data are: it holds another, or one already.

    Says so where ``resume`` has nothing to go on with.
    """
    _look(out, resume)
    if resume and not (out / RUN).exists():
        say(f"{out} holds no run yet: --resume has nothing to go on with, and the run begins at step 0.")


@contextmanager
def opened(
    out: Path, identity: dict[str, Any], code: str, *, resume: bool, allow_code_change: bool
) -> Iterator[RunFolder]:
    """Hold the folder of a run for this process.

    Args:
        out: the folder.
        identity: what decides the weights of the run.
        code: hash of the code that decides them.
        resume: go on with the run that it holds.
        allow_code_change: also if that was begun with other code.

    Raises:
        CheckpointError: it holds a run and ``resume`` is off, or it is another run, or one of other code.
        BusyError: another process is at work on it.
        WriteError: it cannot be written to.
    """
    if ranks.rank():  # the first process holds it for all
        yield Elsewhere(out, identity, {})
        return
    previous = _look(out, resume)
    _same(out, previous, identity)
    if _finished(out, previous):  # the folder may be read-only
        forget_lock(out / LOCK)  # of a process that was killed when it had finished
        yield RunFolder(out, identity, previous)
        return
    with Held(lock := out / LOCK, wait=False) as mine:
        if not mine:
            owner = Held(lock, wait=False).owner()
            raise BusyError(
                f"{owner} is at work on the run in {out}. Fix: wait for it, or give another --out."
            )
        previous = _look(out, resume)  # the owner before may have gone on meanwhile
        _same(out, previous, identity)
        folder = RunFolder(out, identity, previous)
        if not _finished(out, previous):
            remove_leftovers(out, older_than_s=-math.inf)  # nobody else is at work here
            folder.finished, folder.state = False, _state(out, previous, identity)
            folder.codes = _codes(out, previous, folder.state, code, allow_code_change)
        yield folder


class RunFolder:
    """The folder of a run that this process holds, see :func:`opened`.

    Attributes:
        path: the folder.
        previous: provenance of the run so far; {} at the first time.
        finished: whether nothing is left to do.
        state: to go on from; None: from the start, or the run is finished.
        codes: hashes of the code of the run by the step from which each was used.
    """

    def __init__(self, path: Path, identity: dict[str, Any], previous: dict[str, Any]) -> None:
        self.path, self.previous, self.finished = path, previous, True
        self.state: State | None = None
        self.codes: dict[str, str] = {}
        self._run = _digest(identity)

    def progress(self) -> dict[str, Any]:
        """Return how far the run is, for its provenance: ``step``, ``losses`` and ``seconds``."""
        if self.state is None:
            return {"step": 0, "losses": {}, "seconds": 0.0}
        known: dict[str, Any] = {
            key: self.previous[key] for key in ("losses", "seconds") if key in self.previous
        }
        return {"losses": {}, "seconds": 0.0, **known, **self.state.facts, "step": self.state.step}

    def begin(self, run: Mapping[str, Any]) -> None:
        """Write down whose folder it is, before the first step."""
        if self.state is not None:
            return
        for kept in self.path.glob(
            f"{BACKBONE_AT.partition('{')[0]}*"
        ):  # of a run that was killed before its first state
            with explained(kept):
                kept.unlink()
        write_json(self.path / RUN, {**run, "format": RUN_FORMAT})

    def log(self, start: int) -> Log:
        """Return the log of the run, without the lines behind step ``start``."""
        return Log(self.path, start)

    def load(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Copy the state into the method and the optimizer, free it, and return its step; 0 without one."""
        state, self.state = self.state, None
        if state is None:
            return 0
        state.load(method, optimizer)
        return state.step

    def save(
        self, run: Mapping[str, Any], method: nn.Module, optimizer: torch.optim.Optimizer, config: PretrainConfig
    ) -> None:  # fmt: skip
        """Keep what a resumed run needs.

        Args:
            run: the provenance at this step: ``step``, ``losses`` and ``seconds`` among it.
            method, optimizer: what to keep.
            config: how much of it.
        """
        step = int(run["step"])
        # Before the state: killed between the two, the run does this step again.
        if config.keep_checkpoints and (step % config.checkpoint_every == 0 or step == config.steps):
            save_tensors(self.path / BACKBONE_AT.format(step=step), method.backbone.state_dict())  # type: ignore[union-attr]
        facts = {"losses": run["losses"], "seconds": run["seconds"]}
        save_state(self.path, step, method, optimizer, run=self._run, facts=facts, keep=config.keep)
        write_json(self.path / RUN, {**run, "format": RUN_FORMAT})

    def finish(self, run: Mapping[str, Any], backbone: nn.Module) -> dict[str, Any]:
        """Write the backbone and, last, the provenance of the finished run; return that."""
        save_tensors(self.path / BACKBONE, backbone.state_dict())
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {**run, "status": "finished", "finished": finished, "format": RUN_FORMAT}
        write_json(self.path / RUN, whole)
        return whole


class Elsewhere(RunFolder):
    """The folder of a run as the other processes of it see it, which neither read nor write there."""

    def begin(self, run: Mapping[str, Any]) -> None:
        pass

    def log(self, start: int) -> Log:
        return NoLog()

    def load(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        return 0

    def save(
        self, run: Mapping[str, Any], method: nn.Module, optimizer: torch.optim.Optimizer, config: PretrainConfig
    ) -> None:  # fmt: skip
        pass

    def finish(self, run: Mapping[str, Any], backbone: nn.Module) -> dict[str, Any]:
        return dict(run)


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _look(out: Path, resume: bool) -> dict[str, Any]:
    """Return the provenance of the run in ``out``; {} when there is none, or it was killed before its first state."""
    if not (out / RUN).exists():
        if out.is_dir():
            _check_contents(out)
        elif out.exists():
            raise CheckpointError(f"{out} is a file: give another --out.")
        return {}
    previous = read_run(out)
    begun = previous["status"] == "finished" or has_state(out)
    if begun and not resume:
        raise CheckpointError(
            f"{out} already holds a run at step {previous['step']}: add --resume or give another --out."
        )
    return previous if begun else {}


def _check_contents(out: Path) -> None:
    """Raise CheckpointError for a folder without run.json, unless it is empty but for what a killed run has left."""
    if has_state(out):
        raise CheckpointError(
            f"{out} holds {STATE} without the {RUN} that says of which run: restore that, or give another --out."
        )
    names = {"tensorboard", "log.jsonl", LOCK}
    if not all(is_temporary(path) or path.name in names for path in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no run: give another --out.")


def _finished(out: Path, previous: Mapping[str, Any]) -> bool:
    return previous.get("status") == "finished" and is_whole(out, previous)


def _same(out: Path, previous: Mapping[str, Any], identity: dict[str, Any]) -> None:
    if previous and previous["identity"] != identity:
        raise CheckpointError(
            f"{out} holds another run; --resume needs the same settings. Different: "
            + "; ".join(_differences(previous["identity"], identity))
        )


def _state(out: Path, previous: Mapping[str, Any], identity: dict[str, Any]) -> State | None:
    """Return what to go on from, as far as ``previous`` says that there is a run."""
    if not previous:
        return None
    state = newest_state(out, undigested=previous.get("format", 1) < RUN_FORMAT)
    if state is not None and state.run not in (None, _digest(identity)):
        raise CheckpointError(
            f"{state.path} is of another run than the {RUN} beside it: restore the right one, or give another --out."
        )
    if previous["status"] != "finished":
        if state is None:
            say(f"{out} keeps no state that is whole: the run begins again at step 0.")
        return state
    if previous["steps"] and (state is None or state.step != previous["steps"]):
        raise CheckpointError(
            f"{out / BACKBONE} is damaged, and there is no last state to restore it from: pretrain again with another --out."
        )
    if (out / BACKBONE).exists():
        set_aside(out / BACKBONE)
    say(f"{out / BACKBONE} is not what the run ended with; it is written again.")
    return state


def _codes(
    out: Path, previous: Mapping[str, Any], state: State | None, code: str, allow_change: bool
) -> dict[str, str]:
    """Return the hashes of the code of a run by the step from which each was used.

    Raises:
        CheckpointError: the run ``previous`` was begun with other code, and that is not allowed.
    """
    if state is None:
        return {"0": code}
    codes: dict[str, str] = previous.get("code_by_step") or {"0": str(previous.get("code"))}
    codes = {step: used for step, used in codes.items() if int(step) < max(state.step, 1)}
    if list(codes.values())[-1] == code or state.step == previous["steps"]:  # then no step is left to do
        return codes
    if not allow_change:
        raise CheckpointError(
            f"{out} is at step {state.step} of a run with other code (hash {list(codes.values())[-1]}, now {code}): "
            "its weights would be of neither. Start anew (pretrain: another --out; bench: --recompute), or go on with "
            "--allow-code-change, which records both hashes."
        )
    return {**codes, str(state.step): code}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
