"""``ssl3d config``: every option with its meaning, default, value and source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ssl3d.cli import main
from ssl3d.config import Settings, load_settings, option_paths
from ssl3d.errors import ConfigError
from ssl3d.options import list_options


def test_every_option_is_listed_once_with_its_value_and_a_meaning() -> None:
    options = {o.path: o for o in list_options("study", ["pretrain.steps=7"])}
    assert set(options) >= {
        p for p in option_paths(Settings) if p not in ("preset", "changed", "backbone.name")
    }
    settings = load_settings("study", ["pretrain.steps=7"])
    assert options["pretrain.steps"].value == 7 and options["pretrain.steps"].source == "--set"
    assert options["pretrain.lr"].value == settings.pretrain.lr
    assert options["phantoms.placement"].source == "study.yaml"
    assert options["data.spacing_mm"].source == "quick.yaml", "the preset that it extends"
    assert options["data.folds"].source == "default"
    assert options["data.folds"].value == options["data.folds"].default
    unexplained = [
        p for p, o in options.items() if not o.meaning and "." in p and not p.startswith("backbone")
    ]
    assert not unexplained


def test_options_of_methods_have_a_source() -> None:
    options = {o.path: o for o in list_options("smoke", ["byol.base_momentum=0.9"], ["byol"])}
    assert options["methods"].source == "--set"
    assert options["methods"].value["byol"]["base_momentum"] == 0.9


def test_the_command_prints_filters_and_writes_json_and_a_schema(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["config", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    text = run("pretrain.lr", "--preset", "quick")
    assert "pretrain.lr" in text and "quick.yaml" in text and "data.folds" not in text
    listed = json.loads(run("--preset", "smoke", "--json"))
    assert {"path", "meaning", "default", "value", "source"} == set(listed[0])
    schema = json.loads(run("--schema"))
    assert "pretrain" in schema["properties"]
    refused = CliRunner().invoke(main, ["config", "pretrain.learning"])
    assert refused.exit_code == 2 and "pretrain." in refused.output
    with pytest.raises(ConfigError, match="Unknown preset"):
        list_options("nosuch")


def test_python_m_ssl3d_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssl3d", "--version"], capture_output=True, text=True, check=True
    )
    assert "version" in done.stdout
