"""The course of a run: JSON lines, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl3d.errors import ReadError
from ssl3d.files import explained, read_bytes, write_bytes
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
        kept = [(line, values) for line, values in self._lines() if values["step"] <= start] if start else []
        write_bytes(self.path, "".join(f"{line}\n" for line, _ in kept).encode())
        self._before_training = [values for _, values in kept if values["step"] == 0]
        with explained(out):
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the lines up to the first that is damaged: the one that was being written when the run was killed."""
        try:
            data = read_bytes(self.path)
        except ReadError:
            return
        for line in data.decode(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(values, dict) or type(values.get("step")) is not int:
                return
            yield line, values

    def __enter__(self) -> Log:
        return self

    def before_training(self, name: str) -> float | None:
        """Return what was written as ``name`` of step 0, also before an interruption; None if the log was lost."""
        return next((line[name] for line in self._before_training if name in line), None)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step == 0:
            self._before_training.append(values)
        with explained(self.path):
            self._file.write(json.dumps({**values, "step": step}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        with explained(self.path):
            self._file.flush()
            self._board.flush()

    def __exit__(self, *exc: Any) -> None:
        with explained(self.path):
            self._file.close()
            self._board.close()


@without_effect
class NoLog(Log):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        pass

    def before_training(self, name: str) -> float | None:
        return None

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass
