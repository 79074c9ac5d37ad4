"""Ways in which a file is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

Way = Callable[[bytearray], None]
"""Changes the bytes of a file."""


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def zero_tail(data: bytearray) -> None:
    data[-64:] = bytes(64)


def cut(data: bytearray) -> None:
    del data[-100:]


def flip_header(data: bytearray) -> None:
    data[40] ^= 4


def empty(data: bytearray) -> None:
    data.clear()


def longer(data: bytearray) -> None:
    data.extend(b"more")


FULL = "SSL3D_ALL_FAULTS" in os.environ
"""Whether all trials are made, as ``make faults`` does."""

WAYS = (flip, zero_tail, cut, flip_header, empty, longer)
SOME = WAYS if FULL else (flip, cut)
"""Those that a trial takes which is made for every way anew."""


def _flip_at(data: bytearray, share: float = 0.0, byte: int = 0, bit: int = 0) -> None:
    data[int(share * len(data)) + byte] ^= 1 << bit


def _keep(data: bytearray, share: float = 0.0, more: int = 0) -> None:
    del data[int(share * len(data)) + more :]


def _fill(data: bytearray, begin: float, size: int, value: int = 0) -> None:
    start = min(int(begin * len(data)), len(data) - size)
    data[start : start + size] = bytes([value]) * size


def _swap(data: bytearray, a: float, b: float, size: int) -> None:
    first, second = (slice(int(share * len(data)), int(share * len(data)) + size) for share in (a, b))
    data[first], data[second] = data[second], data[first]


def _repeat(data: bytearray, a: float, b: float, size: int) -> None:
    """Write what begins at ``a`` at ``b``, too, as a disk that writes a block to a wrong place."""
    start, to = int(a * len(data)), int(b * len(data))
    data[to : to + size] = data[start : start + size]


def _replace(data: bytearray, content: bytes) -> None:
    data[: len(content)] = content


PAGE = 4096
EVERY_WAY: dict[str, Way] = {
    "first byte flipped": partial(_flip_at), "length of the header doubled": partial(_flip_at, byte=1),
    "length of the header beyond the file": partial(_flip_at, byte=6), "header opened wrongly": partial(_flip_at, byte=8),
    "a name in the header flipped": flip_header, "a digit in the header flipped": partial(_flip_at, byte=90),
    "first tensor flipped": partial(_flip_at, share=0.45), "middle flipped": flip,
    "sign flipped": partial(_flip_at, share=0.6, bit=7), "last tensor flipped": partial(_flip_at, share=0.97),
    "last byte flipped": partial(_flip_at, share=1.0, byte=-1),
    "empty": empty, "one byte": partial(_keep, more=1), "length of the header only": partial(_keep, more=8),
    "cut in the header": partial(_keep, more=200), "cut at a quarter": partial(_keep, share=0.25),
    "cut in the middle": partial(_keep, share=0.5), "cut at nine tenths": partial(_keep, share=0.9),
    "tail cut": cut, "last byte cut": partial(_keep, share=1.0, more=-1),
    "head zeroed": partial(_fill, begin=0.0, size=64), "middle zeroed": partial(_fill, begin=0.5, size=64),
    "tail zeroed": zero_tail, "first page zeroed": partial(_fill, begin=0.0, size=PAGE),
    "a page zeroed": partial(_fill, begin=0.6, size=PAGE), "last page zeroed": partial(_fill, begin=1.0, size=PAGE),
    "all zeroed": lambda data: data.__setitem__(slice(None), bytes(len(data))),
    "a page of ones": partial(_fill, begin=0.6, size=PAGE, value=255),
    "longer": longer, "longer by a page of zeros": lambda data: data.extend(bytes(PAGE)),
    "twice": lambda data: data.extend(data[:]), "two pages swapped": partial(_swap, a=0.5, b=0.8, size=PAGE // 2),
    "a page at a wrong place": partial(_repeat, a=0.5, b=0.8, size=PAGE // 2),
    "begins as a page of the web": partial(_replace, content=b"<html>507 Insufficient Storage</html>"),
}  # fmt: skip
"""Ways for files of several pages; a disk, a copy and a cosmic ray make others, but of these kinds."""


def damage(path: Path, way: Way) -> None:
    """Change what ``path`` holds; a way that changes nothing is no trial."""
    data = bytearray(path.read_bytes())
    before = bytes(data)
    way(data)
    assert data != before, f"{path.name} is what it was"
    path.write_bytes(data)
