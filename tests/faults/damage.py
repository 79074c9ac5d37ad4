"""Ways in which a file is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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


def damage(path: Path, way: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    way(data)
    path.write_bytes(data)
