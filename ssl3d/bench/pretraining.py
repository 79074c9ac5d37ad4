"""One pretraining, from what a user names to the run: for Python and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench.given import load_tasks, say_skipped, settings_of, with_subject_patterns, without_tested

if TYPE_CHECKING:
    from ssl3d.config import Settings
    from ssl3d.data.prepared.build import Policy
    from ssl3d.data.prepared.cohort import PreparedCohort


@dataclass(frozen=True)
class PretrainOptions:
    """What a pretraining is asked for; the options of ``ssl3d pretrain`` and of :func:`ssl3d.bench.api.pretrain`.

    Attributes:
        method: a registered method or variant.
        out: folder of the run.
        data: volumes: ``phantoms``, a folder, or ``LAYOUT=DIR``.
        preset: a name, or a YAML file.
        options: ``key=value`` over the preset.
        seed: of initialisation, order, crops and views.
        resume: go on with the run in ``out``.
        allow_code_change: with ``resume``: although the code has changed; both hashes are recorded.
        exclude_test: tasks (names, files) of which everybody who is tested in some split is left out.
        subject_patterns: ``[LAYOUT=]REGEX``, takes the person from a case's id.
        policy: what to do about bad files: ``refuse`` or ``skip``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        cache: folder of prepared volumes and phantoms; None: ``~/.cache/ssl3d``.
        devices: on each machine; on a CPU as many processes. Above 1 the program is started again for each.
        nodes: machines.
        strategy: how they share the work: ``ddp``.
    """

    method: str
    out: Path
    data: str = "phantoms"
    preset: str = "quick"
    options: Sequence[str] = ()
    seed: int = 0
    resume: bool = False
    allow_code_change: bool = False
    exclude_test: Sequence[str | Path] = ()
    subject_patterns: Sequence[str] = ()
    policy: Policy = "refuse"
    device: str = "auto"
    cache: Path | None = None
    devices: int = 1
    nodes: int = 1
    strategy: str = "ddp"


def run_pretraining(options: PretrainOptions) -> dict[str, Any]:
    """Pretrain and return the provenance that ``run.json`` has.

    With several devices each process calls this, and the first one returns it; the others return {}.

    Raises:
        SSL3DError: see :func:`ssl3d.pretrain.loop.pretrain`; or the data cannot be used.
    """
    settings = settings_of(options.preset, options.options, tasks=()).for_method(options.method)
    settings = with_subject_patterns(settings, options.subject_patterns)
    from ssl3d.registry.registry import registry

    registry().methods.get(options.method)  # a misspelt name must not cost an import of torch
    from ssl3d import ranks
    from ssl3d.bench import sizes
    from ssl3d.device import check_precision, select_device
    from ssl3d.errors import count
    from ssl3d.pretrain.devices import Devices, speaks, started
    from ssl3d.pretrain.loop import check_run, pretrain
    from ssl3d.pretrain.run_folder import check_folder
    from ssl3d.pretrain.run_log import check_loggers, logged_by
    from ssl3d.pretrain.spec import resolve_method
    from ssl3d.progress import quiet, say

    devices = Devices(options.devices, options.nodes, options.strategy)
    device = select_device(options.device)
    devices.check(device)
    check_loggers(settings.pretrain.loggers)
    with quiet() if devices.processes > 1 and not speaks() else nullcontext():
        check_folder(options.out, options.resume)
        spec = resolve_method(options.method, settings.methods)
        check_run(spec, settings, options.seed, devices.processes)
        cohort: PreparedCohort | None = None
        if spec.cls.trains != "none":
            check_precision("pretrain.precision", settings.pretrain.precision, device)
            with _in_turn(options) if devices.processes > 1 else nullcontext():
                settings, cohort = _volumes(options, settings)
            say_skipped(cohort.skipped)
            say(f"Volumes: {count(len(cohort), 'case')}, read as {cohort.taken_for}")
    logged = logged_by(settings.pretrain.loggers)
    with started(devices, device) as own, sizes.pretraining(options.method, settings), logged:
        first = ranks.rank() == 0
        run = pretrain(
            spec, cohort, settings, options.seed, options.out, own,
            resume=options.resume, allow_code_change=options.allow_code_change,
        )  # fmt: skip
    if first and cohort is not None and cohort.skipped:
        from ssl3d.files import write_json

        write_json(options.out / "skipped.json", cohort.skipped)
    return run if first else {}


def _in_turn(options: PretrainOptions) -> AbstractContextManager[bool]:
    """Let one process after the other prepare the volumes: the first does it, the others find them."""
    from ssl3d.bench.sources import cache_folder
    from ssl3d.locks import Held

    return Held(cache_folder(options.cache) / "pretrain.lock", wait=True, what="the volumes to prepare")


def _volumes(options: PretrainOptions, settings: Settings) -> tuple[Settings, PreparedCohort]:
    """Return the prepared volumes, without the people who are to be left out, and the settings that say so."""
    from ssl3d.bench.cell import TaskData
    from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits

    cache, policy = options.cache, options.policy
    cohort = pretraining_cohort(options.data, settings, cache, policy)
    if not options.exclude_test:
        return settings, cohort
    columns = [
        TaskData(task, data, task_splits(task, data, settings), task.place)
        for task in load_tasks(options.exclude_test)
        for data in [task_cohort(task, None, settings, cache, policy)]
    ]
    return without_tested(
        columns, cohort, settings,
        lambda settings, built: pretraining_cohort(options.data, settings, cache, policy, built),
    )  # fmt: skip
