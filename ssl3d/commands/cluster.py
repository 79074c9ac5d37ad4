"""``ssl3d bench --ray`` and ``--slurm``: which engine the options ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ssl3d.errors import ConfigError

if TYPE_CHECKING:
    from ssl3d.bench.cluster.work import Engine


def cluster_options(command: Any) -> Any:
    """Add the options of a bench on many machines."""
    command = click.option(
        "--gpus-per-run", type=click.FloatRange(min=0), metavar="N",
        help="With --ray or --slurm: GPUs of each pretraining and each cell; with --ray a part, as 0.1 [default: 1 where "
        "there are any].",
    )(command)  # fmt: skip
    command = click.option(
        "--slurm", metavar="partition=P,time=T,...",
        help="Every pretraining and every cell is a job of Slurm (ssl3d[slurm]).",
    )(command)  # fmt: skip
    return click.option(
        "--ray", is_flag=False, flag_value="local", metavar="[HOST:PORT]",
        help="Every pretraining and every cell is a task of the Ray cluster there (ssl3d[ray]); without an address, of one "
        "that is started on this machine.",
    )(command)  # fmt: skip


def engine_of(
    ray: str | None, slurm: str | None, gpus: float | None, threads: int, device: str
) -> Engine | None:
    """Return the engine that the options ask for; None: this machine's own processes.

    Raises:
        ConfigError: two are asked for, or one that cannot be used so.
    """
    if ray is None and slurm is None:
        if gpus is not None:
            raise ConfigError(
                "--gpus-per-run says what a task of --ray or a job of --slurm gets; give one of them."
            )
        return None
    if ray is not None and slurm is not None:
        raise ConfigError("--ray and --slurm both hand out the cells; give one of them.")
    context = click.get_current_context()
    if context.get_parameter_source("jobs") is ParameterSource.COMMANDLINE:
        raise ConfigError(
            f"--jobs {context.params['jobs']} starts processes on this machine, and "
            f"--{'slurm' if ray is None else 'ray'} hands out the cells itself; leave --jobs out."
        )
    if device.startswith("cuda:"):
        raise ConfigError(
            f"--device {device}: on a cluster, each task is given its GPU; write --device cuda."
        )
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"--gpus-per-run {gpus:g}: a part of a GPU, or whole ones; write --gpus-per-run {round(gpus)}."
        )
    if gpus and device == "cpu":
        raise ConfigError(f"--gpus-per-run {gpus:g} with --device cpu: leave one of them out.")
    if ray is not None:
        from ssl3d.bench.cluster.ray_engine import RayEngine

        return RayEngine(ray, gpus, threads, device)
    from ssl3d.bench.cluster.slurm_engine import SlurmEngine

    assert slurm is not None
    return SlurmEngine(slurm, gpus, threads, device)
