"""The course of a run: JSON lines, and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssl3d.files import write_bytes
from ssl3d.marks import without_effect


@without_effect
class Log:
    """The course of a run: JSON lines, and TensorBoard.

    Lines after step ``start`` are dropped on opening: a resumed run writes them again.
    """

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = out / "log.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        kept: list[str] = []
        for line in self.path.read_text().splitlines() if start and self.path.is_file() else []:
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                break
        write_bytes(self.path, "".join(f"{line}\n" for line in kept).encode())
        self._before_training = [json.loads(line) for line in kept if json.loads(line)["step"] == 0]
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Log:
        return self

    def before_training(self, name: str) -> float | None:
        """Return what was written as ``name`` of step 0, also before an interruption; None if the log was lost."""
        return next((line[name] for line in self._before_training if name in line), None)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step == 0:
            self._before_training.append(values)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._file.flush()
        self._board.flush()

    def __exit__(self, *exc: Any) -> None:
        self._file.close()
        self._board.close()
