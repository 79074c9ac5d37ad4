"""A stranger's package: written by `ssl3d new-method`, installed by pip, run through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssl3d.cli import main


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Write the package, install it beside ssl3d, and return its folder and the environment that sees it."""
    folder, site = tmp_path_factory.mktemp("work") / "ssl3d-my-pretext", tmp_path_factory.mktemp("site")
    result = CliRunner().invoke(main, ["new-method", "my_pretext", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *options, str(folder)], check=True)
    return folder, {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "160"}


def ssl3d(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ssl3d.cli", *arguments], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_and_described(installed: tuple[Path, dict[str, str]]) -> None:
    _, env = installed
    assert "my_pretext" in ssl3d(env, "methods")
    assert "ssl3d-my-pretext:my_pretext" in ssl3d(env, "plugins")
    info = ssl3d(env, "info", "my_pretext", "--no-cost")
    assert "Standard deviation of the noise" in info and "my_pretext.sigma" in info


def test_no_listing_imports_torch_with_it_installed(installed: tuple[Path, dict[str, str]]) -> None:
    _, env = installed
    code = (
        "import sys; from ssl3d.cli import main\n"
        "for listing in ('methods', 'tasks', 'datasets', 'plugins'): main([listing], standalone_mode=False)\n"
        "print('heavy:', [name for name in ('torch', 'monai', 'ssl3d_my_pretext.method') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "my_pretext" in done.stdout and done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


def test_it_passes_its_own_test(installed: tuple[Path, dict[str, str]]) -> None:
    folder, env = installed
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(folder)], env=env, capture_output=True, text=True
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_it_is_checked_pretrained_and_benched(
    installed: tuple[Path, dict[str, str]], volume_folder: Path, tmp_path: Path
) -> None:
    _, env = installed
    cache = ["--cache", str(tmp_path / "cache")]
    preset = ["--preset", "smoke", "--set", "my_pretext.sigma=0.2"]
    run = tmp_path / "run"
    ssl3d(
        env,
        "pretrain",
        "--method",
        "my_pretext",
        "--data",
        str(volume_folder),
        "--out",
        str(run),
        *preset,
        *cache,
    )
    assert json.loads((run / "run.json").read_text())["identity"]["method"]["config"] == {"sigma": 0.2}
    arguments = [
        "--methods",
        "scratch,my_pretext",
        "--tasks",
        "shc",
        "--modes",
        "linear",
        "--data",
        str(volume_folder),
    ]
    table = ssl3d(env, "bench", *arguments, "--store", str(tmp_path / "store"), *preset, *cache)
    assert "My pretext" in table and "Scratch" in table
    assert "My pretext" in ssl3d(env, "table", "--store", str(tmp_path / "store"), "--format", "markdown")


def test_a_name_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("gvsl", "registered by ssl3d:methods"),
        ("My-Method", "lower-case"),
        ("class", "cannot name"),
    ):
        result = CliRunner().invoke(main, ["new-method", name, "--out", str(tmp_path / name)])
        assert result.exit_code == 2 and message in result.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    result = CliRunner().invoke(main, ["new-method", "fine", "--out", str(tmp_path / "full")])
    assert result.exit_code == 2 and "not empty" in result.output
