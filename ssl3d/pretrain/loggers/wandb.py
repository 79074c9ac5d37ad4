"""Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ssl3d.files import read_bytes, write_bytes
from ssl3d.pretrain.logger import RUN_ID, End, Logger

__without_effect__ = "it is told what was computed"


class WeightsAndBiases(Logger):
    """Weights & Biases, offline in the folder `wandb` of a run; online with WANDB_MODE=online."""

    name = "wandb"
    requires: ClassVar[Mapping[str, str]] = {"wandb": "ssl3d[wandb]"}

    def start(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        # Reports of its own errors would go over the network, in offline mode, too.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        place = folder / "wandb"
        if step == 0 or not (place / RUN_ID).is_file():
            write_bytes(place / RUN_ID, uuid.uuid4().hex[:8].encode())
        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # wandb says what is wrong with it
            project=os.environ.get("WANDB_PROJECT", "ssl3d"),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=read_bytes(place / RUN_ID).decode(),
            resume="allow",
            dir=str(folder),
            config=dict(run),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, end: End) -> None:
        if end == "stopped":
            self._run.mark_preempting()  # it is shown as one that will go on
        self._run.finish(exit_code=0 if end == "finished" else 1)
