"""What a preparation is of: files, options, fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssl3d.data.cohort import ANY_READING, Case, Dataset
from ssl3d.data.files.volume_file import VolumeFile, VolumeFiles
from ssl3d.data.prepared.cohort import PREPARATION_VERSION
from ssl3d.data.prepared.lungs import weights_digest
from ssl3d.data.prepared.steps import Preparation
from ssl3d.data.prepared.stored import known_digests
from ssl3d.parallel import Progress, run_parallel


def _identify(
    cases: Sequence[Case],
    cache_dir: Path,
    workers: int | None,
    progress: Progress | None,
    files: VolumeFiles,
) -> list[dict[str, Any]]:
    """Return path, size, time and SHA-256 of the image and label of every case.

    A hash is taken from an earlier manifest where path, size and modification time are unchanged, see
    :func:`ssl3d.data.prepared.stored.hashing_all_sources`.
    """
    known = known_digests(cache_dir)

    def identify(path: Path | None) -> dict[str, Any] | None:
        if path is None:
            return None
        size, mtime_ns = files[path].stat()
        digest = known.get((str(path), size, mtime_ns)) or _digest(files[path])
        return {"path": str(path), "size": size, "mtime_ns": mtime_ns, "sha256": digest}

    def identify_case(case: Case) -> dict[str, Any]:
        source = {"image": identify(case.image), "label": identify(case.label)}
        return source if case.mask is None else {**source, "mask": identify(case.mask)}

    return run_parallel(identify_case, cases, workers, progress, "hashing")


def _digest(volume: VolumeFile) -> str:
    """Return the SHA-256 of a file, or of the SHA-256 of all files of a volume."""
    digests = []
    for part in volume.parts:
        if part.is_file():
            with part.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _fingerprint(
    cases: Sequence[Case], sources: Sequence[dict[str, Any]], dataset: Dataset, preparation: Preparation
) -> str:
    parameters = preparation.model_dump(mode="json")
    if preparation.lungmask is not None:
        parameters["lungmask"] = weights_digest(preparation.lungmask)  # wherever the file lies
    identity = {
        "format": PREPARATION_VERSION,
        "dataset": [dataset.name, dataset.modality, dataset.intensity_offset],
        "labels": [sorted(dataset.label_index().items()), dataset.label_names()],
        "preparation": parameters,
        **({"reading": asdict(dataset.reading())} if dataset.reading() != ANY_READING else {}),
        "cases": [
            [case.id, case.subject, case.subset, case.target, *(f and f["sha256"] for f in source.values())]
            + [known for known in (case.classes, case.value) if known is not None]
            for case, source in zip(cases, sources, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
