"""What ITK's readers of NRRD and MetaImage have room for.

They copy parts of a header into buffers of a fixed size, and what is longer ends the process, or worse: so every file is
looked at before a reader sees it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ssl3d.data.files.findings import Finding
from ssl3d.remedies import EXPORT

__without_effect__ = "it refuses, or changes nothing"

FIELD, NAME, MAGIC = 400, 200, 16
"""Bytes of a line: of any, of a MetaImage's ``Name``, and of the first of a NRRD."""
AXES, EDGE, CHANNELS = 10, 2**31, 2**16
"""How many axes, voxels along one, and values a voxel."""

_FREE = (b"#", b"content", b"Comment")
"""What may be of any length, as NRRD's own keys (``KEY:=VALUE``)."""
_MOST_BYTES = 4 * 2**20  # of a header


def look(path: Path) -> list[Finding]:
    """Return a finding where ITK has no room for what the header of a NRRD or MetaImage holds."""
    try:
        problem = _problem(path)
    except OSError as error:
        problem = str(error.strerror or error)
    return [] if problem is None else [Finding(path, f"is not a readable image: {problem}", EXPORT())]


def _problem(path: Path) -> str | None:
    nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
    if not (nrrd or path.name.lower().endswith((".mha", ".mhd"))) or not os.path.isfile(path):  # noqa: PTH113 (never raises)
        return None
    for number, line in enumerate(_header(path, b"" if nrrd else b"ElementDataFile")):
        key, _, value = line.partition(b":" if nrrd else b"=")
        key = key.strip()
        if line.startswith(_FREE) or (nrrd and value.startswith(b"=")):
            continue
        most = MAGIC if nrrd and number == 0 else NAME if key == b"Name" else FIELD
        if len(line) > most:
            return f'the line "{_shown(key)}" of its header has {len(line)} bytes (at most {most} are read)'
        wrong = _wrong_number(key.lower(), value.split())
        if wrong is not None:
            return f'its header says "{_shown(key)}" is {_shown(wrong)}'
        if (
            key in (b"ElementDataFile", b"data file", b"datafile") and b"%" in value
        ):  # ITK takes it for a pattern of names
            return f'its voxels are in "{_shown(value.strip())}", a name with %'
    return None


def _header(path: Path, last: bytes) -> Iterator[bytes]:
    """Yield the lines of a header up to the empty one, or up to that which begins with ``last``."""
    with path.open("rb") as file:
        while file.tell() < _MOST_BYTES:
            line = file.readline(_MOST_BYTES)
            if not line.strip():
                return
            yield line.rstrip(b"\r\n")
            if last and line.startswith(last):
                return


def _wrong_number(key: bytes, values: list[bytes]) -> bytes | None:
    """Return the value of a field that is no whole number of 1 at least, or too large; None where it is one."""
    most = {
        b"ndims": AXES, b"dimension": AXES, b"dimsize": EDGE, b"sizes": EDGE, b"elementnumberofchannels": CHANNELS,
    }.get(key)  # fmt: skip
    if most is None:
        return None
    return next(
        (value for value in values if not value.isdigit() or len(value) > 12 or not 0 < int(value) <= most),
        None,
    )


def _shown(text: bytes) -> str:
    return text[:40].decode("utf-8", "replace")
