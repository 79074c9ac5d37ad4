"""Configuration: presets load, overrides apply, everything wrong is named with the nearest name."""

from pathlib import Path

import pytest

from ssl3d.config import Settings, load_settings, option_paths, preset_names, validate
from ssl3d.data.steps import Preparation
from ssl3d.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    assert load_settings(name).preset == name


def test_paper_preset_is_the_papers_protocol() -> None:
    s = load_settings("paper")
    assert (s.pretrain.steps, s.pretrain.batch_size, s.pretrain.lr, s.pretrain.optimizer) == (
        200_000,
        2,
        1e-4,
        "adam",
    )
    for mode in (s.downstream.linear, s.downstream.finetune):
        assert (mode.steps, mode.batch_size, mode.lr, mode.validate_every, mode.loss) == (
            40_000,
            1,
            1e-4,
            200,
            "dice",
        )
    assert s.backbone.options["channels"] == [32, 64, 128, 256, 512]


def test_overrides() -> None:
    s = load_settings(
        "smoke",
        [
            "pretrain.lr=1e-3",
            "pretrain.crop=16,24,32",
            "backbone.channels=[8,16]",
            "gvsl.ncc_weight=0.5",
            "data.task_spacing_mm.shc=2",
        ],
        ["gvsl"],
    )
    assert (s.pretrain.lr, s.pretrain.crop, s.backbone.options["channels"]) == (1e-3, (16, 24, 32), [8, 16])
    assert s.methods == {"gvsl": {"ncc_weight": 0.5}} and s.data.task_spacing_mm["shc"] == 2


def test_a_preset_extends_another(tmp_path: Path) -> None:
    quick, study = load_settings("quick", ["pretrain.precision=float32"]), load_settings("study")
    assert (quick.seeds, study.seeds, study.preset) == ((0,), (0, 1, 2), "study")
    other = {"seeds", "preset", "phantoms", "downstream", "method_lr"}
    assert quick.model_dump(exclude=other) == study.model_dump(exclude=other)
    assert study.phantoms == quick.phantoms.model_copy(update={"placement": 1})
    assert study.downstream.precision == "float32"
    linear = quick.downstream.linear  # a key within a section leaves its neighbours as they are
    assert study.downstream.linear == linear.model_copy(update={"steps": 600, "validate_every": 60})
    own, quick = tmp_path / "own.yaml", load_settings("quick")
    own.write_text("extends: quick\npretrain: {steps: 5}\nmethods: {byol: {base_momentum: 0.9}}\n")
    mine = load_settings(str(own), ["pretrain.lr=1"])
    assert (mine.preset, mine.pretrain.steps, mine.pretrain.lr) == ("own", 5, 1)
    assert mine.pretrain.batch_size == quick.pretrain.batch_size and mine.downstream == quick.downstream
    assert mine.methods == {"byol": {"base_momentum": 0.9}}
    for text, words in (
        ("extends: quik", 'Did you mean "quick"'),
        (f"extends: {own}", "leads back to itself"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_settings(str(own))


def test_a_method_has_its_own_learning_rate_unless_one_is_named_for_all() -> None:
    preset = ["pretrain.lr=0.1", "method_lr.byol=0.3"]
    mine = load_settings("smoke", preset, ["byol", "gvsl"])
    assert [mine.for_method(m).pretrain.lr for m in ("byol", "gvsl")] == [0.3, 0.1]
    assert mine.for_method("byol").for_method("gvsl").pretrain.lr == 0.3, "resolved once"
    assert mine.for_method("byol") == load_settings("smoke", ["pretrain.lr=0.3"]), "nothing else changes"
    study = load_settings("study")
    assert study.method_lr and not load_settings("study", ["pretrain.lr=0.1"]).method_lr
    assert load_settings("study", ["pretrain.lr=0.1", "method_lr.gvsl=1"]).method_lr == {"gvsl": 1}


def test_a_mode_has_its_own_crop_unless_one_is_named_for_all(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("extends: smoke\ndownstream: {finetune: {crop: 24}}\n")
    downstream = load_settings(str(preset)).downstream
    smoke = load_settings("smoke").downstream
    assert downstream.for_mode("finetune") == smoke.model_copy(update={"crop": (24, 24, 24)})
    assert [downstream.for_mode(m).crop for m in ("linear", "knn")] == [smoke.crop] * 2
    assert downstream.for_mode("finetune").for_mode("finetune") == downstream.for_mode("finetune")
    assert load_settings(str(preset), ["downstream.crop=40"]).downstream.for_mode("finetune").crop == (
        40,
        40,
        40,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_lr.gvls=3", r'Unknown method in "method_lr.gvls". Did you mean "gvsl"'),
        ("method_lr.gvsl=0", r"method_lr.gvsl = 0: .*greater than 0"),
        ("pretrain.stepz=3", r'unknown key "pretrain.stepz". Did you mean "pretrain.steps"'),
        ("pretrian.steps=3", r'Unknown key "pretrian.steps". Did you mean "pretrain.steps"'),
        (
            "validate_every=3",
            r"Did you mean downstream.linear.validate_every or downstream.finetune.validate_every",
        ),
        ("pretrain.steps=-1", r"pretrain.steps = -1: .*greater than or equal to 0"),
        ("pretrain.lr=fast", r"pretrain.lr = 'fast': .*number"),
        ("pretrain.steps", r"has no value; write --set key=value"),
        ("pretrain.steps.more=1", r'below "steps", which is a value'),
        ("downstream.linear.loss=focal", r"downstream.linear.loss = 'focal': .*'dice' or 'dice_ce'"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings("smoke", [override], ["gvsl"])


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_settings("smoke", ["pretrain.lr=-1", "downstream.overlap=3"])
    assert "pretrain.lr" in str(error.value) and "downstream.overlap" in str(error.value)


def test_unknown_preset_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='Unknown preset "smok". Did you mean "smoke"'):
        load_settings("smok")
    bad = tmp_path / "x.yaml"
    bad.write_text("pretrain: {steps: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_settings(str(bad))


def test_every_option_is_documented() -> None:
    undocumented = [path for path, text in option_paths(Settings).items() if not text and "." in path]
    assert undocumented == []


def test_what_is_wrong_with_several_keys_together_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        validate(Preparation, {"crop": "center"}, "data prepare")
    assert str(error.value) == 'data prepare: crop "center" and center_mm belong together: give both or none.'
