"""A volume's file, resolved once and passed on: what its name says, which files it is made of, its header."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ssl3d.data.cohort import Reading
from ssl3d.data.files.dicom import SeriesError, series_files
from ssl3d.data.files.headers import Affine, Header, HeaderError, read_header_of
from ssl3d.data.files.opened import OpenedFile
from ssl3d.data.files.suffixes import image_suffix

State = tuple[tuple[int, int, int] | None, ...]
"""Inode, bytes and time of the last change (ns) of each file; None where there is none."""


class VolumeFile:
    """One volume on disk. What was found is kept for as long as its files stay as they were.

    It holds no open file, so threads may share it.

    Attributes:
        path: the file, or the folder of a DICOM series.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._headers: dict[Affine | None, tuple[State, Header]] = {}
        self._passed: dict[tuple[int, Reading], State] = {}

    @cached_property
    def suffix(self) -> str | None:
        """Which of the endings of volumes its name has; None for DICOM and what is no volume."""
        return image_suffix(self.path)

    @property
    def is_nifti(self) -> bool:
        """Whether its name is that of a NIfTI file."""
        return self.suffix in {".nii", ".nii.gz"}

    @property
    def parts(self) -> tuple[Path, ...]:
        """Every file that the volume is made of: the slices of a series, a header and its voxels."""
        if self.suffix is None or self.path.is_dir():
            try:
                return series_files(self.path)
            except SeriesError:
                return (self.path,)  # the checks say what is wrong with it
        if self.suffix not in {".mhd", ".nhdr"}:
            return (self.path,)
        try:
            return tuple(dict.fromkeys((self.path, self.header().payload)))
        except (HeaderError, OSError):
            return (self.path,)

    def stat(self) -> tuple[int, int]:
        """Return bytes and time of the last change (ns) of all its files that exist, as they are now."""
        status = [file.stat() for file in self.parts if file.exists()]
        return sum(s.st_size for s in status), max((s.st_mtime_ns for s in status), default=0)

    def header(self, affine: Affine | None = None, opened: OpenedFile | None = None) -> Header:
        """Return its header, read once while its files stay as they are.

        Args:
            affine: of a NIfTI with two affines, the one that is right.
            opened: an opening of ``path`` to read it from.

        Raises:
            HeaderError: it has none that makes sense.
            OSError: it cannot be opened.
        """
        choice = affine if self.is_nifti else None  # the others have one affine
        if choice in self._headers:
            state, header = self._headers[choice]
            if state == _state(self.path, header.payload):
                return header
        before = _state(self.path)
        header = read_header_of(self.path, self.suffix, affine, opened)
        self._headers[choice] = (before + _state(header.payload), header)
        return header

    def has_passed(self, max_bytes: int, reading: Reading) -> bool:
        """Whether the checks have passed its files as they are now; see :meth:`pass_as`."""
        state = self._passed.get((max_bytes, reading))
        return state is not None and state == self.state()

    def pass_as(self, state: State, max_bytes: int, reading: Reading) -> None:
        """Note that the checks have passed its files as they were in ``state``."""
        self._passed[max_bytes, reading] = state

    def state(self) -> State:
        """Return what tells whether one of its files was changed or replaced."""
        return _state(*self.parts)


class VolumeFiles(dict[Path, VolumeFile]):
    """The files of a cohort by path, each resolved when it is first asked for; threads may share it."""

    def __missing__(self, path: Path) -> VolumeFile:
        return self.setdefault(path, VolumeFile(path))


def _state(*files: Path) -> State:
    found: list[tuple[int, int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)
