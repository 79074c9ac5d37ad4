"""A study runs from its YAML, resumes from the store, and draws its figure."""

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
    assert frame[frame["mode"] == "correspondence"].score.between(0, 100).all()
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
