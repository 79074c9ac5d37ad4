"""Tables in JSON: what the caption and the notes say, and one object a cell."""

from __future__ import annotations

import json
from typing import Any

from ssl3d.results.formats.csv import csv_lines
from ssl3d.results.table.model import TableModel


def render_json(model: TableModel) -> str:
    """Return ``{"tables": [{"caption", "differs", "facets", "footnotes", "remarks", "cells"}]}``.

    Cells have the fields of the CSV, as numbers and unrounded; null is "does not exist".
    """
    lines = csv_lines(model)
    tables: list[dict[str, Any]] = [
        {
            "caption": table.caption, "differs": table.differs, "facets": table.facets,
            "footnotes": dict(table.footnotes), "remarks": list(table.remarks),
            "cells": [line for line in lines if line["table"] == number],
        }
        for number, table in enumerate(model.tables, 1)
    ]  # fmt: skip
    return json.dumps({"tables": tables}, indent=2, default=str) + "\n"
