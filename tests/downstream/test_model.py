"""``ssl3d.load``: weights say how an image is prepared, and the prepared image goes through them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import ssl3d
from ssl3d.cli import main
from ssl3d.config import BackboneConfig
from ssl3d.data.prepared.facts import preparation_differences, preparation_in_words, said_preparation
from ssl3d.errors import CheckpointError, ConfigError, DataError
from ssl3d.models.factory import build_backbone

SMALL = ("--preset", "smoke", "--device", "cpu", "--set", "pretrain.steps=1")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "140"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CT in HU at 5 mm: four volumes, a run at 5 mm, and a file on a grid of another orientation."""
    root = tmp_path_factory.mktemp("model")
    (root / "data").mkdir()
    for i in range(4):
        write_ct(root / "data" / f"p{i}.nii.gz", np.diag([5.0, 5, 5]), (20, 22, 18), seed=i)
    write_ct(root / "new.nii.gz", np.array([[0, 0, -4.0], [2.5, 0, 0], [0, -5, 0]]), (40, 20, 25), seed=9)
    made = run("pretrain", "--method", "denoising", "--data", root / "data", "--out", root / "run",
               "--set", "data.spacing_mm=5", "--cache", root / "cache", *SMALL)  # fmt: skip
    assert made.exit_code == 0, made.output
    return root


def write_ct(path: Path, axes: np.ndarray, shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, rng.uniform(-20, 20, 3)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ axes.T
    centre = index.reshape(-1, 3).mean(0)
    body = np.linalg.norm(index - centre, axis=-1) < 31 + 1.5 * (seed % 5)
    hu = np.where(body, 40, -1000) + rng.normal(0, 12, shape)
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), affine), path)


def test_a_run_and_every_export_say_how_an_image_is_prepared(root: Path, tmp_path: Path) -> None:
    facts = json.loads((root / "run" / "run.json").read_text())["preparation"]
    assert facts["orientation"] == "RAS+" and facts["parameters"]["spacing_mm"] == 5
    assert facts["intensity"]["scaling"] == "ct" and facts["intensity"]["offset"] == 1024
    assert facts["native_mm"] == [5, 5]
    for target, name in (
        ("safetensors", "config.json"),
        ("nnunet", "source.json"),
        ("huggingface", "config.json"),
    ):
        done = run("export", "--checkpoint", root / "run", "--to", target, "--out", tmp_path / target)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / target / name).read_text())["preparation"] == facts
    card = (tmp_path / "huggingface" / "README.md").read_text()
    assert all(line in card for line in preparation_in_words(facts))
    assert "spacing: 5 mm" in card and "add 1024 to the stored values" in card


def test_features_of_a_file_are_those_of_the_volume_that_training_would_prepare(root: Path) -> None:
    model = ssl3d.load(root / "run", device="cpu")
    found = model.features(root / "new.nii.gz")
    # Independently: the same file in a cohort of its own.
    (root / "own").mkdir()
    (root / "own" / "new.nii.gz").write_bytes((root / "new.nii.gz").read_bytes())
    from ssl3d.bench.sources import pretraining_cohort
    from ssl3d.config import load_settings

    cohort = pretraining_cohort(
        str(root / "own"), load_settings("smoke", ["data.spacing_mm=5"]), root / "cache"
    )
    np.testing.assert_array_equal(found.image, cohort.image(0))
    np.testing.assert_allclose(found.affine, cohort.cases[0].affine)
    with torch.no_grad():
        coarse, fine = ssl3d.create_model(root / "run")(
            torch.from_numpy(np.array(cohort.image(0)))[None, None]
        )
    np.testing.assert_allclose(found.global_feature, coarse[0], atol=1e-5)
    np.testing.assert_allclose(found.local_feature, fine[0], atol=1e-5)
    assert found.local_feature is not None and found.local_feature.shape[1:] == found.image.shape
    np.testing.assert_allclose(found.pooled, coarse[0].mean((1, 2, 3)), atol=1e-5)
    assert model.features(root / "new.nii.gz", local=False).local_feature is None


def test_windows_give_the_local_feature_on_the_same_grid(root: Path) -> None:
    model = ssl3d.load(root / "run", device="cpu")
    whole, parts = (model.features(root / "new.nii.gz", window=w) for w in (None, (16, 16, 16)))
    assert whole.local_feature is not None and parts.local_feature is not None
    assert parts.local_feature.shape == whole.local_feature.shape
    np.testing.assert_array_equal(parts.global_feature, whole.global_feature)
    assert np.corrcoef(parts.local_feature.ravel(), whole.local_feature.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("name", ["unet3d", "genesis_unet3d"])
def test_the_global_affine_says_where_a_global_voxel_lies(name: str) -> None:
    """A bright voxel moves the voxel of f^g at its place more than any other."""
    backbone = build_backbone(BackboneConfig(name=name), 0).eval() if name != "unet3d" else build_backbone(
        BackboneConfig.model_validate({"name": name, "channels": [8, 8, 16]}), 0).eval()  # fmt: skip
    size = (33, 26, 38)  # padded by other amounts along each axis
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        plain = torch.rand(1, 1, *size, generator=generator) * 0.1
        base = backbone.encode(plain)[-1]
        place = backbone.global_grid(size, base.shape[2:])
        target = np.array([d // 2 for d in base.shape[2:]])
        voxel = np.rint((place @ [*target, 1])[:3]).astype(int)
        bright = plain.clone()
        d, h, w = (slice(max(0, v - 1), v + 2) for v in voxel)
        bright[..., d, h, w] += 5
        moved = (backbone.encode(bright)[-1] - base).square().sum(1)[0]
        centre = (torch.stack(torch.meshgrid(*map(torch.arange, moved.shape), indexing="ij")) * moved).sum(
            (1, 2, 3)
        )
    assert np.abs((centre / moved.sum()).numpy() - target).max() < 0.75


def test_weights_that_say_nothing_want_to_be_told(root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root / "run", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    del facts["preparation"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"does not say how its images were prepared.*preparation="):
        ssl3d.load(tmp_path / "run", device="cpu").features(root / "new.nii.gz")
    said = {"spacing_mm": 5.0, "scaling": "ct", "intensity_offset": 1024}
    told = ssl3d.load(tmp_path / "run", device="cpu", preparation=said).features(root / "new.nii.gz")
    np.testing.assert_array_equal(
        told.image, ssl3d.load(root / "run", device="cpu").features(root / "new.nii.gz").image
    )
    with pytest.raises(ConfigError, match="leaves open"):
        ssl3d.load(tmp_path / "run", preparation={"spacing_mm": 5.0})


def test_what_cannot_be_used_is_named(root: Path, tmp_path: Path) -> None:
    model = ssl3d.load(root / "run", device="cpu")
    (tmp_path / "bad.nii.gz").write_bytes((root / "new.nii.gz").read_bytes()[:200])
    with pytest.raises(DataError, match=r"bad\.nii\.gz"):
        model.features(tmp_path / "bad.nii.gz")
    with pytest.raises(DataError, match="does not look like CT"):  # stored with air at 0
        model.features(root / "new.nii.gz", offset=0)
    with pytest.raises(ConfigError, match="ssl3d finetune"):
        model.segment(root / "new.nii.gz")
    with pytest.raises(CheckpointError, match="is no folder"):
        ssl3d.load("unet3d")


def test_an_image_unlike_those_of_the_training_is_noted(root: Path, tmp_path: Path) -> None:
    model = ssl3d.load(root / "run", device="cpu")
    assert model.features(root / "new.nii.gz").notes == ()
    write_ct(tmp_path / "thick.nii.gz", np.diag([5.0, 5, 8]), (20, 22, 5), seed=3)
    coarse, small = model.features(tmp_path / "thick.nii.gz").notes
    assert "5 x 5 x 8 mm, coarser than any of the training (at most 5 mm)" in coarse
    assert "smaller than the crops" in small


def test_differences_between_run_and_task_are_said_and_recorded(root: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labelled"
    labels.mkdir()
    for i in range(5):
        write_ct(labels / f"c{i}.nii.gz", np.diag([5.0, 5, 5]), (20, 22, 18), seed=20 + i)
        image = nibabel.load(labels / f"c{i}.nii.gz")
        body = (image.get_fdata() > -500).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(body, image.affine), labels / f"m{i}.nii.gz")
    rows = ["image,label"] + [f"c{i}.nii.gz,m{i}.nii.gz" for i in range(5)]
    (labels / "t.csv").write_text("\n".join(rows) + "\n")
    (labels / "body.yaml").write_text(
        "name: body\nkind: segmentation\nlabels: [body]\ndataset: csv\ndata: t.csv\n"
        "preparation: {spacing_mm: 6.4, scaling: ct}\n"
    )
    tuned = run("finetune", "--checkpoint", root / "run", "--task", labels / "body.yaml", "--out", tmp_path / "p",
                "--cache", root / "cache", "--mode", "linear", *SMALL)  # fmt: skip
    assert tuned.exit_code == 0, tuned.output
    assert "Task body: voxels of 6.4 mm, pretrained on 5 mm" in tuned.output
    source = json.loads((tmp_path / "p" / "predictor.json").read_text())["source"]
    assert source["differences"] == ["voxels of 6.4 mm, pretrained on 5 mm"]
    benched = run("bench", "--methods", "denoising", "--checkpoint", f"denoising={root / 'run'}", "--modes", "linear",
                  "--tasks", labels / "body.yaml", "--store", tmp_path / "s", "--cache", root / "cache",
                  "--jobs", "1", *SMALL)  # fmt: skip
    assert benched.exit_code == 0, benched.output
    assert "Task body: voxels of 6.4 mm, pretrained on 5 mm" in benched.output
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "s" / "records").glob("*.json")]
    assert record["preparation"]["differences"] == source["differences"]
    assert record["preparation"]["pretraining"]["parameters"]["spacing_mm"] == 5
    # The fine-tuned run, from Python: the segmentation is that of ssl3d predict, and lands on the file's grid.
    model = ssl3d.load(tmp_path / "p", device="cpu")
    found = model.segment(root / "new.nii.gz")
    assert found.labels is not None and found.labels.shape == (40, 20, 25) and found.structures == {1: "body"}
    found.save(tmp_path / "mine.nii.gz")
    done = run("predict", "--checkpoint", tmp_path / "p", "--input", root / "new.nii.gz", "--out", tmp_path / "o",
               "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    theirs = nibabel.load(tmp_path / "o" / "new.nii.gz")
    mine = nibabel.load(tmp_path / "mine.nii.gz")
    np.testing.assert_array_equal(np.asarray(mine.dataobj), np.asarray(theirs.dataobj))
    np.testing.assert_array_equal(mine.affine, theirs.affine)
    with pytest.raises(ConfigError, match=r"model\.segment"):
        model.classify(root / "new.nii.gz")
    assert model.features(root / "new.nii.gz").global_feature.ndim == 4


def test_differences_are_of_spacing_scaling_and_orientation() -> None:
    one = said_preparation({"spacing_mm": 1.0, "scaling": "ct", "intensity_offset": 1024})
    other = said_preparation({"spacing_mm": 2.0, "scaling": "minmax"})
    assert preparation_differences(one, one) == [] and preparation_differences(None, one) == []
    assert preparation_differences(one, other) == [
        "voxels of 2 mm, pretrained on 1 mm", "values scaled by minmax, pretrained on ct",
    ]  # fmt: skip
    air = said_preparation({"spacing_mm": 1.0, "scaling": "ct", "intensity_offset": 0, "crop": "foreground"})
    assert preparation_differences(one, air) == []
