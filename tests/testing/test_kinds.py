"""Datasets, tasks and table formats: sound ones pass, mistakes are told once; and the command that checks them all."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result

import ssl3d
from ssl3d.cli import main
from ssl3d.registry.registry import Entry, registry
from ssl3d.testing import check_dataset, check_format, check_task
from ssl3d.testing.checks import Report


def only_failure(report: Report, check: str, message: str) -> None:
    failed = [c for c in report.checks if c.failed]
    assert [c.name for c in failed] == [check], [c.told() for c in failed]
    assert re.search(message, failed[0].seen), failed[0].seen
    assert "test_kinds.py:" in failed[0].where, failed[0]


# --- Datasets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def livers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven livers at 6.4 mm, so that their numbers have one and two digits; odd ones hold a tumour, too."""
    folder = tmp_path_factory.mktemp("livers")
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 20)] * 3, indexing="ij"))
    rng = np.random.default_rng(0)
    for i in range(11):
        label = ((grid**2).sum(0) < 0.2 + 0.02 * i).astype(np.uint8)
        label[9:11, 9:11, 9:11] = 1 + i % 2
        image = np.where((grid**2).sum(0) < 0.8, 0, -1000) + 60 * label + rng.normal(0, 20, label.shape)
        for name, data in (("volume", image.astype(np.int16)), ("segmentation", label)):
            nibabel.save(
                nibabel.Nifti1Image(data, np.diag([6.4, 6.4, 6.4, 1])), folder / f"{name}-{i}.nii.gz"
            )
    return folder


class Livers(ssl3d.Dataset):
    """Livers beside their labels."""

    name = "livers"
    summary = "Livers"
    layout = "volume-*.nii.gz with segmentation-*.nii.gz beside each"
    modality = "ct"
    intensity_offset = 1000.0
    label_values: ClassVar[dict[int, str]] = {1: "liver", 2: "tumour"}

    def case(self, path: Path) -> ssl3d.Case:
        name = path.name[7:-7]
        return ssl3d.Case(name, name, path, path.with_name(path.name.replace("volume", "segmentation")))

    def cases(self, root: Path) -> list[ssl3d.Case]:
        return [self.case(path) for path in sorted(root.glob("volume-*.nii.gz"))]


class SpacedDataset(Livers):
    name = "my livers"


class NoLayout(Livers):
    layout = ""


class Background(Livers):
    label_values: ClassVar[dict[int, str]] = {0: "background", 1: "liver", 2: "tumour"}


class TwoOfOneName(Livers):
    label_values: ClassVar[dict[int, str]] = {1: "liver", 2: "liver"}


class LostAlias(Livers):
    label_aliases: ClassVar[dict[int, int]] = {3: 4}


class OldSignature(Livers):
    def cases(self) -> list[ssl3d.Case]:  # type: ignore[override]
        return []


class Traceback(Livers):
    def cases(self, root: Path) -> list[ssl3d.Case]:
        return sorted(
            (self.case(p) for p in root.iterdir() if p.name.startswith("volume")), key=lambda c: c.id
        )


class AnyFolder(Livers):
    def cases(self, root: Path) -> list[ssl3d.Case]:
        found = super().cases(root)
        return found or [self.case(root / "volume-0.nii.gz")]


class SameId(Livers):
    def case(self, path: Path) -> ssl3d.Case:
        return ssl3d.Case("liver", "liver", path)


class SlashId(Livers):
    def case(self, path: Path) -> ssl3d.Case:
        return ssl3d.Case(f"{path.parent.name}/{path.name}", "someone", path)


class NoSuchLabel(Livers):
    def case(self, path: Path) -> ssl3d.Case:
        return ssl3d.Case(path.name, path.name, path, path.with_name("label_of_" + path.name))


class Unsorted(Livers):
    def cases(self, root: Path) -> list[ssl3d.Case]:
        return [self.case(path) for path in root.glob("volume-*.nii.gz")]


class NoTumour(Livers):
    label_values: ClassVar[dict[int, str]] = {1: "liver"}


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (SpacedDataset, "declarations make sense", "'my livers' cannot name a dataset"),
        (NoLayout, "declarations make sense", "layout = ''"),
        (Background, "declarations make sense", "label_values has 0"),
        (TwoOfOneName, "declarations make sense", "names two alike"),
        (LostAlias, "declarations make sense", r"leads to \[4\]"),
        (OldSignature, "declarations make sense", "cases cannot be called"),
        (Traceback, "other folders are refused", "a folder that is missing: FileNotFoundError"),
        (AnyFolder, "other folders are refused", "a folder that is missing has 1 case"),
        (SameId, "cases are listed", "11 cases have the id 'liver'"),
        (SlashId, "cases are listed", "cannot name a file"),
        (NoSuchLabel, "cases are listed", "does not exist"),
        (Unsorted, "the list does not depend on the disk", "in the order in which the disk lists them"),
        (NoTumour, "cases are prepared", "segmentation-1.nii.gz.*2"),
    ],
)
def test_mistakes_of_datasets_are_told_once(
    cls: type[ssl3d.Dataset], check: str, message: str, livers: Path
) -> None:
    only_failure(check_dataset(cls, livers), check, message)


def test_a_sound_dataset_passes(livers: Path) -> None:
    report = check_dataset(Livers(), livers)
    report.assert_passed()
    assert [c.seen for c in report.checks][2] == "11 cases of 11 people, 11 labelled"
    assert len(check_dataset(Livers).checks) == 2, "without a folder, its cases are not looked at"


@pytest.mark.parametrize("name", registry().datasets.names())
def test_the_bundled_datasets_pass(name: str) -> None:
    check_dataset(name).assert_passed()


# --- Tasks -------------------------------------------------------------------------------------------


def task(**other: Any) -> ssl3d.Task:
    facts = {"name": "made_up", "title": "Made up", "kind": "segmentation", "dataset": "mmwhs", "metric": "dsc",
             "counts": (2, 2, 2), "preparation": {"scaling": "ct"}}  # fmt: skip
    return ssl3d.Task(**{**facts, **other})


@pytest.mark.parametrize(
    ("other", "check", "message"),
    [
        ({"name": "made up"}, "declarations make sense", "'made up' cannot name a task"),
        ({"title": "SHC"}, "declarations make sense", 'the title "SHC" is that of the task "shc"'),
        ({"metric": "auc"}, "declarations make sense", "a segmentation is scored by dsc, not by 'auc'"),
        ({"kind": "segmentatoin"}, "declarations make sense", 'Did you mean "segmentation"'),
        ({"counts": (2, 0, 2)}, "declarations make sense", "counts = "),
        ({"preparation": {"spacing": 2}}, "declarations make sense", 'unknown key "spacing"'),
        ({"dataset": "mmhws"}, "the dataset fits", 'Unknown dataset "mmhws"'),
        ({"facts": {"labels": {1: "a"}}}, "the dataset fits", "a dataset has no fact labels"),
        ({"dataset": "stoic"}, "the dataset fits", "names no structures"),
        (
            {"kind": "classification", "metric": "auc", "facts": {"target_names": {0: "a", 1: "b", 2: "c"}}},
            "the dataset fits", "auc is for two classes, and mmwhs has 3",
        ),
    ],
)  # fmt: skip
def test_mistakes_of_tasks_are_told_once(other: dict[str, Any], check: str, message: str) -> None:
    report = check_task(task(**other), skip=["every mode runs"])
    failed = [c for c in report.checks if c.failed]
    assert [c.name for c in failed] == [check], [c.told() for c in failed]
    assert re.search(message, failed[0].seen), failed[0].seen


@pytest.mark.parametrize("name", registry().tasks.names())
def test_the_bundled_tasks_pass(name: str) -> None:
    check_task(name, skip=["every mode runs"]).assert_passed()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        ("segmentation", "dsc"),
        ("classification", "auc"),
        ("classification", "macro_auc"),
        ("multilabel", "macro_auc"),
        ("regression", "mae"),
    ],
)
def test_every_kind_of_task_is_evaluated_on_made_up_volumes(kind: str, metric: str) -> None:
    report = check_task(task(kind=kind, metric=metric), skip=["the dataset fits"])
    report.assert_passed()
    assert metric in report.checks[-1].seen


@pytest.mark.filterwarnings("ignore")
def test_a_task_is_evaluated_on_the_phantoms() -> None:
    report = check_task("shc", "phantoms", skip=["every mode runs"])
    report.assert_passed()
    assert re.search(r"6 cases, .* for training, validation and test, linear", report.checks[-1].seen)


# --- Table formats -----------------------------------------------------------------------------------


def plain(model: Any) -> str:
    rows = [
        (row.method, key, cell.mean)
        for t in model.tables
        for row in t.rows
        for key, cell in row.cells.items()
    ]
    return repr(rows)


def changes(model: Any) -> str:
    text = plain(model)
    for table in model.tables:
        table.rows[0].cells.clear()
    return text


def first_row(model: Any) -> str:
    return plain(model) + model.tables[0].rows[0].title


def full(model: Any) -> str:
    return repr([[row.cells[c.key].mean for c in t.columns for row in t.rows] for t in model.tables])


FORMATS: list[tuple[Callable[[Any], Any], str, str]] = [
    (lambda model: None, "every table is rendered", "render returns a NoneType"),
    (first_row, "every table is rendered", "a table that is empty: IndexError"),
    (full, "every table is rendered", "a table that is with gaps: KeyError"),
    (changes, "the table is left as it was", "render changes a table"),
    (lambda model: plain(model) + str(time.perf_counter_ns()), "equal tables give equal texts", "the second text differs"),
    (lambda model: f"{len(model.tables)} tables", "other scores give another text", "does not change with the scores"),
    (lambda: "nothing", "declarations make sense", "render cannot be called"),
]  # fmt: skip


@pytest.mark.parametrize(("render", "check", "message"), FORMATS)
def test_mistakes_of_table_formats_are_told_once(render: Any, check: str, message: str) -> None:
    only_failure(check_format(ssl3d.TableFormat("mine", "Mine", render)), check, message)


@pytest.mark.parametrize("name", registry().table_formats.names())
def test_the_bundled_table_formats_pass(name: str) -> None:
    check_format(name).assert_passed()


# --- The command -------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments], env={"COLUMNS": "200"})


QUICK = [
    word for check in (
        "features do not collapse", "one batch can be overfitted", "the backbone loads into the harness", "learns",
        "scoring changes nothing", "sizes work or are refused", "target networks follow by momentum",
        "a checkpoint gives the same next step",
    ) for word in ("--skip", check)
]  # fmt: skip


def test_every_kind_is_checked_by_its_name(livers: Path) -> None:
    result = run("csv")
    assert result.exit_code == 0, result.output
    assert "The dataset csv:" in result.output and "The table format csv:" in result.output
    assert "give some with --data DIR" in result.output
    result = run("csv", "--kind", "format")
    assert result.exit_code == 0 and "The dataset" not in result.output
    result = run(
        "unet3d", "--set", "backbone.channels=4,8", "--skip", "it is pretrained evaluated and exported"
    )
    assert result.exit_code == 0 and "unet3d passes" in result.output, result.output
    result = run("sbm", "--skip", "every mode runs")
    assert result.exit_code == 0 and "the dataset fits" in result.output, result.output
    result = run("folder", "--data", str(livers), "--skip", "cases are prepared")
    assert result.exit_code == 0 and "cases of" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["denosing"],
            'is no method, backbone, dataset, task, table format or logger. Did you mean "denoising"?',
        ),
        (["denoising", "--kind", "task"], 'Unknown task "denoising"'),
        (["denoising", "--skip", "learn"], 'there is no such check. Did you mean "learns"?'),
        (["denoising", "--set", "backbone={name: nosuch}"], 'Unknown backbone "nosuch"'),
        (["denoising", "--set", "backbone.chanels=4,8"], 'unknown key "chanels"'),
        (["denoising", "--set", "pretrain.lr=-1"], "pretrain.lr"),
        (["denoising", "--set", "denoising.sigam=0.2"], 'unknown key "sigam"'),
        (["denoising", "--set", "byol.foo=1"], "an option of byol, which is not checked"),
        (["denoising", "--set", "phantoms.edge=32"], "phantoms means nothing to it"),
        (["denoising", "--data", "somewhere"], "a method is checked without data"),
        (["unet3d", "--set", "backbone={name: genesis_unet3d}"], "and unet3d is checked"),
        (["csv", "--kind", "format", "--set", "pretrain.lr=1"], "a table format has no options"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_remedy(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", ["bench --methods scratch --store", "pretrain --method denoising --out"])
def test_an_option_of_a_method_that_is_not_run_must_exist(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*command.split(), str(tmp_path / "x"), "--set", "byol.foo=1"])
    assert result.exit_code == 2 and 'method byol: unknown key "foo"' in result.output, result.output
    assert not (tmp_path / "x").exists()


def test_the_options_of_a_check_take_effect() -> None:
    """The backbone, the crop and the options of a variant's base, each seen in what is printed."""
    result = run(
        "denoising", *QUICK, "--set", "backbone={name: genesis_unet3d, width: 2}", "--set", "pretrain.crop=24"
    )
    assert result.exit_code == 0, result.output
    assert "noisy (4, 1, 24, 24, 24)" in result.output
    plain = run("gvsl_without_affine", *QUICK, "--set", "backbone.channels=4,8")
    wide = run(
        "gvsl_without_affine", *QUICK, "--set", "backbone.channels=4,8", "--set", "gvsl.hidden_channels=8"
    )
    parameters = [re.search(r"([\d,]+) parameters", result.output) for result in (plain, wide)]
    assert parameters[0] and parameters[1] and parameters[0][1] != parameters[1][1], (
        plain.output,
        wide.output,
    )


def test_a_failure_is_printed_with_place_and_hint_and_exits_with_1() -> None:
    def as_csv(render: Any) -> Result:
        with registry().table_formats.lent(
            Entry("csv", "", lambda: ssl3d.TableFormat("csv", "Mine", render))
        ):
            return run("csv", "--kind", "format")

    assert as_csv(plain).exit_code == 0
    result = as_csv(full)
    assert result.exit_code == 1 and "FAIL  every table is rendered" in result.output, result.output
    assert (
        re.search(r"at \S*test_kinds\.py:\d+ in full", result.output)
        and "hint: row.cells has" in result.output
    )
    assert "--   equal tables give equal texts" in result.output and "csv fails 1 check." in result.output


def test_backbones_are_listed() -> None:
    result = CliRunner().invoke(main, ["backbones"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "unet3d" in result.output and "genesis_unet3d" in result.output
