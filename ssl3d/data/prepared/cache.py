"""Look after the cache of prepared volumes: what lies there, whether it is sound, and what can go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl3d.data.prepared.arrays import SUFFIX, verify_array
from ssl3d.data.prepared.cohort import PREPARATION_VERSION
from ssl3d.data.prepared.index import stream
from ssl3d.data.prepared.stored import read_manifest
from ssl3d.errors import DataError
from ssl3d.files import STALE_S, explained, is_temporary

__without_effect__ = "it looks after what is stored"

PREPARED, DAY_S = "prepared", 24 * 3600.0
_ARRAYS = (SUFFIX, ".npy")


@dataclass(frozen=True)
class Stored:
    """One prepared cohort in the cache.

    Attributes:
        folder: where it is.
        dataset: name of the data set, or of the folder where nothing more is known.
        cases: how many; None: it is not complete.
        size: bytes on the disk, whatever lies in the folder.
        used: when a volume was last read or written, in seconds since 1970; where the file system notes no reading
            (``noatime``), when it was written.
        leftovers: files of builds that were killed, and damaged ones that were set aside.
    """

    folder: Path
    dataset: str
    cases: int | None
    size: int
    used: float
    leftovers: tuple[Path, ...] = field(default=())


def stored(cache: Path) -> Iterator[Stored]:
    """Yield what is in the cache, by name.

    Args:
        cache: the folder of ``--cache``.
    """
    root = cache / PREPARED
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_symlink() or not folder.is_dir():
            continue
        manifest = read_manifest(folder, PREPARATION_VERSION)
        files = [(path, path.lstat()) for path in folder.iterdir()]
        # By the arrays: whoever looks into the cache, as this does, reads the manifest.
        marks = [max(s.st_atime, s.st_mtime) for path, s in files if path.suffix in _ARRAYS]
        used = max(marks or [s.st_mtime for _, s in files] or [folder.stat().st_mtime])
        left = tuple(path for path, _ in files if is_temporary(path) or ".damaged" in path.name)
        name = folder.name if manifest is None else str(manifest["dataset"])
        cases = None if manifest is None else len(manifest["cases"])
        yield Stored(folder, name, cases, sum(s.st_size for _, s in files), used, left)


@dataclass
class Verified:
    """What :func:`verify` has found.

    Attributes:
        sound: arrays that have their digest.
        unknown: arrays without one, of an earlier version.
        problems: a line for each that is damaged.
    """

    sound: int = 0
    unknown: int = 0
    problems: list[str] = field(default_factory=list)


def verify(cohorts: Sequence[Stored], progress: Callable[[int, int, str], None] | None = None) -> Verified:
    """Compare every array with its digest; damaged ones are set aside and stored again by the next preparation."""
    found = Verified()
    for number, cohort in enumerate(cohorts, 1):
        manifest = None if cohort.cases is None else read_manifest(cohort.folder, PREPARATION_VERSION)
        if manifest is None:
            found.problems.append(f"{cohort.folder}: not complete; the next preparation goes on with it")
        for record in stream(manifest["cases"]) if manifest else ():
            for array in filter(None, record["arrays"].values()):
                if array.get("sha256") is None:
                    found.unknown += 1
                    continue
                try:
                    verify_array(cohort.folder / array["name"], array["sha256"])
                    found.sound += 1
                except DataError as error:
                    found.problems.append(str(error))
        if progress is not None:
            progress(number, len(cohorts), "verifying the cache")
    return found


def prune(cohorts: Sequence[Stored], days: float, remove: bool) -> list[tuple[Path, int]]:
    """Remove what was not used for some days, and leftovers; return each with its bytes.

    Args:
        cohorts: of :func:`stored`.
        days: those that were read or written since are kept; so are leftovers of a build that may be running.
        remove: False: only say what would go.
    """
    now, gone = time.time(), []
    for cohort in cohorts:
        if now - cohort.used > days * DAY_S:
            gone.append((cohort.folder, cohort.size))
            if remove:
                with explained(cohort.folder):
                    shutil.rmtree(cohort.folder)
            continue
        for path in cohort.leftovers:
            status = path.lstat()
            if is_temporary(path) and now - status.st_mtime <= STALE_S:
                continue
            gone.append((path, status.st_size))
            if remove:
                with explained(path):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return gone
