"""The checks of a table format."""

from __future__ import annotations

import inspect
from typing import Any

from ssl3d.results.formats.format import TableFormat
from ssl3d.results.statistics.annotate import with_statistics
from ssl3d.results.table.build import build_table
from ssl3d.results.table.model import TableModel
from ssl3d.testing.checks import Checks, Fault, demand
from ssl3d.testing.declarations import check_name
from ssl3d.testing.watch import disturbed

HOSTILE = "<b>\\x & |_%$# {}~^\x1b[31m\n\"',;\u202e é"


class FormatChecks(Checks):
    """The checks of one table format."""

    kind = "table format"
    order = (
        "declarations_make_sense",
        "every_table_is_rendered",
        "the_table_is_left_as_it_was",
        "equal_tables_give_equal_texts",
        "other_scores_give_another_text",
    )
    essential = ("declarations_make_sense", "every_table_is_rendered")

    def __init__(self, format: TableFormat) -> None:
        self.format = format

    @property
    def subject(self) -> Any:
        render = getattr(self.format, "render", None)
        return render if inspect.isfunction(render) else self.format

    # -- checks -----------------------------------------------------------------------------------

    def declarations_make_sense(self) -> str:
        """Name, summary and function are what the framework can use."""
        check_name(getattr(self.format, "name", None), "table format")
        summary, render = getattr(self.format, "summary", None), getattr(self.format, "render", None)
        demand(isinstance(summary, str) and bool(summary.strip()) and "\n" not in summary, f"summary = {summary!r}", None,
               "one line of text")  # fmt: skip
        demand(
            callable(render), f"render = {render!r} is no function", None, "def render(model): return text"
        )
        try:
            assert callable(render)
            inspect.signature(render).bind(None)
        except TypeError as error:
            raise Fault(
                f"render cannot be called: {error}", None, "def render(model): return text"
            ) from error
        return str(summary)

    def every_table_is_rendered(self) -> str:
        """A table is rendered to text, be it empty, with gaps, of errors, with statistics, or with odd names."""
        seen = []
        for what, model in tables().items():
            try:
                text = self.format.render(model)
            except Exception as error:
                raise Fault(f"a table that is {what}: {type(error).__name__}: {error}", error,
                            "row.cells has the cells that are there; mean and sd may be missing") from error  # fmt: skip
            demand(isinstance(text, str), f"render returns a {type(text).__name__} for a table that is {what}", None,
                   "return text")  # fmt: skip
            seen.append(f"{what} {len(text)}")
        return "characters: " + ", ".join(seen)

    def the_table_is_left_as_it_was(self) -> str:
        """Rendering changes nothing of the table: other formats are given it, too."""
        for what, model in tables().items():
            before = repr(model)
            self.format.render(model)
            demand(
                repr(model) == before, f"render changes a table that is {what}", None, "copy what is changed"
            )
        return "nothing changes"

    def equal_tables_give_equal_texts(self) -> str:
        """The same table gives the same text."""
        found = []
        for number in (1, 2):
            with disturbed(number):
                found.append([self.format.render(model) for model in tables().values()])
        demand(
            found[0] == found[1],
            "the second text differs",
            None,
            "leave out dates, addresses and random numbers",
        )
        return "equal twice"

    def other_scores_give_another_text(self) -> str:
        """The text has the scores in it."""
        texts = [self.format.render(_plain(shift)) for shift in (0.0, 7.0)]
        demand(texts[0] != texts[1], "the text does not change with the scores", None, "write cell.mean")
        return "the scores are in the text"


def tables() -> dict[str, TableModel]:
    """Return tables by what is special with them."""
    gap = [_record("scratch", 20.0), _record("a", 50.0), _record("a", 60.0, mode="finetune")]
    failure = {**_record("b", 0.0), "reason": "TrainingError: loss is NaN"}
    errors = [_record(method, score, metric="mae") for method, score in (("scratch", 9.5), ("a", 3.25))]
    seeds = [
        _record(m, s + seed, seed=seed) for m, s in (("scratch", 20.0), ("a", 50.0)) for seed in range(3)
    ]
    budgets = [_record("a", 50.0 + n, budget={"steps": 300 + n}) for n in range(2)]
    hostile = [_record("scratch", 20.0), _record("a", 50.0, title=HOSTILE)]
    return {
        "empty": TableModel(tables=()),
        "plain": _plain(),
        "with gaps": build_table(gap, failures=[failure]),
        "of errors": build_table(errors),
        "with statistics": with_statistics(build_table(seeds), ["ci", "p", "rank", "cost"]),
        "one of two": build_table(budgets),
        "of hostile names": build_table(hostile),
    }


def _plain(shift: float = 0.0) -> TableModel:
    scores = {
        ("scratch", "linear"): 20.0,
        ("scratch", "finetune"): 40.0,
        ("a", "linear"): 55.5,
        ("a", "finetune"): 61.25,
    }
    return build_table(
        [_record(method, score + shift, mode=mode) for (method, mode), score in scores.items()]
    )


def _record(
    method: str, score: float, *, mode: str = "linear", seed: int = 0, metric: str = "dsc", title: str = "",
    budget: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return a made-up record."""
    trains = "none" if method == "scratch" else "encoder+decoder"
    pretrain = {"data": "f00dfeed", "budget": {"steps": 360}}
    case: dict[str, Any] = {"value": 1.0, "prediction": 1.0 + score} if metric == "mae" else {
        "dsc": score / 100, "structures": {}
    }  # fmt: skip
    return {
        "schema": 1,
        "identity": {
            "method": method, "method_config": {}, "backbone": {"name": "unet3d", "channels": [8, 16]},
            "pretrain": None if trains == "none" else pretrain, "pretrain_seed": None if trains == "none" else seed,
            "task": "made_up", "task_data": "made up", "split": "test", "split_cases": "of the test", "mode": mode,
            "seed": seed, "label_fraction": 1.0, "budget": budget or {"steps": 300},
        },
        "method": {"title": title or method.upper(), "trains": trains, "notes": []},
        "preset": "made-up", "metric": metric, "score": score,
        "per_case": [{"case": f"c{i}", **case} for i in range(6)],
        "excluded": {}, "created": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
