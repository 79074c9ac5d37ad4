"""The registry: same door for all, broken plugins named, duplicate names refused."""

import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner
from fresh import command_and_modules
from hostile_plugins import MODULE, WRONG

import ssl3d
from ssl3d.cli import main
from ssl3d.errors import PluginError
from ssl3d.registry.registry import Registry, class_facts, load_class, read_facts, registry

BUNDLED = [
    ("ssl3d", "0", EntryPoint("builtins", "ssl3d.registry.bundled", "ssl3d")),
    ("ssl3d", "0", EntryPoint("methods", "ssl3d_methods", "ssl3d")),
]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Make an importable plugin module and return its (distribution, version, entry point)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, source: str) -> tuple[str, str, EntryPoint]:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return f"dist-{name}", "1.2", EntryPoint(name, name, "ssl3d")

    return make


METHOD = """
    import ssl3d
    class Mine(ssl3d.Method):
        "A method of mine. More."
        name = {name!r}
        title = "Mine"
    @ssl3d.hookimpl
    def ssl3d_methods():
        return [Mine]
"""


def test_bundled_plugins_come_through_entry_points() -> None:
    assert {"ssl3d:builtins", "ssl3d:methods"} <= set(registry().plugins)
    assert not registry().broken()
    assert {"scratch", "gvsl"} <= set(registry().methods.names())
    assert registry().tasks.names()[:4] == ["shc", "sac", "ccc", "sbm"]


def test_variants_are_called_after_their_method(plugin) -> None:  # type: ignore[no-untyped-def]
    variants = 'variants = {"mine_no_head": {"head": 0}, "other_one": {"head": 1}}'
    source = METHOD.format(name="mine").replace('title = "Mine"', f'title = "Mine"\n        {variants}')
    found = Registry([*BUNDLED, plugin("mine_varied", source)])
    assert [found.methods.get(name).title for name in ("mine_no_head", "other_one")] == [
        "Mine no head",
        "other one",
    ]
    assert registry().methods.get("gvsl_released_head").title == "GVSL released head"


def test_a_third_party_method_is_found(plugin) -> None:  # type: ignore[no-untyped-def]
    found = Registry([*BUNDLED, plugin("mine_ok", METHOD.format(name="mine"))])
    entry = found.methods.get("mine")
    assert (entry.title, entry.summary, entry.plugin) == (
        "Mine",
        "A method of mine. More",
        "dist-mine_ok:mine_ok",
    )
    assert issubclass(entry.load(), ssl3d.Method)


def test_duplicate_name_is_refused_naming_both_distributions(plugin) -> None:  # type: ignore[no-untyped-def]
    found = Registry([*BUNDLED, plugin("mine_dup", METHOD.format(name="gvsl"))])
    with pytest.raises(
        PluginError, match=r'"gvsl" is registered by ssl3d:methods and by dist-mine_dup:mine_dup'
    ):
        found.methods.get("gvsl")
    assert found.methods.get("scratch"), "other names still work"
    third = Registry(
        [*BUNDLED, plugin("d1", METHOD.format(name="gvsl")), plugin("d2", METHOD.format(name="gvsl"))]
    )
    assert len(third.methods.conflicts["gvsl"]) == 3


@pytest.mark.parametrize(
    "source", ["raise RuntimeError('no licence file')", "import sys; sys.exit(3)", "def broken(:"]
)
def test_a_plugin_that_fails_at_import_is_named_and_not_fatal(plugin, source: str) -> None:  # type: ignore[no-untyped-def]
    name = f"bad{abs(hash(source))}"
    found = Registry([*BUNDLED, plugin(name, source)])
    assert [p.name for p in found.broken()] == [f"dist-{name}:{name}"]
    assert found.methods.get("gvsl")
    with pytest.raises(
        PluginError,
        match=rf"Unknown method \"theirs\"(.|\n)*dist-{name}:{name} is broken(.|\n)*could not be imported",
    ):
        found.methods.get("theirs")


def test_a_hook_that_raises_is_the_failure_of_one_plugin(plugin) -> None:  # type: ignore[no-untyped-def]
    source = "import ssl3d\n@ssl3d.hookimpl\ndef ssl3d_methods():\n    raise KeyError('weights')"
    found = Registry([*BUNDLED, plugin("raiser", source)])
    assert found.methods.get("gvsl")
    assert "ssl3d_methods() raised KeyError" in (found.plugins["dist-raiser:raiser"].error or "")


def test_misspelt_and_unmarked_hooks_are_reported(plugin) -> None:  # type: ignore[no-untyped-def]
    source = """
        import ssl3d
        @ssl3d.hookimpl
        def ssl3d_metods():
            return []
        def ssl3d_tasks():
            return []
    """
    problems = Registry([plugin("typo", source)]).plugins["dist-typo:typo"].problems
    assert any('no hook is called "ssl3d_metods". Did you mean "ssl3d_methods"' in p for p in problems)
    assert any("ssl3d_tasks() is not marked" in p for p in problems)


def test_a_lazy_class_that_does_not_exist_is_reported(plugin) -> None:  # type: ignore[no-untyped-def]
    source = "import ssl3d\n@ssl3d.hookimpl\ndef ssl3d_methods():\n    return ['ssl3d_methods.gvsl:GSVL']"
    found = Registry([plugin("lazy", source)])
    assert len(found.methods) == 0
    assert 'no class "GSVL"' in (found.plugins["dist-lazy:lazy"].error or "")


def test_no_entry_points_are_no_plugins() -> None:
    nothing = Registry([])
    assert not nothing.plugins and not len(nothing.methods) and not len(nothing.tasks)


@pytest.mark.parametrize(
    ("hook", "value"), [(hook, value) for hook, values in WRONG.items() for value in values]
)
def test_whoever_returns_a_wrong_item_is_named_and_nobody_else_is_harmed(
    plugin,
    hook: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    name = f"wrong{sum(map(ord, hook + value))}"
    found = Registry([*BUNDLED, plugin(name, MODULE.format(hook=hook, value=value))])
    monkeypatch.setattr("ssl3d.registry.registry.registry", lambda: found)
    for command in ("methods", "tasks", "datasets", "plugins"):
        result = CliRunner().invoke(main, [command], env={"COLUMNS": "400"})
        assert result.exit_code == 0, (command, result.exception)
    assert f"broken: ssl3d_{hook}() " in result.output
    assert [p.name for p in found.broken()] == [f"dist-{name}:{name}"]
    whole = Registry(BUNDLED)
    for kind in ("methods", "tasks", "datasets", "backbones", "table_formats", "loggers"):
        assert getattr(found, kind).names() == getattr(whole, kind).names()
    with pytest.raises(
        PluginError, match=rf"dist-{name}:{name} is broken .* ssl3d_{hook}\(\) (returned|raised)"
    ):
        getattr(found, hook).get("mine")


def test_the_sound_items_of_a_plugin_stay_usable(plugin) -> None:  # type: ignore[no-untyped-def]
    found = Registry([plugin("half", MODULE.format(hook="methods", value="[5, Mine, 6]"))])
    assert found.methods.get("mine").load().name == "mine"
    assert [e.split(":")[0] for e in found.plugins["dist-half:half"].errors] == [
        "ssl3d_methods() returned 5", "ssl3d_methods() returned 6",
    ]  # fmt: skip


def test_facts_read_from_source_equal_those_of_the_class() -> None:
    import ssl3d_methods

    for reference in [*ssl3d_methods.ssl3d_methods(), "ssl3d.models.unet:UNet3D"]:
        static, real = read_facts(reference), class_facts(load_class(reference))
        assert {k: real[k] for k in static} == static
        missing = {k: v for k, v in real.items() if k not in static and v not in ("", {}, 1)}
        assert missing in ({}, {"trains": "encoder+decoder"}), (
            f"{reference}: not literal in the class body: {missing}"
        )


def test_every_hook_is_documented_with_what_it_returns_and_an_example() -> None:
    from ssl3d.registry import hookspecs

    hooks = [getattr(hookspecs, n) for n in dir(hookspecs) if n.startswith("ssl3d_")]
    assert len(hooks) >= 5
    for hook in hooks:
        for section in ("Returns:", "Example::"):
            assert section in (hook.__doc__ or ""), f"{hook.__name__} lacks {section}"


@pytest.mark.parametrize("command", ["--help", "methods", "tasks", "datasets", "plugins"])
def test_listings_import_neither_torch_nor_monai(command: str) -> None:
    printed, imported = command_and_modules(command)
    heavy = {"torch", "monai", "timm", "nibabel", "SimpleITK", "pandas", "scipy"} & imported
    assert not heavy, heavy
    assert printed.strip()


def test_imports_point_one_way() -> None:
    """Stages meet only through files (design: data flows one way)."""
    import ast

    root = Path(ssl3d.__file__).parent
    forbidden = {
        "downstream": ("ssl3d.pretrain", "ssl3d.bench.run", "ssl3d.cli", "ssl3d.results"),
        "results": (
            "torch",
            "monai",
            "ssl3d.pretrain",
            "ssl3d.downstream",
            "ssl3d.models",
            "ssl3d.bench.run",
            "ssl3d.rng",
        ),
        "data": ("ssl3d.pretrain", "ssl3d.downstream", "ssl3d.results", "ssl3d.bench.run", "ssl3d.models"),
        "pretrain": ("ssl3d.downstream", "ssl3d.results", "ssl3d.bench.run", "ssl3d.cli"),
        "": ("ssl3d_methods",),
    }
    for part, names in forbidden.items():
        files = list((root / part).rglob("*.py"))
        assert files
        for file in files:
            typing_only: set[ast.AST] = set()
            tree = ast.parse(file.read_text())
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.If)
                    and isinstance(node.test, ast.Name)
                    and node.test.id == "TYPE_CHECKING"
                ):
                    typing_only.update(ast.walk(node))
            for node in ast.walk(tree):
                if node in typing_only:
                    continue
                imported = []
                if isinstance(node, ast.Import):
                    imported = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported = [node.module]
                for module in imported:
                    for name in names:
                        assert not (module == name or module.startswith(name + ".")), (
                            f"{file}: imports {module}"
                        )
