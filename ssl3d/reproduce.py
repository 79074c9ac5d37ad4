"""Compute one cell again from its record, and compare."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench import RELATIVE_COST, Bench, TaskData, check_match
from ssl3d.config import Settings, validate
from ssl3d.data.sources import pretraining_cohort, task_cohort, task_splits
from ssl3d.downstream.harness import check_mode
from ssl3d.downstream.task_files import task_of_record
from ssl3d.errors import DataError
from ssl3d.files import write_json
from ssl3d.pretrain.method import resolve_method
from ssl3d.provenance import stale
from ssl3d.results.manage import differing_results
from ssl3d.results.scores import in_percent
from ssl3d.results.store import Record, ResultStore, canonical_json
from ssl3d.results.table import flatten

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Verdict:
    """Whether a number came back.

    Attributes:
        reproduced: bit for bit, or within the tolerance.
        identical: bit for bit: score, every case, the validation curve.
        lines: what to tell the user.
        record: the new record.
    """

    reproduced: bool
    identical: bool
    lines: list[str]
    record: Record


def reproduce(
    record: Record,
    tolerance: float,
    device: torch.device,
    cache: Path | None = None,
    out: Path | None = None,
    own_checkpoint: ResultStore | None = None,
) -> Verdict:
    """Compute the cell of ``record`` again, in a store of its own.

    Args:
        record: sound; written by a bench that kept its settings.
        tolerance: largest difference of the score, in percentage points; for errors, in percent of the score.
        device: where to compute.
        cache: prepared volumes and phantoms.
        out: store of the new record and its run; None: deleted afterwards.
        own_checkpoint: the record's store; evaluate the checkpoint it holds instead of pretraining again.

    Raises:
        DataError: the record does not say how it was made, its checkpoint is gone, or the cell has
            another identity today, for example because the data changed.
    """
    run = record.get("run")
    if not run:
        raise DataError(
            "The record does not hold the settings it was made with (it is from an older ssl3d), so it cannot be "
            "computed again from itself. Compute it with ssl3d bench and the options of that time."
        )
    if out is not None:
        return _compare(record, _again(record, run, device, cache, out, own_checkpoint), tolerance)
    with tempfile.TemporaryDirectory(prefix="ssl3d-reproduce-") as folder:
        return _compare(record, _again(record, run, device, cache, Path(folder), own_checkpoint), tolerance)


def _again(
    record: Record, run: Mapping[str, Any], device: torch.device, cache: Path | None, out: Path,
    own_checkpoint: ResultStore | None,
) -> Record:  # fmt: skip
    identity = record["identity"]
    settings = validate(Settings, run["settings"], "settings of the record")
    spec = resolve_method(identity["method"], settings.methods)
    checkpoints = {}
    if run["checkpoint"] or (own_checkpoint and spec.cls.trains != "none"):
        named = Path(run["checkpoint"] or record["checkpoint"])
        folder = own_checkpoint.run_folder(record) if own_checkpoint else named
        if folder is None or not folder.is_dir():
            raise DataError(f"The record's checkpoint {named} is not there.")
        checkpoints[spec.name] = folder
    task = task_of_record(record)
    place = Path(run["task_data"]) if run["task_data"] else None
    cohort = task_cohort(task, place, settings, cache)
    splits = [s for s in task_splits(task, cohort, settings) if s.name == identity["split"]]
    if not splits:
        raise DataError(f"Task {task.name} has no split {identity['split']} any more: the data changed.")
    unlabelled = None
    if spec.cls.trains != "none" and not checkpoints:
        unlabelled = pretraining_cohort(run["data"], settings, cache)
    match = identity.get("match", {"by": "steps"})
    if match["by"] == "time":  # the cost that was measured then; another measurement gives other steps
        per_step = match["steps"] / identity["pretrain"]["budget"]["steps"]
        write_json(out / RELATIVE_COST, {spec.name: per_step})
    bench = Bench(
        [spec], [TaskData(task, cohort, splits, place)], [check_mode(identity["mode"])], [identity["seed"]],
        settings, unlabelled, checkpoints, ResultStore(out), device,
        at_steps=(identity.get("pretrain_step"),), label_fractions=(identity["label_fraction"],),
        match=check_match(match["by"]), data=run["data"],
    )  # fmt: skip
    today = bench.identity(spec, bench.tasks[0], splits[0], identity)
    if canonical_json(today) != canonical_json(identity):
        then, now = flatten(identity), flatten(today)
        keys = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
        changes = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in keys)
        raise DataError(f"This is not the same cell any more, so its number cannot come back: {changes}.")
    ((again, _),) = bench.run()
    return again


def _compare(old: Record, new: Record, tolerance: float) -> Verdict:
    difference = abs(new["score"] - old["score"])
    points = in_percent(old["metric"])
    largest = tolerance if points else tolerance / 100 * abs(old["score"])
    fields = differing_results(old, new)
    what = f"{old['metric'].upper()} {old['score']:.6g} in the record, {new['score']:.6g} now"
    if not fields:
        lines = [f"Reproduced bit for bit: {what}, and so is every case."]
    elif difference <= largest:
        lines = [
            f"Reproduced within {tolerance:g} {'points' if points else '%'}: {what} (difference {difference:.3g})."
        ]
    else:
        lines = [f"NOT reproduced: {what} (difference {difference:.3g}, tolerance {largest:g})."]
    if fields:
        lines.append(f"Differs in: {', '.join(fields)}.")
        same = old.get("fingerprint_of_weights") == new.get("fingerprint_of_weights")
        lines.append(f"The pretrained weights are {'the same' if same else 'others'}, bit for bit.")
        reasons = stale(old)
        lines += [f"Changed since: {'; '.join(reasons)}."] if reasons else []
        lines += _environments(old, new)
    return Verdict(not fields or difference <= largest, not fields, lines, new)


def _environments(old: Record, new: Record) -> list[str]:
    then, now = flatten(old.get("environment") or {}), flatten(new.get("environment") or {})
    keys = [k for k in then if k in now and then[k] != now[k]]
    return [f"Another {key.removeprefix('versions.')}: {then[key]}, now {now[key]}." for key in keys]
