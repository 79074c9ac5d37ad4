"""Bad image files in every command: each is named, the good ones are used, in bounded time and memory."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from test_integrity import save_itk
from test_predict import SEG, trained

from faults.bad_files import BY_PATH, IN_FOLDERS
from faults.commands import Outcome, command, here, memory_of
from faults.damage import FULL
from faults.runs import forked
from ssl3d.data.checks.file import read_volume
from ssl3d.errors import DataError

SOME = list(IN_FOLDERS) if FULL else list(IN_FOLDERS)[::7]
MEMORY = 4 * 2**30
"""What a command may have beyond what this process has; the files promise up to 1.4 PiB."""

pytestmark = pytest.mark.timeout(600 if FULL else 120)  # what hangs fails


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, volume_folder: Path) -> Path:
    """Five good volumes, and a folder for each bad one."""
    root = tmp_path_factory.mktemp("bad") / "data"
    shutil.copytree(volume_folder, root / "good")
    here(*pretraining(root, root.parent / "whole"))  # also for what the children inherit
    for name in SOME:
        folder = root / place(name)
        folder.mkdir()
        IN_FOLDERS[name](folder)
    return root


def place(name: str) -> str:
    return f"bad{list(IN_FOLDERS).index(name):03d}"


def not_in(text: str, names: list[str]) -> list[str]:
    return [name for name in names if f"{place(name)}/" not in text]


def run(*arguments: object) -> Outcome:
    outcome = command(*arguments, before=memory_of(MEMORY))
    assert "Traceback" not in outcome.output and "fault of ssl3d" not in outcome.output, outcome.output
    return outcome


def pretraining(data: Path, tmp_path: Path, *more: object) -> list[object]:
    return [
        "pretrain", "--method", "denoising", "--preset", "smoke", "--device", "cpu",
        "--data", data, "--out", tmp_path / "run",
        "--cache", tmp_path / "cache", "--set", "backbone.channels=[4,8]", "--set", "pretrain.crop=8",
        "--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.checkpoint_every=2",
        "--set", "pretrain.monitor_every=2", *more,
    ]  # fmt: skip


def test_bad_files_in_verify(
    data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", len(SOME))
    outcome = run("data", "verify", data)
    assert outcome.status == 1, outcome
    assert not not_in(outcome.output, SOME)
    assert "good/" not in outcome.output


def test_bad_files_in_pretrain(
    data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", len(SOME))
    outcome = run(*pretraining(data, tmp_path))
    assert outcome.status == 2 and "Fix: " in outcome.output, outcome
    assert not not_in(outcome.output, SOME)
    assert not (tmp_path / "run").exists()


def test_bad_files_in_pretrain_that_skips_them(
    data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("trials", len(SOME))
    outcome = run(*pretraining(data, tmp_path, "--policy", "skip"))
    assert outcome.status == 0, outcome
    provenance = json.loads((tmp_path / "run" / "run.json").read_text())
    assert provenance["status"] == "finished"
    assert not not_in(outcome.output, SOME), "said"
    manifest = json.loads(next((tmp_path / "cache").rglob("manifest.json")).read_text())
    assert len(manifest["cases"]) == 5
    assert not not_in(json.dumps(manifest), SOME), "kept in writing"


def test_bad_files_in_predict(
    data: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder, _, _ = trained(tmp_path, SEG, "linear")
    (tmp_path / "paths").mkdir()
    paths = []
    for number, make in enumerate(BY_PATH.values()):
        (tmp_path / "paths" / str(number)).mkdir()
        paths.append(make(tmp_path / "paths" / str(number)))
    paths = [path for path in paths if not os.path.isdir(path)]  # noqa: PTH112 (as in predict)
    record_property("trials", len(SOME) + len(paths))
    inputs = [word for path in (data, *paths) for word in ("--input", path)]
    outcome = run("predict", "--checkpoint", folder, *inputs, "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.status == 1, outcome
    assert not not_in(outcome.output, SOME)
    assert not [path for path in paths if str(path)[:200] not in outcome.output]
    assert len(list((tmp_path / "out").rglob("*.nii.gz"))) == 5, outcome
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) in (5, 6)  # notes.json


VALUES = (
    "", "0", "-1", "11", "90", "100000",
    "1" * 50, "1" * 300, "1" * 5000, "x" * 190, "x" * 300, "x" * 390, "x" * 1100, "x" * 70_000,
    " ".join(["1"] * 90), " ".join(["1"] * 190), " ".join(["1"] * 5000), "nan", "inf", "1e400", "%s%s%n", "\xff" * 50,
)  # fmt: skip
"""What a field of a header may hold that ITK's buffers do not."""
MORE = {
    "mha": ("Name", "Comment", "ObjectSubType", "Color", "AnatomicalOrientation", "Modality", "ElementNumberOfChannels",
    "Foo"),
    "nrrd": ("content", "spacings", "labels", "units", "measurement frame", "byte skip", "axis mins", "sample units",
    "foo"),
}  # fmt: skip


def odd_headers(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (what is odd, file) of headers in which one field holds something else, or one more is."""
    for ending, between in (("mha", " = "), ("nrrd", ": ")):
        whole = save_itk(folder / f"whole.{ending}", False)
        raw = whole.read_bytes()
        end = raw.index(b"LOCAL\n") + 6 if ending == "mha" else raw.index(b"\n\n")
        lines, voxels = raw[:end].decode().split("\n"), raw[end:]
        whole.unlink()
        fields = [line.partition(between)[0] for line in lines if between in line]
        for key in (*fields, *MORE[ending]):
            for value in VALUES:
                line = f"{key}{between}{value}"
                changed = [line if old.startswith(key + between) else old for old in lines]
                if key not in fields:
                    changed.insert(len(changed) - 2, line)
                path = folder / f"odd.{ending}"
                path.write_bytes("\n".join(changed).encode("latin-1") + voxels)
                yield f"{ending}: {key} = {value[:20]!r} ({len(value)})", path


def test_no_header_ends_the_process(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """ITK writes beyond its buffers; whatever is let through is read, or refused by an error."""
    faults, trials, chosen = [], 0, random.Random(0)
    for what, path in odd_headers(tmp_path):
        if not FULL and chosen.random() > 0.03:
            continue
        trials += 1

        def child(path: Path = path) -> None:
            with suppress(DataError):
                read_volume(path)

        if forked(child, tmp_path / "errors.txt"):
            faults.append(what)
    record_property("trials", trials)
    assert not faults, f"{len(faults)} of {trials}:\n" + "\n".join(faults)
