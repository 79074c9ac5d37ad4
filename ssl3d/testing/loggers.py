"""The checks of a logger."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl3d.errors import PluginError
from ssl3d.pretrain.logger import Logger
from ssl3d.pretrain.run_log import check_logger
from ssl3d.testing.checks import Checks, Fault, demand
from ssl3d.testing.declarations import check_name
from ssl3d.testing.watch import generators_left_alone

CALLED_WITH = {
    "start": ("folder", "run", "step"),
    "write": ("step", "values"),
    "flush": (),
    "finish": ("end",),
}
"""Function of a logger -> what the framework gives it."""
RUN: Mapping[str, Any] = {
    "method_name": "denoising", "title": "Denoising", "trains": "encoder+decoder", "status": "running", "steps": 4,
    "preset": "made-up", "backbone": {"name": "unet3d", "channels": [4, 8]}, "volumes": {"cases": 3, "taken_for": "ct"},
    "identity": {"method": {"name": "denoising", "config": {"sigma": 0.1}}, "seed": 0, "pretrain": None},
}  # fmt: skip
TOLD: tuple[tuple[int, Mapping[str, float]], ...] = (
    (0, {"held-back pretext score": 0.5}),
    (2, {"mse": 0.25, "lr": 1e-4}),
    (2, {"feature_std": float("nan"), "odd: name/of <b>a</b> loss^2": -1e30}),
    (4, {"mse": 0.125, "lr": 1e-4}),
)


class LoggerChecks(Checks):
    """The checks of one logger."""

    kind = "logger"
    order = (
        "declarations_make_sense",
        "a_run_is_told",
        "a_run_that_was_stopped_is_told_on",
        "what_it_is_told_stays_as_it_was",
        "global_generators_are_left_alone",
    )
    essential = ("declarations_make_sense", "a_run_is_told")

    def __init__(self, cls: type[Logger]) -> None:
        self.cls = cls

    @property
    def subject(self) -> Any:
        return self.cls

    # -- checks -----------------------------------------------------------------------------------

    def declarations_make_sense(self) -> str:
        """Name, requirements and signatures are what the framework can use, and what it imports is installed."""
        name = getattr(self.cls, "name", None)
        check_name(name, "logger")
        try:
            check_logger(str(name), self.cls)
        except PluginError as error:
            raise Fault(str(error), "requires") from error
        for function, given in CALLED_WITH.items():
            call = f"{function}({', '.join(('self', *given))})"
            try:
                inspect.signature(getattr(self.cls, function)).bind(None, *given)
            except TypeError as error:
                raise Fault(f"{function} cannot be called: {error}", function, f"def {call}") from error
        for function in ("start", "write"):
            demand(
                getattr(self.cls, function) is not getattr(Logger, function),
                f"{function} is not written",
                None,
                f"def {function}({', '.join(('self', *CALLED_WITH[function]))})",
            )
        return f"needs {', '.join(self.cls.requires) or 'nothing'}"

    def a_run_is_told(self) -> str:
        """A run of four steps is told from its start to its end."""
        with tempfile.TemporaryDirectory() as folder:
            self._tell(Path(folder))
            written = sum(path.is_file() for path in Path(folder).rglob("*"))
        return f"{len(TOLD)} calls of write, {written} files below the run's folder"

    def a_run_that_was_stopped_is_told_on(self) -> str:
        """A run that was stopped, or failed, is told in the same folder from where it goes on."""
        with tempfile.TemporaryDirectory() as folder:
            for end in ("stopped", "failed"):
                first = self._begun(Path(folder), 0)
                first.write(0, dict(TOLD[0][1]))
                first.write(4, dict(TOLD[1][1]))  # lost: the state is of step 2
                first.finish(end)
                self._tell(Path(folder), 2)
        return "goes on at step 2"

    def what_it_is_told_stays_as_it_was(self) -> str:
        """The run and the values are not changed: other loggers are given them, too."""
        run, told = copy.deepcopy(dict(RUN)), [dict(values) for _, values in TOLD]
        with tempfile.TemporaryDirectory() as folder:
            logger = self.cls()
            logger.start(Path(folder), run, 0)
            for values, (step, _) in zip(told, TOLD, strict=True):
                logger.write(step, values)
            logger.finish("finished")
        demand(run == RUN, "start changes the run", "start", "copy what is changed")
        as_told = [dict(values) for _, values in TOLD]
        demand(
            json.dumps(told) == json.dumps(as_told),
            "write changes the values",
            "write",
            "copy what is changed",
        )
        return "nothing changes"

    def global_generators_are_left_alone(self) -> str:
        """No global random generator is drawn from or seeded."""
        with (
            tempfile.TemporaryDirectory() as folder,
            generators_left_alone("start", "make a generator of your own"),
        ):
            self._tell(Path(folder))
        return "none moves"

    def _begun(self, folder: Path, step: int) -> Logger:
        logger = self.cls()
        logger.start(folder, copy.deepcopy(dict(RUN)), step)
        return logger

    def _tell(self, folder: Path, start: int = 0) -> None:
        logger = self._begun(folder, start)
        for step, values in TOLD:
            if step > start or not start:
                logger.write(step, dict(values))
        logger.flush()
        logger.finish("finished")
