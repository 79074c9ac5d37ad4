"""The layout: no circles, imports go one way, and docs/architecture.md shows the table that is tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from imports import CONTRACTS, ROOT, back_running, circles, graph, modules, table


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


def test_imports_run_down_but_for_the_contracts_of_plugins() -> None:
    allowed = {f"{name} -> {other}" for name, others in CONTRACTS.items() for other in others}
    assert set(back_running(graph())) == allowed


def test_a_circle_and_an_import_that_runs_up_are_found(tmp_path: Path) -> None:
    for name, text in {
        "errors.py": "from ssl3d.bench.run import x\n",
        "bench/run.py": "if TYPE_CHECKING:\n    from ssl3d.results import table\n",
        "results/table.py": "def f():\n    import ssl3d.bench.run\n",
    }.items():
        path = tmp_path / "ssl3d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "plugins/ssl3d_methods").mkdir(parents=True)
    edges = graph(tmp_path)
    assert circles(edges) == [["ssl3d.bench.run", "ssl3d.results.table"]]
    assert back_running(edges) == [
        "ssl3d.errors -> ssl3d.bench.run",
        "ssl3d.results.table -> ssl3d.bench.run",
    ]


def test_the_page_shows_the_table_that_is_tested() -> None:
    assert table() in (ROOT / "docs/architecture.md").read_text()


def test_results_are_read_without_torch_and_no_module_is_named_like_the_standard_library() -> None:
    code = "import sys, ssl3d.results.table.build, ssl3d.results.statistics.annotate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    top = {path.stem for name, path in modules().items() if name.count(".") == 1}
    assert not top & (set(sys.stdlib_module_names) - {"__main__"})
