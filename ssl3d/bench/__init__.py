"""The bench: runs over methods, tasks, modes and seeds, and what a finished cell is worth today.

``ssl3d.bench(methods, tasks, store=...)`` is :func:`ssl3d.bench.api.bench`.
"""

from ssl3d.calls import make_callable

make_callable(__name__, "ssl3d.bench.api:bench")
