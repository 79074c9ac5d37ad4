"""Is a record still what this ssl3d would compute? And with what could it be computed again?

A record carries its settings and a hash of the code that made it. It is stale when that code, the
preset that it names, or the data at the place that it names have changed since.
"""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ssl3d.config import Settings, load_settings, options_without_effect, preset_names
from ssl3d.downstream.tasks import Task
from ssl3d.errors import PluginError, SSL3DError
from ssl3d.results.store.record import Record, canonical_json, no_garbage_collection
from ssl3d.results.table.caption import flatten
from ssl3d.results.table.model import MODES
from ssl3d.source_hash import evaluation_code, pretraining_code


def run_of(
    settings: Settings, data: str, task_data: Path | None, checkpoint: Path | None, task: Task
) -> dict[str, Any]:
    """Return what a record keeps to be computed again: settings, where they left the preset, places, and
    the text of a task file."""
    values = settings.model_dump(mode="json")
    changed: dict[str, Any] = {}
    if settings.preset in preset_names():
        preset = flatten(load_settings(settings.preset).model_dump(mode="json"))
        here = flatten(values)
        # None: the preset's rate of a method, which `pretrain.lr` has taken the place of.
        changed = {
            k: here.get(k)
            for k in (here.keys() | preset.keys()) - {"changed"}
            if k not in preset or preset[k] != here.get(k)
        }
    return {
        "settings": values,
        "overrides": changed,
        "data": data,
        "task_data": task_data and str(task_data),
        "checkpoint": checkpoint and str(checkpoint),
        **({"task_file": task.source} if task.source else {}),
    }


class _Today:
    """What presets are today, and what has changed since in settings that many records share."""

    def __init__(self) -> None:
        self._presets: dict[str, dict[str, Any]] = {}
        self._changed: dict[bytes, list[str]] = {}
        self._runs: dict[int, tuple[Mapping[str, Any], bytes]] = {}
        self._code: dict[tuple[str, str, str], str | None] = {}

    def code(self, hashed: Callable[[str, str], str], name: str, backbone: str) -> str | None:
        """Return a hash of today's code; None where a plugin is gone."""
        key = (hashed.__name__, name, backbone)
        if key not in self._code:
            try:
                self._code[key] = hashed(name, backbone)
            except PluginError:
                self._code[key] = None
        return self._code[key]

    def preset(self, name: str) -> dict[str, Any]:
        """Return the options of a preset, flat.

        Raises:
            SSL3DError: it cannot be read.
        """
        if name not in self._presets:
            self._presets[name] = flatten(load_settings(name).model_dump(mode="json"))
        return self._presets[name]

    def changed_settings(self, record: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
        identity = record["identity"]
        # All that the answer depends on; equal bytes of marshal (version 2 has no references) mean equal values.
        # Those of a run that many records share are kept with it, so that no other comes to have its id.
        own = [identity["method"], identity["mode"], identity["task"], identity.get("pretrain") is None]
        own += sorted(identity.get("budget") or ())
        if id(run) not in self._runs:
            self._runs[id(run)] = (run, hashlib.sha256(marshal.dumps([run], 2)).digest())
        key = self._runs[id(run)][1] + marshal.dumps([*own, "weights" in identity], 2)
        if key not in self._changed:
            self._changed[key] = _changed_settings(record, run, self)
        return self._changed[key]


def stale(record: Mapping[str, Any], today: _Today | None = None) -> list[str] | None:
    """Return why this ssl3d would not compute ``record`` today; None when the record cannot tell.

    Looks at code and configuration; for data see :func:`stale_records`.
    """
    code, run, identity = record.get("code"), record.get("run"), record["identity"]
    backbone = (identity.get("backbone") or {}).get("name")
    if not code or not run or not backbone:
        return None
    today = today or _Today()
    reasons = []
    # Given weights are in the identity by their hash, whatever made them.
    if record["method"].get("trains") != "none" and "weights" not in identity:
        now = today.code(pretraining_code, identity["method"], backbone)
        reasons += ["code of pretraining changed"] * (now != code.get("pretrain"))
    now = today.code(evaluation_code, code.get("problem") or "", backbone)
    reasons += ["code of evaluation changed"] * (now != code.get("downstream"))
    return reasons + today.changed_settings(record, run)


def _changed_settings(record: Mapping[str, Any], run: Mapping[str, Any], today: _Today) -> list[str]:
    preset = run["settings"]["preset"]
    if preset not in preset_names():
        return []
    try:
        now = today.preset(preset) | run["overrides"]
    except SSL3DError as error:
        return [f"preset {preset} cannot be read: {error}"]
    then = flatten(run["settings"])
    identity = record["identity"]
    own = {
        "pretrain.lr": f"method_lr.{identity['method']}",
        "downstream.crop": f"downstream.{identity['mode']}.crop",
    }
    for settings in (then, now):  # whichever option it came from, the value is what counts
        settings |= {shared: settings.get(key) or settings.get(shared) for shared, key in own.items()}
    keys = [k for k in then.keys() | now.keys() if then.get(k) != now.get(k) and _matters(k, identity, run)]
    return [f"{k} {then.get(k)} -> {now.get(k)}" for k in sorted(keys)]


def _matters(key: str, identity: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if key in options_without_effect() or section == "method_lr":
        return False
    if "weights" in identity and section in ("pretrain", "methods"):
        return False  # given weights: what made them is past
    if section == "downstream":
        if rest == f"{name}.crop":
            return False
        if name in MODES and name != identity["mode"]:
            return False
        # What the settings had and the identity has not is an option that this kind of task does not read.
        had = key in flatten(run.get("settings") or {})
        return not had or rest.rpartition(".")[2] in (identity.get("budget") or ())
    if section == "methods":
        return name == identity["method"]
    if section == "phantoms":
        return run["task_data"] is None or (run["data"] == "phantoms" and "weights" not in identity)
    if section == "data" and name in ("counts", "task_spacing_mm"):
        return rest.rpartition(".")[2] == identity["task"]
    return section != "pretrain" or identity.get("pretrain") is not None


@no_garbage_collection()
def stale_records(records: Iterable[Record]) -> dict[int, list[str] | None]:
    """Return why each record (by its place) is stale: code, configuration, or data.

    The data at a place have changed when a newer record, equal in everything else, read others there.
    """
    records = list(records)
    today = _Today()
    found = {place: stale(record, today) for place, record in enumerate(records)}
    groups: dict[str, list[int]] = {}
    sources: dict[int, str] = {}  # of runs, whose data these are
    for place, record in enumerate(records):
        if not record.get("run"):
            continue
        identity, run = dict(record["identity"]), record["run"]
        pretrain = identity.pop("pretrain", None)
        rest = {k: v for k, v in identity.items() if k not in ("task_data", "split_cases")}
        budget = pretrain and {k: v for k, v in pretrain.items() if k != "data"}
        if id(run) not in sources:  # many records share one
            # The phantoms are made from the settings, so other phantoms are other settings, not changed data.
            settings = run["settings"]
            sources[id(run)] = canonical_json(
                [run["data"], run["task_data"], settings["phantoms"], settings["data"]]
            )
        groups.setdefault(canonical_json([rest, budget]) + sources[id(run)], []).append(place)
    for places in groups.values():
        newest = max(places, key=lambda place: str(records[place].get("created", "")))
        for place in places:
            old, new = records[place]["identity"], records[newest]["identity"]
            if (old["task_data"], old.get("split_cases")) != (new["task_data"], new.get("split_cases")):
                found[place] = [*(found[place] or []), f"data of {old['task']} changed"]
            elif old.get("pretrain") != new.get("pretrain"):
                found[place] = [*(found[place] or []), "data of pretraining changed"]
    return found
