"""Cells that are computed again: by ``ssl3d reproduce``, and by ``ssl3d bench --recompute``; label fractions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner, Result
from cohorts import sphere_cohort

from ssl3d.bench import reproduce
from ssl3d.bench.cell import TaskData
from ssl3d.bench.stale import stale
from ssl3d.cli import main
from ssl3d.config import load_settings
from ssl3d.data.cohort import Case
from ssl3d.data.splits import make_splits
from ssl3d.environment import LIMITS, instruction_set
from ssl3d.errors import DataError
from ssl3d.registry.registry import registry
from ssl3d.results.store.store import ResultStore

# Cohorts that no test here reads.
SMALL = ("--set", "phantoms.asoca=3", "--set", "phantoms.candi=3", "--set", "phantoms.stoic=6")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "140"})


def bench(folder: Path, *more: str) -> Result:
    return run(
        "bench", "--preset", "smoke", *SMALL, "--tasks", "shc", "--modes", "linear", "--cache", str(folder / "cache"),
        "--store", str(folder / "store"), *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke bench with all and half of the labels."""
    folder = tmp_path_factory.mktemp("reproduce")
    result = bench(folder, "--methods", "scratch,gvsl", "--label-fractions", "0.5,1")
    assert result.exit_code == 0, result.output
    assert "50 % of the labels" in result.output and "Table 2 of 2" in result.output
    return folder


def records(folder: Path, *, matched: str | None = None, **identity: Any) -> list[dict[str, Any]]:
    """The records with these parts of the identity, by matched budgets or not: tests share the store in any order."""
    found, problems = ResultStore(folder / "store").records()
    assert not problems
    return [
        r
        for r in found
        if identity.items() <= r["identity"].items() and matched == r["identity"].get("match", {}).get("by")
    ]


def test_fractions_share_their_test_cases_and_their_pretraining(folder: Path) -> None:
    half, whole = (records(folder, method="gvsl", label_fraction=f)[0] for f in (0.5, 1.0))
    assert [c["case"] for c in half["per_case"]] == [c["case"] for c in whole["per_case"]]
    assert half["checkpoint"] == whole["checkpoint"]
    scratch = records(folder, method="scratch", label_fraction=0.5)[0]
    assert (
        scratch["identity"]["split_cases"]
        == half["identity"]["split_cases"]
        != whole["identity"]["split_cases"]
    )


def test_the_identity_of_an_ordinary_cell_has_these_keys_and_no_others(folder: Path) -> None:
    """Other keys would orphan every record there is."""
    (record,) = records(folder, method="gvsl", label_fraction=1.0)
    assert set(record["identity"]) == {
        "method", "method_config", "backbone", "pretrain", "pretrain_seed", "task", "task_data", "split",
        "split_cases", "mode", "seed", "label_fraction", "budget",
    }  # fmt: skip
    assert record["run"]["settings"]["preset"] == "smoke" and record["run"]["overrides"] == {
        "phantoms.asoca": 3, "phantoms.candi": 3, "phantoms.stoic": 6,
    }  # fmt: skip


def test_a_number_comes_back_bit_for_bit(folder: Path) -> None:
    (record,) = records(folder, method="gvsl", label_fraction=0.5)
    store = ResultStore(folder / "store")
    result = run("reproduce", str(store.path_for(record["identity"])), "--cache", str(folder / "cache"))
    assert result.exit_code == 0 and "Reproduced bit for bit" in result.output, result.output


def test_a_number_of_a_task_file_comes_back_without_the_file(folder: Path) -> None:
    file = folder / "blood.yaml"
    file.write_text(
        "name: blood\nkind: segmentation\ndataset: mmwhs\nlabels: {500: left ventricle, 600: right ventricle}\n"
        "ignore_labels: [205, 420, 421, 550, 820, 850]\nsplits: {scheme: random, train: 2, val: 1, test: 2}\n"
    )
    arguments = ("--tasks", str(file), "--methods", "gvsl_without_affine", "--store", str(folder / "blood"))
    result = bench(folder, *arguments)
    assert result.exit_code == 0, result.output
    file.unlink()
    (path,) = (folder / "blood" / "records").glob("*.json")
    again = run("reproduce", str(path), "--cache", str(folder / "cache"))
    assert again.exit_code == 0 and "Reproduced bit for bit" in again.output, again.output


def test_bad_cases_given_folds_and_people_left_out_come_back_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is in the record, with the places of the data from the root of the file system."""
    release, names = tmp_path / "release", [f"c{i}" for i in range(8)]
    balls = sphere_cohort(8, edge=20)
    for name, image, label in zip(names, balls.images, balls.labels, strict=True):
        for part, data in (("imagesTr", (900 * image).astype(np.int16)), ("labelsTr", label)):
            path = release / part / f"{name}{'_0000' if part == 'imagesTr' else ''}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(data, np.diag([6.4, 6.4, 6.4, 1])), path)
    bad = release / "imagesTr" / "c7_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-20])
    facts = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "bright": 1, "dark": 2},
        "file_ending": ".nii.gz",
    }
    (release / "dataset.json").write_text(json.dumps({**facts, "numTraining": 8}))
    folds = [{"train": names[2:7], "val": names[:2]}, {"train": [*names[:2], *names[4:7]], "val": names[2:4]}]
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    (tmp_path / "ball.yaml").write_text("name: ball\nkind: segmentation\ndataset: nnunet\n")
    monkeypatch.chdir(tmp_path)
    result = run(
        "bench", "--preset", "smoke", "--set", "pretrain.steps=2", "--methods", "denoising", "--tasks", "ball.yaml",
        "--task-data", "ball=nnunet=release", "--data", "nnunet=release", "--exclude-test", "--splits-file",
        "ball=folds.json", "--policy", "skip", "--modes", "linear", "--store", "store", "--cache", "cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found, problems = ResultStore(tmp_path / "store").records()
    assert len(found) == 2 and not problems
    assert found[0]["run"]["settings"]["data"]["exclude"] == names[:4] and found[0]["left_out"]["task"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for record, more in zip(found, ((), ("--checkpoint",)), strict=True):
        path = ResultStore(tmp_path / "store").path_for(record["identity"])
        again = run("reproduce", str(path), "--cache", str(tmp_path / "cache"), *more)
        assert again.exit_code == 0 and "Reproduced bit for bit" in again.output, again.output


def test_the_place_of_a_task_file_s_data_is_kept(folder: Path) -> None:
    (folder / "hearts").mkdir()
    assert run("data", "phantoms", "--out", str(folder / "hearts"), "--preset", "smoke").exit_code == 0
    file = folder / "own.yaml"
    file.write_text("name: own\nkind: segmentation\ndataset: mmwhs\ndata: hearts/mmwhs\n")
    result = bench(folder, "--tasks", str(file), "--methods", "scratch", "--store", str(folder / "own"))
    assert result.exit_code == 0, result.output
    (path,) = (folder / "own" / "records").glob("*.json")
    assert json.loads(path.read_text())["run"]["task_data"] == str(folder / "hearts" / "mmwhs")
    again = run("reproduce", str(path), "--cache", str(folder / "cache"))
    assert again.exit_code == 0 and "Reproduced bit for bit" in again.output, again.output


def test_a_moved_store_brings_its_weights(folder: Path, tmp_path: Path) -> None:
    (record,) = records(folder, method="gvsl", label_fraction=1.0)
    assert record["checkpoint"].startswith("runs/gvsl-s0-")
    name = ResultStore(folder / "store").path_for(record["identity"]).name
    moved = shutil.copytree(folder / "store", tmp_path / "moved")
    command = ("reproduce", name, "--store", str(moved), "--cache", str(folder / "cache"), "--checkpoint")
    again = run(*command)
    assert again.exit_code == 0 and "Reproduced bit for bit" in again.output, again.output
    shutil.rmtree(moved / "runs")
    gone = run(*command)
    assert gone.exit_code == 2 and "runs/gvsl-s0-" in gone.output and "is not there" in gone.output


def test_a_number_that_does_not_come_back_says_so(folder: Path) -> None:
    (record,) = records(folder, method="scratch", label_fraction=1.0)
    forged = json.loads(json.dumps(record))
    forged["environment"]["versions"]["torch"] = "1.0"
    forged["score"] += 0.3
    other = ResultStore(folder / "forged")
    path = other.write(forged, replace=True)
    arguments = ["reproduce", str(path), "--cache", str(folder / "cache")]
    unjudged = run(*arguments)
    assert unjudged.exit_code == 1 and "NOT reproduced" in unjudged.output and "no floor" in unjudged.output
    near = run(*arguments, "--tolerance", "0.5")
    assert near.exit_code == 0 and "Reproduced within 0.5" in near.output, near.output
    far = run(*arguments, "--tolerance", "0.1", "--out", str(folder / "again"))
    assert far.exit_code == 1
    for part in ("NOT reproduced", "Differs in: score", "weights are the same", "Another torch: 1.0"):
        assert part in far.output, far.output
    assert ResultStore(folder / "again").records()[0][0]["score"] == record["score"]


@pytest.mark.parametrize("variable", ["MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"])
def test_what_keeps_a_library_from_instructions_is_another_instruction_set(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    try:
        instruction_set.cache_clear()
        plain = instruction_set()
        monkeypatch.setenv(variable, "AVX2")
        instruction_set.cache_clear()
        assert instruction_set() == f"{plain} {variable}=AVX2"
    finally:
        instruction_set.cache_clear()


def test_the_same_machine_must_give_the_same_bits_and_another_within_the_floor(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (new,) = records(folder, method="gvsl", label_fraction=1.0)
    old = json.loads(json.dumps(new))
    old["run"]["overrides"] = {}
    assert reproduce.compare(old, new).identical
    old["score"] += 0.01
    same = reproduce.compare(old, new)
    assert not same.reproduced and "bit by bit" in same.lines[0]
    unknown = json.loads(json.dumps(old))
    del unknown["environment"]["instruction_set"], unknown["pretrain_environment"]["instruction_set"]
    assert any("not say which instruction set" in line for line in reproduce.compare(unknown, new).lines)
    assert "bit by bit" not in reproduce.compare(unknown, new).lines[0]
    for field, value in (("threads", 7), ("cpu", "another"), ("instruction_set", "avx")):
        other = json.loads(json.dumps(old))
        other["environment"][field] = value
        other["pretrain_environment"] = other["environment"]
        verdict = reproduce.compare(other, new)
        assert not verdict.reproduced and "no floor" in verdict.lines[0]
        said = f"Another {field.replace('_', ' ')}: {value}"
        assert any(line.startswith(said) for line in verdict.lines), verdict.lines
        allowed = 1.96 * 2**0.5 * 0.0072  # two runs, each of this standard deviation: 0.02 points
        (tmp_path / "floor.json").write_text(
            json.dumps({old["preset"]: {"shc": {"linear": {"sd": 0.0072, "runs": 9}}}})
        )
        with monkeypatch.context() as patch:
            patch.setattr("ssl3d.results.floor.FILE", tmp_path / "floor.json")
            verdict = reproduce.compare(other, new)
            assert (
                verdict.reproduced
                and not verdict.identical
                and f"up to {allowed:.3g} apart" in verdict.lines[0]
            )
            elsewhere = {**other, "fingerprint_of_weights": "others"}
            verdict = reproduce.compare(elsewhere, new)
            assert (
                not verdict.reproduced
                and "pretraining gvsl" in verdict.lines[0]
                and "no floor" in verdict.lines[0]
            )
            other["score"] += 0.02
            assert not reproduce.compare(other, new).reproduced
            cell = {"sd": 0.0072, "runs": 9, "pretrained": {"gvsl": {"sd": 0.05, "runs": 4}}}
            (tmp_path / "whole.json").write_text(json.dumps({old["preset"]: {"shc": {"linear": cell}}}))
            patch.setattr("ssl3d.results.floor.FILE", tmp_path / "whole.json")
            elsewhere = {**other, "fingerprint_of_weights": "others"}
            assert (
                reproduce.compare(elsewhere, new).reproduced and not reproduce.compare(other, new).reproduced
            )
    elsewhere = {**old, "pretrain_environment": {**old["environment"], "threads": 9}}
    assert "of the pretraining: 9" in " ".join(reproduce.compare(elsewhere, new).lines)


def test_a_cell_that_is_not_the_same_any_more_is_refused(folder: Path) -> None:
    (record,) = records(folder, method="scratch", label_fraction=1.0)
    forged = json.loads(json.dumps(record))
    forged["identity"]["task_data"] = "other"
    old = {k: v for k, v in record.items() if k != "run"}
    store = ResultStore(folder / "refused")
    for bad, words in ((forged, "task_data was other"), (old, "does not hold the settings")):
        result = run("reproduce", str(store.write(bad)), "--cache", str(folder / "cache"))
        assert result.exit_code == 2 and words in result.output, result.output


def test_stale_cells_are_computed_again_on_request_only(folder: Path) -> None:
    store = ResultStore(folder / "store")
    (record,) = records(folder, method="gvsl", label_fraction=1.0)
    old = {**record, "code": {**record["code"], "downstream": "older"}, "created": "2020-01-01"}
    store.write(old, replace=True)
    runs = store.run_folder(record)
    assert runs is not None
    run_file = runs / "run.json"
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "code": "older"}))

    kept = bench(folder, "--methods", "scratch,gvsl")
    assert kept.output.count("already in the store") == 2
    again = bench(folder, "--methods", "scratch,gvsl", "--recompute")
    assert again.exit_code == 0 and again.output.count("already in the store") == 1, again.output
    (new,) = records(folder, method="gvsl", label_fraction=1.0)
    assert new["code"] == record["code"] and new["score"] == record["score"]
    assert [p.name for p in runs.parent.glob("*.stale-older")], "old weights are kept"
    assert bench(folder, "--methods", "scratch,gvsl", "--recompute").output.count("already in the store") == 2


def test_a_method_is_pretrained_with_its_own_rate(folder: Path, tmp_path: Path) -> None:
    (common,) = records(folder, method="gvsl", label_fraction=1.0)
    own_store = ("--methods", "gvsl", "--set", "method_lr.gvsl=0.02", "--store", str(tmp_path / "store"))
    result = bench(folder, *own_store)
    assert result.exit_code == 0, result.output
    (own,) = records(tmp_path)
    rate, other = (r["identity"]["pretrain"]["budget"].pop("lr") for r in (own, common))
    assert (rate, other) == (0.02, load_settings("smoke").pretrain.lr)
    assert own["identity"] == common["identity"], "nothing else changes"
    assert own["fingerprint_of_weights"] != common["fingerprint_of_weights"]
    (path,) = (tmp_path / "store" / "records").glob("*.json")
    again = run("reproduce", str(path), "--cache", str(folder / "cache"))
    assert again.exit_code == 0 and "Reproduced bit for bit" in again.output, again.output


def test_the_crop_of_a_mode_counts_not_where_it_was_written(folder: Path) -> None:
    (edge, *_) = load_settings("smoke").downstream.crop
    elsewhere = ("--set", f"downstream.crop={edge + 8}", "--set", f"downstream.linear.crop={edge}")
    result = bench(folder, "--methods", "scratch", *elsewhere)
    assert result.exit_code == 0 and "already in the store" in result.output, result.output
    (record,) = records(folder, method="scratch", label_fraction=1.0)
    assert record["identity"]["budget"]["crop"] == [edge] * 3
    run = {
        **record["run"],
        "settings": load_settings("smoke", [*SMALL[1::2], *elsewhere[1::2]]).model_dump(mode="json"),
    }
    assert stale({**record, "run": run}) == []


def test_matching_voxels_gives_each_method_as_many(folder: Path) -> None:
    result = bench(folder, "--methods", "scratch,gvsl,denoising", "--match", "voxels")
    assert result.exit_code == 0, result.output
    found = {r["identity"]["method"]: r for r in records(folder, matched="voxels")}
    assert set(found) == {"gvsl", "denoising"}, "scratch has no pretraining to match, so its record is shared"
    assert found["gvsl"]["cost"]["voxels_seen"] == found["denoising"]["cost"]["voxels_seen"]
    assert found["gvsl"]["cost"]["pretrain_steps"] == found["denoising"]["cost"]["pretrain_steps"] == 8
    assert "matched in voxels to 8 supervised steps" in result.output
    assert "Table" not in result.output.split("Method")[0], "one table"
    refused = bench(folder, "--match", "voxel")
    assert refused.exit_code == 2 and 'Did you mean "voxels"' in refused.output


def test_matching_time_measures_a_method_once_a_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl3d.pretrain import describe

    monkeypatch.setattr(describe, "step_cost", lambda name: describe.StepCost(2.0, 1.0, 4, 32))
    assert bench(folder, "--methods", "gvsl", "--match", "time").exit_code == 0
    monkeypatch.setattr(describe, "step_cost", lambda name: describe.StepCost(9.0, 1.0, 4, 32))
    again = bench(folder, "--methods", "gvsl", "--match", "time")
    assert again.output.count("already in the store") == 1
    (record,) = records(folder, matched="time")
    assert record["cost"]["pretrain_steps"] == 4, "8 steps, twice the time"
    path = ResultStore(folder / "store").path_for(record["identity"])
    result = run("reproduce", str(path), "--cache", str(folder / "cache"))
    assert "Reproduced bit for bit" in result.output, result.output


def test_a_fraction_that_lacks_a_class_is_refused_with_the_name_of_its_task() -> None:
    cases = [Case(f"c{i}", f"s{i}", Path("x"), target=int(i % 4 == 0)) for i in range(40)]
    (split,) = make_splits(cases, (20, 10, 10))
    cohort = SimpleNamespace(cases=cases)
    data = TaskData(registry().tasks.get("ccc").load(), cohort, [split])  # type: ignore[arg-type]
    settings = load_settings("smoke")
    assert len(data.split_for(split, 0.5, settings).train) == 10
    with pytest.raises(DataError, match=r"--label-fractions 0\.01 of task ccc: .*no case of class"):
        data.split_for(split, 0.01, settings)


def test_fractions_that_are_none() -> None:
    for text in ("1.5", "0", "half"):
        result = run("bench", "--store", "x", "--label-fractions", text)
        assert result.exit_code == 2 and f'--label-fractions "{text}"' in result.output
