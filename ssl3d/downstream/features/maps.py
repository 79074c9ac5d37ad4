"""Pictures of local features: voxels of several cases in two dimensions, coloured by structure.

As figure 7 of He et al., CVPR 2023: one panel a method, the same voxels in every panel.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

Projection = Literal["tsne", "pca"]
PROJECTIONS: dict[Projection, str] = {"tsne": "t-SNE", "pca": "PCA"}

_PANEL_INCHES, _MOST_COLUMNS, _LEGEND_COLUMNS = 2.4, 5, 7


def embed(features: Tensor, how: Projection, seed: int = 0) -> np.ndarray:
    """Return two coordinates (N, 2) of each row of ``features`` (N, C), N > 5."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = features.numpy().astype(np.float64)
    if how == "pca":
        return PCA(2, random_state=seed).fit_transform(x)
    # Perplexity must stay below the number of points; 30 is the usual value.
    perplexity = min(30.0, (len(x) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)


def palette(count: int) -> np.ndarray:
    """Return ``count`` colours (count, 3) in [0, 1]: hues far apart first, then darker and lighter ones."""
    from matplotlib import colormaps

    first = colormaps["tab10"](np.arange(10))[:, :3]  # (10, 3)
    more = np.concatenate([first, first * 0.6, 1 - (1 - first) * 0.55])  # (30, 3)
    return np.resize(more, (count, 3))


def draw(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]], structures: Sequence[str], heading: str
) -> bytes:
    """Return a PNG with one panel a method.

    Args:
        panels: title, coordinates (N, 2) and labels (N,) in {1, ..., K} of each method.
        structures: names of 1, ..., K.
        heading: above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = palette(len(structures))
    columns = min(len(panels), _MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    legend_rows = -(-len(structures) // _LEGEND_COLUMNS)
    width = max(columns * _PANEL_INCHES, 2 * _PANEL_INCHES)
    height = rows * (_PANEL_INCHES + 0.25) + 0.2 * legend_rows + 0.55
    # No global state, so that it works beside a user's own figures and in any thread.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, points, labels) in zip(axes.flat, panels, strict=False):
        order = np.random.default_rng(0).permutation(len(points))  # no structure always on top
        axis.scatter(*points[order].T, c=colours[labels[order] - 1], s=4, linewidths=0, alpha=0.8)
        axis.set_title(title, fontsize=9, parse_math=False)
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_color("#cccccc")
    figure.suptitle(heading, fontsize=10, parse_math=False)
    seen = sorted({int(k) for _, _, labels in panels for k in np.unique(labels)})
    marks = [Line2D([], [], ls="", marker="o", ms=5, color=colours[k - 1]) for k in seen]
    figure.legend(
        marks, [structures[k - 1] for k in seen], loc="outside lower center", frameon=False,
        ncols=min(_LEGEND_COLUMNS, max(2, int(width / 1.5))), fontsize=7, handletextpad=0.2, columnspacing=1,
    )  # fmt: skip
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()
