"""Published numbers to compare with."""

from __future__ import annotations

import csv
from pathlib import Path

from ssl3d.errors import ConfigError, nearest

PAPER = "He et al., CVPR 2023, table 1"


def _published(against: str | None) -> dict[tuple[str, str, str], float]:
    """Return the published figures in percent by (method, task, mode)."""
    if against is None:
        return {}
    if against != "paper":
        raise ConfigError(f'Unknown figures to compare against: "{against}".{nearest(against, ["paper"])}')
    figures = {}
    with Path(__file__).with_name("paper_table1.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if name != "method" and value:
                    task, mode, _ = name.split("_")
                    figures[line["method"], task, mode] = float(value)
    return figures
