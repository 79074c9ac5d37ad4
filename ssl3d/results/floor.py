"""The floor: how far two runs lie apart that differ by rounding only, measured on the phantoms.

Another number of threads or another kind of processor changes the last digit of every sum, and training makes a
difference of scores out of it. ``floor.json`` holds what ``benchmarks/studies/floor.py`` measured: the standard deviation of
the score of runs that differ by 1e-6 when they begin. Of scratch that is the luck of the evaluation, whatever is evaluated.
A pretraining has luck of its own, which differs from method to method by a factor of hundred: it is measured by method.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.config import options_without_effect

if TYPE_CHECKING:
    from ssl3d.results.store.record import Record

FILE = Path(__file__).with_name("floor.json")


@lru_cache(maxsize=2)
def _measured(path: Path) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    return found


def on_phantoms(records: Iterable[Record]) -> bool:
    """Return whether all of ``records`` were made on the bundled phantoms."""
    runs = [record.get("run") or {} for record in records]
    return bool(runs) and all(run.get("data") == "phantoms" and not run.get("task_data") for run in runs)


_DECIDES = ("downstream.", "phantoms.", "data.", "backbone.")


def as_the_preset_is(records: Iterable[Record]) -> bool:
    """Return whether ``records`` were evaluated as the floor of the preset that they name is: with all labels, and no option
    that decides it changed."""
    return all(
        _has_all_labels(record) and not any(key.startswith(_DECIDES) for key in _overrides(record))
        for record in records
    )


def _has_all_labels(record: Record) -> bool:
    return bool(record["identity"].get("label_fraction", 1.0) == 1.0)


def _overrides(record: Record) -> set[str]:
    return set((record.get("run") or {}).get("overrides") or ())


def pretrained_as_the_preset_says(record: Record) -> bool:
    """Return whether the weights behind ``record`` are the preset's own: not imported, of no other length or option."""
    identity = record["identity"]
    if not (identity.get("pretrain") and _has_all_labels(record)) or any(
        identity.get(key) for key in ("weights", "match", "pretrain_step")
    ):
        return False
    changed = _overrides(record) - options_without_effect()
    of_method = [key.split(".")[1] for key in changed if key.startswith(("methods.", "method_lr."))]
    own = any(identity["method"] == name or identity["method"].startswith(f"{name}_") for name in of_method)
    return not own and not any(key.startswith((*_DECIDES, "pretrain.")) for key in changed)


def floor(preset: str, task: str, mode: str, seeds: int, method: str = "") -> float | None:
    """Return the difference of two means over ``seeds`` that rounding alone stays below in 95 % of cases.

    None where it was not measured. With a standard deviation s of one run it is 1.96 s sqrt(2 / seeds).

    Args:
        preset: of the records.
        task, mode: of the column.
        seeds: of each row.
        method: count its pretraining, too; without, the same weights are evaluated.
    """
    found = _measured(FILE).get(preset, {}).get(task, {}).get(mode, {})
    if method:
        found = found.get("pretrained", {}).get(method, {})
    return 1.96 * float(found["sd"]) * math.sqrt(2 / seeds) if "sd" in found else None
