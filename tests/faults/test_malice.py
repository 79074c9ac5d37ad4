"""Pickles, files of settings and options of an attacker: refused by one line, and nothing of them is run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_import import genesis_state

from faults.commands import Outcome, command
from faults.damage import FULL
from faults.test_texts import BOMB
from faults.world import words

pytestmark = pytest.mark.timeout(1200 if FULL else 120)


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path, way: str) -> None:
        self.path, self.way = path, way

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        text = f"__import__('os').makedirs({str(self.path)!r}, exist_ok=True)"
        return {
            "system": (os.system, (f"mkdir -p {self.path}",)), "eval": (eval, (text,)), "exec": (exec, (text,)),
            "mkdir": (os.makedirs, (str(self.path), 0o777, True)),
        }[self.way]  # fmt: skip


def pickled(content: object, protocol: int) -> bytes:
    return pickle.dumps(content, protocol)


def saved(content: object, legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def evil_files(harm: Path) -> dict[str, bytes]:
    """Return files that do harm when they are unpickled, by how they were made."""
    found = {
        f"{way}, protocol {protocol}": pickled({"state_dict": {"w": Harm(harm, way)}}, protocol)
        for way, protocol in (("system", 0), ("eval", 2), ("exec", 4), ("mkdir", 5))
    }
    for way in ("system", "eval"):
        for legacy in (False, True):
            content = {"state_dict": {**genesis_state(), "x": Harm(harm, way)}}
            found[f"{way} by torch{', as before 1.6' if legacy else ''}"] = saved(content, legacy)
    return found


#: Who reads weights, and which file of WORLD's folder they are in.
READERS: dict[str, tuple[str, str]] = {
    "import EVIL --out OUT/run": ("", ""),
    "export --checkpoint OUT/run --to torch --out OUT/export": ("run", "backbone.safetensors"),
    "finetune TINY --checkpoint OUT/run --task ccc --mode linear --out OUT/p --cache WORLD/cache": ("run",
    "backbone.safetensors"),
    "predict --checkpoint OUT/predictor --input WORLD/volumes --out OUT/o --device cpu": ("predictor", "model.safetensors"),
}  # fmt: skip


def refused(outcome: Outcome) -> None:
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.output and "fault of ssl3d" not in outcome.output, outcome
    assert "\x1b[31mevil" not in outcome.output, "the terminal obeys"


@pytest.mark.parametrize("reader", READERS if FULL else list(READERS)[:1], ids=lambda text: text.split()[0])
def test_a_pickle_is_never_run(
    world: Path, tmp_path: Path, reader: str, record_property: Callable[[str, object], None]
) -> None:
    harm, (folder, name) = tmp_path / "harm", READERS[reader]
    files = evil_files(harm)
    record_property("trials", len(files))
    for number, (how, data) in enumerate(files.items()):
        out = tmp_path / str(number)
        out.mkdir()
        evil = out / "evil.pth"
        if folder:
            shutil.copytree(world / folder, out / folder)
            evil = out / folder / name
            evil.with_name(f"{name}.sha256").unlink()  # an attacker would write one that fits
        evil.write_bytes(data)
        refused(command(*words(reader.replace("EVIL", str(evil)), world, out)))
        assert not harm.exists(), how
    for data in files.values():  # the files would have done harm
        load = (
            pickle.loads
            if not data.startswith(b"PK")
            else lambda d: torch.load(io.BytesIO(d), weights_only=False)
        )
        if b"torch" not in data[:4000] and not data.startswith(b"PK"):
            load(data)
            assert harm.exists()
            harm.rmdir()


PRETRAIN = "pretrain TINY --method denoising --data WORLD/volumes --out OUT/run --cache WORLD/cache"
CODE = "__import__('os').makedirs('harm')"
OPTIONS: tuple[tuple[str, ...], ...] = (
    *(("--set", text) for text in (
        "", "=", "a", "=1", "pretrain", "pretrain=", "pretrain=3", "pretrain.=1", ".lr=1", "pretrain.lr.x=1", "__class__=1",
        "pretrain.__class__=1", "pretrain.__dict__={}", "pretrain.model_config={}", f"pretrain.lr={CODE}",
        "pretrain.lr=!!python/object/apply:os.makedirs ['harm']", f"pretrain.optimizer={CODE}",
        "pretrain.optimizer=os.makedirs",
        "pretrain.steps=-1", "pretrain.steps=1e999", "pretrain.steps=[1]",
        "pretrain.crop=0", "pretrain.crop=[8, 8]", "pretrain.crop=[[[[[[8]]]]]]", "pretrain.batch_size=0", "pretrain.lr=-1",
        "pretrain.loggers=['/etc/passwd']", "pretrain.loggers=evil", "backbone.name=../../evil", "backbone.name=os:system",
        "backbone.channels=[]", "backbone.channels=[0]", "backbone.channels=[-4]", "backbone.channels=evil",
        "data.spacing_mm=0", "data.spacing_mm=-1", "denoising.sigma=evil", "denoising.evil=1", "evil.x=1", "\x1b[31mevil=1",
        "pretrain.\udcffevil=1", f"pretrain.{'x' * 20_000}=1", f"pretrain.lr={'9' * 20_000}", f"pretrain.lr={'[' * 20_000}",
        "downstream.crop=0", "downstream.linear.evil=1", "phantoms.evil=1", "method_lr.evil=1", "method_lr.denoising=-1",
    )),
    *(("--method", text) for text in ("", "../../etc/passwd", "os:system", "\x1b[31mevil",
    "x" * 20_000, "ssl3d_methods.gvsl:GVSL")),
    *(("--preset", text) for text in ("", "/etc/passwd", "/dev/zero", "OUT", "OUT/pipe.yaml", "../evil",
    "OUT/bomb.yaml", "OUT/object.yaml")),
    *(("--data", text) for text in ("", "/dev/zero", "evil=OUT", "OUT/pipe.yaml", "OUT", "=", "mmwhs=/dev/null",
    "\x1b[31mevil")),
    *(("--seed", text) for text in ("1.5", "9" * 40, "evil")),
    *(("--device", text) for text in ("cuda:99", "cpu;evil", "")), *(("--devices", text) for text in ("-1", "99999999")),
    *(("--out", text) for text in ("/dev/null", "/dev/null/run", "/proc/evil", "OUT/pipe.yaml", "OUT/bomb.yaml")),
    *(("--exclude-test", text) for text in ("", "evil", "OUT/object.yaml", "OUT/bomb.yaml", "/dev/zero")),
    *(("--subject-pattern", text) for text in ("(", "evil=(.*)", "no group", "*")),
)  # fmt: skip
SOME_OPTIONS = OPTIONS if FULL else OPTIONS[5::20]


def test_an_option_of_an_attacker_is_refused(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "object.yaml").write_text("!!python/object/apply:os.makedirs ['harm']")
    record_property("trials", len(SOME_OPTIONS))
    faults = []
    for option, value in SOME_OPTIONS:
        arguments = words(PRETRAIN, world, tmp_path)
        given = value.replace("OUT", str(tmp_path))
        if option in ("--method", "--data", "--out"):
            arguments[arguments.index(option) + 1] = given
        else:
            arguments += [option, given]
        outcome = command(*arguments)
        try:
            refused(outcome)
            assert not (tmp_path / "harm").exists(), "harm was done"
            assert len(outcome.output) < 40_000, "a long value is not repeated in full"
        except AssertionError as error:
            faults.append(f"{option} {value[:60]!r}: {str(error)[:500]}")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not faults, f"{len(faults)} of {len(SOME_OPTIONS)}:\n" + "\n".join(faults)


CONTENTS: dict[str, bytes | None] = {
    "empty": b"", "brackets": b"[" * 100_000, "pairs": b'{"a":' * 100_000, "list": b"[]", "object": b"{}", "number": b"3",
    "NaN": b'{"format": NaN, "backbone": NaN}', "binary": bytes(range(256)), "null": b"null", "text": b'"x"',
    "other types": b'{"format": 2, "backbone": [], "task": 3, "splits": {}, "train": 3, "labels": [[]]}', "a pipe": None,
    "code for a name": b'{"backbone": {"name": "os:system", "channels": [4]}, "format": 2}',
    "channels without end": b'{"backbone": {"name": "unet3d", "channels": [1000000000, 1000000000]}, "format": 2}',
}  # fmt: skip
#: Who reads which file.
DESCRIBED: dict[str, tuple[str, str]] = {
    "export --checkpoint OUT/it --to torch --out OUT/export": ("run", "run.json"),
    "predict --checkpoint OUT/it --input WORLD/volumes --out OUT/o --device cpu": ("predictor", "predictor.json"),
    "finetune TINY --checkpoint WORLD/run --task ccc --mode linear --out OUT/p --cache WORLD/cache "
    "--splits-file OUT/it/splits.json": ("", "splits.json"),
    "data verify OUT/it --as nnunet": ("", "dataset.json"),
    "bench TINY CELL --store OUT/store --cache WORLD/cache --tasks OUT/it/task.yaml": ("", "task.yaml"),
}  # fmt: skip


@pytest.mark.parametrize(
    "reader", DESCRIBED if FULL else list(DESCRIBED)[:2], ids=lambda text: text.split()[0]
)
def test_a_description_of_an_attacker_is_refused(
    world: Path, tmp_path: Path, reader: str, record_property: Callable[[str, object], None]
) -> None:
    folder, name = DESCRIBED[reader]
    record_property("trials", len(CONTENTS))
    faults = []
    for what, content in CONTENTS.items():
        place = tmp_path / "it"
        shutil.rmtree(place, ignore_errors=True)
        if folder:
            shutil.copytree(world / folder, place)
            (place / name).unlink()
        else:
            place.mkdir()
        if content is None:
            os.mkfifo(place / name)
        else:
            (place / name).write_bytes(content)
        outcome = command(*words(reader, world, tmp_path))
        try:
            refused(outcome)
            assert name in outcome.output, outcome
        except AssertionError as error:
            faults.append(f"{what}: {str(error)[:500]}")
    assert not faults, f"{len(faults)} of {len(CONTENTS)}:\n" + "\n".join(faults)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"backbone": 3}', b"\xff", None], ids=range(5))
def test_an_exported_folder_of_an_attacker_is_refused(tmp_path: Path, content: bytes | None) -> None:
    import ssl3d
    from ssl3d.errors import CheckpointError

    if content is None:
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json|run\.json"):
        ssl3d.create_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"backbone": {"name": "unet3d", "channels": [4, 8]}}')
    os.mkfifo(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        ssl3d.create_model(str(tmp_path))
