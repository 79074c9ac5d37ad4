"""Prediction on files: voxels land where they should on any grid, and bad files harm no others."""

from __future__ import annotations

import csv
import gzip
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner, Result
from grids import write_itk
from sklearn.metrics import roc_auc_score
from test_dicom import write_series
from torch import nn

from ssl3d.cli import main
from ssl3d.config import BackboneConfig, DownstreamConfig, FinetuneConfig
from ssl3d.data.checks.file import read_volume
from ssl3d.data.files.volume import write_like
from ssl3d.data.prepared.arrays import Where
from ssl3d.data.prepared.grids import logits_to_native_grid
from ssl3d.data.prepared.steps import Intensity, Preparation, prepare_arrays
from ssl3d.data.splits import Split
from ssl3d.device import to_device
from ssl3d.downstream.harness import Evaluation, evaluate
from ssl3d.downstream.predictor import Predictor, expand_inputs, load_predictor, save_predictor
from ssl3d.downstream.tasks import Task
from ssl3d.errors import CheckpointError, ConfigError
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone

CPU = torch.device("cpu")
CONFIG = BackboneConfig(channels=[4, 8])  # type: ignore[call-arg]
SEG = Task("seg", "SEG", "segmentation", "memory", "dsc", (1, 1, 1))
CLS = Task("cls", "CLS", "classification", "memory", "auc", (1, 1, 1))
INTENSITY = Intensity("minmax", 0.0, False, "test")
BALL_MM, RADIUS_MM = np.array([6.0, -4.0, 5.0]), 9.0

# Array axes in any anatomical order, anisotropic, rotated by angles that belong to no axis.
ANGLES = np.deg2rad([0.0, 20.0, 35.0])


def rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]])


GRIDS = {
    "plain": np.diag([2.0, 2.0, 2.0]),
    "anisotropic": np.diag([1.5, 2.0, 4.0]),
    "flipped": np.diag([-2.0, 2.0, -3.0]),
    "permuted": np.array([[0, 0, -3.0], [2.0, 0, 0], [0, -1.5, 0]]),
    "oblique": rotation(ANGLES[1]) @ np.diag([1.5, -2.0, 3.0]),
    "very oblique and permuted": rotation(ANGLES[2])[:, [2, 0, 1]] @ np.diag([3.0, 1.5, -2.0]),
}


def affine_of(axes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ ((np.array(shape) - 1) / 2)  # the middle of the volume is the origin
    return affine


def ball(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The ball of BALL_MM, in world coordinates, sampled on a grid: bool."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.linalg.norm(index @ affine[:3, :3].T + affine[:3, 3] - BALL_MM, axis=-1) < RADIUS_MM


def write_image(path: Path, axes: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Write a bright ball in ``path``'s format; return (ball on the file's grid, affine)."""
    shape = tuple(int(n) for n in np.rint(60 / np.linalg.norm(axes, axis=0)))
    affine = affine_of(axes, shape)
    truth = ball(affine, shape)
    image = (truth * 100 + np.random.default_rng(seed).normal(0, 1, shape)).astype(np.float32)
    if path.name.endswith((".nii", ".nii.gz")):
        nifti = nibabel.Nifti1Image(image, affine)
        nifti.header.set_slope_inter(2.0, 7.0)
        nibabel.save(nifti, path)
    else:
        write_itk(path, image, affine)
    return truth, affine


class Threshold(Backbone):
    """Its only feature is the image; the head of :func:`predictor` makes it a segmentation at 1/2."""

    name = "threshold"
    global_channels = local_channels = 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.decoder = nn.Identity()

    def encode(self, x):  # type: ignore[no-untyped-def]
        return [x]

    def decode(self, features):  # type: ignore[no-untyped-def]
        return features[0]


def predictor(task: Task = SEG, crop: str = "none") -> Predictor:
    head: nn.Module
    if task.kind == "segmentation":
        head = nn.Conv3d(1, 2, 1)
        head.weight.data[:] = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1)
        head.bias.data[:] = torch.tensor([0.5, -0.5])
    else:
        head = nn.Linear(1, 1)
    center = (44.0, 44.0, 44.0) if crop == "center" else None
    preparation = Preparation(spacing_mm=2.0, crop=crop, center_mm=center)  # type: ignore[arg-type]
    config = DownstreamConfig(crop=16)  # type: ignore[arg-type]
    return Predictor(
        task, "finetune", ("ball",), (600,), preparation, INTENSITY, CONFIG, config, Threshold(), head
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("crop", ["none", "center", "foreground"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_segmentation_lands_on_the_grid_of_its_file(tmp_path: Path, grid: str, crop: str) -> None:
    file, out = tmp_path / "a.nii.gz", tmp_path / "out"
    truth, affine = write_image(file, GRIDS[grid])
    assert predictor(crop=crop).predict_files([file], out, CPU) == []
    written = nibabel.load(out / "a.nii.gz")
    labels = np.asarray(written.dataobj)
    assert labels.shape == truth.shape and set(np.unique(labels)) == {0, 600}
    np.testing.assert_allclose(written.affine, affine, atol=1e-4)
    assert written.header["qform_code"] == nibabel.load(file).header["qform_code"]
    assert dice(labels == 600, truth) > 0.9
    # The centre, in mm, is where the ball is: a flip or a shift of one voxel would show.
    index = np.argwhere(labels == 600).mean(axis=0)
    np.testing.assert_allclose(affine[:3, :3] @ index + affine[:3, 3], BALL_MM, atol=0.7)


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha", ".mhd"])
def test_the_format_of_the_file_is_kept(tmp_path: Path, suffix: str) -> None:
    file, out = tmp_path / f"a{suffix}", tmp_path / "out"
    truth, _ = write_image(file, GRIDS["very oblique and permuted"])
    assert predictor().predict_files([file], out, CPU) == []
    before, after = read_volume(file), read_volume(out / f"a{suffix}")
    np.testing.assert_allclose(after.native_affine, before.native_affine, atol=1e-4)
    assert after.native_shape == before.native_shape == truth.shape
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"a{suffix}"))).transpose(2, 1, 0)
    assert labels.dtype.kind in "iu" and dice(labels == 600, truth) > 0.9


def test_logits_on_the_native_grid_equal_interpolation_voxel_by_voxel() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 6, 4)).astype(np.float32)
    prepared, native, shape = np.diag([2.0, 2, 2, 1]), affine_of(GRIDS["oblique"], (6, 5, 4)), (6, 5, 4)
    native[:3, 3] += 5
    expected = np.zeros(shape, int)
    for index in np.ndindex(shape):
        p = (np.linalg.inv(prepared) @ native @ [*index, 1])[:3]
        if all(-0.5 <= v <= n - 0.5 for v, n in zip(p, logits.shape[1:], strict=True)):
            p = np.clip(p, 0, np.array(logits.shape[1:]) - 1)
            low = np.floor(p).astype(int)
            values = np.zeros(3)
            for corner in np.ndindex(2, 2, 2):
                at = np.minimum(low + corner, np.array(logits.shape[1:]) - 1)
                weight = np.prod(np.where(corner, p - low, 1 - (p - low)))
                values += weight * logits[(slice(None), *at)]
            expected[index] = values.argmax()
    found = logits_to_native_grid(logits, prepared, native, shape)
    assert len(np.unique(expected)) == 3
    np.testing.assert_array_equal(found, expected)


def test_another_ending_than_the_image_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii", GRIDS["plain"])
    from ssl3d.errors import DataError

    with pytest.raises(DataError, match="same ending"):
        write_like(tmp_path / "b.mha", np.zeros((30, 30, 30), np.uint8), tmp_path / "a.nii")


# --- a trained one, through its folder and the command line ---------------------------------------


class Cohort:
    """Balls on disk, prepared in memory, with the interface of PreparedCohort that the harness uses."""

    label_names, label_values, num_classes, fingerprint = ("ball",), (600,), 2, "f" * 64
    target_names = {0: "odd", 1: "even"}  # noqa: RUF012
    preparation, intensity = Preparation(spacing_mm=4.0), INTENSITY

    def __init__(self, folder: Path, n: int) -> None:
        self.files = [folder / f"case{i}.nii.gz" for i in range(n)]
        grids = list(GRIDS.values())
        for i, file in enumerate(self.files):
            write_image(file, grids[i % len(grids)], seed=i)
        volumes = [read_volume(file) for file in self.files]
        truths = [ball(v.affine, v.data.shape).astype(np.uint8) for v in volumes]
        made = [
            prepare_arrays(v, t, self.preparation, INTENSITY) for v, t in zip(volumes, truths, strict=True)
        ]
        self.images = [m[0] for m in made]
        self.labels = [m[1] for m in made]
        self.cases = [
            SimpleNamespace(id=f.name, subject=f.name, target=i % 2, shape=m[0].shape, spacing_mm=4.0)
            for i, (f, m) in enumerate(zip(self.files, made, strict=True))
        ]

    def index(self, name: str) -> int:
        return [c.id for c in self.cases].index(name)

    def image(self, i: int, where: Where = ...) -> np.ndarray:
        return self.images[i][where]

    def label(self, i: int, where: Where = ...) -> np.ndarray:
        return self.labels[i][where]


def trained(tmp_path: Path, task: Task, mode: str, kernel: int = 1) -> tuple[Path, Cohort, list[dict]]:  # type: ignore[type-arg]
    (tmp_path / "in").mkdir()
    cohort, folder = Cohort(tmp_path / "in", 6), tmp_path / "predictor"
    ids = [c.id for c in cohort.cases]
    split = Split("one", tuple(ids[:2]), tuple(ids[2:4]), tuple(ids[4:]))
    budget = FinetuneConfig(steps=6, lr=0.02, validate_every=3, loss="dice_ce")
    # float32: what is compared here is the way a network goes, not how a processor rounds in bfloat16.
    config = DownstreamConfig(crop=12, head_kernel=kernel, finetune=budget, precision="float32")  # type: ignore[arg-type]
    backbone = build_backbone(CONFIG, 0)
    evaluation = Evaluation(task, cohort, split, mode, config, 0, CPU)  # type: ignore[arg-type]
    outcome = evaluate(
        backbone, evaluation,
        keep=lambda head: save_predictor(folder, backbone, head, evaluation, CONFIG, source={}),
    )  # fmt: skip
    return folder, cohort, outcome.per_case


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "140"})


@pytest.mark.parametrize(("mode", "kernel"), [("linear", 1), ("linear", 3), ("finetune", 1)])
def test_a_kept_predictor_repeats_what_the_harness_tested(tmp_path: Path, mode: str, kernel: int) -> None:
    folder, cohort, per_case = trained(tmp_path, SEG, mode, kernel)
    model = load_predictor(folder)
    for network in (model.backbone, model.head):
        to_device(network, CPU)  # as predict_files does: the memory format decides how sums are rounded
    for record in per_case:
        i = cohort.index(record["case"])
        labels = model.predict(cohort.image(i), CPU).argmax(axis=0)
        truth = cohort.label(i)
        assert truth is not None
        assert dice(labels == 1, truth == 1) == pytest.approx(record["dsc"], abs=1e-6)


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_classification_goes_to_a_table_with_the_probabilities_of_the_test(tmp_path: Path, mode: str) -> None:
    folder, _, per_case = trained(tmp_path, CLS, mode)
    result = run(
        "predict",
        "--checkpoint",
        folder,
        "--input",
        tmp_path / "in",
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    assert len(rows) == 6
    for record in per_case:
        row = rows[record["case"]]
        assert float(row["probability"]) == pytest.approx(record["probability"], abs=1e-5)
        assert int(row["prediction"]) == (float(row["probability"]) >= 0.5)
        assert row["class"] == ("odd", "even")[int(row["prediction"])]


def test_bad_files_are_named_all_at_once_and_the_others_are_predicted(tmp_path: Path) -> None:
    folder, cohort, _ = trained(tmp_path, SEG, "linear")
    truncated, missing = tmp_path / "in" / "cut.nii.gz", tmp_path / "nowhere.nii"
    truncated.write_bytes(cohort.files[0].read_bytes()[:-200])
    nan = tmp_path / "in" / "nan.nii.gz"
    nan.write_bytes(gzip.compress(gzip.decompress(cohort.files[0].read_bytes())[:352] + b"\xff" * 4 * 30**3))
    result = run("predict", "--checkpoint", folder, "--input", tmp_path / "in", "--input", missing,
                 "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "6 of 9 files predicted" in result.output
    for file in (truncated, missing, nan):
        assert str(file) in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f.name for f in cohort.files}


def test_outputs_never_replace_inputs_or_each_other(tmp_path: Path) -> None:
    folder, cohort, _ = trained(tmp_path, SEG, "linear")
    before = cohort.files[0].read_bytes()
    result = run("predict", "--checkpoint", folder, "--input", cohort.files[0], "--out", tmp_path / "in")
    assert result.exit_code == 2 and "would replace" in result.output
    assert cohort.files[0].read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "case0.nii.gz").write_bytes(before)
    result = run(
        "predict",
        "--checkpoint",
        folder,
        "--input",
        tmp_path / "in",
        "--input",
        other,
        "--out",
        tmp_path / "o",
    )
    assert result.exit_code == 2 and "would both be written" in result.output
    assert not (tmp_path / "o").exists()


def test_a_folder_without_predictor_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    result = run("predict", "--checkpoint", tmp_path, "--input", tmp_path / "a.nii", "--out", tmp_path / "o")
    assert result.exit_code == 2 and "ssl3d finetune" in result.output
    folder, _, _ = trained(tmp_path, CLS, "linear")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_predictor(folder)


def test_finetune_writes_a_predictor_that_predict_uses(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    common = ("--preset", "smoke", "--device", "cpu", "--cache", cache)
    assert run("pretrain", "--method", "scratch", "--out", tmp_path / "run", *common).exit_code == 0
    result = run(
        "finetune", "--checkpoint", tmp_path / "run", "--task", "ccc", "--out", tmp_path / "p", *common
    )
    assert result.exit_code == 0 and "CCC AUC" in result.output, result.output
    images = sorted((cache / "phantoms").glob("*/stoic/**/*.mha"))[:2]
    inputs = [x for image in images for x in ("--input", image)]
    result = run(
        "predict", "--checkpoint", tmp_path / "p", *inputs, "--out", tmp_path / "o", "--device", "cpu"
    )
    assert result.exit_code == 0 and "2 of 2 files predicted" in result.output, result.output


def test_a_task_that_crops_to_its_labels_is_refused_before_training() -> None:
    from ssl3d.downstream.predictor import check_keepable
    from ssl3d.errors import ConfigError

    with pytest.raises(ConfigError, match="crops to its labels"):
        check_keepable(SEG, SimpleNamespace(preparation=Preparation(crop="label")))  # type: ignore[arg-type]


# --- tasks from files: every kind, from the task file to the table of predictions ---------------------

COMMON = "dataset: csv\npreparation: {spacing_mm: 4, scaling: minmax}\nsplits: {scheme: given}\n"
KINDS = {
    "size": "kind: classification\nlabels: [small, middle, large]\ndata: t.csv\n",
    "signs": "kind: multilabel\nlabels: [bright, large]\ndata: signs.csv\n",
    "age": "kind: regression\ndata: t.csv\n",
    "ball": "kind: segmentation\nlabels: [ball]\ndata: t.csv\n",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Boxes with a ball of three sizes, bright or dark, in a CSV; a task file a kind; a run to fine-tune."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij"))
    table, signs = ["subject,image,label,class,value,split"], ["subject,image,class,split"]
    for i in range(24):
        size, bright = i % 3, i // 3 % 2
        inside = ((grid - rng.uniform(7, 9, (3, 1, 1, 1))) ** 2).sum(0) < (3 + 2 * size) ** 2
        image = np.where(inside, 900 if bright else 100, 500) + rng.normal(0, 20, inside.shape)
        image += np.kron(rng.normal(0, 60, (4, 4, 4)), np.ones((4, 4, 4)))  # what is this subject's alone
        for name, data in ((f"i{i}", image), (f"m{i}", inside)):
            nibabel.save(
                nibabel.Nifti1Image(data.astype(np.int16), np.diag([4.0, 4, 4, 1])), root / f"{name}.nii.gz"
            )
        part = "train" if i < 12 else "val" if i < 18 else "test"
        table.append(
            f"p{i},i{i}.nii.gz,m{i}.nii.gz,{('small', 'middle', 'large')[size]},{40 + 10 * size},{part}"
        )
        chosen = ";".join(["bright"] * bright + ["large"] * (size == 2)) or "none"
        signs.append(f"p{i},i{i}.nii.gz,{chosen},{part}")
    (root / "t.csv").write_text("\n".join(table) + "\n")
    (root / "signs.csv").write_text("\n".join(signs) + "\n")
    for name, text in KINDS.items():
        (root / f"{name}.yaml").write_text(f"name: {name}\n{text}{COMMON}")
    made = run("pretrain", "--method", "scratch", "--out", root / "run", "--preset", "smoke", "--device", "cpu",
               "--cache", root / "cache")  # fmt: skip
    assert made.exit_code == 0, made.output
    return root


def through_the_command_line(
    own: Path, out: Path, task: str, mode: str
) -> tuple[float, dict[str, dict[str, str]]]:
    """Fine-tune, predict the six test images, and return (printed score, rows of the table by image)."""
    result = run(
        "finetune", "--checkpoint", own / "run", "--task", own / f"{task}.yaml", "--out", out / "p", "--mode", mode,
        "--preset", "smoke", "--set", "downstream.finetune.steps=12", "--device", "cpu", "--cache", own / "cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    images = [x for i in range(18, 24) for x in ("--input", own / f"i{i}.nii.gz")]
    predicted = run("predict", "--checkpoint", out / "p", *images, "--out", out / "o", "--device", "cpu")
    assert predicted.exit_code == 0, predicted.output
    score = float(result.output.split(f"{task.upper()} ")[1].split()[1])
    if not (out / "o" / "predictions.csv").is_file():
        return score, {}
    with (out / "o" / "predictions.csv").open() as file:
        return score, {Path(row["file"]).name.split(".")[0]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_several_classes_are_predicted_by_name_with_a_probability_each(
    own: Path, tmp_path: Path, mode: str
) -> None:
    score, rows = through_the_command_line(own, tmp_path, "size", mode)
    names = ["small", "middle", "large"]
    assert list(rows["i18"]) == ["file", *(f"probability_{name}" for name in names), "prediction"]
    table = np.array([[float(rows[f"i{i}"][f"probability_{name}"]) for name in names] for i in range(18, 24)])
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-5)
    truth = np.eye(3)[[i % 3 for i in range(18, 24)]]
    assert score == pytest.approx(100 * roc_auc_score(truth, table), abs=0.06)
    assert [rows[f"i{i}"]["prediction"] for i in range(18, 24)] == [names[k] for k in table.argmax(axis=1)]


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_labels_that_do_not_exclude_each_other_have_a_probability_each(
    own: Path, tmp_path: Path, mode: str
) -> None:
    score, rows = through_the_command_line(own, tmp_path, "signs", mode)
    names = ["bright", "large"]
    table = np.array([[float(rows[f"i{i}"][f"probability_{name}"]) for name in names] for i in range(18, 24)])
    truth = np.array([[i // 3 % 2, i % 3 == 2] for i in range(18, 24)])
    assert score == pytest.approx(100 * roc_auc_score(truth, table), abs=0.06)
    for i, row in enumerate(table, start=18):
        chosen = [name for name, p in zip(names, row, strict=True) if p >= 0.5]
        assert rows[f"i{i}"]["prediction"] == (";".join(chosen) or "none")


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_number_is_predicted_in_its_unit(own: Path, tmp_path: Path, mode: str) -> None:
    score, rows = through_the_command_line(own, tmp_path, "age", mode)
    assert list(rows["i18"]) == ["file", "prediction"]
    errors = [abs(float(rows[f"i{i}"]["prediction"]) - (40 + 10 * (i % 3))) for i in range(18, 24)]
    assert score == pytest.approx(np.mean(errors), abs=0.06) and score < 15, "in years, not in deviations"


def test_a_segmentation_of_a_task_file_is_kept_and_used(own: Path, tmp_path: Path) -> None:
    score, _ = through_the_command_line(own, tmp_path, "ball", "linear")
    found = [nibabel.load(tmp_path / "o" / f"i{i}.nii.gz").get_fdata() for i in range(18, 24)]
    truth = [nibabel.load(own / f"m{i}.nii.gz").get_fdata() for i in range(18, 24)]
    # One orientation and one spacing on both sides: the grid of the file is that of the harness.
    scores = [dice(f == 1, t == 1) for f, t in zip(found, truth, strict=True)]
    assert score == pytest.approx(100 * np.mean(scores), abs=0.06)


def test_several_classes_and_several_labels_are_benched_from_task_files(own: Path, tmp_path: Path) -> None:
    tasks = f"{own / 'size.yaml'},{own / 'signs.yaml'}"
    result = run("bench", "--preset", "smoke", "--methods", "scratch", "--modes", "linear", "--tasks", tasks, "--store",
                 tmp_path / "store", "--cache", own / "cache", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    for title in ("SIZE MACRO_AUC", "SIGNS MACRO_AUC"):
        assert title in result.output


# --- DICOM ---------------------------------------------------------------------------------------------


def write_ball(folder: Path, axes: np.ndarray, prefix: str = "IM") -> tuple[np.ndarray, np.ndarray]:
    """Write the bright ball as a DICOM series; return (ball on the series' grid, affine)."""
    shape = tuple(int(n) for n in np.rint(60 / np.linalg.norm(axes, axis=0)))
    affine = affine_of(axes, shape)
    truth = ball(affine, shape)
    lps, spacing = np.diag([-1.0, -1, 1]) @ affine[:3], np.linalg.norm(axes, axis=0)
    write_series(
        folder, (truth * 1000).astype(np.int16), prefix=prefix, origin=lps[:, 3], step=lps[:, 2], spacing=spacing[:2],
        directions=(lps[:, :2] / spacing[:2]).T.ravel(),
    )  # fmt: skip
    return truth, affine


# The third axis of a series is the normal of its slices, so the axes are right-handed in LPS+.
SERIES = {
    "axial": np.diag([-2.0, -2.0, 3.0]),
    "oblique": rotation(ANGLES[1]) @ np.diag([-1.5, -2.0, 3.0]),
}


@pytest.mark.parametrize("axes", SERIES)
def test_a_dicom_series_is_segmented_as_nifti_on_its_own_grid(tmp_path: Path, axes: str) -> None:
    truth, affine = write_ball(tmp_path / "in" / "case7", SERIES[axes])
    for files in ([tmp_path / "in" / "case7"], expand_inputs([tmp_path / "in"])):
        assert len(files) == 1 and predictor().predict_files(files, tmp_path / "out", CPU) == []
        written = nibabel.load(tmp_path / "out" / "case7.nii.gz")
        labels = np.asarray(written.dataobj)
        assert labels.shape == truth.shape and dice(labels == 600, truth) > 0.9
        np.testing.assert_allclose(written.affine, affine, atol=1e-3)
        index = np.argwhere(labels == 600).mean(axis=0)
        np.testing.assert_allclose(affine[:3, :3] @ index + affine[:3, 3], BALL_MM, atol=0.7)
        (tmp_path / "out" / "case7.nii.gz").unlink()


def test_several_series_of_a_folder_are_told_apart_and_a_bad_one_is_named(tmp_path: Path) -> None:
    folder, out = tmp_path / "scan", tmp_path / "out"
    for prefix in ("A", "B"):
        write_ball(folder, SERIES["axial"], prefix)
    write_ball(tmp_path / "cut", SERIES["axial"])
    (tmp_path / "cut" / "IM0007").unlink()
    files = expand_inputs([folder, tmp_path / "cut"])
    (finding,) = predictor().predict_files(files, out, CPU)
    assert "misses about 1 slice" in str(finding) and finding.path == list(files)[-1]
    assert {p.name for p in out.iterdir()} == {"scan-series1.nii.gz", "scan-series2.nii.gz"}


def test_a_folder_is_read_as_deep_as_for_pretraining_and_predicted_as_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top, out = tmp_path / "in", tmp_path / "in" / "predicted"
    for name in (
        "a.nii.gz",
        "p1/day1/scan.nii.gz",
        "p1/day2/scan.nrrd",
        "p2/day1/scan.nii.gz",
        "p2/day1/scan_seg.nii.gz",
    ):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(top / name, GRIDS["plain"])
    write_ball(top / "p3" / "series", SERIES["axial"])
    for _ in range(2):  # what the first call wrote is no input of the second
        files = expand_inputs([top], out)
        assert (
            "1 image left out: p2/day1/scan_seg.nii.gz is named as a segmentation" in capsys.readouterr().err
        )
        assert len(files) == 5 and predictor().predict_files(files, out, CPU) == []
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.n*")} == {
        "a.nii.gz", "p1/day1/scan.nii.gz", "p1/day2/scan.nrrd", "p2/day1/scan.nii.gz", "p3/series.nii.gz",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="holds no NIfTI"):
        (tmp_path / "empty" / "below").mkdir(parents=True)
        expand_inputs([tmp_path / "empty"])


def test_a_ct_is_predicted_with_the_offset_that_it_needs(tmp_path: Path) -> None:
    """Trained on HU; a file with air at 0 is refused with the figures, and --offset 0 is what it needs."""
    ct = replace(predictor(), intensity=Intensity("ct", 1024.0, True, "test", "CT in HU"))
    rng = np.random.default_rng(0)
    hu = np.where(ball(affine_of(np.diag([2.0] * 3), (30, 30, 30)), (30, 30, 30)), 60.0, -1000.0)
    hu = hu + rng.normal(0, 5, hu.shape)
    results = []
    for name, data in (("hu", hu), ("zero", hu + 1024)):
        image = nibabel.Nifti1Image(data.astype(np.float32), affine_of(np.diag([2.0] * 3), hu.shape))
        nibabel.save(image, tmp_path / f"{name}.nii")
    assert ct.predict_files([tmp_path / "hu.nii"], tmp_path / "out", CPU) == []
    (finding,) = ct.predict_files([tmp_path / "zero.nii"], tmp_path / "out", CPU)
    assert "offset 1024" in finding.problem and "--offset 0 for" in finding.fix and "predict" in finding.fix
    assert ct.predict_files([tmp_path / "zero.nii"], tmp_path / "out", CPU, offset=0.0) == []
    (finding,) = ct.predict_files([tmp_path / "hu.nii"], tmp_path / "out", CPU, offset=0.0)
    assert "offset 0" in finding.problem and "--offset 1024" in finding.fix
    results = [np.asarray(nibabel.load(tmp_path / "out" / f"{n}.nii").dataobj) for n in ("hu", "zero")]
    np.testing.assert_array_equal(*results)
    with pytest.raises(ConfigError, match="--offset 0: this predictor was trained on volumes without a unit"):
        predictor().predict_files([tmp_path / "hu.nii"], tmp_path / "out", CPU, offset=0.0)
    # One that was trained on MR does not take a CT for it.
    mr = replace(predictor(), intensity=replace(INTENSITY, taken_for="MR"))
    (finding,) = mr.predict_files([tmp_path / "hu.nii"], tmp_path / "out", CPU)
    assert "does not look like MR" in finding.problem
