"""A study runs from its YAML, resumes from the store, and draws its figure."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"


def study(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, STUDY / "run.py", *arguments], capture_output=True, text=True, env={**os.environ}
    )


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = (
        STUDY / "studies" / "smoke.yaml",
        "--store",
        tmp_path / "store",
        "--cache",
        tmp_path / "cache",
    )
    first = study(*arguments)
    assert first.returncode == 0, first.stderr
    frame = pd.read_csv(tmp_path / "store" / "smoke.csv")
    # scratch and the two checkpoints of denoising in two modes and their correspondence, and the upper bound
    assert len(frame) == 3 * 3 + 1
    matches = frame["mode"] == "correspondence"
    assert frame[matches].score.between(0, 100).all() and frame[matches].validation.isna().all()
    assert frame[~matches & (frame["mode"] != "knn")].validation.between(0, 100).all()
    assert set(frame[frame.method == "denoising"].step) == {4, 8} and set(
        frame[frame.method == "scratch"].step
    ) == {0}
    assert (tmp_path / "store" / "smoke.png").stat().st_size > 10_000
    (tmp_path / "store" / "smoke.csv").unlink()
    again = study(*arguments)
    assert again.stderr.count("already in the store") == 7
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "store" / "smoke.csv"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("questoin: x", "question"),
        ("[1]", "mapping"),
        ("question: x\nmethods: [gvls]", 'Did you mean "gvsl"'),
    ],
)
def test_mistakes_in_a_study_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = study(path, "--store", tmp_path / "store")
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


def test_separation_finds_what_was_put_in() -> None:
    """Scratch at 40, others at 40.2, 50 and 60; cases differ by 4, seeds of a case by 2."""
    from test_statistics import made_up_model

    spec = importlib.util.spec_from_file_location("separation", STUDY / "separation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    frame = module.separation(made_up_model(cases=30, modes=("linear",)).tables[0]).set_index("Column")
    dice = frame.loc["Linear SHC DSC"]
    apart, low, high = (float(part.strip("[],")) for part in dice["Difference [95 %]"].split())
    assert dice["Best"].startswith("c ") and dice["Seeds"] == 3 and dice["Methods"] == 4
    assert 18.5 < apart < 21.5 and low < apart < high and high - low < 3
    assert float(dice["p"]) < 1e-6
    same = made_up_model(cases=30, modes=("linear",)).tables[0]
    cell = same.rows[0].cells["linear", "shc"]
    assert module.difference(cell, cell, "dsc")[0] == 0
