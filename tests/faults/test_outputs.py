"""Predictions, exports and reports where the disk gives no room: an error, and nothing cut under a final name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_dicom import write_series
from test_predict import CLS, GRIDS, SEG, predictor, write_image

from faults.commands import files_of
from faults.damage import FULL
from faults.runs import CPU, Plain, forked, noise_cohort, settings
from ssl3d.cli import main
from ssl3d.downstream.predictor import expand_inputs
from ssl3d.errors import WriteError
from ssl3d.models.weights.export import TARGETS, export
from ssl3d.pretrain.loop import pretrain
from ssl3d.pretrain.spec import MethodSpec

ENDINGS = ("nii", "nii.gz", "nrrd", "mha", "nhdr", "mhd")
SHARES = (0.0, 0.3, 0.9)
"""Of the largest file that is written: how much of it there is room for."""


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(work: Callable[[Path], object], folder: Path, share: float) -> None:
    """Do ``work``, which writes to the folder that it is given, without room.

    Nothing may be left that differs from what is written where there is room, and then the same must work.
    """
    work(folder / "room")
    whole = written(folder / "room")
    most = int(share * max(map(len, whole.values())))
    out = folder / "out"

    def child() -> None:
        torch.set_num_threads(1)
        files_of(most)()
        try:
            work(out)
        except WriteError as error:
            assert "Fix: " in str(error) and str(out) in str(error), error
            return
        raise AssertionError(
            f"nothing was refused: {[p.stat().st_size for p in out.rglob('*') if p.is_file()]}"
        )

    errors = folder / "errors.txt"
    assert forked(child, errors) == 0, errors.read_text()
    for name, data in written(out).items() if out.exists() else ():
        assert whole.get(name) == data, f"{name} is cut, or a leftover"
    work(out)
    assert written(out) == whole


def segmentations(folder: Path, ending: str) -> Callable[[Path], object]:
    """Return what predicts an image of a kind."""
    (folder / "in").mkdir()
    if ending == "DICOM":
        write_series(folder / "in" / "series")
        files = expand_inputs([folder / "in"])
    else:
        write_image(folder / "in" / f"a.{ending}", GRIDS["plain"])
        files = {folder / "in" / f"a.{ending}": Path()}
    model = predictor(SEG)

    def work(out: Path) -> None:
        assert not model.predict_files(files, out, CPU)

    return work


@pytest.mark.parametrize("share", SHARES if FULL else SHARES[1:2])
@pytest.mark.parametrize("ending", ENDINGS if FULL else ENDINGS[1:3])
def test_a_segmentation_without_room(tmp_path: Path, ending: str, share: float) -> None:
    refused(segmentations(tmp_path, ending), tmp_path, share)


@pytest.mark.parametrize("share", SHARES if FULL else SHARES[1:2])
def test_a_table_of_predictions_without_room(tmp_path: Path, share: float) -> None:
    (tmp_path / "in").mkdir()
    files = [tmp_path / "in" / f"{n}.nii.gz" for n in range(4)]
    for file in files:
        write_image(file, GRIDS["plain"])
    model = predictor(CLS)
    refused(lambda out: model.predict_files(files, out, CPU), tmp_path, share)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five stages, as every target takes them."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "run"
    spec = MethodSpec(Plain.name, Plain, Plain.Config(), Plain.title)
    own = settings(steps=1, crop=32).model_dump()
    own["backbone"]["channels"] = [8, 8, 8, 8, 8]
    from ssl3d.config import Settings

    pretrain(spec, noise_cohort(2, (32, 32, 32)), Settings.model_validate(own), 0, out, CPU)
    return out


@pytest.mark.parametrize("share", SHARES if FULL else SHARES[1:2])
@pytest.mark.parametrize("target", list(TARGETS) if FULL else list(TARGETS)[:1])
def test_an_export_without_room(tmp_path: Path, finished: Path, target: str, share: float) -> None:
    refused(lambda out: export(finished, target, out), tmp_path, share)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, or skip the test where nobody may mount one."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("mounts a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.thorough
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_segmentation_on_a_disk_that_is_really_full(tmp_path: Path, ending: str) -> None:
    """SimpleITK returns without an error there."""
    work = segmentations(tmp_path, ending)
    with small_disk(tmp_path / "disk", "64k") as disk:
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(WriteError, match="Fix: "):
            work(disk / "out")
        assert not written(disk / "out")
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        work(disk / "out")
        work(tmp_path / "room")
        assert written(disk / "out") == written(tmp_path / "room")


@pytest.mark.thorough
def test_an_export_to_a_disk_that_is_really_full_is_one_message(tmp_path: Path, finished: Path) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        result = CliRunner().invoke(
            main, ["export", "--checkpoint", str(finished), "--to", "torch", "--out", str(disk / "out")]
        )
        assert result.exit_code == 2 and "make room on its disk" in result.output, result.output
        assert not (disk / "out" / "config.json").exists() and not (disk / "out" / "model.pt").exists()
