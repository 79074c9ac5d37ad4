"""What the commands of a study read from a store: finished runs, and its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl3d.errors import SSL3DError
from ssl3d.models.weights.checkpoint import RUN, read_run
from ssl3d.results.results import Results
from ssl3d.results.store.record import Record
from ssl3d.results.store.store import ResultStore
from ssl3d.results.table.build import pretext_learned
from ssl3d.results.table.caption import flatten
from ssl3d.results.table.model import Column, Table


def finished_runs(store: Path, name: str = "*") -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and description of every finished run whose folder is called ``name`` (a pattern), by name."""
    for file in sorted(store.glob(f"runs/{name}/{RUN}")):
        run = read_run(file.parent)
        if run["status"] == "finished":
            yield file.parent, run


def tables_of(store: Path, seeds: Collection[int] | None = None) -> list[tuple[float, Table]]:
    """Return the tables of a store, of all seeds or of some, with the share of the labels of each, the most first.

    A task that is fine-tuned for longer has a table of its own.

    Raises:
        SSL3DError: two tables have a column in common at one share, and are two studies.
    """
    found: list[tuple[float, Table]] = []
    taken: set[tuple[float, tuple[str, str]]] = set()
    records, _ = ResultStore(store).records()
    if seeds:
        records = [record for record in records if record["identity"]["seed"] in seeds]
    for table in _tables(store, records):
        (share,) = {
            r["identity"]["label_fraction"]
            for row in table.rows
            for c in row.cells.values()
            for r in c.records
        }  # one: tables are apart by it
        columns = {(share, column.key) for column in table.columns}
        if columns & taken:
            raise SSL3DError(f"{store} holds several studies: {table.caption}. Give each a store of its own.")
        taken |= columns
        found.append((share, table))
    return sorted(found, key=lambda entry: -entry[0])


def tables_by(store: Path, key: str) -> dict[float, Table]:
    """Return the table of a store at each value of a setting, the lowest first.

    Args:
        store: a study over that setting, and over nothing else.
        key: of a number among the settings, such as ``phantoms.appearance_variance``.

    Raises:
        SSL3DError: a record has no such number, there are no two values, or something else differs, too.
    """
    records, _ = ResultStore(store).records()
    by_value: dict[float, list[Record]] = defaultdict(list)
    for record in records:
        value = flatten((record.get("run") or {}).get("settings", {})).get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise SSL3DError(f"{store}: {key} is no number in the settings of its records, but {value}.")
        by_value[value].append(record)
    if len(by_value) < 2:
        raise SSL3DError(f"{store}: two values of {key} are needed, and it has {len(by_value)}.")
    found: dict[float, Table] = {}
    for value, of_value in sorted(by_value.items()):
        table, *others = _tables(store, of_value)
        methods = [row.method for row in table.rows]
        doubled = [method for method in methods if methods.count(method) > 1]
        if others or doubled:
            what = others[0].caption if others else f"{doubled[0]} in two configurations"
            raise SSL3DError(
                f"{store} holds several studies at {key} {value:g}: {what}. Give each a store of its own."
            )
        found[value] = table
    _differ_by_data_alone(store, key, found)
    return found


def _differ_by_data_alone(store: Path, key: str, tables: Mapping[float, Table]) -> None:
    """Raise SSL3DError where tables at two values differ by more than data and that setting."""
    (first, of_first), *others = tables.items()
    leaf = key.rpartition(".")[2]
    for value, table in others:
        for name in of_first.facets.keys() & table.facets.keys():
            of_data = name in ("preset", "pretrain.data") or name.endswith(".fingerprint")
            then, now = of_first.facets[name], table.facets[name]
            if not of_data and leaf not in name.split(".") and then != now:
                raise SSL3DError(
                    f"{store}: {name} is {then} at {key} {first:g} and {now} at {value:g}. Give each a store of its own."
                )


def titled(column: Column, labels: float) -> str:
    """Return the title of a column, with the share of the labels where it is not all of them."""
    return f"{column.group} {column.title}" + (f", {100 * labels:g} % of the labels" if labels < 1 else "")


LEARNED = "‡ pretext task not learned by any seed; § not learned by some."
"""What the signs behind :func:`titles_of` mean."""


def titles_of(tables: Iterable[tuple[float, Table]]) -> dict[str, str]:
    """Return the title of every method, with a sign where its pretext task was not learned, see :data:`LEARNED`."""
    titles: dict[str, str] = {}
    # Of each table, since two may have one seed, pretrained twice.
    shares: dict[str, list[float]] = defaultdict(list)
    for row in (row for _, table in tables for row in table.rows):
        titles[row.method] = row.title
        share = pretext_learned(record for cell in row.cells.values() for record in cell.records)
        shares[row.method] += [] if share is None else [share]
    signs = {method: _sign(of) for method, of in shares.items()}
    return {method: title + signs[method] for method, title in titles.items()}


def _sign(shares: Sequence[float]) -> str:
    if all(share == 1 for share in shares):
        return ""
    return " §" if any(shares) else " ‡"


def _tables(store: Path, records: Sequence[Record]) -> tuple[Table, ...]:
    return Results(store, tuple(records)).model(()).tables
