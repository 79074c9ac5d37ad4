"""The command line as a user meets it: results, errors without traceback, and what is left behind."""

from __future__ import annotations

import gzip
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ssl3d.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"COLUMNS": "140"})


def refused(result: Result, *parts: str) -> None:
    """The command failed with status 2, said all ``parts``, and showed no traceback."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.output, f"{part!r} not in:\n{result.output}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A smoke bench of scratch and gvsl on two tasks in both modes."""
    folder = tmp_path_factory.mktemp("bench")
    return folder / "store", bench(folder / "store", folder / "cache", "scratch,gvsl")


def bench(store: Path, cache: Path, methods: str, *more: str) -> Result:
    arguments = ["--preset", "smoke", "--methods", methods, "--tasks", "shc,ccc", "--cache", str(cache)]
    return run("bench", *arguments, "--store", str(store), *more)


def test_a_bench_prints_the_table_and_keeps_a_record_a_cell(store: tuple[Path, Result]) -> None:
    folder, result = store
    assert result.exit_code == 0, result.output
    for part in ("Scratch", "GVSL", "SHC DSC", "CCC AUC", "Linear", "Fine-tune", "Preset smoke"):
        assert part in result.output
    records = [json.loads(p.read_text()) for p in sorted((folder / "records").glob("*.json"))]
    assert len(records) == 2 * 2 * 2
    for record in records:
        assert record["per_case"] and record["environment"]["versions"]["torch"] and record["cost"]["device"]
        assert record["cost"]["pretrain_steps"] == (8 if record["identity"]["method"] == "gvsl" else 0)
    assert {p.name for p in (folder / "splits").iterdir()} == {"shc.json", "ccc.json"}


def test_finished_cells_are_skipped_and_missing_ones_computed(store: tuple[Path, Result]) -> None:
    folder, _ = store
    lost = next((folder / "records").glob("gvsl-ccc-linear*.json"))
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "records").glob("*.json")}
    lost.unlink()
    result = bench(folder, folder.parent / "cache", "scratch,gvsl")
    assert result.exit_code == 0 and result.output.count("already in the store") == 7
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "records").glob("*.json")}
    assert [name for name in after if after[name] != before[name]] == [lost.name]
    assert len(list((folder / "runs").glob("gvsl-*"))) == 1, "not pretrained again"


def test_a_finished_run_can_be_benched_by_its_folder(store: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = store
    checkpoint = next((folder / "runs").glob("gvsl-*"))
    result = bench(
        tmp_path / "s",
        folder.parent / "cache",
        "gvsl",
        "--checkpoint",
        f"gvsl={checkpoint}",
        "--modes",
        "linear",
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "s" / "runs").exists()
    wider = bench(
        tmp_path / "s",
        folder.parent / "cache",
        "gvsl",
        "--checkpoint",
        f"gvsl={checkpoint}",
        "--set",
        "backbone.channels=16,32",
    )
    refused(wider, "another architecture", str(checkpoint))


def test_the_seeds_of_the_preset_are_run(store: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("extends: smoke\nseeds: [0, 3]\n")
    result = run(
        "bench", "--preset", str(tmp_path / "two.yaml"), "--methods", "scratch", "--tasks", "shc", "--modes", "linear",
        "--cache", str(store[0].parent / "cache"), "--store", str(tmp_path / "s"),
    )  # fmt: skip
    assert result.exit_code == 0 and "seeds 0, 3" in result.output, result.output


def test_tables_in_every_format(store: tuple[Path, Result]) -> None:
    folder, _ = store
    markdown = run("table", "--store", str(folder), "--format", "markdown", "--against", "paper")
    assert markdown.exit_code == 0 and "| GVSL" in markdown.output and "68.4" in markdown.output
    lines = run("table", "--store", str(folder), "--format", "csv").output.strip().splitlines()
    assert len(lines) == 1 + 8 and "method" in lines[0].split(",")
    assert run("table", "--store", str(folder), "--with", "ci").exit_code == 0
    refused(run("table", "--store", str(folder), "--format", "latx"), 'Unknown table format "latx"')
    refused(run("table", "--store", str(folder / "nowhere")), "nowhere")


def test_a_truncated_record_is_named_and_left_out(store: tuple[Path, Result], tmp_path: Path) -> None:
    shutil.copytree(store[0], tmp_path / "store")
    victim = next((tmp_path / "store" / "records").glob("scratch-*.json"))
    victim.write_bytes(victim.read_bytes()[:-50])
    result = run("table", "--store", str(tmp_path / "store"))
    assert result.exit_code == 1 and victim.name in result.output and "GVSL" in result.output


def test_misspelt_names_get_the_nearest_one() -> None:
    refused(run("bench", "--methods", "gvls", "--store", "x"), 'Unknown method "gvls". Did you mean "gvsl"')
    refused(run("bench", "--tasks", "shcc", "--store", "x"), 'Unknown task "shcc". Did you mean "shc"')
    refused(run("bench", "--modes", "liner", "--store", "x"), 'Unknown mode "liner". Did you mean "linear"')
    refused(run("bench", "--seeds", "0,one", "--store", "x"), '--seeds "one"')
    refused(
        run("bench", "--set", "gvsl.ncc_wieght=2", "--store", "x"), 'unknown key "ncc_wieght"', "ncc_weight"
    )
    refused(
        run(
            "pretrain",
            "--method",
            "simclr",
            "--set",
            "simclr.views.edge=1",
            "--set",
            "pretrain.batch_size=2",
            "--out",
            "x",
        ),
        "simclr",
        "batch_size",
    )
    refused(run("bench", "--task-data", "sac=/x", "--tasks", "shc", "--store", "x"), 'the task "sac"')
    refused(run("methds"), 'No command "methds". Did you mean "methods"')
    assert not Path("x").exists()


def test_info_names_paper_options_and_what_is_trained() -> None:
    output = run("info", "gvsl", "--no-cost").output
    assert "CVPR 2023" in output and "encoder+decoder" in output and "gvsl.ncc_window" in output
    assert "variant of" in run("info", "gvsl_without_affine", "--no-cost").output


# --- bad data: all bad files at once, before any training -------------------------------------------


def pretrain(folder: Path, tmp_path: Path, *more: str) -> Result:
    arguments = [
        "--method",
        "gvsl",
        "--data",
        str(folder),
        "--preset",
        "smoke",
        "--cache",
        str(tmp_path / "cache"),
    ]
    return run("pretrain", *arguments, "--out", str(tmp_path / "run"), *more)


def test_every_bad_file_is_listed_before_training_starts(volume_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(volume_folder, folder)
    good = nibabel.load(folder / "ct_0.nii.gz")
    voxels = np.asarray(good.dataobj).astype(np.float32)
    whole = (folder / "ct_1.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"no image at all" * 50))
    holed = voxels.copy()
    holed[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(holed, good.affine), folder / "nan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels] * 2, axis=-1), good.affine), folder / "series.nii.gz")
    result = pretrain(folder, tmp_path)
    refused(result, "truncated.nii.gz", "text.nii.gz", "nan.nii.gz", "series.nii.gz", "Fix")
    assert "ct_0.nii.gz" not in result.output
    assert not (tmp_path / "run").exists(), "nothing was trained"


def test_empty_and_missing_folders_and_small_volumes(
    volume_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    refused(pretrain(tmp_path / "empty", tmp_path), str(tmp_path / "empty"), "empty")
    refused(pretrain(tmp_path / "nowhere", tmp_path), "nowhere")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("hello")
    refused(pretrain(tmp_path / "text", tmp_path), "holds no volume")
    small = pretrain(volume_folder, tmp_path, "--set", "pretrain.crop=24", "--set", "pretrain.steps=1")
    assert small.exit_code == 0, small.output
    (note,) = (text for text in caplog.messages if "smaller than the crop" in text)
    assert "5 of 5 prepared volumes are smaller than the crop (24, 24, 24)" in note
    assert "ct_0: (20, 20, 20)" in note and "data.spacing_mm=" in note


def test_label_on_another_grid_is_refused(store: tuple[Path, Result], tmp_path: Path) -> None:
    cache = store[0].parent / "cache"
    (source,) = (cache / "phantoms").glob("*/mmwhs")
    shutil.copytree(source, tmp_path / "mmwhs")
    label = tmp_path / "mmwhs/ct_train/ct_train_1001_label.nii.gz"
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), label)
    result = bench(
        tmp_path / "s", cache, "scratch", "--tasks", "shc", "--task-data", f"shc={tmp_path / 'mmwhs'}"
    )
    refused(result, "ct_train_1001", "grid")


def test_a_folder_of_ordinary_cts_pretrains_with_the_default_preset(tmp_path: Path) -> None:
    """No setting but --data: three CTs of 160 mm with anisotropic voxels (one step, to be quick)."""
    rng = np.random.default_rng(0)
    (tmp_path / "cts").mkdir()
    for i in range(3):
        hu = np.full((80, 80, 54), -1000, np.int16)
        hu[10:70, 10:70] = 40 + rng.integers(-20, 20, (60, 60, 54))
        nibabel.save(
            nibabel.Nifti1Image(hu, np.diag([-2.0, -2.0, 3.0, 1.0])), tmp_path / "cts" / f"{i}.nii.gz"
        )
    arguments = ["--method", "gvsl", "--data", str(tmp_path / "cts"), "--out", str(tmp_path / "run")]
    result = run("pretrain", *arguments, "--cache", str(tmp_path / "cache"), "--set", "pretrain.steps=1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "backbone.safetensors").exists()


def test_verbose_methods_say_what_info_says_of_every_method() -> None:
    output = run("methods", "--verbose", "--no-cost").output
    for name, words in (("gvsl", "CVPR 2023"), ("byol", "base_momentum"), ("rotation", "trains     encoder")):
        assert name in output and words in output


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    code = """
import ctypes, resource, sys
from ssl3d.commands.common import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 0, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    keep, give_back = (
        int(
            subprocess.run([sys.executable, "-c", code, a], capture_output=True, text=True, check=True).stdout
        )
        for a in ("keep", "give back")
    )
    assert 5 * keep < give_back, "page faults of 64 MiB"


def test_jobs_share_the_cells_and_compute_the_same(store: tuple[Path, Result], tmp_path: Path) -> None:
    scores = []
    torch.set_num_threads(2)  # of whoever calls: a cell has one thread with and without jobs
    try:
        for name, jobs in (("alone", "1"), ("shared", "2")):
            result = bench(
                tmp_path / name,
                store[0].parent / "cache",
                "scratch,gvsl",
                "--modes",
                "linear",
                "--jobs",
                jobs,
            )
            assert result.exit_code == 0, result.output
            assert "already in the store" not in result.output and result.output.count("Mean over seeds") == 1
            records = [json.loads(p.read_text()) for p in (tmp_path / name / "records").glob("*.json")]
            scores.append({(r["identity"]["method"], r["identity"]["task"]): r["score"] for r in records})
            assert {r["environment"]["threads"] for r in records} == {1}
            assert len(list((tmp_path / name / "runs").glob("gvsl-*"))) == 1, "pretrained once"
    finally:
        torch.set_num_threads(1)
    assert len(scores[0]) == 4 and scores[1] == scores[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="lists processes by /proc")
def test_jobs_end_with_the_process_that_started_them(store: tuple[Path, Result], tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "ssl3d.cli", "bench", "--preset", "smoke", "--methods", "denoising", "--tasks", "shc",
        "--jobs", "2", "--set", "pretrain.steps=100000", "--cache", str(store[0].parent / "cache"),
        "--store", str(tmp_path / "s"),
    ]  # fmt: skip
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def children() -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                of = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if of == parent.pid and b"spawn_main" in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except OSError:  # gone since it was listed
                continue
        return found

    try:
        deadline = time.monotonic() + 120
        while not (started := children()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert started
        time.sleep(8)  # the child imports torch and reaches its first cell
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 30
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_a_cell_that_another_process_holds_is_passed_over(store: tuple[Path, Result], tmp_path: Path) -> None:
    """The holder has the first cell; a bench finishes all others, waits, and ends when the holder lets go."""
    folder, _ = store
    shutil.copytree(folder, tmp_path / "s")
    held, *_ = (tmp_path / "s" / "records").glob("scratch-shc-linear*.json")
    other, *_ = (tmp_path / "s" / "records").glob("gvsl-ccc-finetune*.json")
    identity = json.loads(held.read_text())["identity"]
    held.unlink()
    other.unlink()
    holder = subprocess.Popen(
        [
            sys.executable, "-c",
            "import json, sys, time; from pathlib import Path; from ssl3d.results.store.store import ResultStore\n"
            "with ResultStore(Path(sys.argv[1])).claim(json.loads(sys.argv[2])):\n"
            "    print('held', flush=True)\n"
            "    while not Path(sys.argv[3]).exists(): time.sleep(0.05)\n",
            tmp_path / "s", json.dumps(identity), other,
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    result = bench(tmp_path / "s", folder.parent / "cache", "scratch,gvsl")
    assert holder.wait(timeout=60) == 0
    assert result.exit_code == 0 and result.output.count("already in the store") == 6, result.output
    assert held.is_file() and other.is_file()
    assert result.output.index("gvsl  ccc finetune") < result.output.index("scratch  shc linear   seed")


@pytest.mark.parametrize("option", ["data.counts.shx=[1,1,1]", "data.task_spacing_mm.shx=3.0"])
def test_pretraining_refuses_options_of_tasks_that_do_not_exist(option: str, tmp_path: Path) -> None:
    arguments = [
        "pretrain",
        "--method",
        "denoising",
        "--preset",
        "smoke",
        "--set",
        option,
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and 'unknown task "shx". Did you mean "shc"?' in result.output
    assert not (tmp_path / "run").exists()
