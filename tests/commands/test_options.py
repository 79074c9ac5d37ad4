"""``ssl3d config``: every option with its meaning, default, value and source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from ssl3d.cli import main
from ssl3d.config import Settings, load_settings, option_paths, preset_names, presets_folder
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
    assert options["pretrain.crop"].source == "quick.yaml", "the preset that it extends"
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
    refused = CliRunner().invoke(main, ["config", "pretrain.learning"])
    assert refused.exit_code == 2 and "pretrain." in refused.output
    with pytest.raises(ConfigError, match="Unknown preset"):
        list_options("nosuch")


def test_a_value_is_printed_with_where_it_comes_from_and_what_it_was() -> None:
    result = CliRunner().invoke(main, ["config", "--preset", "quick", "--set", "pretrain.lr=0.5"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "pretrain.lr = 0.5   (--set; default 0.0001)" in text and "data.folds = 4   (default)" in text
    assert "data.spacing_mm = 3.84   (quick.yaml; default 1.0)" in text


def schema_faults(values: Any) -> list[str]:
    schema = json.loads(CliRunner().invoke(main, ["config", "--schema"]).output)
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(values)]


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_fits_the_schema(preset: str) -> None:
    assert not schema_faults(yaml.safe_load((presets_folder() / f"{preset}.yaml").read_text()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrian: {steps: 3}", "'pretrian' was unexpected"),
        ("pretrain: {stesp: 3}", "'stesp' was unexpected"),
        ("downstream: {finetune: {voxels: 3}}", "'voxels' was unexpected"),
        ("pretrain: {steps: -1}", "-1 is less than the minimum of 0"),
        ("pretrain: {crop: [8, 8]}", "[8, 8] is not valid"),
        ("pretrain: {precision: float16}", "'float16' is not one of"),
        ("extends: [quick]", "['quick'] is not of type 'string'"),
    ],
)
def test_what_the_schema_refuses_ssl3d_refuses_and_the_other_way_round(
    text: str, message: str, tmp_path: Path
) -> None:
    (found,) = schema_faults(yaml.safe_load(text))
    assert message in found
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_settings(str(tmp_path / "mine.yaml"))


def test_what_stands_for_something_longer_fits_the_schema() -> None:
    text = "{extends: quick, pretrain: {crop: 8, loggers: wandb}, downstream: {linear: {crop: 8}}, backbone: {width: 3}}"
    assert not schema_faults(yaml.safe_load(text))


def test_python_m_ssl3d_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssl3d", "--version"], capture_output=True, text=True, check=True
    )
    assert "version" in done.stdout
