"""What lies below a folder: every file, links followed, and what could not be entered, named."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ssl3d.data.files.suffixes import image_suffix
from ssl3d.remedies import PUT_FILE, READABLE, Fix


@dataclass(frozen=True, order=True)
class LeftOut:
    """An entry of a folder that is not read.

    Attributes:
        path: the file, link or folder.
        reason: why, completing "<path> ...".
        fix: what to do about it; None where nothing is wrong with leaving it out.
    """

    path: Path
    reason: str
    fix: Fix | None = None


@dataclass(frozen=True)
class Tree:
    """The result of :func:`walk`.

    Attributes:
        files: regular files, also those behind links, sorted.
        dangling: links that lead nowhere, sorted.
        left_out: what is neither, or was not entered.
    """

    files: list[Path] = field(default_factory=list)
    dangling: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def walk(root: Path) -> Tree:
    """List everything below ``root``: links to folders are followed, and each folder is entered once.

    Not entered, and named instead: hidden folders, links to a folder that holds the link (a loop), a folder that was
    entered under another name, and folders that may not be read. Real folders come before links, and links in the
    order of their names, so the names of files do not depend on the file system.
    """
    tree = Tree()
    entered: dict[tuple[int, int], Path] = {}
    links: list[Path] = []
    _enter(root, tree, entered, links)
    while links:
        links.sort()
        link = links.pop(0)
        target, place = link.resolve(), link.parent.resolve()
        if target == place or target in place.parents:
            tree.left_out.append(LeftOut(link, f"is a link back to {target}, which holds it"))
        else:
            _enter(link, tree, entered, links)
    tree.files.sort()
    tree.dangling.sort()
    tree.left_out.sort()
    return tree


def _enter(top: Path, tree: Tree, entered: dict[tuple[int, int], Path], links: list[Path]) -> None:
    """Add what lies below ``top`` to ``tree``; links to folders go to ``links``, to be followed later."""
    pending = [top]
    while pending:
        folder = pending.pop()
        try:
            status = folder.stat()
            other = entered.setdefault((status.st_dev, status.st_ino), folder)
            if other is not folder:
                tree.left_out.append(LeftOut(folder, f"is the same folder as {other}, which is read"))
                continue
            with os.scandir(folder) as entries:
                paths = sorted(Path(entry.path) for entry in entries)
        except OSError as error:
            tree.left_out.append(_unreadable(folder, error))
            continue
        if not paths and folder != top and image_suffix(folder) is not None:
            tree.left_out.append(LeftOut(folder, "is an empty folder with the name of an image", PUT_FILE()))
        for path in paths:
            try:
                kind = _sort_in(path, tree)
            except OSError as error:
                tree.left_out.append(_unreadable(path, error))
                continue
            if kind == "folder":
                pending.append(path)
            elif kind == "link":
                links.append(path)


def _sort_in(path: Path, tree: Tree) -> str:
    """Put one entry where it belongs; return "folder" or "link" (to a folder) for what is still to be entered."""
    if path.is_dir():
        if path.name.startswith("."):
            tree.left_out.append(LeftOut(path, "is a hidden folder"))
            return ""
        return "link" if path.is_symlink() else "folder"
    if path.is_file():
        tree.files.append(path)
    elif path.is_symlink() and not path.exists():
        tree.dangling.append(path)
    else:
        fix = PUT_FILE() if image_suffix(path) is not None else None
        tree.left_out.append(LeftOut(path, not_a_file(path) or "cannot be opened", fix))
    return ""


def _unreadable(path: Path, error: OSError) -> LeftOut:
    return LeftOut(path, f"cannot be opened ({error.strerror or error})", READABLE())


def not_a_file(path: Path) -> str | None:
    """Return what a path is that is neither a file nor a folder, completing "<path> ..."; None: it is one of these.

    Nothing is opened: a pipe would wait for ever, and a device has no end.

    Raises:
        OSError: it does not exist, or cannot be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return f"is {'a link to ' if path.is_symlink() else ''}{kinds.get(stat.S_IFMT(mode), 'something')}, not a file"


def leads_nowhere(path: Path) -> str | None:
    """Return what is wrong with a link whose target is not there, completing "<path> ..."; None: nothing."""
    if not path.is_symlink() or path.exists():
        return None
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "is a link that leads back to itself"
    return f"is a link to {path.readlink()}, which is not there"
