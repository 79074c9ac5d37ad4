"""The LaTeX and HTML tables are parsed, the LaTeX one compiled where a TeX engine is on the PATH; costs."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_table import HOSTILE, METHODS, PAIRS, made_up

from ssl3d.results.formats.format import BUILTIN_FORMATS
from ssl3d.results.formats.html import render_html
from ssl3d.results.formats.latex import PREAMBLE, escape, render_latex
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.table.build import build_table
from ssl3d.results.table.cost import cost_of
from ssl3d.results.table.model import TableModel


def costly(record: dict[str, Any], steps: int = 360, volumes: int = 1) -> dict[str, Any]:
    pretrained = record["method"]["trains"] != "none"
    record["cost"] = {
        "pretrain_steps": steps * pretrained, "pretrain_seconds": 90.0 * pretrained,
        "voxels_seen": steps * volumes * 1000 * pretrained, "pretrain_parameters": 5_000_000,
        "pretrain_device": "GPU", "downstream_seconds": 30.0, "device": "CPU",
        "peak_memory_mib": 2048.0, "parameters_trained": 17,
    }  # fmt: skip
    return record


@pytest.fixture(scope="module")
def model() -> TableModel:
    records = [
        costly(
            made_up(
                method, 60.0 - 15 * i + seed, task, mode, seed, trains=trains,
                dsc=[0.01 * (60 - 15 * i + seed + case / 20) for case in range(12)],
            ),
            volumes=1 + (method == "gvsl"),
        )
        for i, (method, trains) in enumerate((*METHODS.items(), (HOSTILE, "encoder+decoder")))
        for task, mode in PAIRS
        for seed in range(3)
        if (method, task) != ("byol", "sac")
    ]  # fmt: skip
    return with_statistics(build_table(records, METHODS, against="paper"), ["ci", "p", "rank", "tau", "cost"])


# --- LaTeX ------------------------------------------------------------------------------------------


def tabulars(text: str) -> list[list[list[str]]]:
    """Return the fields of each line of each tabular, rules left out; a merged field counts as many."""
    found = []
    for body in re.findall(r"\\begin\{tabular\}\{[^\n]*\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = re.sub(
            r"\\(toprule|midrule|bottomrule|addlinespace|cmidrule\(lr\)\{\d+-\d+\})\n", "", body
        ).split(r" \\" + "\n")
        fields = [re.split(r"(?<!\\)&", line) for line in lines if line.strip()]
        for line in fields:
            for place in reversed(range(len(line))):
                merged = re.match(r" ?\\multicolumn\{(\d+)\}", line[place])
                if merged:
                    line[place:place] = [""] * (int(merged[1]) - 1)
        found.append(fields)
    return found


def test_latex_is_balanced_and_rectangular(model: TableModel) -> None:
    text = render_latex(model)
    bare = re.sub(r"%[^\n]*\n", "", re.sub(r"\\[\\{}%&$#_]", "", text))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert sorted(re.findall(r"\\begin\{(.*?)\}", text)) == sorted(re.findall(r"\\end\{(.*?)\}", text))
    table, costs = tabulars(text)
    assert {len(line) for line in table} == {1 + 8}
    assert {len(line) for line in costs} == {8} and len(costs) == 1 + 4
    assert "[31m" not in text.replace("{[}31m", ""), "no escape sequence"


def test_latex_shows_the_marks_and_its_caption_explains_them(model: TableModel) -> None:
    text = render_latex(model)
    (table, _) = tabulars(text)
    (scratch,) = [line for line in table if line[0].startswith("SCRATCH")]
    (byol,) = [line for line in table if line[0].startswith("BYOL")]
    assert scratch[1].strip().startswith(r"\textbf{61.0}")
    assert (
        byol[1].strip().startswith(r"\underline{46.0}") and r"{}^{***}" in byol[1] and r"\dagger" in byol[1]
    )
    assert byol[2].strip() == "--", "byol has no SAC"
    assert r"\textcolor{blue!75!black}{\ensuremath{-}15.0}" in text
    assert "paper 46.9" in text
    (caption,) = re.findall(r"\\caption\{(.*)\}\n", text)
    for words in (
        "bold: best",
        "underlined: second",
        "red: better, blue: worse",
        "Holm-adjusted p at most 0.05",
    ):
        assert words in caption
    assert "t test over seeds" in caption and "shows: the smallest difference" in caption
    assert "Mixed pretraining budgets" in caption


def test_better_than_scratch_is_red_as_in_the_paper() -> None:
    records = [made_up("scratch", 20.0), made_up("gvsl", 30.0), made_up("byol", 20.01)]
    text = render_latex(build_table(records))
    assert r"\textcolor{red!75!black}{+10.0}" in text and r"\textcolor{black}{+0.0}" in text
    page = render_html(build_table(records))
    assert '<div class="better">+10.0</div>' in page and "<div>+0.0</div>" in page


def test_every_printable_character_has_a_latex_form(tmp_path: Path) -> None:
    assert escape("a_b & 50% ***") == r"a\_b \& 50\% \ensuremath{{}^{***}}"
    assert escape("Müller é ß") == "Müller é ß"
    assert escape("心") == "{[}U+5FC3{]}"


ENGINE = next(
    (shutil.which(name) for name in ("pdflatex", "tectonic", "lualatex") if shutil.which(name)), None
)


@pytest.mark.skipif(
    ENGINE is None,
    reason="no TeX engine on the PATH: apt-get install texlive-latex-base texlive-latex-recommended",
)
def test_latex_compiles(model: TableModel, tmp_path: Path) -> None:
    characters = "".join(map(chr, range(0x20, 0x250))) + "†‡§¶‖#×±−–≤≥’心"
    odd = made_up("scratch")
    odd["method"]["title"] = characters
    text = render_latex(model) + render_latex(build_table([odd]))
    preamble = PREAMBLE.replace("% ", "")
    (tmp_path / "t.tex").write_text(
        f"\\documentclass{{article}}\n{preamble}\\begin{{document}}\n{text}\\end{{document}}\n"
    )
    assert ENGINE
    options = [] if "tectonic" in ENGINE else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run([ENGINE, *options, "t.tex"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# --- HTML -------------------------------------------------------------------------------------------

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects tags and the cells of each table's body, and checks the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1] += [""] * int(dict(attrs).get("colspan") or 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_html_is_well_formed_and_self_contained(model: TableModel) -> None:
    text = render_html(model)
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not any(
        key in ("src", "href") or key.startswith("on") for _, attributes in page.tags for key in attributes
    )
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    assert {len(row) for row in page.rows[2:6]} == {1 + 8}
    assert {len(row) for row in page.rows[6:]} == {8} and len(page.rows) == 2 + 4 + 5
    assert "<script>" in page.text.lower(), "the hostile title is shown as text"
    assert page.text.count("p < 0.001") + page.text.count("p = ") > 10


def test_html_shows_the_same_marks(model: TableModel) -> None:
    text = render_html(model)
    assert "<strong>61.0</strong>" in text and "<u>46.0</u>" in text
    assert re.search(r"<u>46\.0</u>.*?<sup>\*\*\*</sup><sup>†</sup>", text)
    assert '<div class="worse">−15.0</div>' in text and "paper 46.9" in text
    assert "Mixed pretraining budgets" in text and "Holm-adjusted p at most 0.05" in text


# --- Cost -------------------------------------------------------------------------------------------


def test_costs_are_those_of_one_seed() -> None:
    records = [
        costly(made_up("gvsl", mode=mode, seed=seed), steps=100 * (seed + 1))
        for seed in range(2)
        for mode in ("linear", "finetune")
    ]
    cost = cost_of(records)
    assert cost is not None
    assert (cost.pretrain_steps, cost.voxels_seen, cost.pretrain_seconds) == (150, 150_000, 90)
    assert cost.downstream_seconds == 60, "both evaluations of a seed"
    assert (cost.peak_memory_mib, cost.devices) == (2048, ("CPU", "GPU"))
    assert cost_of([made_up("gvsl")]) is None


@pytest.mark.parametrize(
    "table_format", [f for f in BUILTIN_FORMATS if f.name not in ("csv", "json")], ids=lambda f: f.name
)
def test_costs_are_shown_when_asked_for(
    model: TableModel, table_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal breaks the words
    shown = table_format.render(model)
    for words in ("Voxels seen", "720 k", "1.5 min", "2.0 GiB", "CPU, GPU", "Cost of one seed"):
        assert words in shown
    assert "Voxels seen" not in table_format.render(build_table([costly(made_up())]))


def test_the_caption_names_mixed_budgets() -> None:
    same = [costly(made_up("scratch")), costly(made_up("gvsl")), costly(made_up("byol"))]
    assert "Mixed" not in build_table(same).tables[0].caption
    mixed = [*same[:2], costly(made_up("byol"), volumes=2)]
    caption = build_table(mixed).tables[0].caption
    assert "Mixed pretraining budgets: voxels seen from 3.6e+05 (GVSL) to 7.2e+05 (BYOL)." in caption
