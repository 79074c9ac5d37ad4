"""Tables from made-up records: what is averaged, what is kept apart, what every format shows."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from ssl3d.errors import ConfigError, DataError
from ssl3d.results.formats.csv import render_csv
from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.formats.markdown import render_markdown
from ssl3d.results.formats.terminal import render_rich
from ssl3d.results.table.build import build_table, called
from ssl3d.results.table.model import Cell, Table, TableModel

Record = dict[str, Any]


def made_up(
    method: str = "gvsl",
    score: float = 50.0,
    task: str = "shc",
    mode: str = "linear",
    seed: int = 0,
    *,
    trains: str | None = None,
    split: str = "test",
    dsc: list[float] | None = None,
    created: str = "2025-01-01T00:00:00+00:00",
    preset: str = "made-up",
    **identity: Any,
) -> Record:
    """A made-up record; ``identity`` overrides parts of the identity."""
    trains = trains or ("none" if method == "scratch" else "encoder+decoder")
    classification = task == "ccc"
    values = dsc or [score / 100] * 12
    per_case: list[dict[str, Any]] = (
        [{"case": f"{split} {i}", "target": i % 2, "probability": 0.5} for i in range(40)]
        if classification
        else [{"case": f"{split} {i}", "dsc": value, "structures": {}} for i, value in enumerate(values)]
    )
    return {
        "schema": 1,
        "identity": {
            "method": method, "method_config": {}, "backbone": {"name": "unet3d", "channels": [16, 32]},
            "pretrain": None if trains == "none" else {"data": "f00dfeed", "budget": {"steps": 360}},
            "pretrain_seed": None if trains == "none" else seed,
            "task": task, "task_data": f"data of {task}", "split": split, "split_cases": f"cases of {split}",
            "mode": mode, "seed": seed, "label_fraction": 1.0, "budget": {"steps": 300}, **identity,
        },
        "method": {
            "title": method.upper(), "trains": trains,
            "notes": ["decoder random"] if trains == "encoder" and not classification else [],
        },
        "preset": preset,
        "metric": "auc" if classification else "dsc",
        "score": score,
        "per_case": per_case,
        "excluded": {},
        "created": created,
    }  # fmt: skip


def only(model: TableModel) -> Table:
    assert len(model.tables) == 1
    return model.tables[0]


def cell(table: Table, method: str, task: str = "shc", mode: str = "linear") -> Cell:
    (row,) = [row for row in table.rows if row.method == method]
    return row.cells[mode, task]


def test_mean_deviation_and_difference_to_scratch() -> None:
    scores = {"scratch": [20.0, 22.0, 27.0], "gvsl": [60.0, 61.0, 65.0]}
    table = only(build_table([made_up(m, s, seed=i) for m, v in scores.items() for i, s in enumerate(v)]))
    scratch, gvsl = cell(table, "scratch"), cell(table, "gvsl")
    assert scratch.mean == pytest.approx(23)
    assert scratch.sd == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert scratch.delta is None
    assert gvsl.delta == pytest.approx(39)
    assert gvsl.support == (3, 12)
    assert gvsl.seeds == {(0, 0): 60.0, (1, 1): 61.0, (2, 2): 65.0}
    assert len(gvsl.records) == 3
    assert table.columns[0].support == (3, 12)


def test_one_seed_has_no_deviation_and_without_scratch_there_is_no_difference() -> None:
    gvsl = cell(only(build_table([made_up("gvsl")])), "gvsl")
    assert (gvsl.sd, gvsl.delta) == (None, None)
    assert not gvsl.best, "a lone row is not the best of anything"


def test_rows_and_columns_follow_the_paper() -> None:
    records = [
        made_up(method, task=task, mode=mode)
        for method in ("zeta", "gvsl", "byol", "alpha", "scratch")
        for task in ("sbm", "zzz", "ccc", "sac", "shc", "aaa")
        for mode in ("finetune", "linear")
    ]
    table = only(build_table(records, method_order=["byol", "scratch", "gvsl"]))
    assert [row.method for row in table.rows] == ["scratch", "byol", "gvsl", "alpha", "zeta"]
    assert [column.task for column in table.columns] == ["shc", "sac", "ccc", "sbm", "aaa", "zzz"] * 2
    assert [column.mode for column in table.columns] == ["linear"] * 6 + ["finetune"] * 6
    assert [column.title for column in table.groups[0][:3]] == ["SHC DSC", "SAC DSC", "CCC AUC"]


def test_rows_are_called_what_their_methods_are_called_today() -> None:
    then, now, gone = made_up(), made_up(seed=1), made_up("gone")
    then["method"]["title"] = "Old name"
    rows = only(build_table(called([then, now, gone], {"gvsl": "New name", "byol": "BYOL"}))).rows
    assert [row.title for row in rows] == ["GONE", "New name"]
    assert then["method"]["title"] == "Old name", "the record stays"


def test_the_best_and_second_best_by_what_is_shown() -> None:
    scores = {"scratch": 30.0, "a": 49.96, "b": 50.04, "c": 40.0}
    table = only(build_table([made_up(m, s) for m, s in scores.items()]))
    assert {m for m in scores if cell(table, m).best} == {"a", "b"}, "both show 50.0"
    assert {m for m in scores if cell(table, m).second} == {"c"}


def test_folds_are_pooled_over_cases_within_a_seed() -> None:
    folds = [
        made_up(split="fold-0", score=50.0, dsc=[0.5]),
        made_up(split="fold-1", score=80.0, dsc=[0.7, 0.8, 0.9]),
    ]
    pooled = cell(only(build_table(folds)), "gvsl")
    assert pooled.mean == pytest.approx(72.5), "over four cases, not over two folds"
    assert pooled.support == (1, 4)
    assert pooled.sd is None, "folds are no seeds"


def test_the_folds_that_the_splits_are_named_after_share_a_table() -> None:
    from types import SimpleNamespace

    from ssl3d.data.splits import make_splits

    cases = [
        SimpleNamespace(id=f"c{i}", subject=f"p{i}", subset=None, target=None, classes=None, labelled=True)
        for i in range(8)
    ]
    splits = make_splits(cases, (3, 1, 2), scheme="cv", folds=4)
    assert cell(only(build_table([made_up(split=split.name) for split in splits])), "gvsl").n_cases == 4 * 12


def test_auc_of_folds_is_averaged() -> None:
    folds = [made_up(task="ccc", split=f"fold-{i}", score=s) for i, s in enumerate((60.0, 70.0))]
    pooled = cell(only(build_table(folds)), "gvsl", "ccc")
    assert pooled.mean == pytest.approx(65)
    assert pooled.support == (1, 80)


def test_cases_that_could_not_be_scored_are_not_counted() -> None:
    record = made_up(dsc=[0.5, 0.7], score=60.0)
    record["per_case"].append({"case": "empty", "dsc": None, "structures": {}})
    record["excluded"] = {"structures_empty_in_both": 2}
    scored = cell(only(build_table([record])), "gvsl")
    assert scored.n_cases == 2
    assert scored.excluded == {"structures_empty_in_both": 2}


def test_missing_folds_are_marked_and_not_ranked() -> None:
    records = [made_up("scratch", 20.0 + i, split=f"fold-{i}") for i in range(2)]
    records += [made_up("gvsl", 90.0, split="fold-0"), made_up("byol", 30.0, split="fold-0")]
    records += [made_up("byol", 40.0, split="fold-1"), made_up("byol", 99.0, seed=1, split="fold-1")]
    table = only(build_table(records))
    assert cell(table, "gvsl").missing_folds == ("fold-1",)
    assert not cell(table, "gvsl").best
    byol = cell(table, "byol")
    assert byol.best
    assert byol.seeds == {(0, 0): pytest.approx(35.0)}, "an unfinished seed stands on other cases"
    texts = [text for _, text in table.footnotes]
    assert any("folds are missing" in text for text in texts)
    assert any("without seeds that lack folds" in text for text in texts)


def test_random_decoders_are_marked_on_segmentation_only() -> None:
    records = [made_up("byol", task=task, trains="encoder") for task in ("shc", "ccc")] + [made_up("gvsl")]
    table = only(build_table(records))
    assert cell(table, "byol").marks == "†"
    assert cell(table, "byol", "ccc").marks == cell(table, "gvsl").marks == ""
    assert table.footnotes == (("†", "decoder random, frozen in the linear evaluation"),)


def test_seeds_of_one_checkpoint_are_marked() -> None:
    table = only(build_table([made_up(seed=seed, pretrain_seed=7) for seed in range(3)]))
    assert cell(table, "gvsl").n_seeds == 3
    assert [text for _, text in table.footnotes] == [
        "the seeds share one pretraining, so the deviation is that of the evaluation only"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pretrain": {"data": "f00dfeed", "budget": {"steps": 9}}}, "pretrain.budget.steps = 9"),
        ({"pretrain": {"data": "other", "budget": {"steps": 360}}}, "pretrain.data = other"),
        ({"backbone": {"name": "unet3d", "channels": [8]}}, r"backbone.channels = \[8\]"),
        ({"task_data": "other"}, "data.shc.fingerprint = other"),
        ({"split_cases": "other"}, "data.shc.cases.test = other"),
        ({"budget": {"steps": 1}}, "linear.steps = 1"),
        ({"label_fraction": 0.1}, "label_fraction = 0.1"),
        ({"a_later_field": "x"}, ""),
    ],
)
def test_what_differs_is_never_averaged(changes: dict[str, Any], said: str) -> None:
    records = [made_up(score=50.0), made_up(score=90.0, seed=1, created="2025-01-02", **changes)]
    model = build_table(records)
    assert [cell(table, "gvsl").mean for table in model.tables] == [50.0, 90.0]
    assert re.search(said, model.tables[1].differs)
    assert "Table 2 of 2" in render_markdown(model)


def test_two_kinds_of_split_are_never_averaged() -> None:
    model = build_table([made_up(score=50.0), made_up(score=90.0, split="fold-0", seed=1)])
    assert sorted(cell(table, "gvsl").mean for table in model.tables) == [50.0, 90.0]


def test_two_presets_make_two_tables_each_with_its_scratch() -> None:
    def preset(name: str, steps: int, score: float) -> list[Record]:
        budgets: dict[str, Any] = {"budget": {"steps": steps}, "task_data": name, "preset": name}
        pretrain = {"data": name, "budget": {"steps": 10 * steps}}
        return [
            made_up("scratch", score, **budgets),
            made_up("gvsl", score + 5, pretrain=pretrain, **budgets),
        ]

    model = build_table(preset("smoke", 1, 10.0) + preset("quick", 2, 30.0))
    assert {table.differs for table in model.tables} == {"preset smoke", "preset quick"}
    assert all(cell(table, "gvsl").delta == pytest.approx(5) for table in model.tables)
    assert sorted(cell(table, "scratch").mean for table in model.tables) == [10.0, 30.0]


def test_scratch_is_repeated_beside_every_pretraining_budget() -> None:
    longer = {"data": "f00dfeed", "budget": {"steps": 1000}}
    records = [made_up("scratch", 20.0), made_up("gvsl", 30.0), made_up("gvsl", 35.0, pretrain=longer)]
    model = build_table(records)
    assert [cell(table, "gvsl").delta for table in model.tables] == [10.0, 15.0]


def test_rows_with_rates_of_their_own_share_a_table_and_a_sweep_of_rates_does_not() -> None:
    def rate(lr: float) -> dict[str, Any]:
        return {"data": "f00dfeed", "budget": {"steps": 10, "lr": lr}}

    own = [made_up("scratch", 20.0), made_up("gvsl", 30.0, pretrain=rate(0.1)), made_up("byol", 40.0, pretrain=rate(0.3)),
           made_up("simclr", 41.0, pretrain=rate(0.3))]  # fmt: skip
    (table,) = build_table(own).tables
    assert [cell(table, name).delta for name in ("gvsl", "byol", "simclr")] == [10.0, 20.0, 21.0]
    assert "learning rate of pretraining 0.3, but 0.1 for GVSL;" in table.caption
    assert table.facets["pretrain.budget.lr.BYOL"] == 0.3 and own[1]["identity"]["pretrain"] == rate(0.1)

    first, second = build_table([*own, made_up("byol", 35.0, pretrain=rate(0.1))]).tables
    assert [cell(first, "byol").mean, cell(second, "byol").mean] == [35.0, 40.0], "two rates of one row"
    assert [cell(first, "gvsl").delta, cell(second, "simclr").delta] == [10.0, 21.0]
    assert "but" not in first.caption and first.differs == "pretrain.budget.lr = 0.1"


def test_scratch_stands_beside_weights_kept_on_the_way() -> None:
    records = [made_up("scratch", 20.0), made_up("gvsl", 40.0)]
    records += [made_up("gvsl", 25.0 + step / 60, pretrain_step=step) for step in (60, 120)]
    whole, *kept = build_table(records).tables
    assert cell(whole, "gvsl").delta == 20.0
    assert [cell(table, "gvsl").delta for table in kept] == [6.0, 7.0]
    for table, step in zip(kept, (60, 120), strict=True):
        assert f"; pretraining {step} of 360 steps on data " in table.caption


def test_a_changed_budget_keeps_its_columns_together() -> None:
    """Columns of the old and the new linear budget must not be mixed in one table."""
    old = [made_up(task=task, mode=mode) for task in ("shc", "sac") for mode in ("linear", "finetune")]
    new = [made_up(task=task, budget={"steps": 7}, created="2025-02-01") for task in ("sac", "shc", "sbm")]
    model = build_table([*new, *old])
    assert [[column.key for column in table.columns] for table in model.tables] == [
        [("linear", "shc"), ("linear", "sac"), ("finetune", "shc"), ("finetune", "sac")],
        [("linear", "shc"), ("linear", "sac"), ("linear", "sbm")],
    ]


def test_another_configuration_of_a_method_is_another_row() -> None:
    records = [
        made_up(score=50.0, method_config={"smooth": 1.0, "ncc": 1.0}),
        made_up(score=60.0, seed=1, method_config={"smooth": 2.0, "ncc": 1.0}),
    ]
    table = only(build_table(records))
    assert {row.title: row.cells["linear", "shc"].mean for row in table.rows} == {
        "GVSL (smooth=1.0)": 50.0,
        "GVSL (smooth=2.0)": 60.0,
    }


def test_two_results_for_one_cell_are_refused() -> None:
    with pytest.raises(DataError, match=r"gvsl shc linear seed 0 test scored 50\.0 and 51\.0"):
        build_table([made_up(score=50.0), made_up(score=51.0)])
    assert cell(only(build_table([made_up(), made_up()])), "gvsl").n_seeds == 1


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records"):
        build_table([])


def test_against_the_paper() -> None:
    records = [made_up(m, task=t, mode=k) for m in ("scratch", "gvsl", "mine") for t, k in PAIRS]
    table = only(build_table(records, against="paper"))
    assert cell(table, "gvsl").paper == 68.4
    assert cell(table, "scratch", "ccc", "finetune").paper == 74.4
    assert cell(table, "mine").paper is None
    assert cell(only(build_table(records)), "gvsl").paper is None
    fewer = only(build_table([made_up(label_fraction=0.1)], against="paper"))
    assert cell(fewer, "gvsl").paper is None, "the paper has no figures for a tenth of the labels"
    with pytest.raises(ConfigError, match='Did you mean "paper"'):
        build_table(records, against="papr")


# --- Formats ----------------------------------------------------------------------------------------

PAIRS = [(task, mode) for mode in ("linear", "finetune") for task in ("shc", "sac", "ccc", "sbm")]
METHODS = {"scratch": "none", "byol": "encoder", "gvsl": "encoder+decoder"}


@pytest.fixture(scope="module")
def model() -> TableModel:
    records = [
        made_up(method, 20.0 + 5 * i + seed + 3 * k, task, mode, seed, trains=trains)
        for i, (method, trains) in enumerate(METHODS.items())
        for k, (task, mode) in enumerate(PAIRS)
        for seed in range(3)
        if (method, task, mode, seed) != ("gvsl", "sbm", "finetune", 2)
    ]
    records = [r for r in records if (r["identity"]["method"], r["identity"]["task"]) != ("byol", "sac")]
    return build_table(records, METHODS, against="paper")


def shown(model: TableModel, width: int, terminal: bool = False) -> str:
    return render_rich(
        model, Console(width=width, force_terminal=terminal, color_system=None, highlight=False)
    )


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_table_fits(model: TableModel, width: int) -> None:
    assert max(map(len, shown(model, width, terminal=True).splitlines())) <= width
    text = shown(model, width)  # in a log, where sentences are not wrapped, so that they can be searched for
    rows = text[text.index("\n\n") : text.index("Mean over seeds")]
    assert max(map(len, rows.splitlines())) <= width
    assert "…" not in text, "nothing is cut"
    assert text.count("Method") == (1 if width == 140 else 2), "one block where it fits, else one a mode"
    # Three seeds with 30, 31, 32; scratch has 20, 21, 22; the paper's gvsl has 68.4.
    for part in ("31.0* ±1.0", "+10.0", "68.4 paper", "n = 3×12", "n = 2×12", "† decoder random", "*: best"):
        assert part in text


def test_decimal_points_stand_in_one_line(model: TableModel) -> None:
    block = shown(model, 140).split("Method")[1]
    columns = [{m.start() for m in re.finditer(r"\d\.\d", line)} for line in block.splitlines()]
    first = {min(found) for found in columns if found and min(found) < 16}
    assert len(first) == 1


def test_bold_replaces_the_star_in_a_terminal(model: TableModel) -> None:
    console = Console(width=140, force_terminal=True, color_system="standard", highlight=False)
    text = render_rich(model, console)
    assert "\x1b[1m31.0\x1b[0m" in text
    assert "\x1b[4m26.0\x1b[0m" in text, "second best underlined"
    assert "\x1b[32m+10.0\x1b[0m" in text
    assert "31.0*" not in text
    words = " ".join(re.sub(r"\x1b\[\d+m", "", text).split())
    assert "bold: best; underlined: second" in words


def test_markdown(model: TableModel) -> None:
    lines = render_markdown(model).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10}
    assert "Linear SHC DSC<br>n = 3×12" in table[0]
    assert "| **31.0** ±1.0<br>+10.0<br>paper 68.4 |" in table[-1]
    assert "| – |" in table[3], "byol has no SAC"
    assert "<u>26.0</u> ±1.0†<br>+5.0" in table[3]


def test_csv_is_tidy_and_complete(model: TableModel) -> None:
    lines = list(csv.DictReader(io.StringIO(render_csv(model))))
    assert len(lines) == 3 * 8 - 2
    (gvsl,) = [x for x in lines if (x["method"], x["task"], x["mode"]) == ("gvsl", "shc", "linear")]
    assert (float(gvsl["mean"]), float(gvsl["sd"]), float(gvsl["delta"])) == (31.0, 1.0, 10.0)
    assert (gvsl["n_seeds"], gvsl["n_cases"], gvsl["best"], gvsl["paper"]) == ("3", "12", "1", "68.4")
    assert lines[0]["delta"] == "", "scratch has no difference to itself"
    (byol,) = [x for x in lines if (x["method"], x["task"], x["mode"]) == ("byol", "shc", "linear")]
    assert byol["notes"] == "decoder random, frozen in the linear evaluation"


HOSTILE = "<script>alert(1)</script> [red]a|b[/] \\textbf{x} 50% _y_ `z` &amp; \x1b[31m\n# $"


@pytest.mark.parametrize("table_format", BUILTIN_FORMATS, ids=lambda f: f.name)
def test_hostile_names_harm_no_format(table_format: Any) -> None:
    record = made_up("scratch")
    record["method"]["title"] = HOSTILE
    record["method"]["notes"] = [HOSTILE]
    text = table_format.render(build_table([record, made_up("gvsl")]))
    assert "\x1b[31m" not in text
    if table_format.name == "markdown":
        assert "<script>" not in text
        assert {len(re.findall(r"(?<!\\)\|", x)) for x in text.splitlines() if x.startswith("|")} == {3}
    if table_format.name == "rich":
        assert "[red]a|b[/]" in text.replace("\n", ""), "shown as it is, not as markup"
    if table_format.name == "csv":
        assert len(list(csv.DictReader(io.StringIO(text)))) == 2


def test_differences_that_round_to_zero_have_no_minus() -> None:
    model = build_table([made_up("scratch", 50.0), made_up("gvsl", 49.98)])
    assert "+0.0" in render_markdown(model)


@pytest.mark.parametrize(
    ("errors", "shown", "gain", "loss"),
    [
        ((0.046, 0.021, 0.049), ("0.0460", "0.0210", "0.0490"), "−0.0250", "+0.0030"),
        ((460.04, 210.1, 490.3), ("460", "210", "490"), "−250", "+30"),
        ((4.6e-6, 2.1e-6, 4.9e-6), ("0.00000460", "0.00000210", "0.00000490"), "−0.00000250", "+0.00000030"),
    ],
    ids=["hundredths", "hundreds", "millionths"],
)
@pytest.mark.parametrize("table_format", BUILTIN_FORMATS, ids=lambda f: f.name)
def test_digits_unit_and_colours_follow_the_metric(
    table_format: Any, errors: tuple[float, ...], shown: tuple[str, ...], gain: str, loss: str
) -> None:
    """Errors are in the unit of what is predicted: told apart at any size, not in percent, and less is better."""
    records = []
    for method, error in zip(("scratch", "a", "b"), errors, strict=True):
        record = made_up(method, error, "age")
        record |= {"metric": "mae", "per_case": [{"case": str(i), "mae": error} for i in range(9)]}
        records += [record, made_up(method, 81.23, "shc")]
    model = build_table(records)
    text = table_format.render(model)
    if table_format.name == "csv":
        lines = list(csv.DictReader(io.StringIO(text)))
        assert {(x["task"], x["unit"]) for x in lines} == {("age", "value"), ("shc", "%")}
        assert [float(x["mean"]) for x in lines if x["task"] == "age"] == list(errors)
        return
    if table_format.name == "json":
        cells = [cell for table in json.loads(text)["tables"] for cell in table["cells"]]
        assert {(x["task"], x["unit"]) for x in cells} == {("age", "value"), ("shc", "%")}
        assert [x["mean"] for x in cells if x["task"] == "age"] == list(errors)
        return
    bold = {"rich": "{}*", "markdown": "**{}**", "latex": r"\textbf{{{}}}", "html": "<strong>{}</strong>"}
    marked = [bold[table_format.name].format(value) in text for value in shown]
    assert marked == [False, True, False] and all(value in text for value in shown) and "81.2" in text
    words = " ".join(text.split()).replace(r"\%", "%")
    assert "in % (MAE: in the unit of the values, lower is better)" in words
    coloured = {
        "html": (f'<div class="better">{gain}</div>', f'<div class="worse">{loss}</div>'),
        "latex": (f"red!75!black}}{{{gain.replace('−', chr(92) + 'ensuremath{-}')}}}", f"blue!75!black}}{{{loss}}}"),
        "rich": (f"\x1b[32m{gain}\x1b", f"\x1b[31m{loss}\x1b"),
        "markdown": (f"<br>{gain}", f"<br>{loss}"),
    }[table_format.name]  # fmt: skip
    if table_format.name == "rich":
        console = Console(width=140, force_terminal=True, color_system="standard", highlight=False)
        text = re.sub(r"m +", "m", render_rich(model, console))
    assert all(part in text for part in coloured)


def test_every_format_says_what_it_is() -> None:
    assert len({f.name for f in BUILTIN_FORMATS}) == len(BUILTIN_FORMATS)
    assert all(f.summary for f in BUILTIN_FORMATS)
