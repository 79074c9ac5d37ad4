"""Where does the order of the methods differ from the paper's table 1?

For each column: the best method here and in the paper, GVSL's rank, and Kendall's tau-b between the two
orders with its two-sided p value (exact under the null hypothesis of unrelated orders).

Usage: ``python benchmarks/studies/order.py benchmarks/studies/results/table1-quick.csv``
(the CSV is written by ``ssl3d table --format csv --against paper``)
"""

from __future__ import annotations

import sys

import pandas as pd
from scipy.stats import kendalltau

MODES = {"linear": "Linear", "finetune": "Fine-tune"}
TASKS = ("shc", "sac", "ccc", "sbm")


def order(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a column of the table.

    Args:
        frame: columns title, mode, task, mean (ours) and paper, in percent; rows without a published
            figure are left out.
    """
    frame = frame.dropna(subset=["paper", "mean"])
    rows = []
    for mode, title in MODES.items():
        for task in TASKS:
            part = frame[(frame["mode"] == mode) & (frame.task == task)].set_index("title")
            if len(part) < 2:
                continue
            tau, p = kendalltau(part["mean"], part["paper"])
            ranks = part[["mean", "paper"]].rank(ascending=False, method="min").astype(int)
            gvsl = (
                f"{ranks.loc['GVSL', 'mean']} / {ranks.loc['GVSL', 'paper']}" if "GVSL" in ranks.index else ""
            )
            row = {
                "Column": f"{title} {task.upper()}", "Methods": len(part), "Best here": part["mean"].idxmax(),
                "Best in the paper": part["paper"].idxmax(), "GVSL's rank here / paper": gvsl,
                "Kendall's tau": f"{tau:+.2f}", "p": f"{p:.2f}",
            }  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = order(pd.read_csv(sys.argv[1]))
    header = list(table.columns)
    print(
        "\n".join(
            "| " + " | ".join(map(str, row)) + " |"
            for row in [header, ["--"] * len(header), *table.to_numpy()]
        )
    )
