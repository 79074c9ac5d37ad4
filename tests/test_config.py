"""Configuration: presets load, overrides apply, everything wrong is named with the nearest name."""

import re
from pathlib import Path
from typing import Any, get_origin

import pytest
from pydantic import BaseModel

from ssl3d.commands.common import settings_of
from ssl3d.config import KeysAre, Settings, load_settings, option_paths, preset_names, validate
from ssl3d.data.prepared.steps import Preparation
from ssl3d.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    assert load_settings(name).preset == name


def test_paper_preset_is_the_papers_protocol() -> None:
    s = load_settings("paper")
    assert (s.pretrain.steps, s.pretrain.batch_size, s.pretrain.lr, s.pretrain.optimizer) == (
        200_000,
        4,  # two pairs of GVSL; every method gets as many voxels
        1e-4,
        "adam",
    )
    assert s.downstream.linear.loss == "dice"  # solved, not trained
    tuned = s.downstream.finetune
    assert (tuned.steps, tuned.batch_size, tuned.lr, tuned.validate_every) == (40_000, 1, 1e-4, 200)
    assert (tuned.loss, tuned.weights) == ("dice", "best")
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
    text = """
extends: quick
seeds: [0, 1, 2]
phantoms: {placement: 1}
pretrain: {precision: float32}
downstream: {finetune: {steps: 480, crop: 32}}
"""
    (tmp_path / "placed.yaml").write_text(text)
    quick = load_settings("quick", ["pretrain.precision=float32"])
    placed = load_settings(str(tmp_path / "placed.yaml"))
    assert (quick.seeds, placed.seeds, placed.preset) == ((0,), (0, 1, 2), "placed")
    other = {"seeds", "preset", "changed", "phantoms", "downstream"}
    assert quick.model_dump(exclude=other) == placed.model_dump(exclude=other)
    assert placed.phantoms == quick.phantoms.model_copy(update={"placement": 1})
    tuned = quick.downstream.finetune  # a key within a section leaves its neighbours as they are
    assert placed.downstream.finetune == tuned.model_copy(update={"steps": 480, "crop": (32, 32, 32)})
    own, quick = tmp_path / "own.yaml", load_settings("quick")
    own.write_text("extends: quick\npretrain: {steps: 5}\nmethods: {byol: {base_momentum: 0.9}}\n")
    mine = load_settings(str(own), ["pretrain.lr=1"])
    assert (mine.preset, mine.pretrain.steps, mine.pretrain.lr) == ("own", 5, 1)
    assert mine.pretrain.batch_size == quick.pretrain.batch_size and mine.downstream == quick.downstream
    assert mine.methods == quick.methods | {"byol": {"base_momentum": 0.9}}
    for text, words in (
        ("extends: quik", 'Did you mean "quick"'),
        (f"extends: {own}", "leads back to itself"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_settings(str(own))


def test_a_path_that_a_preset_extends_starts_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "presets" / "mine"
    folder.mkdir(parents=True)
    (folder.parent / "base.yaml").write_text("extends: smoke\npretrain: {steps: 5}\n")
    (folder / "own.yaml").write_text("extends: ../base.yaml\npretrain: {lr: 1}\n")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "presets").mkdir(parents=True)
    (elsewhere / "base.yaml").write_text("pretrain: {steps: 99}\n")
    for place in (elsewhere, folder, tmp_path):
        monkeypatch.chdir(place)
        mine = load_settings(str(folder / "own.yaml"))
        assert (mine.preset, mine.pretrain.steps, mine.pretrain.lr) == ("own", 5, 1)
    monkeypatch.chdir(tmp_path)
    assert load_settings("presets/mine/own.yaml").pretrain.steps == 5
    (folder / "own.yaml").write_text("extends: bass.yaml\n")
    with pytest.raises(ConfigError, match=r"own.yaml: extends = bass.yaml: .* There is no .*mine/bass.yaml"):
        load_settings("presets/mine/own.yaml")
    (folder / "own.yaml").write_text("extends: ../mine/own.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_settings("presets/mine/own.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method_lr: {byoll: 3.0e-3}", 'method_lr: unknown method "byoll". Did you mean "byol"'),
        ("methods: {gsvl: {ncc_weight: 1}}", 'methods: unknown method "gsvl". Did you mean "gvsl"'),
        (
            "data: {task_spacing_mm: {cccc: 6.4}}",
            'data.task_spacing_mm: unknown task "cccc". Did you mean "ccc"',
        ),
        ("data: {counts: {sch: [1, 1, 1]}}", 'data.counts: unknown task "sch". Did you mean "shc"'),
        ("data: {affine: {foldr: sform}}", 'data.affine: unknown dataset "foldr". Did you mean "folder"'),
        ("data: {channel: {mds: 1}}", 'data.channel: unknown dataset "mds". Did you mean "msd"'),
        (
            "data: {intensity_offset: {mwhs: 1}}",
            'data.intensity_offset: unknown dataset "mwhs". Did you mean',
        ),
    ],
)
def test_misspelt_names_in_a_preset_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings_of(str(tmp_path / "p.yaml"), (), [])


def test_options_of_a_task_file_are_known_where_it_is_named(tmp_path: Path) -> None:
    from types import SimpleNamespace

    (tmp_path / "p.yaml").write_text("data: {counts: {liver: [1, 1, 1]}}")
    liver: Any = SimpleNamespace(name="liver")
    assert settings_of(str(tmp_path / "p.yaml"), (), [liver]).data.counts == {"liver": (1, 1, 1)}
    assert settings_of(str(tmp_path / "p.yaml"), ()).data.counts, "no task at hand: not looked at"
    with pytest.raises(ConfigError, match='unknown task "liver".*A task file has splits'):
        settings_of(str(tmp_path / "p.yaml"), (), [])


def test_every_mapping_by_name_says_what_its_names_are() -> None:
    """A new option of single methods, tasks or data sets cannot be misspelt in silence either."""

    def mappings(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, info in model.model_fields.items():
            if get_origin(info.annotation) is dict:
                found[prefix + name] = [m for m in info.metadata if isinstance(m, KeysAre)]
            elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                found |= mappings(info.annotation, f"{prefix}{name}.")
        return found

    found = mappings(Settings)
    assert found.pop("data.subject_pattern") == [], "names, and * for every folder; checked where it is used"
    assert len(found) == 8 and all(found.values()), found


def test_a_changed_preset_says_so(tmp_path: Path) -> None:
    plain = load_settings("smoke", ["pretrain.workers=7", "data.folds=4"])
    assert (plain.changed, plain.title) == ((), "smoke"), "no number changes"
    changed = load_settings(
        "smoke", ["pretrain.steps = 9", "gvsl.ncc_weight=0.5", "pretrain.workers=1"], ["gvsl"]
    )
    assert changed.changed == ("pretrain.steps=9", "gvsl.ncc_weight=0.5")
    assert changed.title == "smoke (pretrain.steps=9, gvsl.ncc_weight=0.5)" and changed.preset == "smoke"
    many = ["pretrain.steps=5", "pretrain.batch_size=5", "pretrain.lr=5", "data.split_seed=1", "data.folds=3",
            "pretrain.clip_grad=1"]  # fmt: skip
    assert load_settings("smoke", many[:4]).title.endswith(", data.split_seed=1)")
    assert load_settings("smoke", many).title.endswith(", data.split_seed=1 and 2 more)")
    study = load_settings("study")
    rate = study.pretrain.lr  # the preset's own, but now for every method
    assert load_settings("study", [f"pretrain.lr={rate}"]).changed == (f"pretrain.lr={rate}",)
    own = tmp_path / "quick.yaml"
    own.write_text("extends: smoke\n")
    assert load_settings(str(own)).title == "quick.yaml", "not the quick that everybody knows"


def test_a_method_has_its_own_learning_rate_unless_one_is_named_for_all() -> None:
    preset = ["pretrain.lr=0.1", "method_lr.byol=0.3"]
    mine = load_settings("smoke", preset, ["byol", "gvsl"])
    assert [mine.for_method(m).pretrain.lr for m in ("byol", "gvsl")] == [0.3, 0.1]
    assert mine.for_method("byol").for_method("gvsl").pretrain.lr == 0.3, "resolved once"
    alike = [
        s.model_dump(exclude={"changed"})
        for s in (mine.for_method("byol"), load_settings("smoke", ["pretrain.lr=0.3"]))
    ]
    assert alike[0] == alike[1], "nothing else changes"
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
        ("method_lr.gvls=3", r'method_lr: unknown method "gvls". Did you mean "gvsl"'),
        ("method_lr.gvsl=0", r"method_lr.gvsl = 0: .*greater than 0"),
        ("pretrain.stepz=3", r'unknown key "pretrain.stepz". Did you mean "pretrain.steps"'),
        ("pretrian.steps=3", r'Unknown key "pretrian.steps". Did you mean "pretrain.steps"'),
        ("warmup_steps=3", r"Did you mean pretrain.warmup_steps or downstream.finetune.warmup_steps"),
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


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "downstream.linear.steps=3",
            "downstream.linear: linear evaluation is solved, not trained, and has no steps",
        ),
        (
            "downstream.linear.clip_grad=1",
            "and has no clip_grad; its options are loss, voxels, penalty, crop",
        ),
        ("downstream.finetune.penalty=1", "fine-tuning changes the features, and has no penalty"),
        ("downstream.finetune.standardize=true", 'unknown key "downstream.finetune.standardize"'),
    ],
)
def test_an_option_without_effect_is_refused(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings("quick", [option])
