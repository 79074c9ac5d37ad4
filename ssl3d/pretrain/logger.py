"""The contract of a logger: where the course of a pretraining is told besides the ``log.jsonl`` of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

__without_effect__ = "it is told what was computed"

End = Literal["finished", "stopped", "failed"]
"""How a run has ended; one that was stopped, by a signal or Ctrl-C, can be resumed."""

RUN_ID = "ssl3d-run-id"
"""File, in a logger's own folder, with the id under which a resumed run goes on in the program that is told."""


class Logger:
    """Tells the course of one run to another program; ``pretrain.loggers`` names the loggers of a run.

    A logger changes no number and costs no run: what it raises is said once, and the run goes on without it. It opens
    no connection unless the user asks for one, by the environment variables of the program that it tells.

    Attributes:
        name: unique, as in ``pretrain.loggers``.
        requires: module that it imports -> what ``pip install`` is to be given for it. Looked at before training;
            such modules are imported in :meth:`start`, not at the top of the file.
    """

    name: ClassVar[str]
    requires: ClassVar[Mapping[str, str]] = {}

    def start(self, folder: Path, run: Mapping[str, Any], step: int) -> None:
        """Begin.

        Args:
            folder: of the run; what is written goes to a folder of its own below. There from before where the run
                is resumed, or was killed.
            run: the provenance so far, as in ``run.json``: ``method_name``, ``preset``, ``identity``, ...
            step: steps that are done; above 0, the run is resumed, and the steps after this one are told again, with
                the same values.
        """
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take values.

        Args:
            step: steps that are done, from 0; never less than in the call before. Several calls may be of one step.
            values: losses, learning rate, scores and measures by name.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Make sure that what was told is kept; called before each checkpoint."""

    def finish(self, end: End) -> None:
        """End; called once, whatever has happened.

        Args:
            end: how the run ended.
        """
