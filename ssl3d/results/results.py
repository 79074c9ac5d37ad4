"""Records in hand: ``ssl3d.store(DIR)`` and what ``ssl3d.bench(...)`` returns; as a data frame, or as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.errors import PluginError
from ssl3d.results.store.record import Record

if TYPE_CHECKING:
    import pandas as pd

    from ssl3d.results.table.model import TableModel


@dataclass(frozen=True)
class Results:
    """Records of a store, one a cell of the bench.

    Attributes:
        folder: the store.
        records: identity, score, metrics of each case, cost, environment: see docs/results.md.
        failures: cells that could not be computed, each with why.
        problems: a line for each record that cannot be read and is left out.
        order: methods from top to bottom of a table; empty: as they are registered.
    """

    folder: Path
    records: tuple[Record, ...] = field(repr=False)
    failures: tuple[Record, ...] = field(default=(), repr=False)
    problems: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def to_dataframe(self, per_case: bool = False) -> pd.DataFrame:
        """Return one row a cell: its identity, score and cost; or one row a test case with its metrics.

        Args:
            per_case: one row a case; metrics of structures are columns ``structure.metric``.
        """
        import pandas as pd

        from ssl3d.results.store.manage import rows

        return pd.DataFrame(list(rows(self.records, "cases" if per_case else "records")))

    def model(
        self, statistics: Sequence[str] = ("ci",), *, reference: str = "scratch", difference: float | None = None,
        against: str | None = None,
    ) -> TableModel:  # fmt: skip
        """Return rows, columns, cells and captions as data.

        Args:
            statistics: of ``ssl3d table --with``.
            reference: row that ``p`` compares with: ``scratch`` or ``best``.
            difference: in points, for which ``power`` says the seeds; None: 5.
            against: ``paper`` puts the published figures beside ours.

        Raises:
            DataError: there is no record.
            ConfigError: no such statistic or reference.
        """
        from ssl3d.registry.registry import registry
        from ssl3d.results.statistics.annotate import DIFFERENCE, with_statistics
        from ssl3d.results.table.build import build_table, called

        titles = registry().methods.titles()
        records, failures = called(self.records, titles), called(self.failures, titles)
        order = list(dict.fromkeys([*self.order, *titles]))
        table = build_table(records, method_order=order, against=against, failures=failures)
        if not statistics:
            return table
        return with_statistics(
            table, list(statistics), reference, DIFFERENCE if difference is None else difference
        )

    def table(self, format: str = "markdown", statistics: Sequence[str] = ("ci",), **more: Any) -> str:
        """Return the table of ``ssl3d table`` as text.

        Args:
            format: ``rich``, ``markdown``, ``latex``, ``html``, ``csv``, ``json``, or a plugin's.
            statistics: see :meth:`model`.
            more: other arguments of :meth:`model`.

        Raises:
            PluginError: no such format, or it returns no text.
        """
        from ssl3d.registry.registry import registry

        entry = registry().table_formats.get(format)
        text = entry.load().render(self.model(statistics, **more))
        if not isinstance(text, str):
            raise PluginError(
                f"The table format {format} of the plugin {entry.plugin} is broken: render() returned an object of "
                f"{type(text).__name__}. Fix: return the text of the table: docs/plugins.md shows one."
            )
        return text


def store(folder: str | Path) -> Results:
    """Return the records of a store.

    Args:
        folder: as given to ``ssl3d bench --store``.

    Raises:
        DataError: there is no store, or it has no record.
    """
    from ssl3d.results.store.store import ResultStore

    opened = ResultStore(Path(folder))
    records, problems = opened.records()
    failures, damaged = opened.sound_failures()
    return Results(Path(folder), tuple(records), tuple(failures), (*problems, *damaged))
