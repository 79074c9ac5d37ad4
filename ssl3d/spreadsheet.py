"""CSV that a spreadsheet can open: what people or files have named is text there, never a formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssl3d.errors import printable

__without_effect__ = "text of a file"

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a header and one line a row; None is an empty field.

    Text that a spreadsheet would take for a formula (it begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage
    return, and is no number) gets an apostrophe in front, as spreadsheets themselves write text (OWASP, CSV injection).

    >>> csv_text(["name", "score"], [{"name": "=1+1", "score": -2.5}])
    "name,score\\n'=1+1,-2.5\\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_safe(column) for column in columns])
    writer.writerows([_safe(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _safe(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = printable(value)
    if not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
