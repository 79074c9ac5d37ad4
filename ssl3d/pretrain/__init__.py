"""Pretraining: the method contract, the one loop, checkpoints and monitors.

``ssl3d.pretrain(method, data, out=...)`` is :func:`ssl3d.bench.api.pretrain`.
"""

from ssl3d.calls import make_callable

make_callable(__name__, "ssl3d.bench.api:pretrain")
