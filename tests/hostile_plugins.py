"""What plugins return, or do, that they must not: for tests of those who list and use them."""

from __future__ import annotations

TASK = 'Task("liver", "Liver", "segmentation", "mmwhs", "dsc", None)'
WRONG = {
    "methods": ["5", "[5]", "None", "'gvsl'", "[int]", "['nowhere:Mine']", "[Named]", "[Variants]", "{'a': Mine}",
                "[Nameless]"],
    "backbones": ["[Mine]", "['ssl3d.models.unet']"],
    "tasks": ["['liver']", "[Task]", "[None]", f"[replace({TASK}, kind='segmentaton')]", f"[replace({TASK}, metric=1)]",
              f"[replace({TASK}, counts=3)]", f"[replace({TASK}, name='')]", f"[replace({TASK}, dataset=None)]",
              f"[replace({TASK}, summary=None)]", "exec('raise SystemExit(3)')", "(1 / 0 for _ in 'a')"],
    "datasets": ["['lits']", "[Dataset()]", "[Data]", "[replaced(modality='us')]",
                 "[replaced(intensity_offset='air')]", "[Hostile()]"],
    "table_formats": ["['csv']", "[print]", "[Hostile()]"],
    "loggers": ["[Mine]", "['ssl3d.pretrain.loggers.wandb:Wandb']", "[Logger()]", "[Unnamed]"],
}  # fmt: skip
MODULE = """
    import ssl3d
    from dataclasses import replace
    from ssl3d import Dataset, Logger, Method, Task
    class Unnamed(Logger):
        pass
    class Mine(Method):
        name = "mine"
    class Named(Method):
        name = 7
    class Nameless(Method):
        pass
    class Variants(Method):
        name = "varied"
        variants = ["a"]
    class Data(Dataset):
        name, summary = "data", "Data"
        def cases(self, root):
            return []
    def replaced(**facts):
        data = Data()
        vars(data).update(facts)
        return data
    class Hostile:
        def __getattr__(self, name):
            raise RuntimeError("no attributes")
        def __repr__(self):
            raise RuntimeError("no text")
    @ssl3d.hookimpl
    def ssl3d_{hook}():
        return {value}
"""

AT_IMPORT = {
    "raises": "raise RuntimeError('no licence file')", "exits": "import sys; sys.exit(0)", "is no Python": "def broken(:",
    "imports what is not there": "import nothing_of_this_name",
    "raises what is no Exception": "raise BaseException('base')",
    "recurses": "def f(): f()\nf()", "holds a zero": "x = 1\0", "raises an error that cannot be printed":
    "class E(Exception):\n    def __str__(self):\n        return 1 / 0\nraise E()",
    "deletes itself": "import sys; del sys.modules[__name__]",
    "has a hook that raises what is no Exception":
    "import ssl3d\n@ssl3d.hookimpl\ndef ssl3d_methods(): raise BaseException('base')",
    "has a hook that is none": "import ssl3d\nssl3d_methods = ssl3d.hookimpl(lambda: 3)",
    "has a hook with arguments": "import ssl3d\n@ssl3d.hookimpl\ndef ssl3d_methods(a, b): return []",
}  # fmt: skip
"""Sources of modules that do harm, or nothing, when they are imported."""
