"""Which records belong to one table, row and column."""

from __future__ import annotations

import marshal
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssl3d.results.store.record import Record, canonical_json


@dataclass
class _Part:
    """All records that agree in everything but method, its configuration and the seed."""

    pretrain: str  # "" without pretraining
    shared: str  # backbone, label fraction and whatever a later schema adds
    column: tuple[str, str]  # (mode, task)
    split: str
    conditions: dict[str, str]  # of this task, this mode and this split; see _conditions
    records: list[Record] = field(default_factory=list)

    @property
    def created(self) -> str:
        return min(str(record.get("created", "")) for record in self.records)


_FOLD = re.compile(r"fold-?\d+$")


_OWN = {"method", "method_config", "seed", "pretrain_seed", "weights"}


_OF_COLUMN = {"task", "mode", "task_data", "split", "split_cases", "budget"}


_OF_PRETRAINING = {"pretrain", "match", "pretrain_step"}


_NOT_SHARED = _OWN | _OF_COLUMN | _OF_PRETRAINING


class _Canonical:
    """:func:`canonical_json` that encodes what it has seen before only once.

    Thousands of records share a few budgets and backbones. Equal bytes of ``marshal`` (version 2, which
    has no references) mean equal values, and take a tenth of the time.
    """

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def __call__(self, value: Any) -> str:
        key = marshal.dumps(value, 2)
        if key not in self._seen:
            self._seen[key] = canonical_json(value)
        return self._seen[key]


def _parts(records: Iterable[Record]) -> list[_Part]:
    records = list(records)
    parts: dict[tuple[str, ...], _Part] = {}
    canonical = _Canonical()
    swept = _swept(records, canonical)
    for record in records:
        identity = record["identity"]
        pretraining = _pretraining(identity)
        if pretraining and canonical(_without_rate(pretraining)) not in swept:
            pretraining = _without_rate(pretraining)
        pretrain = canonical(pretraining) if pretraining else ""
        shared = canonical({k: v for k, v in identity.items() if k not in _NOT_SHARED})
        mode, task, split = identity["mode"], identity["task"], identity["split"]
        own = canonical([identity.get(key) for key in ("task_data", "split_cases", "budget")])
        key = (pretrain, shared, mode, task, split, own)
        if key not in parts:
            parts[key] = _Part(pretrain, shared, (mode, task), split, _conditions(identity, canonical))
        parts[key].records.append(record)
    return sorted(parts.values(), key=lambda part: (part.created, part.column, part.split))


def _pretraining(identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the conditions of pretraining that the rows of a table share.

    Methods that were matched in voxels or time have other steps each, and share what was matched.
    Weights kept on the way share the step that they were kept at.
    """
    pretrain, match = identity.get("pretrain"), identity.get("match")
    if not pretrain:
        return None
    if "pretrain_step" in identity:
        pretrain = {**pretrain, "kept_at_step": identity["pretrain_step"]}
    if match:
        budget = {k: v for k, v in pretrain.get("budget", {}).items() if k != "steps"}
        pretrain = {**pretrain, "budget": budget, "match": match}
    return pretrain


def _without_rate(pretraining: Mapping[str, Any]) -> dict[str, Any]:
    budget = {k: v for k, v in pretraining.get("budget", {}).items() if k != "lr"}
    return {**pretraining, "budget": budget}


def _swept(records: Iterable[Record], canonical: _Canonical) -> set[str]:
    """Return the conditions of pretraining under which one row has several learning rates.

    There the rate is what is compared, and each has its own table. Elsewhere it is an option of the row, as in a
    preset with ``method_lr``, and the caption names it.
    """
    rates: dict[tuple[str, ...], set[Any]] = defaultdict(set)
    for record in records:
        identity = record["identity"]
        if pretraining := _pretraining(identity):
            row = (identity["method"], canonical(identity["method_config"]), canonical(identity["backbone"]))
            rates[canonical(_without_rate(pretraining)), *row].add(pretraining.get("budget", {}).get("lr"))
    return {conditions for (conditions, *_), values in rates.items() if len(values) > 1}


def _conditions(identity: Mapping[str, Any], canonical: Callable[[Any], str]) -> dict[str, str]:
    """Return what must be equal wherever two records of one table meet.

    The keys say where that is: all records of a task share its data and its kind of split, all of
    a mode share the options of its budget that both read, all of a fold share its cases.
    """
    task, mode, split = identity["task"], identity["mode"], identity["split"]
    options = {f"{key} of {mode}": canonical(value) for key, value in (identity.get("budget") or {}).items()}
    return options | {
        f"data of {task}": str(identity.get("task_data")),
        f"splits of {task}": "folds" if _FOLD.match(split) else split,
        f"cases of {task} {split}": str(identity.get("split_cases")),
    }


@dataclass
class _Draft:
    """A table in the making: the conditions taken so far, and its records by column."""

    pretrain: str
    shared: str
    conditions: dict[str, str] = field(default_factory=dict)
    columns: dict[tuple[str, str], list[Record]] = field(default_factory=dict)

    def takes(self, part: _Part) -> bool:
        return all(self.conditions.get(k, v) == v for k, v in part.conditions.items())

    def add(self, part: _Part) -> None:
        self.conditions |= part.conditions
        self.columns.setdefault(part.column, []).extend(part.records)

    @property
    def records(self) -> list[Record]:
        return [record for records in self.columns.values() for record in records]

    def rates(self) -> dict[Any, list[str]]:
        """Return the methods' titles by learning rate of pretraining, that of the most methods first."""
        titles: dict[Any, dict[str, None]] = defaultdict(dict)
        for record in self.records:
            if pretraining := record["identity"].get("pretrain"):
                titles[pretraining.get("budget", {}).get("lr")][record["method"]["title"]] = None
        return {rate: sorted(titles[rate]) for rate in sorted(titles, key=lambda rate: -len(titles[rate]))}

    @property
    def facets(self) -> dict[str, Any]:
        """The conditions as nested data, for captions."""
        budgets: dict[str, dict[str, Any]] = {}
        data: dict[str, dict[str, Any]] = defaultdict(lambda: {"cases": {}})
        for record in self.records:
            identity = record["identity"]
            budgets.setdefault(identity["mode"], {}).update(identity.get("budget") or {})
            data[identity["task"]]["fingerprint"] = identity.get("task_data")
            data[identity["task"]]["cases"][identity["split"]] = identity.get("split_cases")
        identity = self.records[0]["identity"]
        pretrain = next((p for r in self.records if (p := _pretraining(r["identity"]))), None)
        if pretrain and len(rates := self.rates()) > 1:
            own = {title: rate for rate, titles in rates.items() for title in titles}
            pretrain = {**pretrain, "budget": {**pretrain.get("budget", {}), "lr": own}}
        shared = {k: v for k, v in identity.items() if k not in _NOT_SHARED}
        presets = sorted({str(record.get("preset", "?")) for record in self.records})
        return {"preset": ", ".join(presets), "pretrain": pretrain, **shared, **budgets, "data": data}


def _assemble(parts: Sequence[_Part]) -> list[_Draft]:
    """Put every part into the first table (oldest first) with whose conditions it agrees.

    Records without pretraining fit every pretraining budget, so they are repeated in each table
    with a column that they belong to. The preset's name is no condition: the identity holds
    everything that decides a number, and a copy of a preset under another name changes none.
    """
    drafts: list[_Draft] = []
    for part in (p for p in parts if p.pretrain):
        same = (d for d in drafts if (d.pretrain, d.shared) == (part.pretrain, part.shared))
        draft = next((d for d in same if d.takes(part)), None)
        if draft is None:
            draft = _Draft(part.pretrain, part.shared)
            drafts.append(draft)
        draft.add(part)
    compared_in = {id(draft): set(draft.columns) for draft in drafts}
    alone: list[_Draft] = []
    for part in (p for p in parts if not p.pretrain):
        fitting = [d for d in drafts + alone if d.shared == part.shared and d.takes(part)]
        homes = [d for d in fitting if part.column in compared_in.get(id(d), ())] or fitting[:1]
        if not homes:
            homes = [_Draft("", part.shared)]
            alone += homes
        for draft in homes:
            draft.add(part)
    return drafts + alone
