"""``ssl3d cache`` and ``ssl3d doctor``: what lies there, what is damaged, what can go, and what is wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ssl3d.cli import main
from ssl3d.data.prepared import arrays


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def cache(volume_folder: Path, tmp_path: Path) -> Path:
    """A cache with one cohort of five volumes."""
    place = tmp_path / "cache"
    assert run("data", "prepare", volume_folder, "--spacing", 6.4, "--cache", place).exit_code == 0
    return place


def test_the_cache_is_listed_verified_and_pruned(cache: Path, volume_folder: Path) -> None:
    (folder,) = (cache / "prepared").iterdir()
    listed = run("cache", "ls", "--cache", cache).output
    assert "5" in listed and "today" in listed and folder.name in listed.replace("\n", "")
    (known,) = json.loads(run("cache", "ls", "--cache", cache, "--json").output)
    assert (
        known["cases"] == 5
        and known["folder"] == str(folder)
        and known["bytes"] > 0
        and not known["leftovers"]
    )
    arrays._verified.clear()
    assert "5 arrays sound, 0 problems" in run("cache", "verify", "--cache", cache).output
    path = sorted(folder.glob("*.b2nd"))[2]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    arrays._verified.clear()
    result = run("cache", "verify", "--cache", cache)
    assert (
        result.exit_code == 1 and f"{path} is damaged" in result.output and "4 arrays sound" in result.output
    )
    assert "set aside as damaged" in run("doctor", "--cache", cache).output
    assert run("data", "prepare", volume_folder, "--spacing", 6.4, "--cache", cache).exit_code == 0
    arrays._verified.clear()
    assert "5 arrays sound" in run("cache", "verify", "--cache", cache).output
    # The damaged file is the only thing that can go; then all of the cohort, once it is old.
    said = run("cache", "prune", "--cache", cache).output
    assert "Would remove" in said and ".damaged" in said and list(folder.glob("*.damaged"))
    run("cache", "prune", "--cache", cache, "--yes")
    assert not list(folder.glob("*.damaged")) and folder.is_dir()
    old = time.time() - 40 * 86_400
    for file in folder.iterdir():
        os.utime(file, (old, old))
    assert folder.is_dir() and str(folder) in run("cache", "prune", "--cache", cache).output
    assert run("cache", "prune", "--cache", cache, "--yes").exit_code == 0
    assert not folder.exists() and volume_folder.is_dir()


def test_a_link_in_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (cache / "prepared" / "link").symlink_to(precious)
    assert run("cache", "prune", "--cache", cache, "--days", 0, "--yes").exit_code == 0
    assert (precious / "file").read_text() == "kept"


def test_doctor_says_what_is_there_and_what_is_wrong(cache: Path, tmp_path: Path) -> None:
    result = run("doctor", "--cache", cache)
    assert "torch" in result.output and "1 of 1 cohort complete" in result.output
    store = tmp_path / "store"
    (store / "records").mkdir(parents=True)
    (store / "records" / "x.json").write_text("[")
    result = run("doctor", "--cache", cache, "--store", store)
    assert result.exit_code == 1 and "Not one record in the store" in result.output


def test_all_files_are_hashed_on_request(
    volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl3d.data.prepared import identity

    command = ["data", "prepare", volume_folder, "--spacing", 6.4, "--cache", tmp_path]
    real, hashed = identity._digest, []
    monkeypatch.setattr(identity, "_digest", lambda volume: hashed.append(volume) or real(volume))
    for more, count in (([], 5), ([], 0), (["--verify-cache"], 5), ([], 0)):
        hashed.clear()
        assert run(*command, *more).exit_code == 0
        assert len(hashed) == count
