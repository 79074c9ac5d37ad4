"""Processes for several devices: started by Lightning Fabric, or by what Fabric knows (torchrun, Slurm), and ended together.

What they exchange is in :mod:`ssl3d.ranks`. Fabric is imported here alone, and with one device not at all.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssl3d import ranks, signals
from ssl3d.device import visible_gpus
from ssl3d.errors import ConfigError, LostError, SSL3DError, count
from ssl3d.progress import quiet

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__without_effect__ = "where it is computed"

STRATEGIES = ("ddp",)
PARTING_S = 20.0
"""Longest time that a process stays when the others are gone: one that waits for them in a device never ends by itself."""

LOST = (
    "A process of this run has ended, and the others are ended, too. The last checkpoint is whole: the same command with "
    "--resume goes on from it."
)


@dataclass(frozen=True)
class Devices:
    """How many devices train together.

    Attributes:
        each: on each machine; on a CPU as many processes.
        nodes: machines.
        strategy: of Lightning Fabric; each device has the whole network, and a share of each batch.
    """

    each: int = 1
    nodes: int = 1
    strategy: str = "ddp"

    @property
    def processes(self) -> int:
        """How many processes there are in all."""
        return self.each * self.nodes

    def check(self, device: torch.device) -> None:
        """Raise ConfigError for devices that are not there, or processes that another program has started otherwise."""
        if self.each < 1 or self.nodes < 1:
            raise ConfigError(f"--devices {self.each} --nodes {self.nodes}: use 1 at least of each.")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy {self.strategy}: use {' or '.join(STRATEGIES)}.")
        self._check_started()
        if self.processes == 1:
            return
        if device.index is not None:
            raise ConfigError(
                f"--device {device} is one GPU, and --devices {self.each} --nodes {self.nodes} are {self.processes}: use "
                "--device cuda; CUDA_VISIBLE_DEVICES=... chooses which."
            )
        there = visible_gpus() if device.type == "cuda" else os.cpu_count() or 1
        if self.each > there:
            what = count(there, "GPU") if device.type == "cuda" else f"a CPU of {count(there, 'core')}"
            raise ConfigError(
                f"--devices {self.each}: this machine has {what}; use --devices {there} or fewer."
            )

    def _check_started(self) -> None:
        """Compare with what torchrun has started."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        world = _number("WORLD_SIZE", 1)
        each = _number("LOCAL_WORLD_SIZE", world)
        nodes = max(1, world // each)
        if (each, nodes) != (self.each, self.nodes):
            raise ConfigError(
                f"--devices {self.each} --nodes {self.nodes} are {self.processes} processes, but torchrun started {world}: "
                f"{each} on each of {count(nodes, 'machine')}. Fix: ssl3d pretrain --devices {each} --nodes {nodes}, or "
                f"torchrun --nproc-per-node {self.each} --nnodes {self.nodes}."
            )


def speaks() -> bool:
    """Whether this process speaks for the run, as far as the environment says before the processes meet."""
    return not any(_number(name, 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@contextmanager
def started(devices: Devices, device: torch.device) -> Iterator[torch.device]:
    """Start the processes, or join those that were; inside, all do the same, each on the device that is yielded.

    With one process nothing happens.

    Args:
        devices: that were checked (:meth:`Devices.check`).
        device: of which kind, or the one of a single process.

    Raises:
        ConfigError: Lightning Fabric is not installed, or does not accept what another program has started.
        LostError: another process has not come, or has ended before this one.
    """
    if devices.processes == 1:
        yield device
        return
    fabric = _fabric(devices, device)
    _tell()
    try:
        fabric.launch()
    except ValueError as error:  # of what a scheduler has started
        raise _refused(devices, error) from error
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise LostError(
            f"The {devices.processes} processes of this run have not met: {line} Fix: start all of them, within minutes of "
            "each other, and let the machines reach each other."
        ) from error
    ranks.begin()
    own = started_here() and ranks.rank() > 0
    if own:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    try:
        with quiet() if ranks.rank() else nullcontext():
            yield fabric.device
    except BaseException as error:
        number = ranks.rank()
        if isinstance(error, LostError) and device.type == "cuda":
            _last_resort()
        ranks.end()  # the others notice now
        if own:
            _outlive(os.getppid())
        if number and isinstance(error, signals.Stopped):
            raise SystemExit(signals.RESUMABLE) from error  # the first process says how to go on
        if number and isinstance(error, SSL3DError):
            raise type(error)(f"(process {number} of {devices.processes}) {error}") from error
        raise
    ranks.end()


def started_here() -> bool:
    """Whether the processes of this machine were started by the first of them, and not by torchrun or a scheduler."""
    return not any(
        name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    )


def _number(name: str, default: int) -> int:
    with suppress(ValueError):
        return int(os.environ.get(name, default))
    return default


def _fabric(devices: Devices, device: torch.device) -> Fabric:
    """Return Fabric, with the processes described and not yet started."""
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ConfigError(
            f"--devices {devices.each} --nodes {devices.nodes} needs Lightning Fabric: pip install 'ssl3d[devices]'."
        ) from error
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    try:
        return Fabric(
            accelerator=device.type, devices=devices.each, num_nodes=devices.nodes, strategy=devices.strategy
        )
    except (ValueError, RuntimeError) as error:
        raise _refused(devices, error) from error


def _refused(devices: Devices, error: Exception) -> ConfigError:
    line = " ".join(str(error).split())[:300]
    return ConfigError(
        f"--devices {devices.each} --nodes {devices.nodes} {devices.strategy}: {line} Fix: as many processes on each "
        "machine as --devices, on as many machines as --nodes; see docs/more-than-one-machine.md."
    )


def _tell() -> None:
    """Say in our words what Fabric's observer of the processes says to nobody before it ends them."""
    log = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Ending) for handler in log.handlers):
        log.addHandler(_Ending())


class _Ending(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(LOST)


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"Error: {text}\n".encode())


def _watch(parent: int) -> None:
    """End this process some time after the one that started it, if it has not ended by itself."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PARTING_S)
    _say(LOST)
    os._exit(2)


def _outlive(parent: int, seconds: float = 10.0) -> None:
    """Wait for the process that started this one, which would be killed in the middle of its last words."""
    began = time.monotonic()
    while os.getppid() == parent and time.monotonic() - began < seconds:
        time.sleep(0.1)


def _last_resort() -> None:
    """End the process in a while, come what may: a device that waits for another one keeps it alive."""

    def end() -> None:
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(2 * PARTING_S, end)
    timer.daemon = True
    timer.start()
