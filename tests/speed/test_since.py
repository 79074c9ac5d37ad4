"""What `benchmarks/speed/since.py` says of two trees whose steps take known processor time."""

from __future__ import annotations

from pathlib import Path

import pytest
import since

CLI = """
import sys, time
from importlib.metadata import distribution

def main():
    ((entry,),) = [distribution("ssl3d").entry_points]
    assert entry.value == "{name}", entry
    (steps,) = [int(word.partition("=")[2]) for word in sys.argv if word.startswith("pretrain.steps=")]
    if "fails" in sys.argv:
        sys.exit("it broke")
    end = time.process_time() + {seconds} * steps
    while time.process_time() < end:
        pass
"""


def tree(place: Path, name: str, seconds: float) -> Path:
    (place / name / "ssl3d").mkdir(parents=True)
    (place / name / "ssl3d" / "__init__.py").touch()
    (place / name / "ssl3d" / "cli.py").write_text(CLI.format(name=name, seconds=seconds))
    project = f'[project]\nname = "ssl3d"\nversion = "7"\n[project.entry-points.ssl3d]\nown = "{name}"\n'
    (place / name / "pyproject.toml").write_text(project)
    return place / name


def test_each_tree_runs_its_own_code_and_steps_alone_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(since, "HERE", tree(tmp_path, "here", 0.02))
    ((there, here),) = since.compare(tree(tmp_path, "then", 0.06), 1, (1, 11), [])
    assert there == pytest.approx(0.06, rel=0.25) and here == pytest.approx(0.02, rel=0.25)


def test_a_tree_that_fails_ends_it_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 1:\nit broke"):
        fails = tree(tmp_path, "then", 0.0)
        since.seconds(fails, since.environment_of(fails, tmp_path), 1, ["fails"])
