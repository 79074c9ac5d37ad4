"""One opening of a file, shared by all that is read of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO, Self


class OpenedFile:
    """A file that is opened when its bytes are first wanted, and closed at the end of the ``with`` block.

    Header, check of the compressed stream and voxels each start at its first byte again. For one thread.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def rewound(self) -> BinaryIO:
        """Return the file at its first byte.

        Raises:
            OSError: it cannot be opened.
        """
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(0)
        return self._file


def opening(path: Path, opened: OpenedFile | None) -> AbstractContextManager[OpenedFile]:
    """Return ``opened``, which stays open, where it is an opening of ``path``; else a new one."""
    return nullcontext(opened) if opened is not None and opened.path == path else OpenedFile(path)
