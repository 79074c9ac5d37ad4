"""Every remedy that a finding can print works: a file is refused with it, what it says is done, the file is read.

Each scenario yields findings: first those that print the remedy, then, after every way that the remedy names, what is
left (nothing). A remedy of :mod:`ssl3d.remedies` without a scenario fails here.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from click.testing import CliRunner, Result
from torch import nn

import ssl3d
from ssl3d import remedies
from ssl3d.bench.sources import open_dataset, pretraining_cohort, task_cohort, with_masks
from ssl3d.cli import main
from ssl3d.config import BackboneConfig, DownstreamConfig, Settings, load_settings, option_paths
from ssl3d.data.checks.case import check_cases
from ssl3d.data.checks.file import check_file
from ssl3d.data.checks.unnamed import unnamed_labels
from ssl3d.data.checks.verify import verify
from ssl3d.data.cohort import Case
from ssl3d.data.files.findings import Finding
from ssl3d.data.layouts.listing import list_cases
from ssl3d.data.layouts.releases import Folder
from ssl3d.data.prepared import case as prepare_module
from ssl3d.data.prepared.build import prepare
from ssl3d.data.prepared.case import prepare_file
from ssl3d.data.prepared.cohort import PreparedCohort
from ssl3d.data.prepared.steps import Intensity, Preparation
from ssl3d.downstream import predictor as predictor_module
from ssl3d.downstream.predictor import Predictor
from ssl3d.downstream.task_files import load_task
from ssl3d.downstream.tasks import Task
from ssl3d.models.backbone import Backbone
from ssl3d.remedies import REMEDIES, Remedy

Scenario = Callable[[Path, pytest.MonkeyPatch], Iterator[list[Finding]]]
SCENARIOS: dict[str, Scenario] = {}
SHAPE = (10, 11, 12)
GRID = np.diag([2.0, 2.0, 2.0, 1.0])


def works(*made: Remedy) -> Callable[[Scenario], Scenario]:
    def register(scenario: Scenario) -> Scenario:
        for remedy in made:
            assert remedy.name not in SCENARIOS
            SCENARIOS[remedy.name] = scenario
        return scenario

    return register


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_the_remedy_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in SCENARIOS, f"{name}: a promise without a test. Write a scenario for it in this file."
    refused, *healed = SCENARIOS[name](tmp_path, monkeypatch)
    assert any(finding.fix.remedy == name for finding in refused), [str(finding) for finding in refused]
    assert healed and not any(healed), [str(finding) for findings in healed for finding in findings]


def test_every_scenario_belongs_to_a_remedy() -> None:
    assert set(SCENARIOS) <= set(REMEDIES)


# --- helpers --------------------------------------------------------------------------------------


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def save(
    path: Path, data: np.ndarray | None = None, affine: np.ndarray = GRID, qform: np.ndarray | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(noise() if data is None else data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine if qform is None else qform, 1)
    nibabel.save(image, path)
    return path


def patch(path: Path, place: int, content: bytes) -> Path:
    raw = bytearray(path.read_bytes())
    raw[place : place + len(content)] = content
    path.write_bytes(bytes(raw))
    return path


def of_cases(cases: list[Case], **facts: Any) -> list[Finding]:
    return check_cases(cases, Folder().with_facts(**facts))


def one(path: Path, **facts: Any) -> list[Finding]:
    return of_cases([Case("a", "a", path)], **facts)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "300"})


class Plain(Backbone):
    """Its only feature is the image."""

    name, global_channels, local_channels = "plain", 1, 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.decoder = nn.Identity()

    def encode(self, x):  # type: ignore[no-untyped-def]
        return [x]

    def decode(self, features):  # type: ignore[no-untyped-def]
        return features[0]


def make_predictor(intensity: Intensity) -> Predictor:
    return Predictor(
        Task("seg", "SEG", "segmentation", "memory", "dsc", (1, 1, 1)), "finetune", ("a",), (1,),
        Preparation(spacing_mm=4), intensity, BackboneConfig(), DownstreamConfig(crop=8), Plain(), nn.Conv3d(1, 2, 1),  # type: ignore[arg-type]
    )  # fmt: skip


def ways(fix: str) -> list[tuple[list[str], str, str]]:
    """Return what a remedy prints, word for word: (``--option value``, ``key=value`` of ``--set``, line of a task file).

    It says ``--option value for data verify, data prepare and predict, --set key=value for pretrain and bench, key: value
    in a task file``; where several values work, each with "or".
    """
    option = r"--\w+ \S+"
    found = []
    for one, where in (
        (option, "for data verify, data prepare and predict"), (r"--set \S+", "for pretrain and bench"),
        (r"\w+: \S+", "in a task file"),
    ):  # fmt: skip
        said = re.search(rf"({one}(?: or {one})*) {where}", fix.replace("\n", " "))
        assert said, (where, fix)
        found.append(said.group(1).split(" or "))
    return [
        (words.split(), setting.removeprefix("--set "), line)
        for words, setting, line in zip(*found, strict=True)
    ]


def every_way(root: Path, fix: str, mp: pytest.MonkeyPatch, ct: bool = False) -> None:
    """Do what a remedy says, in its own words, in every command that it names, with every value that it names.

    Args:
        root: folder of the files.
        fix: the text, see :func:`ways`.
        mp: replaces the loading of a predictor.
        ct: whether the predictor was trained on CT.
    """
    for number, (words, setting, line) in enumerate(ways(fix)):
        one_way(root, words, setting, line, mp, root.parent / f"way{number}", ct)


def one_way(
    root: Path, words: list[str], setting: str, line: str, mp: pytest.MonkeyPatch, scratch: Path, ct: bool
) -> None:
    scratch.mkdir(exist_ok=True)
    cache, out = scratch / "cache", scratch / "out"
    checked = run("data", "verify", root, *words)
    assert checked.exit_code == 0, checked.output
    prepared = run("data", "prepare", root, *words, "--spacing", 4, "--cache", cache)
    assert prepared.exit_code == 0, prepared.output
    intensity = Intensity("ct", 512.0, True, "") if ct else Intensity("minmax", 0.0, False, "")
    mp.setattr(predictor_module, "load_predictor", lambda folder: make_predictor(intensity))
    predicted = run("predict", "--checkpoint", root, "--input", root, "--out", out, "--device", "cpu", *words)
    assert predicted.exit_code == 0, predicted.output
    # pretrain and bench take their volumes from these two.
    settings = load_settings("smoke", [setting, "data.spacing_mm=4"])
    assert isinstance(pretraining_cohort(str(root), settings, cache), PreparedCohort)
    files = sorted(p for p in root.iterdir())
    rows = "subject,image,value\n" + "".join(f"{i},{p},{i}\n" for i, p in enumerate(files))
    (scratch / "t.csv").write_text(rows)
    modality = "modality: ct\n" if ct else ""
    text = f"name: t\nkind: regression\ndataset: csv\ndata: t.csv\n{modality}{line}\n"
    (scratch / "t.yaml").write_text(text)
    task = load_task(scratch / "t.yaml")
    assert isinstance(
        task_cohort(task, None, load_settings("smoke", ["data.spacing_mm=4"]), cache), PreparedCohort
    )


# --- files ----------------------------------------------------------------------------------------


@works(remedies.COPY_AGAIN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    source = save(tmp / "source.nii.gz")
    copy = tmp / "copy.nii.gz"
    copy.write_bytes(source.read_bytes()[:-100])
    yield check_file(copy)
    shutil.copy(source, copy)
    yield check_file(copy)


@works(remedies.CHECK_PATH)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    cases = [Case("a", "a", save(tmp / "a.nii")), Case("b", "b", tmp / "bb.nii")]
    yield of_cases(cases)
    yield of_cases([cases[0], replace(cases[1], image=save(tmp / "b.nii", noise(1)))])
    yield of_cases(cases[:1])


@works(remedies.FETCH)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    (tmp / "a.nii").symlink_to(tmp / "annex" / "a.nii")
    yield check_file(tmp / "a.nii")
    save(tmp / "annex" / "a.nii")
    yield check_file(tmp / "a.nii")


@works(remedies.LOOK_AFTER)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield check_file(tmp / ("x" * 300 + ".nii"))
    yield check_file(save(tmp / "x.nii"))


@works(remedies.PUT_FILE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    os.mkfifo(tmp / "a.nii")
    yield check_file(tmp / "a.nii")
    (tmp / "a.nii").unlink()
    yield check_file(save(tmp / "a.nii"))


@works(remedies.CONVERT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    save(tmp / "a.nii").rename(tmp / "a.img")
    refused = check_file(tmp / "a.img")
    yield refused
    endings = refused[0].fix.rsplit("ends in ")[1].split(", ")
    assert ".nii.gz" in endings
    for ending in endings:
        image = sitk.GetImageFromArray(noise().transpose(2, 1, 0))
        sitk.WriteImage(image, str(tmp / f"converted{ending}"))
        yield check_file(tmp / f"converted{ending}")


@works(remedies.EXPORT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    (tmp / "a.nii.gz").write_bytes(b"no image at all, but long enough to hold a header" * 10)
    (tmp / "b.nii.gz").write_bytes(save(tmp / "b.nii").read_bytes())
    yield check_file(tmp / "a.nii.gz")
    yield check_file(save(tmp / "a.nii.gz"))


@works(remedies.COPY_BOTH)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    sitk.WriteImage(sitk.GetImageFromArray(noise()), str(tmp / "a.mhd"))
    (tmp / "b").mkdir()
    shutil.copy(tmp / "a.mhd", tmp / "b")
    yield check_file(tmp / "b" / "a.mhd")
    shutil.copy(tmp / "a.raw", tmp / "b")
    yield check_file(tmp / "b" / "a.mhd")


@works(remedies.RUN_AGAIN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "a.nii")
    real = prepare_module.inspect_case

    def touched(*args: Any, **kwargs: Any) -> Any:
        os.utime(path, (1, 1))
        return real(*args, **kwargs)

    dataset = Folder().with_facts(modality="mr")
    arguments = [Case("a", "a", path)], dataset, Preparation(spacing_mm=2), tmp / "cache"
    mp.setattr(prepare_module, "inspect_case", touched)
    yield refused(lambda: prepare(*arguments), [remedies.RUN_AGAIN])
    mp.setattr(prepare_module, "inspect_case", real)
    yield refused(lambda: prepare(*arguments), [])


def refused(command: Callable[[], object], printed: list[Remedy]) -> list[Finding]:
    """Run a command that raises; return findings with the remedies whose words its error holds."""
    from ssl3d.errors import SSL3DError

    try:
        command()
    except SSL3DError as error:
        # Up to the first value of each template.
        said = [r for r in printed if r.template.partition("{")[0] in str(error)]
        assert said, str(error)
        return [Finding(Path(), str(error), _nameless(r)) for r in said]
    return []


def _nameless(remedy: Remedy) -> remedies.Fix:
    fix = remedies.Fix(remedy.template)
    fix.remedy, fix.values = remedy.name, {}
    return fix


# --- headers --------------------------------------------------------------------------------------


@works(remedies.SHRINK)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield check_file(save(tmp / "a.nii"), max_bytes=4000)
    yield check_file(save(tmp / "cropped.nii", noise()[:5, :6, :7]), max_bytes=4000)
    yield check_file(save(tmp / "coarse.nii", noise()[::2, ::2, ::2]), max_bytes=4000)


@works(remedies.SPLIT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    data = noise(0, (*SHAPE, 2, 3))
    yield check_file(save(tmp / "a.nii", data))
    yield check_file(save(tmp / "b.nii", data[..., 0, 0]))


@works(remedies.CHANNEL)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    for i, ending in enumerate(("nii.gz", "nrrd", "mha")):
        frames = noise(i, (3, *SHAPE))  # (t, z, y, x) for ITK
        if ending == "nii.gz":
            save(tmp / "d" / "a.nii.gz", np.moveaxis(frames, 0, -1))
        else:
            sitk.WriteImage(sitk.GetImageFromArray(frames, isVector=False), str(tmp / "d" / f"a{i}.{ending}"))
    found = [finding for path in sorted((tmp / "d").iterdir()) for finding in check_file(path)]
    assert len(found) == 3
    yield found
    every_way(tmp / "d", found[0].fix, mp)
    every_way(tmp / "d", re.sub(r"(channel(?: |: |\S+=))0", r"\g<1>2", found[0].fix), mp)  # the last one
    yield [
        finding for path in sorted((tmp / "d").iterdir()) for finding in one(path, channel=2, modality="mr")
    ]
    for ending in ("nrrd", "mha"):  # "or split it"
        whole = sitk.ReadImage(str(next((tmp / "d").glob(f"*.{ending}"))))
        sitk.WriteImage(whole[:, :, :, 0], str(tmp / f"split.{ending}"))
        yield check_file(tmp / f"split.{ending}")


@works(remedies.CHANNEL_RANGE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "a.nii", noise(0, (*SHAPE, 3)))
    refused = one(path, channel=3)
    yield refused
    last = int(refused[0].fix.rsplit(" ")[-1])
    yield [finding for channel in range(last + 1) for finding in one(path, channel=channel)]


@works(remedies.STACK)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    data = noise()
    yield [f for k in range(3) for f in check_file(save(tmp / f"{k}.nii", data[:, :, k : k + 1]))]
    yield check_file(save(tmp / "stacked.nii", data[:, :, :3]))


@works(remedies.QFORM)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    for i in range(2):
        patch(save(tmp / "d" / f"a{i}.nii", noise(i)), 280, bytes(48))  # srow_x, srow_y, srow_z
    found = check_file(tmp / "d" / "a0.nii")
    yield found
    every_way(tmp / "d", found[0].fix, mp)
    yield one(tmp / "d" / "a0.nii", affine="qform")


@works(remedies.SFORM)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    for i in range(2):  # quatern_b, which makes no rotation
        patch(save(tmp / "d" / f"a{i}.nii", noise(i)), 256, np.float32("nan").tobytes())
    found = one(tmp / "d" / "a0.nii", affine="qform")
    yield found
    every_way(tmp / "d", found[0].fix, mp)
    yield one(tmp / "d" / "a0.nii", affine="sform")


@works(remedies.AFFINE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    other = GRID.copy()
    other[0] = [-2, 0, 0, 18]
    for i in range(2):
        save(tmp / "d" / f"a{i}.nii.gz", noise(i), qform=other)
    found = check_file(tmp / "d" / "a0.nii.gz")
    yield found
    every_way(tmp / "d", found[0].fix, mp)
    assert [words[1] for words, _, _ in ways(found[0].fix)] == ["sform", "qform"]
    for choice in ("sform", "qform"):
        yield one(tmp / "d" / "a0.nii.gz", affine=choice)


def test_a_remedy_names_the_layout_that_the_file_was_read_with(tmp_path: Path) -> None:
    other = GRID.copy()
    other[0] = [-2, 0, 0, 18]
    for i in range(2):
        save(tmp_path / "d" / f"a{i}.nii.gz", noise(i), qform=other)
    (tmp_path / "t.csv").write_text("image\nd/a0.nii.gz\nd/a1.nii.gz\n")
    dataset = open_dataset("csv", tmp_path / "t.csv", labels=False)
    findings = check_cases(list_cases(dataset, tmp_path / "t.csv").cases, dataset)
    for (_, setting, _), choice in zip(ways(findings[0].fix), ("sform", "qform"), strict=True):
        assert setting == f"data.affine.csv={choice}"
        settings = load_settings("smoke", [setting, "data.spacing_mm=4"])
        assert len(pretraining_cohort(f"csv={tmp_path / 't.csv'}", settings, tmp_path / "cache")) == 2


@works(remedies.GEOMETRY)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "a.nii", affine=np.diag([2000.0, 2000, 2000, 1]))  # micrometres, say
    sitk.WriteImage(sitk.GetImageFromArray(noise()), str(tmp / "b.mha"))
    raw = (tmp / "b.mha").read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1")
    (tmp / "b.mha").write_bytes(raw)
    yield check_file(path) + check_file(tmp / "b.mha")
    image = nibabel.load(path)
    fixed = nibabel.Nifti1Image(np.asarray(image.dataobj), GRID, image.header)
    fixed.set_sform(GRID)
    fixed.set_qform(GRID)
    nibabel.save(fixed, tmp / "fixed.nii")
    yield check_file(tmp / "fixed.nii")
    other = sitk.GetImageFromArray(noise())
    other.SetSpacing((1, 2, 3))
    sitk.WriteImage(other, str(tmp / "b.mha"))
    yield check_file(tmp / "b.mha")


@works(remedies.ORIGIN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    nan = np.float32("nan").tobytes()
    path = patch(patch(save(tmp / "a.nii"), 292, nan), 268, nan)  # of the sform and of the qform
    yield check_file(path)
    affine = GRID.copy()
    affine[:3, 3] = 5
    image = nibabel.load(path)
    fixed = nibabel.Nifti1Image(np.asarray(image.dataobj), affine, image.header)
    fixed.set_sform(affine, 1)
    fixed.set_qform(affine, 1)
    nibabel.save(fixed, tmp / "fixed.nii")
    yield check_file(tmp / "fixed.nii")


# --- values ---------------------------------------------------------------------------------------


@works(remedies.REPLACE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    data = noise().astype(np.float32)
    data[0, 0, :3] = np.nan, np.inf, -np.inf
    yield one(save(tmp / "a.nii", data))
    data[~np.isfinite(data)] = 0
    yield one(save(tmp / "a.nii", data))


def scan(seed: int, hu: bool) -> np.ndarray:
    """A CT (12^3), half air and half tissue, in HU or with air at 0."""
    rng = np.random.default_rng(seed)
    data = np.where(np.arange(12)[:, None, None] < 6, -1000, 50) + rng.normal(0, 10, (12, 12, 12))
    return (data + (0 if hu else 1024)).astype(np.int16)


@works(remedies.OFFSET)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    """In HU, with air at 0, and cut inside the body, where the advice once made it worse."""
    kinds = {"hu": scan(0, True), "zero": scan(1, False), "inside": scan(2, True)[6:]}
    wrong = {"hu": 512.0, "zero": 1024.0, "inside": 0.0}
    found = {
        kind: one(save(tmp / kind / "d" / "a.nii", data), modality="ct", intensity_offset=wrong[kind])
        for kind, data in kinds.items()
    }
    yield [finding for findings in found.values() for finding in findings]
    for kind, (finding,) in found.items():
        every_way(tmp / kind / "d", finding.fix, mp, ct=True)
        right = 0.0 if kind == "zero" else 1024.0
        yield one(tmp / kind / "d" / "a.nii", modality="ct", intensity_offset=right)


@works(remedies.NO_CT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    strange = scan(0, True) * 20
    cases = [
        Case("a", "a", save(tmp / "d" / "a.nii", strange)),
        Case("b", "b", save(tmp / "d" / "b.nii", scan(1, True))),
    ]
    yield of_cases(cases, modality="ct", intensity_offset=1024.0)
    yield of_cases(cases[1:], modality="ct", intensity_offset=1024.0)  # taken out
    prepared = run("data", "prepare", tmp / "d", "--scaling", "minmax", "--spacing", 2, "--cache", tmp / "c")
    assert prepared.exit_code == 0, prepared.output
    (tmp / "t.csv").write_text(f"subject,image,value\na,{tmp}/d/a.nii,1\nb,{tmp}/d/b.nii,2\n")
    head = "name: t\nkind: regression\ndataset: csv\ndata: t.csv\nmodality: ct\nintensity_offset: 1024\n"
    settings = load_settings("smoke", ["data.spacing_mm=2"])
    (tmp / "t.yaml").write_text(head)
    assert refused(
        lambda: task_cohort(load_task(tmp / "t.yaml"), None, settings, tmp / "c"), [remedies.NO_CT]
    )
    (tmp / "t.yaml").write_text(head + "preparation: {scaling: minmax}\n")
    yield refused(lambda: task_cohort(load_task(tmp / "t.yaml"), None, settings, tmp / "c"), [remedies.NO_CT])
    save(tmp / "d" / "a.nii", (strange // 20).astype(np.int16))  # brought to HU
    yield of_cases(cases, modality="ct", intensity_offset=1024.0)


@works(remedies.MODALITY)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    import json

    for i in range(2):
        save(tmp / "d" / "imagesTr" / f"c{i}_0000.nii.gz", scan(i, True))
        save(
            tmp / "d" / "labelsTr" / f"c{i}.nii.gz", np.ones((12, 12, 12), np.uint8) * (np.arange(12) > i + 3)
        )
    facts = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "a": 1},
        "file_ending": ".nii.gz",
        "numTraining": 2,
    }
    (tmp / "d" / "dataset.json").write_text(json.dumps(facts))

    def found(lines: str = "") -> list[Finding]:
        (tmp / "t.yaml").write_text(f"name: t\nkind: segmentation\ndataset: nnunet\n{lines}")
        dataset = open_dataset("nnunet", tmp / "d", facts=load_task(tmp / "t.yaml").facts)
        return check_cases(dataset.cases(tmp / "d"), dataset)

    yield found()
    yield found("modality: ct\n")
    (tmp / "d" / "dataset.json").write_text(json.dumps({**facts, "channel_names": {"0": "CT"}}))
    yield found()


def two_kinds(tmp: Path, other: np.ndarray, remedy: Remedy, **facts: Any) -> Iterator[list[Finding]]:
    cases = [Case(str(i), str(i), save(tmp / "d" / f"{i}.nii", scan(i, True))) for i in range(2)]
    cases.append(Case("m", "m", save(tmp / "d" / "m.nii", other)))
    yield of_cases(cases, **facts)
    dataset = Folder().with_facts(**facts)
    cohort = prepare(cases, dataset, Preparation(spacing_mm=2), tmp / "c", policy="skip")
    assert len(cohort) == 2 and cohort.skipped[0]["fix"] == remedy.template
    yield of_cases(cases[:2], **facts)


@works(remedies.TWO_KINDS)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield from two_kinds(tmp, noise(), remedies.TWO_KINDS)
    yield one(tmp / "d" / "m.nii")  # in a folder of its own
    result = run("data", "verify", tmp / "d", "--policy", "skip")
    assert result.exit_code == 1 and "keep CT and MR in folders of their own" in result.output


@works(remedies.TWO_CTS)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield from two_kinds(tmp, scan(7, False), remedies.TWO_CTS, modality="ct")
    save(tmp / "d" / "m.nii", scan(7, False) - 1024)
    yield of_cases([Case(n, n, tmp / "d" / f"{n}.nii") for n in "01m"], modality="ct")


# --- labels and cohorts ---------------------------------------------------------------------------

LABELS: dict[str, Any] = {"label_values": {1: "a", 2: "b"}, "modality": "mr"}


def labelled(tmp: Path, label: np.ndarray, affine: np.ndarray = GRID, **facts: Any) -> list[Finding]:
    case = Case("a", "a", save(tmp / "a.nii"), save(tmp / "a_label.nii", label, affine))
    return of_cases([case], **{**LABELS, **facts})


def segmentation(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)


def of_task(tmp: Path, lines: str) -> list[Finding]:
    """Check the label of :func:`labelled` as a task file describes it."""
    (tmp / "t.csv").write_text("image,label\na.nii,a_label.nii\n")
    (tmp / "t.yaml").write_text(f"name: t\nkind: segmentation\ndataset: csv\n{lines}")
    dataset = open_dataset("csv", tmp / "t.csv", facts=load_task(tmp / "t.yaml").facts)
    return check_cases(dataset.cases(tmp / "t.csv"), dataset)


@works(remedies.INTEGERS)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    label = segmentation().astype(np.float32)
    yield labelled(tmp, label * 1.3)
    yield labelled(tmp, label)


@works(remedies.EMPTY_LABEL)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield labelled(tmp, segmentation() * 0)
    yield of_task(tmp, "labels: {1: a, 2: b}\nempty_labels: true\n")
    yield labelled(tmp, segmentation())


@works(remedies.LABEL_VALUES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    label = segmentation()
    label[0] = 7
    found = labelled(tmp, label)
    yield found
    (tmp / "t.csv").write_text("image,label\na.nii,a_label.nii\n")
    said = re.search(r"(--labels) (\S+) for data verify and data prepare", found[0].fix)
    assert said and run("data", "verify", tmp / "t.csv", "--as", "csv").exit_code == 1
    for command in (["verify"], ["prepare", "--spacing", "4", "--cache", tmp / "cache"]):
        result = run("data", command[0], tmp / "t.csv", "--as", "csv", *said.groups(), *command[1:])
        assert result.exit_code == 0, result.output
    yield of_task(tmp, "labels: {1: a, 2: b, 7: c}\n")
    yield of_task(tmp, "labels: {1: a, 2: b}\nignore_labels: [7]\n")
    yield labelled(tmp, label, label_values={1: "a", 2: "b", 7: "c"})  # an adapter's own
    yield labelled(tmp, segmentation())


@works(remedies.NAME_VALUES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    """In a table and in BIDS, of any number of cases: one finding, by both commands; what it says names the values."""
    labelled(tmp, segmentation())
    (tmp / "t.csv").write_text("image,label\na.nii,a_label.nii\n")
    (tmp / "bids/sub-1/anat").mkdir(parents=True)
    shutil.copy(tmp / "a.nii", tmp / "bids/sub-1/anat/sub-1_T1w.nii")
    shutil.copy(tmp / "a_label.nii", tmp / "bids/sub-1/anat/sub-1_dseg.nii")
    (tmp / "names.yaml").write_text("name: t\nkind: segmentation\ndataset: csv\nlabels: {1: a, 2: b}\n")
    places = {"csv": tmp / "t.csv", "bids": tmp / "bids"}

    def left(layout: str, **facts: Any) -> list[Finding]:
        dataset = open_dataset(layout, places[layout], facts=facts)
        found = unnamed_labels(places[layout], dataset.cases(places[layout]), dataset)
        return [found] if found else []

    found = left("csv") + left("bids")
    assert len(found) == 2 and all(
        "has 1 label file, and nothing says" in finding.problem for finding in found
    )
    yield found
    said = re.search(r"(--labels) (\S+) with names", found[0].fix)
    assert said and said[2] == "1=structure1,2=structure2"
    for layout, place in places.items():
        for command in (["verify"], ["prepare", "--spacing", "4", "--cache", tmp / "cache"]):
            arguments = ["data", command[0], place, "--as", layout, *command[1:]]
            refused = run(*arguments)
            assert refused.exit_code and refused.output.count("nothing says what their values mean") == 1
            for names in (said.groups(), ("--task", tmp / "names.yaml")):
                result = run(*arguments, *names)
                assert result.exit_code == 0, result.output
        yield left(layout, label_values={1: "a", 2: "b"})


@works(remedies.LABEL_GRID)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    from scipy.ndimage import zoom

    coarse = segmentation()[::2, :, :]
    yield labelled(tmp, coarse, np.diag([4.0, 2, 2, 1]))
    yield labelled(tmp, zoom(coarse, (2, 1, 1), order=0, grid_mode=True, mode="nearest"))
    shifted = GRID.copy()
    shifted[0, 3] = 9
    assert labelled(tmp, segmentation(), shifted)
    yield labelled(tmp, segmentation())  # the header corrected


@works(remedies.KEEP_ONE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    cases = [Case(n, n, save(tmp / f"{n}.nii")) for n in "ab"]
    yield of_cases(cases)
    yield of_cases(cases[:1])
    save(tmp / "b.nii", noise(1))
    yield of_cases(cases)


@works(remedies.ONE_SCAN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    from scipy.ndimage import gaussian_filter

    for seed in range(4):
        blobs = gaussian_filter(np.random.default_rng(seed).normal(size=(30, 30, 30)), 1.5) * 4000
        save(tmp / "d" / f"{'abcd'[seed]}.nii", blobs.astype(np.int16) + 2500, np.diag([4.0, 4, 4, 1]))
        if not seed:
            save(tmp / "d" / "z.nii", (blobs * 0.5).astype(np.int16) + 1090, np.diag([4.0, 4, 4, 1]))
    mr = Folder().with_facts(modality="mr")
    cases = mr.cases(tmp / "d")
    yield list(verify(cases, mr).findings)
    yield list(verify([case for case in cases if case.id != "a"], mr).findings)
    yield list(verify([replace(c, subject="one") if c.id in "az" else c for c in cases], mr).findings)
    # With names that hold the person, the option that it names does the same.
    (tmp / "d" / "z.nii").rename(tmp / "d" / "a-again.nii")
    told = run("data", "verify", tmp / "d", "--subject-pattern", "^([a-d])")
    assert told.exit_code == 0 and run("data", "verify", tmp / "d").exit_code == 1, told.output
    cases = mr.cases(tmp / "d")
    rows = [(c.id[0], c.image) for c in cases]
    (tmp / "t.csv").write_text("subject,image\n" + "".join(f"{who},{path}\n" for who, path in rows))
    dataset = open_dataset("csv", tmp / "t.csv", labels=False).with_facts(modality="mr")
    yield list(verify(list_cases(dataset, tmp / "t.csv").cases, dataset).findings)


@works(remedies.OWN_LABEL)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    cases = [
        Case(n, n, save(tmp / f"{n}.nii", noise(i)), save(tmp / f"{n}_l.nii", segmentation()))
        for i, n in enumerate("ab")
    ]
    found = of_cases(cases, **LABELS)
    yield found
    same_person = [replace(case, subject="one") for case in cases]
    yield of_cases(same_person, **LABELS)
    assert "--subject-pattern" in found[0].fix and "subject: " in found[0].fix
    (tmp / "t.csv").write_text("id,image,label\nq7-anna,a.nii,a_l.nii\nrx-anna,b.nii,b_l.nii\n")
    head = "name: t\nkind: segmentation\ndataset: csv\nlabels: {1: a, 2: b}\n"

    def of_people(line: str) -> list[Finding]:
        (tmp / "t.yaml").write_text(head + line)
        dataset = open_dataset("csv", tmp / "t.csv", facts=load_task(tmp / "t.yaml").facts)
        return check_cases(list_cases(dataset, tmp / "t.csv").cases, dataset)

    assert of_people("")
    yield of_people("subject: 'anna$'\n")
    words = ("data", "verify", tmp / "t.csv", "--as", "csv", "--task", tmp / "t.yaml")
    (tmp / "t.yaml").write_text(head)
    assert run(*words).exit_code == 1 and run(*words, "--subject-pattern", "anna$").exit_code == 0
    save(tmp / "b_l.nii", segmentation(1))
    yield of_cases(cases, **LABELS)


@works(remedies.ONE_PART)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    cases = [
        Case(n, "anna", save(tmp / f"{n}.nii", noise(i)), subset=s)
        for i, (n, s) in enumerate((("a", "train"), ("b", "test")))
    ]  # type: ignore[arg-type]
    yield of_cases(cases)
    yield of_cases([replace(case, subset="train") for case in cases])


@works(remedies.ABSENT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    case = Case("a", "a", save(tmp / "a.nii"), save(tmp / "a_label.nii", segmentation()))

    def absent(cases: list[Case], **facts: Any) -> list[Finding]:
        return verify(cases, Folder().with_facts(**{**LABELS, **facts})).findings

    three = {"label_values": {1: "a", 2: "b", 3: "c"}}
    yield absent([case], **three)
    yield absent([case])  # taken out
    rare = segmentation(1)
    rare[0] = 3
    more = Case("b", "b", save(tmp / "b.nii", noise(1)), save(tmp / "b_label.nii", rare))
    yield absent([case, more], **three)


# --- layouts --------------------------------------------------------------------------------------


def nnunet(
    root: Path, ending: str = ".nii.gz", promised: int = 2, file_ending: str = ".nii.gz"
) -> list[Finding]:
    """Write two cases, the second with another ending, and list the folder."""
    import json

    for i, end in enumerate((".nii.gz", ending)):
        save(root / "imagesTr" / f"c{i}_0000{end}", noise(i))
        save(root / "labelsTr" / f"c{i}{end}", segmentation(i))
    facts = {
        "channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": promised,
        "file_ending": file_ending,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(facts))
    return listed(root)


def listed(root: Path) -> list[Finding]:
    dataset = open_dataset("nnunet", root)
    listing = list_cases(dataset, root)
    return listing.findings + check_cases(listing.cases, dataset)


@works(remedies.ENDING, remedies.PROMISE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    yield nnunet(tmp / "d", ".nii")
    for folder, name in (("imagesTr", "c1_0000"), ("labelsTr", "c1")):
        path = tmp / "d" / folder / f"{name}.nii"
        nibabel.save(nibabel.load(path), path.with_suffix(".nii.gz"))
        path.unlink()
    yield listed(tmp / "d")  # converted, and with them the count
    for folder, name in (("imagesTr", "c1_0000"), ("labelsTr", "c1")):
        (tmp / "d" / folder / f"{name}.nii.gz").unlink()
    text = (tmp / "d" / "dataset.json").read_text().replace('"numTraining": 2', '"numTraining": 1')
    (tmp / "d" / "dataset.json").write_text(text)
    yield listed(tmp / "d")  # the promise corrected


@works(remedies.NUMBER)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    nnunet(tmp / "d")
    path = (tmp / "d" / "imagesTr" / "c1_0000.nii.gz").rename(tmp / "d" / "imagesTr" / "c1.nii.gz")
    found = listed(tmp / "d")
    yield found
    (name,) = (re.search(r"call it (\S+) if", f.fix).group(1) for f in found if f.fix.remedy == "number")  # type: ignore[union-attr]
    path.rename(path.with_name(name))
    yield listed(tmp / "d")


@works(remedies.READABLE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    """A folder that may not be read; to the administrator everything is readable, so the refusal is acted."""
    save(tmp / "d" / "a.nii")
    save(tmp / "d" / "private" / "b.nii", noise(1))
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    mp.setattr(os, "scandir", scandir)
    yield list_cases(Folder(), tmp / "d").findings
    mp.setattr(os, "scandir", real)
    whole = list_cases(Folder(), tmp / "d")
    assert len(whole.cases) == 2
    yield whole.findings
    shutil.rmtree(tmp / "d" / "private")
    yield list_cases(Folder(), tmp / "d").findings


# --- preparation ----------------------------------------------------------------------------------


def prepared_file(path: Path, **options: Any) -> list[Finding]:
    found = prepare_file(
        path, Preparation(**{"spacing_mm": 2.0, **options}), Intensity("minmax", 0, False, "")
    )
    return found if isinstance(found, list) else []


@works(remedies.COARSER)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "d" / "a.nii", noise(0, (24, 24, 24)), np.diag([45.0, 45, 45, 1]))
    yield prepared_file(path, spacing_mm=0.3)
    assert run("data", "prepare", tmp / "d", "--spacing", 10, "--cache", tmp / "c").exit_code == 0
    settings = load_settings("smoke", ["data.spacing_mm=10"])
    assert len(pretraining_cohort(str(tmp / "d"), settings, tmp / "c")) == 1
    (tmp / "t.csv").write_text("image,value\nd/a.nii,1\n")
    (tmp / "t.yaml").write_text(
        "name: t\nkind: regression\ndataset: csv\ndata: t.csv\npreparation: {spacing_mm: 10}\n"
    )
    assert len(task_cohort(load_task(tmp / "t.yaml"), None, load_settings("smoke"), tmp / "c")) == 1
    yield prepared_file(
        save(tmp / "b.nii", noise(0, (24, 24, 24))), spacing_mm=0.3, crop="center", center_mm=(5, 5, 5)
    )
    yield prepared_file(
        save(tmp / "d" / "a.nii", noise(0, (24, 24, 24)), np.diag([0.45, 0.45, 0.45, 1])), spacing_mm=0.3
    )


@works(remedies.GIVE_MASK)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    cases = [Case("a", "a", save(tmp / "a.nii"))]
    dataset = Folder().with_facts(modality="mr")
    save(tmp / "masks" / "a.nii.gz", (np.ones(SHAPE) * (np.arange(12) > 4)).astype(np.uint8))

    def cropped(cases: list[Case], crop: str) -> list[Finding]:
        preparation = Preparation(spacing_mm=2, crop=crop)  # type: ignore[arg-type]
        return refused(lambda: prepare(cases, dataset, preparation, tmp / "c"), [remedies.GIVE_MASK])

    yield cropped(cases, "mask")
    yield cropped(with_masks(cases, tmp / "masks"), "mask")
    yield cropped(cases, "none")


@works(remedies.GIVE_LABEL)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "a.nii")
    yield prepared_file(path, crop="label")
    yield prepared_file(path, crop="foreground")
    case = Case("a", "a", path, save(tmp / "l.nii", segmentation()))
    dataset = Folder().with_facts(**LABELS)
    yield refused(
        lambda: prepare([case], dataset, Preparation(spacing_mm=2, crop="label"), tmp / "c"),
        [remedies.GIVE_LABEL],
    )


@works(remedies.CROP_OF_CT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    path = save(tmp / "a.nii")
    yield prepared_file(path, crop="lungs")
    for crop in re.findall('"(.*?)"', remedies.CROP_OF_CT.template):
        yield prepared_file(path, crop=crop)


@works(remedies.OTHER_CROP)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    data = noise()
    data[3:7, 3:8, 3:9] = 5
    path = save(tmp / "a.nii", data)
    yield prepared_file(path, crop="center", center_mm=(4, 4, 4))
    yield prepared_file(path, crop="none")


# --- DICOM series ---------------------------------------------------------------------------------


def series(folder: Path, **options: Any) -> list[Path]:
    test_dicom = pytest.importorskip("test_dicom", reason='pip install "ssl3d[dev]"')
    paths: list[Path] = test_dicom.write_series(folder, **options)
    return paths


def edit(path: Path, **values: object) -> Path:
    import pydicom

    content = pydicom.dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(content, name)
        else:
            setattr(content, name, value)
    content.save_as(path)
    return path


@works(remedies.NOT_A_LABEL)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    import pydicom
    from pydicom.data import get_testdata_file

    scan = series(tmp / "d")
    dose = tmp / "d" / "dose.dcm"
    shutil.copy(get_testdata_file("rtdose_1frame.dcm"), dose)
    yield check_file(dose)
    values = np.ones(SHAPE, np.uint8)
    yield check_file(save(tmp / "label.nii.gz", values)) + check_file(scan[0])
    assert pydicom.dcmread(dose).Modality == "RTDOSE"
    dose.unlink()
    yield check_file(tmp / "d")


@works(remedies.TAKE_OUT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    """A file that has the preamble of DICOM and is none."""
    series(tmp / "d")
    from ssl3d.data.checks import file as integrity

    mp.setattr(integrity, "is_dicom", lambda path: True)  # a race: it was replaced after it was looked at
    (tmp / "other" / "x").parent.mkdir()
    (tmp / "other" / "x").write_bytes(b"text")
    yield check_file(tmp / "other" / "x")
    yield check_file(tmp / "d")


@works(remedies.HOLDS_NONE)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    series(tmp / "d" / "patient")
    yield check_file(tmp / "d")
    yield check_file(tmp / "d" / "patient")


@works(remedies.NAME_SERIES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    first, second = series(tmp / "d", prefix="A"), series(tmp / "d", prefix="B")
    yield check_file(tmp / "d")
    yield check_file(first[0]) + check_file(second[2])


@works(remedies.COPY_FILE, remedies.COPY_OR_OUT)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    paths = series(tmp / "d")
    whole = paths[4].read_bytes()
    paths[4].write_bytes(whole[: len(whole) // 2])
    yield check_file(paths[4]) + check_file(tmp / "d")
    moved = paths[4].rename(tmp / "away")
    yield check_file(tmp / "d")
    moved.unlink()
    paths[4].write_bytes(whole)
    yield check_file(tmp / "d") + check_file(paths[4])


@works(remedies.DCM2NIIX)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    (path,) = series(tmp / "d", keep=[0])
    frames = noise(0, (5, 6, 7))  # (frames, rows, columns)
    edit(path, NumberOfFrames=5, PixelData=frames.tobytes())
    yield check_file(path)
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp / "converted.nii.gz"))  # as dcm2niix does
    yield check_file(tmp / "converted.nii.gz")


@works(remedies.NO_SCAN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    series(tmp / "d" / "scan")
    for path in series(tmp / "d" / "colour"):
        rgb = np.zeros((6, 7, 3), np.uint8)
        edit(
            path, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8, BitsStored=8,
            HighBit=7, PixelRepresentation=0, PixelData=rgb.tobytes(),
        )  # fmt: skip

    def all_of_folder() -> list[Finding]:
        return [finding for case in Folder().cases(tmp / "d") for finding in check_file(case.image)]

    yield all_of_folder()
    shutil.rmtree(tmp / "d" / "colour")
    yield all_of_folder()


@works(remedies.ADD_SLICES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    paths = series(tmp / "whole")
    (tmp / "d").mkdir()
    shutil.copy(paths[0], tmp / "d")
    yield check_file(tmp / "d")
    for path in paths[1:]:
        shutil.copy(path, tmp / "d")
    yield check_file(tmp / "d")


@works(remedies.EXPORT_SERIES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    edit(series(tmp / "d")[2], PixelSpacing=[3.0, 3.0])
    yield check_file(tmp / "d")
    shutil.rmtree(tmp / "d")
    series(tmp / "d")
    yield check_file(tmp / "d")


@works(remedies.OWN_SERIES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    edit(series(tmp / "d")[2], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    yield check_file(tmp / "d")
    shutil.rmtree(tmp / "d")
    series(tmp / "d" / "axial")
    series(tmp / "d" / "sagittal", directions=(0, 1, 0, 0, 0, -1), step=(2.5, 0, 0))
    yield check_file(tmp / "d" / "axial") + check_file(tmp / "d" / "sagittal")
    edit(series(tmp / "e", keep=[0, 1, 2, 3, 4])[4], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    assert check_file(tmp / "e")
    (tmp / "e" / "IM0005").unlink()  # slice 4
    yield check_file(tmp / "e")


@works(remedies.ONE_VOLUME)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    series(tmp / "d", step=(0, 0, 0))
    yield check_file(tmp / "d")
    for echo in range(2):
        series(tmp / "e" / str(echo))
        yield check_file(tmp / "e" / str(echo))


@works(remedies.COPY_SLICES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    lost = series(tmp / "d")[2]
    kept = lost.read_bytes()
    lost.unlink()
    yield check_file(tmp / "d")
    lost.write_bytes(kept)
    yield check_file(tmp / "d")


@works(remedies.EQUAL_STEPS)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    paths = series(tmp / "d")
    edit(paths[4], ImagePositionPatient=[-10, 20, 30 + 3.5 * 2.5])
    yield check_file(tmp / "d")
    yield check_file(save(tmp / "resampled.nii.gz"))


@works(remedies.STRAIGHTEN)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    series(tmp / "d", step=(0, 2.5 * np.tan(np.radians(12)), 2.5))
    yield check_file(tmp / "d")
    series(tmp / "straight")
    yield check_file(tmp / "straight")


@works(remedies.COPY_SERIES)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    paths = series(tmp / "d")
    from ssl3d.data.files import dicom

    known, kept = dicom.series_of(tmp / "d"), paths[1].read_bytes()
    mp.setattr(dicom, "series_of", lambda folder: known)  # it was whole when the folder was read
    mp.setattr(dicom, "unreadable_in", lambda folder: [])
    paths[1].write_bytes(kept[:200])
    yield check_file(tmp / "d")
    paths[1].write_bytes(kept)
    yield check_file(tmp / "d")


@works(remedies.OF_SCANNER)
def _(tmp: Path, mp: pytest.MonkeyPatch) -> Iterator[list[Finding]]:
    edit(series(tmp / "d")[1], ImagePositionPatient=None)
    yield check_file(tmp / "d")
    shutil.rmtree(tmp / "d")
    series(tmp / "d")
    yield check_file(tmp / "d")


# --- what messages name exists --------------------------------------------------------------------


def options_of(group: click.Group) -> set[str]:
    found = own_options(group)
    for command in group.commands.values():
        found |= options_of(command) if isinstance(command, click.Group) else own_options(command)
    return found


def own_options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def texts() -> Iterator[tuple[str, str]]:
    """Every piece of text in the package that is no documentation: (file, text)."""
    root = Path(ssl3d.__file__).parent
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in documentation
            ):
                yield str(path.relative_to(root)), node.value


OTHERS_OPTIONS = {
    "--help", "--version", "--always", "--dirty", "--abbrev", "--nnodes", "--nproc-per-node", "--head", "--generate",
}  # fmt: skip
"""Options in texts that belong to other programs (git, torchrun, ray), or to all commands."""


def test_messages_name_options_and_settings_that_exist() -> None:
    options, settings = options_of(main) | OTHERS_OPTIONS, set(option_paths(Settings))
    sections = {name for name, field in Settings.model_fields.items()}
    unknown = []
    for file, text in texts():
        if "var(--" in text:  # a style sheet
            continue
        unknown += [
            f"{file}: {name} in {text!r}"
            for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
            if name not in options
        ]
        for key in re.findall(r"--set (?:')?([a-z_]+\.[a-z_.]+[a-z_])", text):
            owner = key.split(".")
            if owner[0] in sections and not any(key == s or key.startswith(f"{s}.") for s in settings):
                unknown.append(f"{file}: {key} in {text!r}")
    assert not unknown, "\n".join(unknown)
