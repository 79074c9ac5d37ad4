"""The pretext methods that come with ssl3d: one method, one file.

Named as strings, so that a listing need not import torch.
"""

from ssl3d import hookimpl


@hookimpl
def ssl3d_methods() -> list[str]:
    return [
        "ssl3d_methods.scratch:Scratch",
        "ssl3d_methods.gvsl:GVSL",
    ]
