"""Every way to fail ends in a message, an exit status that is documented, and no trace of ours without --debug."""

from __future__ import annotations

import errno
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from ssl3d.commands.common import Group
from ssl3d.errors import DataError, MemoryFault
from ssl3d.memory import explained
from ssl3d.registry import blame


def invoke(error: BaseException | None, *arguments: str, function: Any = None) -> Result:
    @click.group(cls=Group)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None: ...

    @group.command()
    def work() -> None:
        if function is not None:
            function()
        if error is not None:
            raise error

    return CliRunner().invoke(group, [*arguments, "work"])


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_ours_says_so_and_keeps_its_trace_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, debug: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = invoke(KeyError("lost"), *["--debug"] * debug)
    assert result.exit_code == 70
    assert "this is a fault of ssl3d, not yours: KeyError: 'lost'" in result.output
    assert ("Traceback" in result.output) == debug
    if not debug:
        name = re.search(r"The trace is in (\S+):", result.output)
        assert (
            name
            and "KeyError: 'lost'" in Path(name[1]).read_text()
            and "ssl3d work" in Path(name[1]).read_text()
        )


@pytest.mark.parametrize("error, said", [
    (DataError("no such folder. Fix: give one."), "no such folder. Fix: give one."),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x cannot be written: No space left.*make room"),
    (OSError(errno.EROFS, "Read-only file system", b"/data/x"), "/data/x cannot be written: Read-only"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x cannot be written: Permission denied.*permissions"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "The output cannot be written: Disk quota exceeded.*quota"),
    (MemoryError(), "The memory is used up.*Fix: smaller crops or batches"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), "memory is used up"),
])  # fmt: skip
def test_what_somebody_can_repair_is_no_fault_of_ours(error: Exception, said: str) -> None:
    result = invoke(error)
    assert result.exit_code == 2, result.output
    assert (
        re.search(said, result.output)
        and "Traceback" not in result.output
        and "fault of ssl3d" not in result.output
    )


def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Any:
    """Return ``work`` of a module that a plugin called "evil" owns."""
    path = tmp_path / "evil_plugin.py"
    path.write_text(f"class Evil:\n    name = 'evil'\n    def training_step(self, views):\n        {body}\n")
    module = types.ModuleType("evil_plugin")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "evil_plugin", module)
    monkeypatch.setattr(
        blame, "_owners", lambda: iter([("evil_plugin", "evil-dist:evil"), ("ssl3d", "ssl3d:builtins")])
    )
    return lambda: module.Evil().training_step({})


@pytest.mark.parametrize("body, said", [
    ("sys.exit(0)", "called sys.exit(0)"), ("raise SystemExit('bye')", "called sys.exit('bye')"),
    ("1 / 0", "raised ZeroDivisionError"), ("raise KeyError('x')", "raised KeyError: 'x'"),
    ("raise type('Odd', (Exception,), {'__str__': lambda s: 1 / 0})()", "raised Odd"),
    ("views['lost']", "raised KeyError"), ("int('x' * 3)", "raised ValueError"),
    ("raise OSError(28, 'full')", "raised OSError"),
])  # fmt: skip
def test_a_plugin_is_named_with_its_own_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, said: str
) -> None:
    result = invoke(None, function=plugin(monkeypatch, tmp_path, f"import sys; {body}"))
    assert result.exit_code == 2, result.output
    assert "the method evil of the plugin evil-dist:evil" in result.output and said in result.output
    assert re.search(
        rf"in Evil.training_step\(\): {re.escape(str(tmp_path))}/evil_plugin.py, line 4", result.output
    )
    assert "Traceback" not in result.output


def test_an_exit_of_a_command_stays_its_own() -> None:
    assert invoke(SystemExit(1)).exit_code == 1
    assert invoke(None).exit_code == 0


def test_out_of_memory_names_sizes_and_options() -> None:
    from ssl3d.bench import sizes
    from ssl3d.config import load_settings

    settings = load_settings("smoke", ["pretrain.crop=48", "pretrain.batch_size=3"])
    with (
        pytest.raises(
            Exception, match=r"gvsl with 3 crops of 48 x 48 x 48 voxels.*accumulate=3.*pretrain.crop"
        ),
        sizes.pretraining("gvsl", settings),
    ):
        raise MemoryError
    with (
        pytest.raises(
            Exception, match=r"shc finetune with windows of .* downstream.finetune.batch_size \(now"
        ),
        sizes.evaluation("shc", "finetune", settings),
    ):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")
    with pytest.raises(RuntimeError, match="of another kind"), explained("x", "y"):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize(
    "where", ["ssl3d.data.files.volume._read_nifti", "ssl3d.data.prepared.case.prepare_arrays"]
)
def test_out_of_memory_names_the_file_that_was_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from ssl3d.data.files.volume import write_volume
    from ssl3d.data.layouts.releases import Folder
    from ssl3d.data.prepared.build import prepare
    from ssl3d.data.prepared.case import prepare_file
    from ssl3d.data.prepared.steps import Intensity, Preparation

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    images = tmp_path / "images"
    images.mkdir()
    values = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    write_volume(images / "large.nii.gz", values, np.eye(4))
    monkeypatch.setattr(where, full)
    dataset = Folder().with_facts(modality="mr")
    preparation = Preparation(spacing_mm=1)
    with pytest.raises(MemoryFault, match="large.nii.gz"):
        prepare(dataset.cases(images), dataset, preparation, tmp_path / "cache")
    with pytest.raises(MemoryFault, match="large.nii.gz"):
        prepare_file(images / "large.nii.gz", preparation, Intensity("minmax", 0.0, False, "", "MR"))


def test_an_output_that_is_no_utf8_is_escaped(tmp_path: Path) -> None:
    import subprocess

    code = "from ssl3d.commands.failures import survive_any_output as s; s(); print('gr\\u00fcn \\u2264')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert result.returncode == 0 and result.stdout.strip() == b"gr\\xfcn \\u2264", result
