"""Functions are short and take few arguments; those that do not are named here, each with its reason."""

from __future__ import annotations

from pathlib import Path

from functions import MOST_ARGUMENTS, MOST_LINES, Size, sizes, too_long, too_wide

LONG = {
    "ssl3d/data/phantoms/subjects.py:_cardiac": "the steps of one draw share their random streams, whose order decides "
    "every voxel",
    "ssl3d/data/phantoms/anatomy_heart.py:chambers": "one list of structures, each cut by others of it",
    "ssl3d/data/phantoms/anatomy_heart.py:coronary_tree": "one list of vessels, each from a parent in it",
    "ssl3d/data/phantoms/brain.py:paint_brain": "one list of structures, painted over each other in this order",
    "ssl3d/data/files/dicom.py:open_series": "one refusal after the other, in the order in which a file can be read",
}

WIDE = {
    "ssl3d/pretrain/loop.py:pretrain": "six that say what is run where, and two switches by name for going on",
    "ssl3d/data/prepared/build.py:prepare": "four that say what is prepared, and by name what a caller may leave out",
    "ssl3d/data/phantoms/geometry.py:SpatialMap.draw": "one range each of an affine map and its waves, by name, all "
    "with a default",
    "ssl3d/data/phantoms/subjects.py:_degrade": "one range each of what a scanner does, by name",
}


def test_functions_are_short_but_for_those_named() -> None:
    long = too_long(sizes())
    assert set(long) == set(LONG), f"more than {MOST_LINES} lines: {long}"


def test_functions_take_few_arguments_but_for_those_named() -> None:
    wide = too_wide(sizes())
    assert set(wide) == set(WIDE), f"more than {MOST_ARGUMENTS} arguments: {wide}"


def test_lines_and_arguments_are_counted(tmp_path: Path) -> None:
    (tmp_path / "ssl3d").mkdir()
    (tmp_path / "ssl3d/a.py").write_text(
        "class A:\n"
        "    @staticmethod\n"
        "    def f(a, /, b, *c, d=1, **e):\n"
        '        """One.\n'
        "\n"
        '        Two."""\n'
        "        def g(\n"
        "            self, x\n"
        "        ):\n"
        "            return x\n"
        "        return g\n"
        "@click.option('--a')\n"
        "@group.command()\n"
        "async def h(a, b): pass\n"
        "if True:\n"
        "    @cache\n"
        "    def k(a, b): pass\n"
    )
    assert sizes(tmp_path) == [
        Size("ssl3d/a.py:A.f", 6, 5),
        Size("ssl3d/a.py:A.f.g", 4, 1),
        Size("ssl3d/a.py:h", 1, 0),
        Size("ssl3d/a.py:k", 1, 2),
    ]
    many = [Size("f", MOST_LINES, MOST_ARGUMENTS), Size("g", MOST_LINES + 1, MOST_ARGUMENTS + 1)]
    assert (too_long(many), too_wide(many)) == ({"g": MOST_LINES + 1}, {"g": MOST_ARGUMENTS + 1})
