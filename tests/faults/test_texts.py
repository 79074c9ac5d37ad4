"""Hostile YAML and JSON: bounded in time and memory, inert, and refused by one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssl3d.config import load_settings
from ssl3d.downstream.task_files import load_task
from ssl3d.errors import ConfigError, ReadError
from ssl3d.files import parse_json, parse_yaml, read_bytes, read_json

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAML = {
    "deep": "[" * 100_000, "deep pairs": "{a: " * 50_000, "bomb": BOMB, "holds itself": "&a [*a]", "cut": "a: [1, 2",
    "object": "!!python/object/apply:os.system ['echo ran > ran']", "module": "!!python/module:os",
    "two": "a: 1\n---\nb: 2", "control": "a: \x00", "tab": "a:\n\t- b", "tag": "!unknown 3",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        parse_yaml(YAML[name])
    path = tmp_path / "file.yaml"
    path.write_text(YAML[name])
    for read in (lambda: load_task(path), lambda: load_settings(str(path))):
        with pytest.raises(ConfigError, match=r"file.yaml is not valid YAML"):
            read()
    with pytest.raises(ConfigError, match="--set pretrain.lr"):
        load_settings("smoke", [f"pretrain.lr={YAML[name]}"])
    assert not (tmp_path / "ran").exists()


def test_what_people_write_is_read() -> None:
    text = "base: &base {lr: 0.1, steps: [1, 2]}\nother:\n  <<: *base\n  lr: 1.0e-3\n"
    assert parse_yaml(text)["other"] == {"lr": 0.001, "steps": [1, 2]}
    assert parse_yaml("") is None and parse_yaml("3") == 3


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "1e400"])
@pytest.mark.parametrize(
    "key", ["pretrain.lr", "data.spacing_mm", "pretrain.weight_decay", "phantoms.spacing_mm"]
)
def test_a_number_that_is_not_finite_is_no_option(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = .*finite"):
        load_settings("smoke", [f"{key}={value}"])


JSON = {
    "deep": b"[" * 100_000, "deep pairs": b'{"a":' * 50_000, "NaN": b'{"a": NaN}', "infinite": b"[-Infinity]",
    "large": b"[1e400]", "long": b"[" + b"9" * 5000 + b"]", "cut": b'{"a": ', "empty": b"", "bytes": b"\xff\xfe",
    "twice": b"{}{}",
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_hostile_json(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        parse_json(JSON[name])
    path = tmp_path / "file.json"
    path.write_bytes(JSON[name])
    with pytest.raises(ReadError, match="file.json is damaged"):
        read_json(path)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "loop", "broken", "folder", "absent"):
        with pytest.raises(ReadError, match=name):
            read_bytes(tmp_path / name)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    with pytest.raises(
        ReadError, match="sparse has 1048576.0 MiB; nothing that ssl3d writes there is larger than"
    ):
        read_json(tmp_path / "sparse")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    (tmp_path / "good").write_text("{}")
    assert read_json(tmp_path / "link") == {}
