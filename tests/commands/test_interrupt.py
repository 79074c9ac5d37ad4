"""After Ctrl-C the command that is printed goes on, and nothing else is claimed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from ssl3d.bench import whole
from ssl3d.cli import main
from ssl3d.commands import data
from ssl3d.commands.common import Group
from ssl3d.pretrain.watch import Watch
from ssl3d.signals import RESUMABLE


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def printed(result: Result) -> list[str]:
    """Return the arguments of the command that the message names."""
    assert result.exit_code == RESUMABLE, result.output
    words = shlex.split(result.output.split("It goes on where it stopped with:\n")[1].splitlines()[0])
    assert words[0] == "ssl3d"
    return words[1:]


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Press Ctrl-C at the n-th call of a function, once."""
    real, calls = getattr(owner, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("step", [1, 3, 7])  # before the first checkpoint (of step 4) and after it
def test_pretrain_names_the_command_that_goes_on(
    volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = tmp_path / "a run"  # with a space, so that it must be quoted
    command = ["pretrain", "--method", "rotation", "--data", volume_folder, "--preset", "smoke", "--out", out]
    interrupt(monkeypatch, Watch, "note", step)
    words = printed(run(*command))
    assert words == [*map(str, command), "--resume"]
    again = run(*words)
    assert again.exit_code == 0, again.output
    command[-1] = tmp_path / "whole"
    assert run(*command).exit_code == 0
    weights, whole = (load_file(f / "backbone.safetensors") for f in (out, tmp_path / "whole"))
    assert all((weights[key] == whole[key]).all() for key in whole)


def test_resume_is_not_added_twice(
    volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pretrain", "--method", "rotation", "--data", volume_folder, "--preset", "smoke", "--resume"]
    interrupt(monkeypatch, Watch, "note", 1)
    words = printed(run(*command, "--out", tmp_path / "run"))
    assert words == [*map(str, command), "--out", str(tmp_path / "run")]
    assert run(*words).exit_code == 0


def test_bench_goes_on_with_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "bench", "--preset", "smoke", "--methods", "scratch", "--seeds", "0,1", "--tasks", "ccc", "--modes", "linear",
        "--store", tmp_path / "store",
    ]  # fmt: skip
    interrupt(monkeypatch, whole, "line", 1)  # the first cell is done
    words = printed(run(*command))
    assert words == list(map(str, command))
    again = run(*words)
    assert again.exit_code == 0 and again.output.count("already in the store") == 1, again.output
    assert len(list((tmp_path / "store").rglob("*linear*.json"))) == 2


def test_preparation_goes_on_and_verification_says_that_it_does_not(
    volume_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssl3d.data.checks import verify
    from ssl3d.data.prepared import case as prepare

    interrupt(monkeypatch, prepare, "save_array", 3)
    words = printed(
        run("data", "prepare", volume_folder, "--spacing", 6.4, "--cache", tmp_path, "--workers", 1)
    )
    (folder,) = (tmp_path / "prepared").iterdir()
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}
    assert done and run(*words).exit_code == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done  # not repeated
    interrupt(monkeypatch, verify, "examine_cases", 1)
    result = run("data", "verify", volume_folder)
    assert result.exit_code == 130 and "Started again, it begins anew." in result.output


def test_every_claim_to_go_on_has_a_test_here() -> None:
    """A command that is newly marked as resumable needs a test above."""

    def commands(group: click.Group) -> dict[str, click.Command]:
        found = dict(group.commands)
        for name, command in group.commands.items():
            if isinstance(command, Group):
                found |= {f"{name} {inner}": c for inner, c in commands(command).items()}
        return found

    marked = {name for name, command in commands(main).items() if hasattr(command, "resumes_with")}
    assert marked == {"pretrain", "bench", "data prepare", "data phantoms"}
    assert data.phantoms.resumes_with == ""  # tests/data/test_phantoms.py interrupts it
