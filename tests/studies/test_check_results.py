"""Published tables follow from committed records that are current, or the check says which do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from ssl3d.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("check_results", ROOT / "benchmarks" / "check_results.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_results"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "store"
    result = CliRunner().invoke(
        main,
        [
            "bench",
            "--preset",
            "smoke",
            "--methods",
            "scratch",
            "--tasks",
            "shc",
            "--modes",
            "linear",
            "--store",
            str(folder),
        ],
    )
    assert result.exit_code == 0, result.output
    return folder


def page(folder: Path, command: str, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(f"Before.\n\n<!-- result: {command} -->\n{text}\n<!-- end of result -->\n\nAfter.\n")
    return path


def test_a_table_that_follows_from_current_records_passes_and_another_is_named(
    check: ModuleType, store: Path, tmp_path: Path
) -> None:
    command = f"ssl3d table --store {store} --format markdown"
    path = page(tmp_path, command, "nothing yet")
    (problem,) = check.problems_of(check.published(path))
    assert "page.md: not what is printed by" in problem
    check.rewrite(path)
    assert path.read_text().startswith("Before.\n") and path.read_text().endswith("After.\n")
    assert "Scratch" in path.read_text()
    assert check.problems_of(check.published(path)) == []
    digit = next(c for c in path.read_text() if c.isdigit() and c != "9")
    path.write_text(path.read_text().replace(digit, "9", 1))
    assert len(check.problems_of(check.published(path))) == 1


def test_records_that_are_not_current_are_named(
    check: ModuleType, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = page(tmp_path, f"ssl3d table --store {store} --format csv", "")
    check.rewrite(path)
    monkeypatch.setattr("ssl3d.bench.stale.evaluation_code", lambda *_: "another")
    (problem,) = check.problems_of(check.published(path))
    assert "scratch, shc linear, seed 0" in problem and "code of evaluation changed" in problem


def test_commands_that_are_no_commands_of_the_project_are_refused(check: ModuleType, tmp_path: Path) -> None:
    for command, said in (
        ("rm -rf /tmp/x", "begin with ssl3d"),
        ("ssl3d table --store nosuch", "exit status"),
    ):
        problems = check.problems_of(check.published(page(tmp_path, command, "")))
        assert any(said in problem for problem in problems), problems


def test_what_the_project_publishes_is_well_formed(check: ModuleType) -> None:
    """That it is current is looked at by ``make check-results``: an unpublished change may be under way."""
    for path in check.PAGES:
        text = path.read_text()
        assert (
            text.count("<!-- result: ") == text.count("<!-- end of result -->") == len(check.published(path))
        ), path
        for result in check.published(path):
            assert result.store is None or (ROOT / result.store).is_dir(), result
