"""A command in a process of its own, and what that has imported."""

from __future__ import annotations

import json
import subprocess
import sys

_CODE = """
import json, sys
from ssl3d.cli import main
try:
    main(sys.argv[1:])
except SystemExit as e:
    assert not e.code, e.code
sys.stdout.flush()
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def command_and_modules(*arguments: str) -> tuple[str, set[str]]:
    """Run ``ssl3d`` with ``arguments``, which must succeed; return what it printed and the modules it has imported."""
    done = subprocess.run([sys.executable, "-c", _CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))
