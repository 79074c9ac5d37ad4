"""A pretrained backbone in one line."""

from __future__ import annotations

from pathlib import Path

from ssl3d.config import BackboneConfig
from ssl3d.errors import CheckpointError
from ssl3d.models.backbone import Backbone
from ssl3d.models.factory import build_backbone
from ssl3d.registry.registry import registry

HUB = "hf-hub:"


def create_model(name_or_path: str | Path, seed: int = 0) -> Backbone:
    """Return a pretrained backbone, or a registered one with fresh weights.

    Args:
        name_or_path: a folder written by ``ssl3d pretrain``, ``ssl3d import`` or ``ssl3d export``;
            ``hf-hub:OWNER/NAME`` for such an export on the Hugging Face Hub, or in its cache on this machine;
            or the name of a registered backbone, such as ``unet3d``: its default options, **not pretrained**.
        seed: of the fresh weights.

    Raises:
        CheckpointError: the folder holds no finished run, or its weights do not fit; or the Hub cannot be
            asked and its cache has no such model; or it is neither a folder nor a backbone.

    Example::

        backbone = ssl3d.create_model("runs/gvsl")
        global_feature, local_feature = backbone(volume)  # (B, 1, D, H, W) in [0, 1]
    """
    from ssl3d.models.weights.checkpoint import RUN, load_backbone
    from ssl3d.models.weights.export import CONFIG, load_exported

    folder, name = Path(name_or_path), str(name_or_path)
    if name.startswith(HUB):
        from ssl3d.models.weights.hub import download

        return load_exported(download(name.removeprefix(HUB)))
    if not folder.exists():
        if name in registry().backbones:
            return build_backbone(BackboneConfig(name=name), seed)
        known = ", ".join(registry().backbones.names())
        raise CheckpointError(
            f'"{name}" is neither a folder nor a registered backbone ({known}). Give a folder written by ssl3d '
            f"pretrain, import or export, or {HUB}OWNER/NAME."
        )
    exported = (folder / CONFIG).is_file() and not (folder / RUN).is_file()
    return load_exported(folder) if exported else load_backbone(folder)
