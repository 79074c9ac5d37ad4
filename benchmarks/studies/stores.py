"""What the commands of a study read from a store: finished runs, and the table with the most rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ssl3d.models.weights.checkpoint import RUN, read_run
from ssl3d.registry.registry import registry
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import build_table
from ssl3d.results.table.model import Table


def finished_runs(store: Path, name: str = "*") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and description of every finished run whose folder is called ``name`` (a pattern), by name."""
    for file in sorted(store.glob(f"runs/{name}/{RUN}")):
        run = read_run(file.parent)
        if run["status"] == "finished":
            yield file.parent, run


def largest_table(store: Path, seeds: Collection[int] | None = None) -> Table:
    """Return the table with the most rows, of all seeds or of some."""
    records, _ = ResultStore(store).records()
    if seeds:
        records = [record for record in records if record["identity"]["seed"] in seeds]
    return max(build_table(records, registry().methods.names()).tables, key=lambda table: len(table.rows))
