"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ssl3d.pretrain.logger import End, Logger

__without_effect__ = "it is told what was computed"


class TensorBoard(Logger):
    """TensorBoard, in the folder `tensorboard` of a run."""

    name = "tensorboard"
    requires: ClassVar[Mapping[str, str]] = {"tensorboard": "tensorboard"}

    def start(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._board.flush()

    def finish(self, end: End) -> None:
        self._board.close()
