"""DeepCluster (Caron et al., ECCV 2018)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ssl3d import Method, MethodConfig, Progress
from ssl3d.device import sent
from ssl3d.errors import ConfigError
from ssl3d.models.heads import PooledLinear, pool
from ssl3d.pretrain.monitor import pooled_features
from ssl3d.pretrain.source import CropSource
from ssl3d.rng import BatchRng, derive_seed, numpy_rng, torch_rng
from ssl3d.transforms import RandomViews


def cluster(
    features: np.ndarray, others: np.ndarray, clusters: int, dimensions: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pseudo-label of each feature: PCA, whitening, unit length, k-means (section 3).

    Args:
        features: (N, C).
        others: (M, C), which decide nothing: each gets the label of the nearest cluster.
        clusters: k <= N.
        dimensions: most dimensions kept by the PCA. At most N / 4 are: whitened in N - 1 dimensions,
            N points are all equally far from each other.
        seed: decides where k-means starts.

    Returns:
        (N,) in {0, ..., k - 1}, in which no cluster is empty, and (M,).
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n, channels = features.shape
    kept = max(1, min(dimensions, channels, n // 4))
    # One thread: several add in an order of their own, and a resumed run must get the same labels.
    # Features that are all the same are no error: fill_empty deals them out.
    with threadpool_limits(1), np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pca = PCA(kept, whiten=True, svd_solver="full").fit(features.astype(np.float64))
        points = normalize(pca.transform(features.astype(np.float64)))  # (N, kept), unit length
        labels = KMeans(clusters, n_init=5, random_state=seed % 2**32).fit_predict(points)
        labels = fill_empty(points, labels, clusters, seed)
        if not len(others):
            return labels, labels[:0]
        centroids = np.stack([points[labels == k].mean(0) for k in range(clusters)])  # (k, kept)
        placed = normalize(pca.transform(others.astype(np.float64)))  # (M, kept)
    distances = ((placed[:, None] - centroids) ** 2).sum(2)  # (M, k)
    return labels, distances.argmin(1)


def fill_empty(points: np.ndarray, labels: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return ``labels`` with every empty cluster filled from a split of the largest one (section 3.3).

    The paper puts the empty cluster's centroid next to that of another one, displaced a little at
    random, and assigns that one's points anew: they part at the plane through its centroid, across the
    displacement. It takes any non-empty cluster; the largest is the one to which it matters least.

    Args:
        points: (N, C).
        labels: (N,) in {0, ..., clusters - 1}.
        clusters: at most N.
        seed: decides the displacements.
    """
    labels = labels.copy()
    for empty in np.flatnonzero(np.bincount(labels, minlength=clusters) == 0):
        members = np.flatnonzero(labels == np.bincount(labels).argmax())
        displacement = numpy_rng(seed, "split", int(empty)).standard_normal(points.shape[1])
        beyond = (points[members] - points[members].mean(0)) @ displacement > 0
        if beyond.all() or not beyond.any():  # all its points are one (but for rounding): any half will do
            beyond = np.arange(len(members)) < len(members) // 2
        labels[members[beyond]] = empty
    return labels


LEAST_STEPS = 100
"""Fewest steps from one clustering to the next, unless `recluster_every` says otherwise."""


class DeepClusterConfig(MethodConfig):
    """Options of DeepCluster."""

    clusters: int = Field(16, ge=2)
    """Clusters k. The paper's 10,000 are for a million images; here they must be much fewer than the
    crops: volumes times `crops_per_volume`."""
    crops_per_volume: int = Field(4, ge=1)
    """Crops of each volume that get a pseudo-label; the method trains on these."""
    recluster_every: int | None = Field(None, ge=1)
    """Passes over the volumes from one clustering to the next. None: `crops_per_volume`, which is one
    pass over the crops, as in the paper; there that is 5,000 steps, in which a fresh classifier learns
    its clusters, and here 100 at least."""
    cluster_until: float = Field(0.6, ge=0, le=1)
    """Share of the run after which the clusters stay, so that the last classifier has steps and rate
    left to learn them; 1 in the paper."""
    pca: int = Field(16, ge=1)
    """Most dimensions in which features are clustered (256 in the paper); at most a quarter of the
    number of crops."""
    views: RandomViews = RandomViews()
    """Augmentations, shared by all contrastive methods."""


class DeepCluster(Method):
    """Cluster the features, and learn to tell the clusters apart, in turn.

    Departures from the paper: the clustered feature is f^g averaged over voxels, without further
    layers; the classifier sees it normalised by `ssl3d.models.heads.PooledNorm` (the paper: batch norm
    throughout the network), which follows the features, where statistics of the last clustering do not;
    no Sobel filter, for there are no colours; the optimizer's moments of the classifier outlive its
    reset (they are the loop's).
    """

    name = "deepcluster"
    title = "DeepCluster"
    paper = "Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018"
    trains = "encoder"
    Config = DeepClusterConfig
    config: DeepClusterConfig

    source: CropSource
    """Where the labelled crops are read from; set by ``setup``."""
    labels: Tensor
    """Pseudo-label of crop j of volume v at v * crops_per_volume + j."""
    progress: Tensor
    """Share of the run that is done."""
    clustered: Tensor
    """Epoch of the last clustering, -1 before the first."""
    stability: Tensor
    """Normalised mutual information of the last two clusterings, in [0, 1]; the paper's figure 2 b."""
    held_back_labels: Tensor
    """Cluster of each held-back crop, by its running number."""

    def __init__(self, backbone: Any, config: DeepClusterConfig) -> None:
        super().__init__(backbone, config)
        self.view_edge = config.views.edge
        self.classifier = PooledLinear(backbone.global_channels, config.clusters)
        self.register_buffer("clustered", torch.tensor(-1))
        self.register_buffer("progress", torch.tensor(0.0))
        self.register_buffer("stability", torch.tensor(0.0))
        self._host: dict[str, tuple[Tensor, int, Any]] = {}

    def on_host(self, name: str) -> Any:
        """Return a buffer's values in NumPy; the device is waited for only where they have changed."""
        buffer = self.get_buffer(name)
        tensor, version, values = self._host.get(name, (None, 0, None))
        if tensor is not buffer or version != buffer._version:
            values = buffer.cpu().numpy().copy()
            self._host[name] = buffer, buffer._version, values
        return values

    def setup(self, volumes: CropSource) -> None:
        crops = len(volumes) * self.config.crops_per_volume
        if self.config.clusters > crops:
            raise ConfigError(
                f"deepcluster.clusters = {self.config.clusters}, but there are {crops} crops to cluster "
                f"({len(volumes)} volumes x deepcluster.crops_per_volume = {self.config.crops_per_volume}): "
                f"use --set deepcluster.clusters={max(2, crops // 8)}, more crops a volume, or more volumes."
            )
        self.source = volumes
        self.register_buffer("labels", torch.zeros(crops, dtype=torch.long))
        held_back = sum(len(batch.items) for batch in volumes.held_back)
        self.register_buffer("held_back_labels", torch.zeros(held_back, dtype=torch.long))

    def on_epoch_start(self, volumes: CropSource, epoch: int) -> None:
        least = -(-LEAST_STEPS * volumes.batch_size // len(volumes))  # passes
        every = self.config.recluster_every or max(self.config.crops_per_volume, least)
        late = float(self.on_host("progress")) > self.config.cluster_until
        clustered = int(self.on_host("clustered"))
        if clustered >= 0 and (late or clustered > epoch - every):
            return
        features = self.features(self.crop(i)[None] for i in range(len(self.labels)))  # (N, C)
        others = self.features(batch.x for batch in volumes.held_back)  # (M, C)
        seed = derive_seed(volumes.seed, "deepcluster", epoch)
        labels, held_back = cluster(
            features.cpu().numpy(), others.cpu().numpy(), self.config.clusters, self.config.pca, seed
        )
        if clustered >= 0:
            from sklearn.metrics import normalized_mutual_info_score

            self.stability.fill_(normalized_mutual_info_score(self.labels.cpu().numpy(), labels))
        self.labels.copy_(torch.from_numpy(labels))
        self.held_back_labels.copy_(torch.from_numpy(held_back))
        self.clustered.fill_(epoch)
        self.classifier.calibrate(features)
        # Clusters have no order, so what the classifier learnt of the former ones is void.
        self.classifier.restart(torch_rng(volumes.seed, "classifier", epoch))

    def features(self, crops: Iterable[Tensor]) -> Tensor:
        """Return the pooled f^g (N, C) of crops (n, 1, D, H, W), each as a whole at the size of a view."""
        device = self.labels.device
        seen = [torch.zeros(0, self.backbone.global_channels, device=device)]
        for x in crops:
            whole = F.interpolate(x.to(device), self.view_shape(x.shape[2:]), mode="area")
            seen.append(pooled_features(self.backbone, whole))
        return torch.cat(seen)

    def crop(self, index: int) -> Tensor:
        """Return labelled crop ``index`` (1, D, H, W)."""
        return self.source.fixed_crop(*divmod(index, self.config.crops_per_volume))

    def views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Return augmented crops (B, 1, D, H, W) and their pseudo-labels (B,).

        The crops are not those of the batch, which have no label, but drawn from the labelled ones:
        first a cluster, all equally likely, then one of its crops (section 3.3), so that large clusters
        do not outweigh small ones.
        """
        labels, host = self.on_host("labels"), rng.on_host()
        drawn, places = host.integers(0, self.config.clusters).tolist(), host.uniform().tolist()
        chosen = []
        for label, place in zip(drawn, places, strict=True):
            members = np.flatnonzero(labels == label)
            chosen.append(int(members[int(place * len(members))]))
        crops = sent(torch.stack([self.crop(i) for i in chosen]), x.device)  # (B, 1, D, H, W)
        return {"view": self.config.views.view(crops, rng.fork("view")), "label": rng.constant(drawn)}

    def held_back_views(self, x: Tensor, rng: BatchRng) -> dict[str, Tensor]:
        """Return views of held-back crops (B, 1, D, H, W), and the clusters nearest to these (B,)."""
        return {
            "view": self.config.views.view(x, rng.fork("view")),
            "label": self.held_back_labels[rng.indices],
        }

    def chance(self, views: dict[str, Tensor]) -> float:
        """Entropy of the clusters of all held-back crops, at most log k: the best constant answer."""
        share = self.held_back_labels.bincount(minlength=self.config.clusters) / len(self.held_back_labels)
        return float(torch.special.entr(share.double()).sum())

    def training_step(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pooled = pool(self.backbone.encode(views["view"]))  # (B, C)
        return {"cross_entropy": F.cross_entropy(self.classifier(pooled), views["label"])}

    def on_step_end(self, progress: Progress) -> None:
        self.progress.fill_(progress.fraction)
        # What was written is known, as the buffer holds it.
        self._host["progress"] = self.progress, self.progress._version, np.float32(progress.fraction)

    def monitor(self, probe: Tensor, rng: BatchRng) -> dict[str, float]:
        return {"cluster_stability": float(self.stability)}
