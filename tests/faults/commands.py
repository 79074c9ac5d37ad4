"""Commands as a user gives them, in a child of this process, which has imported what takes long."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner

from ssl3d.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        status: of its end; minus the signal that killed it.
        output: what it said, on both streams.
    """

    status: int
    output: str

    def named(self, *words: str) -> Outcome:
        """Assert that it ended with a message for users, which has these words."""
        assert self.status == 2, self
        assert "Traceback" not in self.output and "fault of ssl3d" not in self.output, self.output
        missing = [word for word in words if word not in self.output]
        assert not missing, f"{missing} not in: {self.output}"
        return self


def fork(arguments: Sequence[object], output: Path | int, before: Callable[[], object] | None = None) -> int:
    """Start a command in a child of this process and return its id.

    Args:
        arguments: of ssl3d.
        output: file that what it says is added to, or a descriptor to write it to.
        before: called in the child first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = output if isinstance(output, int) else os.open(output, flags)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        if before is not None:
            before()
        main([str(a) for a in arguments], prog_name="ssl3d")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(*arguments: object, before: Callable[[], object] | None = None) -> Outcome:
    """Run a command in a child of this process; what it says comes through a pipe, which no limit of files cuts."""
    read, write = os.pipe()
    child = fork(arguments, write, before)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        text = said.read().decode(errors="replace")
    return Outcome(ended(child), text)


def here(*arguments: object) -> None:
    """Run a command in this process: its children inherit what was imported, which takes longer than most trials."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)


def files_of(most: int) -> Callable[[], None]:
    """Let no file of this process grow beyond ``most`` bytes: as a full disk, for writers in any language."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    return limit


def memory_of(more: int) -> Callable[[], None]:
    """Let this process have ``more`` bytes of addresses than it has now."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        now = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))

    return limit
