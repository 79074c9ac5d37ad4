"""What a row of a table cost: pretraining, evaluation, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ssl3d.results.table.model import Cost

if TYPE_CHECKING:
    from ssl3d.results.store.record import Record
    from ssl3d.results.table.model import TableModel


def cost_of(records: Iterable[Record]) -> Cost | None:
    """Return the cost behind ``records`` of one method, or None when not one record has any."""
    by_seed: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("cost"):
            identity = record["identity"]
            by_seed.setdefault((identity["seed"], identity.get("pretrain_seed")), []).append(record["cost"])
    if not by_seed:
        return None

    # A pretraining is paid once for all evaluations of its seed.
    def once(field: str) -> float | None:
        found = [max(values) for costs in by_seed.values() if (values := _numbers(costs, field))]
        return fmean(found) if found else None

    costs = [cost for seed in by_seed.values() for cost in seed]
    evaluations = [sum(v) for seed in by_seed.values() if (v := _numbers(seed, "downstream_seconds"))]
    devices = {str(cost["device"]) for cost in costs if cost.get("device")}
    devices |= {str(cost.get("pretrain_device")) for cost in costs if cost.get("pretrain_steps")}
    return Cost(
        once("pretrain_steps"), once("voxels_seen"), once("pretrain_seconds"),
        fmean(evaluations) if evaluations else None,
        max(_numbers(costs, "peak_memory_mib"), default=None),
        once("pretrain_parameters"), tuple(sorted(devices - {"None"})),
    )  # fmt: skip


def _numbers(costs: Iterable[Mapping[str, Any]], field: str) -> list[float]:
    return [float(cost[field]) for cost in costs if isinstance(cost.get(field), int | float)]


def with_costs(model: TableModel) -> TableModel:
    """Return ``model`` with the cost of every row."""
    return replace(
        model,
        tables=tuple(
            replace(
                table,
                rows=tuple(
                    replace(
                        row, cost=cost_of(record for cell in row.cells.values() for record in cell.records)
                    )
                    for row in table.rows
                ),
            )
            for table in model.tables
        ),
    )


def mixed_budgets(costs: Mapping[str, Cost]) -> str:
    """Return the sentence that warns of pretraining budgets which differ between methods, or nothing.

    Args:
        costs: of the pretrained methods, by title.
    """
    parts = []
    for field, name in (("pretrain_steps", "steps"), ("voxels_seen", "voxels seen")):
        values = {title: v for title, cost in costs.items() if (v := getattr(cost, field))}
        if values and max(values.values()) > 1.001 * min(values.values()):
            least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            parts.append(f"{name} from {values[least]:.3g} ({least}) to {values[most]:.3g} ({most})")
    return f"Mixed pretraining budgets: {'; '.join(parts)}." if parts else ""
