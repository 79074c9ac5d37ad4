"""Which layout a folder has, by the file that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssl3d.errors import DataError, ReadError
from ssl3d.files import MOST_JSON_BYTES, parse_json, read_bytes


def recognized(root: Path) -> tuple[str, str] | None:
    """Return (layout, the file that says so) of a folder of nnU-Net, the Decathlon, BIDS or nnssl; None: of none of these.

    Nothing but names and that file is looked at, so a folder may still lack what its layout must have.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        return None
    facts = _object(root / "dataset.json")
    if facts is not None:
        listed = facts.get("training")
        first = listed[0] if isinstance(listed, list) and listed else None
        if isinstance(first, dict) and "image" in first and not any(root.glob("imagesTr/*_0000.*")):
            return "msd", "dataset.json"
        if {"channel_names", "file_ending"} & facts.keys() or any(root.glob("imagesTr/*_0000.*")):
            return "nnunet", "dataset.json"
    if "BIDSVersion" in (_object(root / "dataset_description.json") or {}):
        return "bids", "dataset_description.json"
    if (root / "pretrain_data.json").is_file():
        return "nnssl", "pretrain_data.json"
    return None


def said_to_be(root: Path, layout: str) -> str:
    """Return the sentence that a folder is of another layout than the one that it is read with; "" where it is not."""
    known = recognized(root)
    if known is None or known[0] == layout:
        return ""
    other, file = known
    return (
        f"{Path(root) / file} is that of the layout {other}: write {other}={root} for --data and --task-data, "
        f"--as {other} for data verify and data prepare."
    )


@contextmanager
def other_layout_named(root: Path, layout: str) -> Iterator[None]:
    """Add to a DataError inside, of reading ``root`` with ``layout``, that the folder is of another layout, if it is."""
    try:
        yield
    except DataError as error:
        other = said_to_be(root, layout)
        if not other:
            raise
        raise DataError(f"{error}\n{other}") from error


def _object(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(read_bytes(path, MOST_JSON_BYTES).decode("utf-8-sig"))
    except (ReadError, ValueError):
        return None
    return content if isinstance(content, dict) else None
