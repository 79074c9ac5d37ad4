"""``ssl3d.pretrain(...)`` and ``ssl3d.bench(...)``: what the commands of the same names do, from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl3d.bench.given import as_overrides, checked_options
from ssl3d.bench.plan import BenchOptions, bench_of
from ssl3d.bench.pretraining import PretrainOptions, run_pretraining

if TYPE_CHECKING:
    from ssl3d.downstream.tasks import Task
    from ssl3d.results.results import Results


def pretrain(
    method: str, data: str | Path = "phantoms", *, out: str | Path, preset: str = "quick",
    options: Mapping[str, Any] | Iterable[str] = (), **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Pretrain a backbone, as ``ssl3d pretrain`` does.

    Args:
        method: a registered method or variant (``ssl3d methods``).
        data: ``phantoms``, a folder of volumes, or ``LAYOUT=DIR``.
        out: folder of the run, which :func:`ssl3d.load` reads.
        preset: a name, or a YAML file.
        options: over the preset: ``{"pretrain.steps": 1000, "byol.base_momentum": 0.98}``.
        more: any other field of :class:`ssl3d.bench.pretraining.PretrainOptions`: ``seed``, ``resume``, ``device``, ...

    Returns:
        The provenance in ``run.json``: losses, steps, seconds, preparation, hash of the weights.

    Raises:
        SSL3DError: something cannot be used; the message has the fix.
    """
    checked = checked_options(_names(PretrainOptions), more, "ssl3d.pretrain")
    return run_pretraining(
        PretrainOptions(method, Path(out), str(data), preset, as_overrides(options), **_paths(checked))
    )


def bench(
    methods: Sequence[str] | Literal["all"] = ("scratch", "gvsl"),
    tasks: Sequence[str | Path | Task] | Literal["all"] = ("shc", "sac", "ccc", "sbm"),
    *, store: str | Path, preset: str = "quick", options: Mapping[str, Any] | Iterable[str] = (), **more: Any,
) -> Results:  # fmt: skip
    """Pretrain methods and evaluate them on tasks, as ``ssl3d bench`` does, in this process.

    Cells that are in the store are not computed again, and calls on one store, at once or one after the other, share the
    cells. (Several processes of one call: ``ssl3d bench --jobs N``.)

    Args:
        methods: rows.
        tasks: columns: names, task files or :class:`ssl3d.Task`.
        store: folder of the records.
        preset: a name, or a YAML file.
        options: over the preset: ``{"pretrain.steps": 1000}``.
        more: any other field of :class:`ssl3d.bench.plan.BenchOptions`: ``modes``, ``seeds``, ``data``, ``task_data``,
            ``checkpoint``, ``label_fractions``, ``device``, ...

    Returns:
        The records of these cells, and the cells that failed.

    Raises:
        SSL3DError: something cannot be used; nothing has been trained then.
    """
    from ssl3d.errors import CellsFailed
    from ssl3d.results.results import Results

    checked = checked_options(_names(BenchOptions), more, "ssl3d.bench")
    rows = (methods,) if isinstance(methods, str) and methods != "all" else methods
    columns = (tasks,) if isinstance(tasks, str) and tasks != "all" else tasks
    asked = BenchOptions(
        Path(store), rows, columns, preset=preset, options=as_overrides(options), **_paths(checked)
    )
    job = bench_of(asked)
    cells = [cell.identity for cell in job.cells()]
    records = []
    try:
        records += [record for record, _ in job.run()]
    except CellsFailed:  # they are in the store, by name, and in the results
        wanted = [job.store.path_for(identity) for identity in cells]
        records = [job.store.read(path) for path in wanted if path.is_file()]
    failures = [failure for failure in job.store.sound_failures()[0] if failure["identity"] in cells]
    return Results(
        Path(store), tuple(records), tuple(failures), (), tuple(spec.name for spec in job.grid.methods)
    )


def _names(cls: type) -> list[str]:
    return [field.name for field in fields(cls)]


def _paths(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with texts as paths where these are wanted."""
    found = dict(options)
    for name in ("task_data", "checkpoint", "splits_file"):
        if name in found:
            found[name] = {key: Path(value) for key, value in found[name].items()}
    if found.get("cache") is not None:
        found["cache"] = Path(found["cache"])
    return found
