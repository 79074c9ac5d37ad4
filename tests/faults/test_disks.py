"""A disk that is full, read-only or forbidden at any moment: one message with path and remedy, and then it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from faults.damage import FULL
from faults.kills import CODES, Counter, refuse
from faults.runs import forked, run, same_weights, states
from ssl3d.cli import main
from ssl3d.errors import SSL3DError, WriteError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


@pytest.mark.timeout(3600 if FULL else 600)
def test_refused_at_any_operation_of_a_pretraining(
    tmp_path: Path, whole: Path, record_property: Callable[[str, object], None]
) -> None:
    with Counter(tmp_path, 0, refuse("ENOSPC")) as counter:
        run(tmp_path / "counted")
    some = {1, 4, counter.seen // 3, counter.seen // 2, counter.seen - 4}
    points = list(range(1, counter.seen + 1)) if FULL else sorted(some)
    record_property("trials", len(points))
    for number, point in enumerate(points):
        code = list(CODES)[number % len(CODES)]
        out = tmp_path / f"{code}-{point}"
        try:
            with Counter(tmp_path, point, refuse(code)):
                run(out)
        except WriteError as error:
            assert CODES[code] in str(error) and str(tmp_path) in str(error) and "Fix: " in str(error), error
        except OSError as error:
            raise AssertionError(f"{code} at operation {point} is not explained") from error
        run(out, resume=bool(states(out)))
        assert same_weights(out, whole), (code, point)


def test_a_file_size_limit_is_named(tmp_path: Path) -> None:
    """The real thing: the kernel refuses to write more than some bytes to a file."""
    import resource
    import signal

    def child() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            run(tmp_path / "run")
        except WriteError as error:
            assert "ulimit -f" in str(error), error
            return
        raise AssertionError("nothing was refused")

    assert forked(child) == 0


def test_the_command_line_says_it_in_one_message(tmp_path: Path, volume_folder: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for option, place in (("--out", tmp_path / "file" / "run"), ("--cache", tmp_path / "file" / "cache")):
        places = {"--out": tmp_path / "run", "--cache": tmp_path / "cache", option: place}
        result = CliRunner().invoke(
            main,
            ["pretrain", "--method", "rotation", "--data", str(volume_folder), "--preset", "smoke",
             *(str(word) for pair in places.items() for word in pair)],
        )  # fmt: skip
        assert result.exit_code == 2, result.output
        assert (
            "Traceback" not in result.output
            and str(tmp_path / "file") in result.output
            and "Fix: " in result.output
        )


@pytest.mark.thorough
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path, whole: Path) -> None:
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounts a small disk")
    try:
        (disk / "ballast").write_bytes(bytes(150_000))
        with pytest.raises(SSL3DError, match=r"make room on its disk \(.* free\)"):
            run(disk / "run")
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run(disk / "run", resume=bool(states(disk / "run")))
        assert same_weights(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)
