"""How heavy is a report of 20 methods x 4 tasks x 2 modes x 5 seeds, and how soon does a browser show it?

    python benchmarks/speed/report_in_browser.py --out report.html

Made-up records, pretraining logs and segmentations in a temporary store. Where Chromium is
installed, it also prints how long it takes from the start of the navigation until every section is drawn.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows.results import TASKS, made_up_records

from ssl3d.report.data import report_data
from ssl3d.report.page import render
from ssl3d.results.store.predictions import keep_prediction
from ssl3d.results.store.record import encode_record
from ssl3d.results.store.store import ResultStore

_PROBE = """<script>
requestAnimationFrame(() => setTimeout(() => {
  document.documentElement.dataset.opened = Math.round(performance.now());
}));
</script>"""


def fill(store: ResultStore, methods: int, cases: int, edge: int) -> None:
    """Write the records of a full bench, a log a run, and one segmented case a cell (``edge``³ voxels)."""
    rng = np.random.default_rng(0)
    store.folder.mkdir(parents=True)
    logged: set[str] = set()
    for record in made_up_records(methods * len(TASKS) * 2 * 5, cases):
        identity = record["identity"]
        score = 60 + 10 * rng.random()
        record["score"] = score
        for case in record["per_case"]:
            if "dsc" in case:
                case["dsc"] = float(np.clip((score + 8 * rng.normal()) / 100, 0, 1))
        record["validation"] = [
            {"step": 200 * k, "score": score * (1 - np.exp(-k / 4))} for k in range(1, 21)
        ]
        if identity["pretrain"]:
            run = store.root / "runs" / f"{identity['method']}-s{identity['seed']}"
            record["checkpoint"] = str(run)
            if run.name not in logged:
                logged.add(run.name)
                run.mkdir(parents=True)
                lines = [
                    {"step": s, "ncc": -s / 1000 + 0.1 * rng.random(), "mse": 1 / s}
                    for s in range(10, 5000, 10)
                ]
                (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if record["metric"] == "dsc" and identity["seed"] == 0:
            record["predictions"] = [keep_prediction(store, identity, "0", _volumes(rng, edge), np.eye(4))]
        store.path_for(identity).write_bytes(encode_record(record))


def _volumes(rng: np.random.Generator, edge: int) -> dict[str, Any]:
    """Return a ball in noise, and a segmentation of it that is a little off."""
    grid = np.indices((edge,) * 3) - edge / 2
    distance = np.sqrt((grid**2).sum(axis=0))
    truth = (distance < edge / 3).astype(np.uint8) + (distance < edge / 6)
    off = np.sqrt(((grid + 2 * rng.random((3, 1, 1, 1))) ** 2).sum(axis=0))
    return {
        "image": np.clip(truth / 3 + 0.1 * rng.random(distance.shape), 0, 1),
        "truth": truth,
        "prediction": (off < edge / 3).astype(np.uint8) + (off < edge / 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=int, default=20)
    parser.add_argument("--cases", type=int, default=12, help="test cases of each record")
    parser.add_argument("--edge", type=int, default=96, help="voxels along an edge of the segmented volumes")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore(folder)
        fill(store, options.methods, options.cases, options.edge)
        began = time.perf_counter()
        data, _ = report_data(store)
    page = render(data, "Made-up records")
    print(f"collected and rendered in {time.perf_counter() - began:.2f} s")
    options.out.write_text(page, encoding="utf-8")
    print(
        f"{len(data['records'])} records, {len(data['viewer']['scenes'])} scenes: {len(page.encode()) / 2**20:.1f} MiB"
    )
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.html"
            probe.write_text(page.replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
                       "--timeout=20000", "--dump-dom", probe.as_uri()]  # fmt: skip
            shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        found = re.search(r'data-opened="(\d+)"', shown)
        print(f"opens in {int(found[1]) / 1000:.2f} s" if found else "Chromium drew no page")


if __name__ == "__main__":
    main()
