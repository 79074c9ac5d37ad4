"""Files are whole or absent, whoever else writes them, and what the system refuses is said."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from ssl3d import files
from ssl3d.data.checks.file import read_volume
from ssl3d.data.files.volume import write_like, write_volume
from ssl3d.errors import WriteError


def test_threads_that_write_one_file_never_meet(tmp_path: Path) -> None:
    """The leakage check on large volumes: every thread keeps the same coarse volume."""
    path, errors = tmp_path / "new" / "a.npy", []

    def write(k: int) -> None:
        try:
            for _ in range(30):
                files.write_bytes(path, bytes([k]) * 5000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    content = path.read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1
    assert [p.name for p in path.parent.iterdir()] == ["a.npy"]  # no temporary file is left


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".a.json.guessed.tmp").symlink_to(target)
    with pytest.raises(WriteError, match="a.json"):
        files.write_json(tmp_path / "a.json", 1)
    assert target.read_text() == "kept"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, r"make room on its disk \(.*MiB free\)"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "can be written to"),
        (errno.EACCES, "permissions"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EIO, "disk, which fails"),
    ],
)
def test_what_the_system_refuses_is_explained_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, "old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(WriteError, match=remedy) as raised:
        files.write_json(path, "new")
    assert str(path) in str(raised.value) and os.strerror(code) in str(raised.value)
    with pytest.raises(WriteError, match=remedy), files.staged(path) as inside:
        inside.write_text("new")
    assert path.read_text() == '"old"\n' and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(WriteError, match="one of the folders in this path is a file"):
        files.write_json(tmp_path / "a" / "b" / "c.json", 1)
    with pytest.raises(WriteError, match="one of the folders in this path is a file"):
        write_volume(tmp_path / "a" / "b.nii.gz", np.zeros((3, 3, 3), np.uint8), np.eye(4))


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    files.write_json(path, 1)
    assert path.read_text() == "1\n"


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd", "mha", "mhd", "nhdr"])
def test_a_cut_output_is_an_error_and_not_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """SimpleITK returns without an error on a full disk; what it wrote is read back before it is moved."""
    source = tmp_path / "in" / f"scan.{ending}"
    source.parent.mkdir()
    data = np.random.default_rng(0).integers(0, 99, (8, 9, 10)).astype(np.int16)
    if ending == "nii.gz":
        write_volume(source, data, np.eye(4))
    else:
        sitk.WriteImage(sitk.GetImageFromArray(data.transpose(2, 1, 0)), str(source))
    out = tmp_path / "out" / source.name
    write_like(out, data.astype(np.uint8), source)
    before = {p.name: p.read_bytes() for p in out.parent.iterdir()}
    assert (read_volume(out).data != 0).any()

    # The library's own writers, cut short as by a disk that is full.
    real_itk = sitk.WriteImage
    import nibabel

    real_nibabel = nibabel.save

    def shorten(name: str) -> None:
        folder = Path(name).parent
        largest = max(folder.iterdir(), key=lambda p: p.stat().st_size)
        with largest.open("rb+") as file:
            file.truncate(largest.stat().st_size // 2)

    monkeypatch.setattr(sitk, "WriteImage", lambda i, n, **k: (real_itk(i, n, **k), shorten(n)))
    monkeypatch.setattr(nibabel, "save", lambda i, n: (real_nibabel(i, n), shorten(str(n))))
    with pytest.raises(WriteError, match="not written whole"):
        write_like(out, data.astype(np.uint8) + 1, source)
    assert {p.name: p.read_bytes() for p in out.parent.iterdir()} == before


def test_leftovers_of_killed_processes_are_removed_when_old(tmp_path: Path) -> None:
    for name in (".old.1.tmp", ".new.2.tmp", "mine.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".3.tmp").mkdir()
    for name in (".old.1.tmp", ".3.tmp", "mine.tmp"):
        os.utime(tmp_path / name, (0, 0))
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".new.2.tmp", "mine.tmp"]


def test_many_files_are_written_together_or_their_old_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {tmp_path / f"folder {k % 2}" / f"{k}.json": bytes([k]) * 100 for k in range(10)}
    files.write_all(many)
    assert all(path.read_bytes() == data for path, data in many.items())

    create, opened = files._create, []

    def full(path: Path) -> Any:
        opened.append(path)
        if len(opened) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(path)

    monkeypatch.setattr(files, "_create", full)
    with pytest.raises(WriteError, match="make room"):
        files.write_all(dict.fromkeys(many, b"new"))
    assert all(path.read_bytes() == data for path, data in many.items())
    assert len(list(tmp_path.rglob("*.tmp"))) == 0
