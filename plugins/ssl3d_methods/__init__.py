"""The pretext methods that come with ssl3d: one method, one file.

Named as strings, so that a listing need not import torch.
"""

from ssl3d import hookimpl


@hookimpl
def ssl3d_methods() -> list[str]:
    return [
        "ssl3d_methods.scratch:Scratch",
        "ssl3d_methods.random_labels:RandomLabels",
        "ssl3d_methods.denoising:Denoising",
        "ssl3d_methods.inpainting:InPainting",
        "ssl3d_methods.models_genesis:ModelsGenesis",
        "ssl3d_methods.rotation:Rotation",
        "ssl3d_methods.deepcluster:DeepCluster",
        "ssl3d_methods.simsiam:SimSiam",
        "ssl3d_methods.byol:BYOL",
        "ssl3d_methods.simclr:SimCLR",
        "ssl3d_methods.gvsl:GVSL",
    ]
