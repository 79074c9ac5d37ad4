"""Captions: what the numbers of a table have in common, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssl3d.results.table.grouping import _Draft
from ssl3d.results.table.model import MODES


def _distinction(config: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]) -> str:
    """Return ``" (key=value)"`` naming what sets this configuration of a method apart."""
    if len(configs) < 2:
        return ""
    keys = sorted({key for c in configs for key in c if any(o.get(key) != c[key] for o in configs)})
    if not keys:
        return ""
    return f" ({', '.join(f'{key}={_short(config.get(key))}' for key in keys)})"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def _short(value: Any) -> str:
    return value[:10] if isinstance(value, str) and len(value) > 24 else str(value)


_SHOWN_DIFFERENCES = 6


def _differences(flat: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Return what sets one table's conditions apart from the other tables'."""
    # Where one side has no such condition (a table without fine-tuning has no budget for it),
    # there is nothing to compare.
    keys = [k for k, value in flat.items() if any(k in other and other[k] != value for other in others)]
    if "preset" in keys and all(other["preset"] != flat["preset"] for other in others):
        return f"preset {flat['preset']}"
    text = ", ".join(f"{key} = {_short(flat[key])}" for key in keys[:_SHOWN_DIFFERENCES])
    more = len(keys) - _SHOWN_DIFFERENCES
    return text + (f" and {more} more" if more > 0 else "")


def _caption(flat: Mapping[str, Any], draft: _Draft) -> str:
    parts = [f"Preset {flat['preset']}", *_backbone(flat)]
    if flat.get("pretrain.data"):
        steps = flat.get("pretrain.budget.steps")
        budget = f" {steps} steps" if steps is not None else ""
        if "pretrain.match.by" in flat:
            reference = f"{flat['pretrain.match.steps']} supervised steps"
            budget = f" matched in {flat['pretrain.match.by']} to {reference}"
        if "pretrain.kept_at_step" in flat:
            budget = f" {flat['pretrain.kept_at_step']} of{budget}"
        parts.append(f"pretraining{budget} on data {flat['pretrain.data'][:8]}")
        if len(rates := draft.rates()) > 1:
            (most, _), *others = rates.items()
            own = ", ".join(f"{rate} for {', '.join(titles)}" for rate, titles in others)
            parts.append(f"learning rate of pretraining {most}, but {own}")
    parts += [
        f"{title.lower()} {flat[f'{mode}.steps']} steps"
        for mode, title in MODES.items()
        if f"{mode}.steps" in flat
    ]
    fraction = flat.get("label_fraction", 1.0)
    if fraction != 1.0:
        parts.append(f"{100 * fraction:g} % of the labels")
    seeds = sorted({record["identity"]["seed"] for record in draft.records})
    parts.append(f"seed{'s' * (len(seeds) > 1)} {_ranges(seeds)}")
    return "; ".join(parts) + "."


def _backbone(flat: Mapping[str, Any]) -> list[str]:
    """Return the backbone by its name and its options, as ``backbone unet3d (channels 16, 32, 64)``."""
    if "backbone.name" not in flat:
        return []
    options = [
        (key.removeprefix("backbone."), value) for key, value in flat.items() if key.startswith("backbone.")
    ]
    shown = [
        f"{key} {', '.join(map(str, v)) if isinstance(v, list | tuple) else v}"
        for key, v in options
        if key != "name"
    ]
    return [f"backbone {flat['backbone.name']}" + (f" ({'; '.join(shown)})" if shown else "")]


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted integers as ranges.

    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
