"""The report: what is in the page, that nothing in it can act, and that a browser draws it."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import CliRunner

from ssl3d.cli import main
from ssl3d.downstream.features.maps import draw
from ssl3d.errors import DataError, TrainingError
from ssl3d.report.data import read_log, report_data, thin
from ssl3d.report.page import embed_json, render
from ssl3d.results.store.predictions import keep_prediction, nifti
from ssl3d.results.store.record import SCHEMA
from ssl3d.results.store.store import ResultStore, failure_of

NASTY = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
CASES = 6
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="Chromium is not installed: apt-get install chromium"
)


def record(
    store: ResultStore, method: str, title: str, seed: int, dsc: float, curve: list[float]
) -> dict[str, Any]:
    """Write a record with a segmentation of its first case, and a log of its run."""
    run = store.root / "runs" / f"{method}-s{seed}"
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text(
        "".join(f'{{"step": {s}, "ncc": {-s}, "lr": 0.1}}\n' for s in (1, 2)) + '{"st'
    )
    identity = {
        "method": method, "method_config": {}, "backbone": {"name": "unet3d"}, "pretrain": None, "pretrain_seed": seed,
        "task": "shc", "task_data": "0" * 64, "split": "test", "split_cases": "0", "mode": "finetune", "seed": seed,
        "label_fraction": 1.0, "budget": {"steps": 30},
    }  # fmt: skip
    shape = np.indices((20, 20, 20)).sum(axis=0)
    arrays = {"image": shape / 57, "truth": shape > 30, "prediction": shape > 30 + seed}
    made = {
        "schema": SCHEMA, "identity": identity, "method": {"title": title, "trains": "encoder", "notes": []},
        "preset": "test", "metric": "dsc", "score": 100 * dsc, "created": "2025-01-01T00:00:00+00:00",
        "per_case": [{"case": f"case {k}", "dsc": dsc + 0.01 * k} for k in range(CASES)], "excluded": {},
        "validation": [{"step": 10 * (k + 1), "score": score} for k, score in enumerate(curve)],
        "checkpoint": str(run), "predictions": [keep_prediction(store, identity, "case 0", arrays, np.eye(4))],
    }  # fmt: skip
    store.write(made)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    store = ResultStore(tmp_path_factory.mktemp("store"))
    for seed in (0, 1):
        record(store, "scratch", "Scratch", seed, 0.5, [10, 30, 50])
        record(store, "gvsl", "GVSL", seed, 0.7, [50, 60, 70])
        record(store, "nasty", NASTY, seed, 0.6, [20, 30, 40])
    represented(store)
    return store


def represented(store: ResultStore) -> None:
    """Write what ``ssl3d represent`` writes: GVSL is better than scratch, and matches."""

    def of(title: str, method: str, accuracy: float, matching: dict[str, Any] | None) -> dict[str, Any]:
        pair = {
            "accuracy": accuracy,
            "chance": 0.3,
            "balanced": accuracy,
            "balanced_chance": 0.2,
            "queries": 9,
        }
        return {"title": title, "method": method, "silhouette": accuracy - 0.6, "transfer_dice": [accuracy] * 2,
                "correspondence": [pair, pair], "matching": matching, "not_matched": ""}  # fmt: skip

    maps = {
        name: {"ncc": 0.5, "dice": 0.6, "folded": 0.01}
        for name in ("not aligned", "affine only", "predicted")
    }
    result = {
        "schema": 1, "task": "shc", "title": NASTY, "cases": ["a", "b"], "pairs": [["a", "b"], ["b", "a"]],
        "voxels_per_structure": 9, "left_out": [], "pictures": {"tsne": "shc-tsne.png", "pca": "gone.png"},
        "methods": [of("Scratch", "scratch", 0.5, None), of("GVSL", "gvsl", 0.75, maps), of(NASTY, "nasty", 0.6, None)],
    }  # fmt: skip
    folder = store.root / "representation"
    folder.mkdir()
    (folder / "shc.json").write_text(json.dumps(result))
    points = [("Scratch", np.eye(2), np.array([1, 2]))]
    (folder / "shc-tsne.png").write_bytes(draw(points, ["one", "two"], "Map"))


@pytest.fixture(scope="module")
def data(store: ResultStore) -> dict[str, Any]:
    return report_data(store)[0]


@pytest.fixture(scope="module")
def page(data: dict[str, Any]) -> str:
    return render(data, f"Report {NASTY}")


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# --- Data -------------------------------------------------------------------------------------------


def test_cells_hold_what_the_table_says_and_name_their_records(data: dict[str, Any]) -> None:
    (table,) = data["tables"]
    (column,) = table["columns"]
    cells = dict(zip((row["method"] for row in table["rows"]), column["cells"], strict=True))
    assert cells["gvsl"]["mean"] == 70 and cells["gvsl"]["delta"] == 20 and cells["gvsl"]["best"]
    assert cells["gvsl"]["cases"] == pytest.approx([70 + k for k in range(CASES)])
    assert {data["records"][i]["identity"]["method"] for i in cells["gvsl"]["records"]} == {"gvsl"}
    assert {(data["records"][i]["file"]) for i in cells["gvsl"]["records"]} <= {
        r["file"] for r in data["records"]
    }
    assert cells["gvsl"]["interval"][0] < 72.5 < cells["gvsl"]["interval"][1]


def test_representation_is_shown_and_a_lost_picture_is_named(data: dict[str, Any]) -> None:
    (shown,) = data["representation"]
    assert [row["correspondence"] for row in shown["rows"]] == [0.5, 0.75, 0.6]
    assert [row.get("dice_predicted") for row in shown["rows"]] == [None, 0.6, None]
    assert [picture["how"] for picture in shown["pictures"]] == ["tsne"]
    assert len(data["problems"]) == 1 and "gone.png" in data["problems"][0]


def test_label_curves_and_costs_are_shown_where_the_records_have_them(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for fraction, score in ((0.25, 0.4), (1.0, 0.5)):
        for method, gain in (("scratch", 0.0), ("gvsl", 0.2)):
            made = record(store, method, method, 0, score + gain, [10])
            store.path_for(made["identity"]).unlink()
            made["identity"]["label_fraction"] = fraction
            made["cost"] = {"pretrain_steps": 7 if gain else 0, "peak_memory_mib": 2048.0}
            store.write(made)
    data, _ = report_data(store)
    curves = {curve["method"]: curve for curve in data["labels"]}
    assert [p[:2] for p in curves["gvsl"]["points"]] == [[0.25, 60.0], [1.0, 70.0]]
    assert curves["gvsl"]["reaches"] == 0.25 and curves["scratch"]["reaches"] == 1
    costs = data["tables"][0]["costs"]
    assert [values[0] for values in costs["values"]] == [0, 7] and "2.0 GiB" in costs["lines"][1]


def test_steps_to_reach_scratch(data: dict[str, Any]) -> None:
    cells = data["tables"][0]["columns"][0]["cells"]
    assert sorted(str(cell["reach"]) for cell in cells) == ["10", "30", "None"]


def test_pretraining_curves_are_separate_and_a_torn_log_line_ends_them(data: dict[str, Any]) -> None:
    assert {(run["method"], run["seed"]) for run in data["runs"]} == {
        (m, s) for m in ("scratch", "gvsl", "nasty") for s in (0, 1)
    }
    assert all(run["curves"] == {"ncc": [[1, -1.0], [2, -2.0]]} for run in data["runs"])


def test_thinning_averages_neighbours() -> None:
    assert thin([(k, float(k)) for k in range(1, 7)], points=3) == [[2, 1.5], [4, 3.5], [6, 5.5]]
    assert len(thin([(k, 0.0) for k in range(1001)])) <= 200
    assert thin([]) == []


def test_a_log_without_finite_values(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "a": NaN, "b": 1}\n{"step": 2, "a": Infinity}\n')
    assert read_log(tmp_path / "log.jsonl") == {"b": [(1, 1.0)]}


# --- Segmentations -----------------------------------------------------------------------------------


def test_kept_segmentations_survive_as_nifti(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 9, (4, 5, 6))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    (tmp_path / "x.nii.gz").write_bytes(nifti(labels, affine))
    read = nibabel.load(tmp_path / "x.nii.gz")
    assert (np.asarray(read.dataobj) == labels).all() and (read.affine == affine).all()
    assert nifti(labels, affine) == nifti(labels, affine)


def test_a_bench_keeps_the_segmentations_that_were_asked_for(tmp_path: Path) -> None:
    command = ["bench", "--preset", "smoke", "--methods", "scratch", "--tasks", "shc", "--modes", "linear"]
    places = ["--store", str(tmp_path / "s"), "--cache", str(tmp_path / "c"), "--keep-predictions", "1"]
    result = CliRunner().invoke(main, [*command, *places])
    assert result.exit_code == 0, result.output
    (made,), _ = ResultStore(tmp_path / "s").records()
    (kept,) = made["predictions"]
    volumes = {
        k: np.asarray(nibabel.load(tmp_path / "s" / kept[k]).dataobj)
        for k in ("image", "truth", "prediction")
    }
    case = next(c for c in made["per_case"] if c["case"] == kept["case"])
    prediction, truth = volumes["prediction"], volumes["truth"]
    dices = [2 * ((prediction == k) & (truth == k)).sum() / ((prediction == k).sum() + (truth == k).sum())
             for k in range(1, int(max(prediction.max(), truth.max())) + 1)]  # fmt: skip
    assert case["dsc"] == pytest.approx(np.mean(dices), abs=1e-4), "the kept labels are the scored ones"
    assert np.unique(volumes["image"]).size > 50, "scaled to the range of uint8"


def test_the_viewer_embeds_each_volume_once_and_keeps_to_its_bound(
    store: ResultStore, data: dict[str, Any]
) -> None:
    (scene,) = data["viewer"]["scenes"]
    assert len(scene["methods"]) == 3 and len(data["viewer"]["volumes"]) == 3 + 2
    assert report_data(store, viewer_mib=0)[0]["viewer"] == {"scenes": [], "volumes": {}, "left_out": 1}


def test_a_record_cannot_embed_a_file_outside_its_store(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "store")
    made = record(store, "scratch", "Scratch", 0, 0.5, [1])
    (tmp_path / "secret").write_text("secret")
    made["predictions"][0]["image"] = "../secret"
    with pytest.raises(DataError, match=r"predictions\.0\.image"):
        store.write(made, replace=True)
    next((store.root / "records").glob("*.json")).write_text(json.dumps(made))
    with pytest.raises(DataError, match="altered after it was written"):
        report_data(store)


# --- Page -------------------------------------------------------------------------------------------


def test_json_in_a_script_element_is_inert_and_unchanged() -> None:
    for text in ("</script>", "<!-- <script>", "]]>", "&lt;", "\u2028\u2029", NASTY, "{{style}}"):
        written = embed_json({text: text})
        assert not set("<>&\u2028\u2029") & set(written)
        assert json.loads(written) == {text: text}


def test_nothing_of_a_record_becomes_markup(page: str, data: dict[str, Any]) -> None:
    assert NASTY not in page
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Tags().feed(page)
    assert [tag for tag, _ in tags].count("script") == 4 and "img" not in [tag for tag, _ in tags]
    assert embedded(page)["tables"] == json.loads(json.dumps(data["tables"]))


def test_the_page_refers_to_no_address_outside_itself(page: str) -> None:
    own = page.split('id="niivue"')[0]
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:,|#)', own)
    assert "default-src 'none'" in own


def test_the_viewer_is_the_release_that_is_named() -> None:
    folder = Path(sys.modules["ssl3d.report.page"].__file__ or "").parent / "vendor"
    script = gzip.decompress((folder / "niivue.umd.js.gz").read_bytes())
    assert hashlib.sha256(script).hexdigest() in (folder / "README.md").read_text()
    assert "BSD 2-Clause" in (folder / "LICENSE-niivue").read_text()


# --- Command ----------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["report", *arguments])


def test_the_command_writes_the_page(store: ResultStore, tmp_path: Path) -> None:
    result = run("--store", str(store.root), "--out", str(tmp_path / "r.html"), "--title", "A & B")
    assert result.exit_code == 1 and "gone.png" in result.output and "6 records" in result.output
    assert embedded((tmp_path / "r.html").read_text())["title"] == "A & B"


def test_an_empty_store_is_an_error_and_a_damaged_record_is_named(store: ResultStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("--store", str(tmp_path / "empty"), "--out", str(tmp_path / "r.html"))
    assert (
        result.exit_code == 2 and "holds no records" in result.output and not (tmp_path / "r.html").exists()
    )
    shutil.copytree(store.root, tmp_path / "store")
    (tmp_path / "store" / "records" / "torn.json").write_text('{"schema"')
    result = run("--store", str(tmp_path / "store"), "--out", str(tmp_path / "r.html"))
    assert result.exit_code == 1 and "torn.json" in result.output
    assert any("torn.json" in line for line in embedded((tmp_path / "r.html").read_text())["problems"])


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data of a store in which both runs of a row failed."""
    store = ResultStore(tmp_path_factory.mktemp("failing"))
    made = [record(store, "scratch", "Scratch", seed, 0.5, [10, 30]) for seed in (0, 1)]
    for one in made:
        head = {key: one[key] for key in ("schema", "preset", "metric")}
        head |= {
            "identity": {**one["identity"], "method": "byol"},
            "method": {"title": "BYOL", "trains": "encoder"},
        }
        store.write_failure(failure_of(head, TrainingError(f"loss = nan {NASTY}"), "s", None))
    return report_data(store)[0]


def test_a_failed_cell_is_there_with_its_reasons(failing: dict[str, Any]) -> None:
    (table,) = failing["tables"]
    assert [(row["title"], list(row["failed"])) for row in table["rows"]] == [("Scratch", []), ("BYOL", [0])]
    assert table["columns"][0]["cells"][1] is None
    reasons = table["rows"][1]["failed"][0]
    assert reasons == [f"seed {seed}, test: TrainingError: loss = nan {NASTY}" for seed in (0, 1)]


# --- Browser ----------------------------------------------------------------------------------------

PROBE = """<script>
const problems = [], before = new Set(Object.keys(window));
window.addEventListener("error", (e) => problems.push(String(e.message)));
window.addEventListener("unhandledrejection", (e) => problems.push(String(e.reason)));
window.addEventListener("securitypolicyviolation", (e) => problems.push(`policy: ${e.blockedURI}`));
for (const kind of ["error", "warn"]) console[kind] = (...said) => problems.push(said.join(" "));
</script>"""


def browse(page: str, script: str, folder: Path) -> dict[str, Any]:
    """Open ``page`` from a file address, run ``script`` and return what it says, with all console errors."""
    asks = (
        "<script>(async () => { let said; try { said = await (async () => {" + script + "})(); }"
        " catch (e) { said = {failed: String(e.stack)}; }"
        " const out = document.createElement('pre'); out.id = 'said';"
        " out.textContent = JSON.stringify({...said, problems, title: document.title}); "
        " document.body.append(out); })();</script>"
    )
    file = folder / "page.html"
    file.write_text(page.replace("<style>", f"{PROBE}<style>", 1).replace("</body>", f"{asks}</body>"))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="said">(.*?)</pre>', shown, re.DOTALL)
    assert found, "the browser returned no answer"
    said: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert "failed" not in said, said
    return said


@needs_browser
def test_a_browser_draws_sorts_filters_and_shows_records(page: str, tmp_path: Path) -> None:
    said = browse(page, """
        const names = () => [...document.querySelectorAll("#results-table tbody th")].map((th) => th.firstChild.data);
        const press = () => document.querySelector('[data-sort="0"]').click();
        const before = names(); press(); const down = names(); press(); const up = names();
        const sort = document.querySelector('[data-sort="0"]').closest("th").getAttribute("aria-sort");
        document.querySelector("#results-table tbody td button").click();
        const dialog = document.getElementById("record");
        const opened = dialog.open && dialog.textContent.includes("method_config"); dialog.close();
        const filter = document.getElementById("filter");
        filter.value = "gv"; filter.dispatchEvent(new Event("input"));
        const filtered = names(); filter.value = ""; filter.dispatchEvent(new Event("input"));
        const measured = () => [...document.querySelectorAll("#features-shc tbody th")].map((th) => th.textContent);
        const order = [measured()];
        for (const _ of "12") { document.querySelector('[data-sort="features-shc 1"]').click(); order.push(measured()); }
        const keyed = document.activeElement.dataset.sort;
        const map = document.querySelector("#representation img"); await map.decode();
        return { before, down, up, sort, opened, filtered, order, keyed, map: map.naturalWidth,
                 matched: document.querySelectorAll("#matching-shc tbody tr").length,
                 charts: document.querySelectorAll("#curves-body svg .curve").length,
                 ticks: document.querySelectorAll("#curves-body figure svg text").length };
    """, tmp_path)  # fmt: skip
    assert said["problems"] == []
    assert said["before"] == ["Scratch", "GVSL", NASTY] and said["title"] == f"Report {NASTY}"
    assert (
        said["down"] == ["GVSL", NASTY, "Scratch"]
        and said["up"] == said["down"][::-1]
        and said["sort"] == "ascending"
    )
    assert said["opened"] and said["filtered"] == ["GVSL"] and said["charts"] == 3 and said["ticks"] > 4
    first, down, up = said["order"]
    assert first == ["Scratch", "GVSL", NASTY] and down == ["GVSL", NASTY, "Scratch"] and up == down[::-1]
    assert said["keyed"] == "features-shc 1", "the focus stays on the heading that sorts"
    assert said["map"] > 100 and said["matched"] == 1


@needs_browser
def test_a_browser_shows_a_failed_cell_and_why(failing: dict[str, Any], tmp_path: Path) -> None:
    said = browse(render(failing, "Report"), """
        const buttons = [...document.querySelectorAll("#results-table tbody td button")];
        const cell = buttons.find((b) => b.textContent === "failed");
        cell.click();
        const dialog = document.getElementById("record");
        return { opened: dialog.open, reasons: [...dialog.querySelectorAll("li")].map((li) => li.textContent) };
    """, tmp_path)  # fmt: skip
    assert said["problems"] == [] and said["title"] == "Report"
    assert (
        said["opened"]
        and len(said["reasons"]) == 2
        and said["reasons"][0].startswith("seed 0, test: TrainingError")
    )


@needs_browser
def test_the_viewer_draws_as_often_as_it_is_asked(page: str, tmp_path: Path) -> None:
    said = browse(page, """
        const named = Object.keys(window).filter((name) => !before.has(name));
        const filter = document.getElementById("filter"); // software rendering takes seconds a panel
        filter.value = "gvsl"; filter.dispatchEvent(new Event("input"));
        const note = document.querySelector("#viewer [role=status]");
        const colours = ({ viewer }) => {
            viewer.drawScene(); // the buffer is readable until the frame ends
            const gl = viewer.gl, [w, h] = [gl.drawingBufferWidth, gl.drawingBufferHeight], p = new Uint8Array(4 * w * h);
            gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, p);
            const seen = new Set(); let tinted = 0;
            for (let i = 0; i < p.length; i += 4) {
                seen.add((p[i] << 16) | (p[i + 1] << 8) | p[i + 2]);
                tinted += Math.max(p[i], p[i + 1], p[i + 2]) - Math.min(p[i], p[i + 1], p[i + 2]) > 60;
            }
            return [seen.size, tinted];
        };
        const openings = [];
        for (const clicks of [1, 1, 2]) { // the last time impatiently
            note.textContent = "";
            for (let k = 0; k < clicks; k++) document.getElementById("show").click();
            for (let i = 0; i < 300 && !/^(Case|The viewer)/.test(note.textContent); i++)
                await new Promise((done) => setTimeout(done, 100));
            const seen = [...document.querySelectorAll("#panels canvas")].map(colours);
            openings.push({ note: note.textContent, colours: seen });
        }
        return { openings, named };
    """, tmp_path)  # fmt: skip
    assert said["problems"] == []
    assert said["named"] == [], (
        "a global function could be overwritten by the library, which names itself there"
    )
    assert len(said["openings"]) == 3
    for opening in said["openings"]:
        assert opening["note"].startswith("Case case 0"), opening["note"]
        image, truth, *methods = opening["colours"]
        assert len(methods) == 1
        assert all(count > 20 for count, _ in opening["colours"]), "a blank canvas has one colour"
        assert all(tinted > 2 * image[1] + 500 for _, tinted in (truth, *methods)), "labels are in colour"
