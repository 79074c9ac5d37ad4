"""Surroundings that nobody tests in: no home, an output of another encoding, one that is closed or full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.damage import FULL
from faults.test_records import place, whole
from ssl3d.results.store.record import identity_hash

COMMANDS: dict[str, list[str]] = {
    "help": ["--help"], "help of a command": ["bench", "--help"], "version": ["--version"], "methods": ["methods"],
    "methods as JSON": ["methods", "--json"], "tasks": ["tasks"], "datasets": ["datasets"], "backbones": ["backbones"],
    "plugins": ["plugins"], "info": ["info", "gvsl", "--no-cost"], "config": ["config", "--preset", "smoke"],
    "doctor": ["doctor"], "cache ls": ["cache", "ls"], "cache verify": ["cache", "verify"],
    "store ls": ["store", "ls", "--store", "STORE"], "store verify": ["store", "verify", "--store", "STORE"],
    "table": ["table", "--store", "STORE"], "table as CSV": ["table", "--store", "STORE", "--format", "csv"],
    "data verify": ["data", "verify", "VOLUMES"],
}  # fmt: skip
SURROUNDINGS = (
    "without HOME", "read-only HOME", "an ASCII output", "a Latin-1 output", "a closed output", "a full output",
)  # fmt: skip
FINE = (0, 1)
"""Status of a command that has done its work; doctor and ls end with 1 when they have found something."""


def said(
    arguments: list[str], tmp_path: Path, *, home: Path | None, stdout: int | None, encoding: str = "utf-8"
) -> tuple[int, bytes, str]:
    """Run a command as a process of its own and return status and both outputs.

    Args:
        arguments: of ssl3d.
        tmp_path: where to run.
        home: HOME; None: without.
        stdout: the descriptor of the output; None: read it; -1: closed.
        encoding: of the outputs.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "SSL3D_CACHE", "XDG_CACHE_HOME")}
    environment |= {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "200"}
    if home is not None:
        environment["HOME"] = str(home)
    result = subprocess.run(
        [sys.executable, "-m", "ssl3d", *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE if stdout is None else None if stdout == -1 else stdout,
        preexec_fn=(lambda: os.close(1)) if stdout == -1 else None, check=False, timeout=120,
    )  # fmt: skip
    return result.returncode, result.stdout or b"", result.stderr.decode(errors="replace")


def check(surrounding: str, arguments: list[str], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    if surrounding == "a full output":
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            status, _, errors = said(arguments, tmp_path, home=home, stdout=full)
        finally:
            os.close(full)
        assert status == 2 and "No space left on device. Fix: " in errors, (status, errors)
        assert errors.count("Error: ") == 1, errors
        return
    if surrounding == "read-only HOME":
        home = Path("/proc/1/fd")  # there is none that root could write to otherwise
    encoding = {"an ASCII output": "ascii", "a Latin-1 output": "latin-1"}.get(surrounding, "utf-8")
    status, output, errors = said(
        arguments, tmp_path, home=None if surrounding == "without HOME" else home, encoding=encoding,
        stdout=-1 if surrounding == "a closed output" else None,
    )  # fmt: skip
    assert status in FINE and "Traceback" not in errors and "Error" not in errors, (status, errors)
    if surrounding != "a closed output":
        assert output.decode(
            "utf-8" if encoding == "ascii" else encoding
        )  # click takes ASCII for a wrong setting


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="an output that is full")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_every_command_that_reads_works_in_surroundings(
    surrounding: str, tmp_path: Path, volume_folder: Path, record_property: Callable[[str, object], None]
) -> None:
    store = tmp_path / "store"
    place(store, whole("scratch", 1), f"good-{identity_hash(whole('scratch', 1)['identity'])}.json")
    number = SURROUNDINGS.index(surrounding)
    names = list(COMMANDS) if FULL else ["help", list(COMMANDS)[3 + number]]
    record_property("trials", len(names))
    faults = []
    for name in names:
        words = [
            {"STORE": str(store), "VOLUMES": str(volume_folder)}.get(word, word) for word in COMMANDS[name]
        ]
        try:
            check(surrounding, words, tmp_path)
        except AssertionError as error:
            faults.append(f"{name}: {str(error)[:600]}")
    assert not faults, f"{len(faults)} of {len(names)}:\n" + "\n".join(faults)


@pytest.mark.parametrize("stderr", ["closed", "full"])
def test_without_an_output_for_errors_the_status_tells(tmp_path: Path, stderr: str) -> None:
    redirect = "2>&-" if stderr == "closed" else "2>/dev/full"
    line = f"exec {sys.executable} -m ssl3d store ls --store {tmp_path / 'nowhere'} {redirect}"
    assert subprocess.run(["sh", "-c", line], check=False, capture_output=True).returncode == 2
