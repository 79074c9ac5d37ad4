"""Segmentation: one class a voxel, from the local feature f^l."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.downstream.metrics import dice_per_structure, segmentation_metrics
from ssl3d.downstream.problems import probe
from ssl3d.downstream.problems.problem import Problem
from ssl3d.downstream.problems.scaling import Whiten
from ssl3d.losses import segmentation_loss
from ssl3d.rng import numpy_rng

WINDOW_VOXELS = (2 * 40**3, 128**3)
"""Voxels of windows that pass together, on a CPU and on a GPU. Measured on one core: windows of 16^3 0.4 of the time that
they take one by one, 32^3 0.8, 40^3 0.9 by twos and no less by fours."""


class Segmentation(Problem):
    """A softmax over structures at every voxel, from the local feature f^l."""

    @property
    def classes(self) -> int:
        return self.cohort.num_classes

    @property
    def feature_channels(self) -> int:
        return self.backbone.local_channels

    def layer(self) -> nn.Module:
        kernel = self.config.head_kernel
        return nn.Conv3d(self.backbone.local_channels, self.classes, kernel, padding=kernel // 2)

    def _empty_scale(self) -> nn.Module:
        return Whiten(torch.zeros(self.feature_channels), torch.eye(self.feature_channels))

    def solve(self, train: list[int], val: list[int], seed: int) -> tuple[nn.Module, probe.LinearMap]:
        assert self.frozen is not None
        cfg, scale = self.config.linear, self._whiten(train)
        voxels = []
        for case in train:
            label = np.array(self.cohort.label(case))
            rng = numpy_rng(seed, "probe", self.cohort.cases[case].id)
            places, standing_for = probe.choose_voxels(label, self.classes, cfg.voxels, rng)
            features = probe.gather(scale(self.frozen[case]), places, self.config.head_kernel)
            voxels.append(probe.Voxels(features, label.ravel()[places], standing_for))
        found = probe.fit_voxels(voxels, self.classes, cfg.loss, cfg.penalty)
        return self._fixed_map(found, scale), found

    def make_neighbours(self, train: list[int], seed: int) -> nn.Module:
        cfg, frozen = self.config.knn, self.frozen
        assert frozen is not None
        bank, classes = [], []
        for case in train:
            features = frozen[case][0].flatten(1).T  # (voxels, C)
            labels = np.array(self.cohort.label(case)).ravel()  # (voxels,)
            for k in range(self.classes):
                where = np.flatnonzero(labels == k)
                chosen = numpy_rng(seed, "neighbours", case, k).permutation(len(where))[: cfg.voxels]
                bank.append(features[torch.from_numpy(where[np.sort(chosen)])])
                classes.append(torch.full((len(chosen),), k))
        return self._neighbours(torch.cat(bank), torch.cat(classes), self.classes, train)

    @torch.no_grad()
    def features(self, case: int) -> Tensor:
        return self._windows(self.volume(case), lambda x: self.backbone(x)[1].float())  # (1, C, D, H, W)

    def voxels_trained(self, case: int) -> int:
        return math.prod(self.config.crop)

    def voxels_predicted(self, case: int) -> int:
        number = 1
        for size, edge in zip(self.cohort.cases[case].shape, self.config.crop, strict=True):
            number *= 1 + max(0, math.ceil((size - edge) / max(1, int(edge * (1 - self.config.overlap)))))
        return number * math.prod(self.config.crop)

    def _windows(self, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        """Run ``network`` over overlapping windows of a whole volume and blend (MONAI)."""
        from monai.inferers import sliding_window_inference

        config = self.config
        together = config.windows
        if together == "auto":
            together = max(1, WINDOW_VOXELS[x.device.type != "cpu"] // math.prod(config.crop))
        with self.autocast():
            result = sliding_window_inference(
                x, config.crop, together, network, overlap=config.overlap, mode="gaussian"
            )
        assert isinstance(result, Tensor)
        return result.float()

    def logits(self, head: nn.Module, case: int) -> Tensor:
        """Return logits (1, K + 1, D, H, W) of a whole case."""
        if self.frozen is not None:
            return head(self.frozen[case].to(self.device))
        return self._windows(self.volume(case), lambda x: head(self.backbone(x)[1]).float())

    def loss(self, head: nn.Module, cases: list[int], step: int, seed: int) -> Tensor:
        inputs, labels = [], []
        for place, case in enumerate(cases):
            size = self.cohort.cases[case].shape
            position = numpy_rng(seed, "downstream crop", step, place).random(3)
            starts = [
                int(p * (max(s, e) - e + 1)) for p, s, e in zip(position, size, self.config.crop, strict=True)
            ]
            d, h, w = (slice(a, a + e) for a, e in zip(starts, self.config.crop, strict=True))
            pads = [
                n for s, e in zip(size[::-1], self.config.crop[::-1], strict=True) for n in (0, max(0, e - s))
            ]
            x = torch.from_numpy(np.array(self.cohort.image(case, (d, h, w))))[None, None]  # (1, 1, d, h, w)
            y = torch.from_numpy(np.array(self.cohort.label(case, (d, h, w))))[None, None]
            inputs.append(F.pad(x, pads))  # (1, 1, *crop)
            labels.append(F.pad(y, pads))  # (1, 1, *crop)
        x = torch.cat(inputs).to(self.device)
        y = torch.cat(labels).long().to(self.device)
        cfg = self.config.finetune
        if cfg.augment:
            augmentation = self.augmentation(x, step, seed)
            x, y = augmentation.image(x), augmentation.labels(y)
        with self.autocast():
            logits = head(self.backbone(x)[1])  # (B, K + 1, *crop)
        return segmentation_loss(cfg.loss, logits, y)

    @torch.no_grad()
    def predict(self, head: nn.Module, case: int) -> Tensor:
        return self.logits(head, case)[0].cpu()

    def compare(self, head: nn.Module, case: int) -> tuple[Tensor, Tensor]:
        """Return (prediction, truth) of one case, labels (D, H, W)."""
        prediction = self.predict(head, case).argmax(dim=0)
        return prediction, torch.from_numpy(np.array(self.cohort.label(case)))

    def validate(self, head: nn.Module, cases: list[int]) -> tuple[float, float]:
        scores = [dice_per_structure(*self.compare(head, case), self.classes).nanmean() for case in cases]
        return float(torch.stack(scores).nanmean().nan_to_num()), 0.0

    def test(self, head: nn.Module, cases: list[int]) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        per_case = []
        for case in cases:
            names = list(self.cohort.label_names)
            spacing = self.cohort.cases[case].spacing_mm
            prediction, truth = self.compare(head, case)
            if self.on_prediction:
                self.on_prediction(case, prediction, truth)
            metrics = segmentation_metrics(
                prediction, truth, names, spacing, self.config.surface_tolerance_mm
            )
            per_case.append({"case": self.cohort.cases[case].id, **metrics})
        scores = [c["dsc"] for c in per_case if c["dsc"] is not None]
        empty = sum(s["dsc"] is None for c in per_case for s in c["structures"].values())
        return float(np.mean(scores)), per_case, {"structures_empty_in_both": empty}
