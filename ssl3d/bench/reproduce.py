"""Compute one cell again from its record, and compare."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.bench.cell import TaskData
from ssl3d.bench.run import RELATIVE_COST, Bench, Grid, Pretraining, check_match
from ssl3d.bench.sources import pretraining_cohort, task_cohort, task_splits
from ssl3d.bench.stale import stale
from ssl3d.config import Settings, validate
from ssl3d.downstream.problems.kinds import check_mode
from ssl3d.downstream.task_files import task_of_record
from ssl3d.errors import DataError
from ssl3d.files import write_json
from ssl3d.pretrain.spec import resolve_method
from ssl3d.results.floor import as_the_preset_is, floor, pretrained_as_the_preset_says
from ssl3d.results.scores import in_percent
from ssl3d.results.store.manage import differing_results
from ssl3d.results.store.record import Record, canonical_json
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.caption import flatten

if TYPE_CHECKING:
    import torch

    from ssl3d.data.prepared.build import Policy


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
    tolerance: float | None,
    device: torch.device,
    cache: Path | None = None,
    out: Path | None = None,
    own_checkpoint: ResultStore | None = None,
) -> Verdict:
    """Compute the cell of ``record`` again, in a store of its own.

    On the same kind of processor, with as many threads and the same versions, the number must come back bit for
    bit. Elsewhere sums are rounded in another order, and two runs differ by luck: the number must come back
    within what the preset's floor of such luck allows (``results/floor.json``).

    Args:
        record: sound; written by a bench that kept its settings.
        tolerance: largest difference of the score that counts as the same, instead of both: percentage points, or for
            errors percent of the score.
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
        return compare(record, _again(record, run, device, cache, out, own_checkpoint), tolerance)
    with tempfile.TemporaryDirectory(prefix="ssl3d-reproduce-") as folder:
        return compare(record, _again(record, run, device, cache, Path(folder), own_checkpoint), tolerance)


def _again(
    record: Record, run: Mapping[str, Any], device: torch.device, cache: Path | None, out: Path,
    own_checkpoint: ResultStore | None,
) -> Record:  # fmt: skip
    identity = record["identity"]
    settings = validate(Settings, run["settings"], "settings of the record")
    spec = resolve_method(identity["method"], settings.methods)
    given = _run_folder(record, run["checkpoint"], own_checkpoint) if run["checkpoint"] else None
    ready = _run_folder(record, None, own_checkpoint) if own_checkpoint and not given else None
    task = task_of_record(record)
    policy: Policy = "skip" if any((record.get("left_out") or {}).values()) else "refuse"  # as then
    place = Path(run["task_data"]) if run["task_data"] else None
    cohort = task_cohort(task, place, settings, cache, policy)
    splits = [s for s in task_splits(task, cohort, settings) if s.name == identity["split"]]
    if not splits:
        raise DataError(f"Task {task.name} has no split {identity['split']} any more: the data changed.")
    trained = spec.cls.trains != "none"
    unlabelled = (
        pretraining_cohort(run["data"], settings, cache, policy) if trained and not (given or ready) else None
    )
    match = identity.get("match") or {"by": "steps"}
    if match["by"] == "time":  # the cost that was measured then; another measurement gives other steps
        steps = ((identity.get("pretrain") or {}).get("budget") or {}).get("steps")
        if not steps:
            raise DataError(
                "The record does not say how many steps its pretraining had: it cannot be reproduced."
            )
        write_json(out / RELATIVE_COST, {spec.name: match["steps"] / steps})
    grid = Grid(
        [spec], [TaskData(task, cohort, splits, place)], [check_mode(identity["mode"])], [identity["seed"]],
        label_fractions=(identity["label_fraction"],), at_steps=(identity.get("pretrain_step"),),
    )  # fmt: skip
    pretraining = Pretraining(
        unlabelled, {spec.name: given} if given else {}, check_match(match["by"]), run["data"],
        seen=(identity["pretrain"] or {}).get("data", ""),
    )  # fmt: skip
    bench = Bench(grid, pretraining, settings, ResultStore(out), device)
    cell = bench.cell_like(identity)
    _check_same(identity, cell.identity)
    if ready is not None:
        shutil.copytree(ready, bench.run_folder(cell.weights), ignore=shutil.ignore_patterns("tensorboard"))
    ((again, _),) = bench.run()
    return again


def _run_folder(record: Record, named: str | None, own: ResultStore | None) -> Path:
    """Return the run behind ``record``, where it was or in its store."""
    place = Path(named or record["checkpoint"])
    folder = own.run_folder(record) if own else place
    if folder is None or not folder.is_dir():
        raise DataError(f"The record's checkpoint {place} is not there.")
    return folder


def _check_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if canonical_json(now) == canonical_json(then):
        return
    old, new = flatten(then), flatten(now)
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    changes = "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in keys)
    raise DataError(f"This is not the same cell any more, so its number cannot come back: {changes}.")


# --- Comparison ------------------------------------------------------------------------------------

_ONE_SETUP = ("cpu", "instruction_set", "gpu", "threads", "python", "versions")

UNKNOWN_INSTRUCTIONS = "The record does not say which instruction set its processor had."


@dataclass(frozen=True)
class _Allowed:
    """Largest difference that counts as the same, in the unit of the score, and in words where it comes from."""

    difference: float
    words: str


def compare(old: Record, new: Record, tolerance: float | None = None) -> Verdict:
    """Compare a record with the one that was computed again; see :func:`reproduce`."""
    fields = differing_results(old, new)
    what = f"{old['metric'].upper()} {old['score']:.6g} in the record, {new['score']:.6g} now"
    if not fields:
        return Verdict(
            True,
            True,
            [f"Reproduced bit for bit: {what}, and so is every case.", *_environments(old, new)],
            new,
        )
    difference = abs(new["score"] - old["score"])
    allowed = _allowed(old, new, tolerance)
    reproduced = difference <= allowed.difference
    verdict = "Reproduced within rounding luck" if tolerance is None else f"Reproduced within {tolerance:g}"
    lines = [
        f"{verdict if reproduced else 'NOT reproduced'}: {what} (difference {difference:.3g}). {allowed.words}",
        f"Differs in: {', '.join(fields)}.",
    ]
    same = old.get("fingerprint_of_weights") == new.get("fingerprint_of_weights")
    lines.append(f"The pretrained weights are {'the same' if same else 'others'}, bit for bit.")
    reasons = stale(old)
    lines += [f"Changed since: {'; '.join(reasons)}."] if reasons else []
    lines += _environments(old, new)
    return Verdict(reproduced, False, lines, new)


def _allowed(old: Record, new: Record, tolerance: float | None) -> _Allowed:
    points = in_percent(old["metric"])
    if tolerance is not None:
        largest = tolerance if points else tolerance / 100 * abs(old["score"])
        return _Allowed(largest, f"Allowed by --tolerance: {tolerance:g} {'points' if points else '%'}.")
    differing = _environments(old, new)
    if not differing:
        return _Allowed(
            0.0, "Compared bit by bit, because threads, kind of processor and versions are the same."
        )
    identity = old["identity"]
    preset, task, mode = str(old.get("preset")), identity["task"], identity["mode"]
    trained = old.get("fingerprint_of_weights") != new.get("fingerprint_of_weights") and identity.get(
        "pretrain"
    )
    known = pretrained_as_the_preset_says(old) if trained else as_the_preset_is([old])
    largest = floor(preset, task, mode, 1, identity["method"] if trained else "") if known else None
    other = (
        "Whether the processor had the same instructions is not known, and sums may be rounded in another order"
        if differing == [UNKNOWN_INSTRUCTIONS]
        else "Threads, kind of processor or versions differ, so that sums are rounded in another order"
    )
    if largest is None:
        what = f"pretraining {identity['method']} by preset {preset} for" if trained else f"preset {preset},"
        return _Allowed(
            0.0,
            f"{other}; how much luck that may bring was not measured for {what} {task}, {mode} (no floor). "
            "Give --tolerance POINTS to judge by a difference of your own"
            + (", or --checkpoint to evaluate the weights of then." if trained else "."),
        )
    return _Allowed(
        largest, f"{other}; two runs that differ by that only are up to {largest:.3g} apart (95 %)."
    )


def _environments(old: Record, new: Record) -> list[str]:
    """Return what differs in threads, processor and versions: of the evaluation, and of the pretraining."""
    found: dict[tuple[Any, ...], str] = {}
    for name, of in (("environment", ""), ("pretrain_environment", " of the pretraining")):
        then, now = (_setup(r.get(name) or r.get("environment") or {}) for r in (old, new))
        if "instruction_set" in now and "instruction_set" not in then:  # a record from before it was kept
            found[("instruction set",)] = UNKNOWN_INSTRUCTIONS
        for key in then:
            if key in now and then[key] != now[key]:
                what = key.removeprefix("versions.").replace("_", " ")
                found.setdefault(
                    (what, then[key], now[key]), f"Another {what}{of}: {then[key]}, now {now[key]}."
                )
    return list(found.values())


def _setup(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides how sums are rounded. The version of ssl3d does not: its code has a hash."""
    values = flatten({key: environment[key] for key in _ONE_SETUP if key in environment})
    return {key: value for key, value in values.items() if key != "versions.ssl3d"}
