"""Is the payload of a file as long as its header promises?"""

from __future__ import annotations

import errno
import zlib
from pathlib import Path

import numpy as np

from ssl3d.data.cohort import ANY_READING, Reading
from ssl3d.data.files.entries import leads_nowhere, not_a_file
from ssl3d.data.files.findings import Finding
from ssl3d.data.files.headers import Header
from ssl3d.data.files.opened import OpenedFile, opening
from ssl3d.data.files.volume_file import VolumeFile
from ssl3d.remedies import (
    AFFINE,
    CHANNEL,
    CHANNEL_RANGE,
    CHECK_PATH,
    COPY_AGAIN,
    COPY_BOTH,
    FETCH,
    GEOMETRY,
    LOOK_AFTER,
    ORIGIN,
    PUT_FILE,
    QFORM,
    SFORM,
    SHRINK,
    SPLIT,
    STACK,
)

PLAUSIBLE_SPACING_MM = (0.01, 50.0)
"""Spacings outside are taken for an error of the header."""


XFORM_TOLERANCE = 0.5
"""Largest distance between a corner under sform and under qform, in voxels (a quaternion of 32 bits
is good to about 0.0003 rad)."""


_CHUNK = 1 << 16


def check_place(path: Path) -> list[Finding]:
    """Check that a path leads to a file or folder; nothing is opened, so that nothing can wait for ever."""
    try:
        problem = not_a_file(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG and path.is_symlink():
            return [Finding(path, leads_nowhere(path) or "cannot be opened", FETCH())]
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return [Finding(path, "does not exist", CHECK_PATH())]
        return [
            Finding(
                path,
                f"cannot be opened: {error.strerror}",
                LOOK_AFTER(),
            )
        ]
    return [] if problem is None else [Finding(path, problem, PUT_FILE())]


def _check_header(
    file: VolumeFile, header: Header, max_bytes: int, reading: Reading = ANY_READING
) -> list[Finding]:
    path = file.path
    size = " x ".join(map(str, header.shape))
    if min(header.shape, default=0) < 1:
        return [Finding(path, f"has a header that says its size is {size or 'nothing'}", COPY_AGAIN())]
    # Of a NIfTI one frame can be read without the others.
    alone = header.frames > 1 and file.is_nifti
    promised = header.voxels * 4 // (header.frames if alone else 1)
    if promised > max_bytes:
        problem = f"promises {size} voxels, {promised / 2**30:.3g} GiB (limit {max_bytes / 2**30:.3g} GiB)"
        return [Finding(path, problem, SHRINK())]
    if sum(edge > 1 for edge in (*header.shape[3:], header.channels)) > 1:
        per_voxel = f" with {header.channels} values a voxel" if header.channels > 1 else ""
        problem = f"is {len(header.shape)}D ({size}{per_voxel}), not one 3D volume"
        return [Finding(path, problem, SPLIT())]
    if header.frames > 1 and reading.channel is None:
        what = (
            f"is {len(header.shape)}D ({size})"
            if header.channels == 1
            else (f"has {header.channels} values a voxel ({size})")
        )
        return [Finding(path, f"{what}, not one 3D volume", CHANNEL(last=header.frames - 1))]
    if reading.channel is not None and reading.channel >= header.frames:
        problem = f"is {len(header.shape)}D ({size}), so it has no channel {reading.channel}"
        return [Finding(path, problem, CHANNEL_RANGE(last=header.frames - 1))]
    if len(header.shape) < 3 or min(header.shape[:3]) < 2:
        problem = f"is a single slice ({size}), not a 3D volume"
        return [Finding(path, problem, STACK())]
    assert header.axes_mm is not None  # it has three axes
    assert header.origin_mm is not None
    findings = _check_geometry(path, header.axes_mm, header.origin_mm)
    other = header.other_affine
    if findings and other is not None:
        # One of two affines is broken and the other one is sound: no need to write a header.
        if not _check_geometry(path, other[:3, :3], other[:3, 3]):
            broken, sound, fix = (
                ("qform", "sform", SFORM) if reading.affine == "qform" else ("sform", "qform", QFORM)
            )
            problem = f"{findings[0].problem} under its {broken}, but not under its {sound}"
            findings = [Finding(path, problem, fix())]
    elif not findings and header.xform_gap > XFORM_TOLERANCE and reading.affine is None:
        problem = f"has an sform and a qform that disagree, by up to {header.xform_gap:.3g} voxels"
        findings = [Finding(path, problem, AFFINE())]
    return findings


def _check_geometry(path: Path, axes_mm: np.ndarray, origin_mm: np.ndarray) -> list[Finding]:
    """Check the (3, 3) steps in mm a voxel and the (3,) place of the first one."""
    fix = GEOMETRY()
    if not np.isfinite(axes_mm).all():
        return [Finding(path, "has NaN or infinite spacing or orientation in its header", fix)]
    if not np.isfinite(origin_mm).all():
        place = ", ".join(f"{value:g}" for value in origin_mm)
        fix = ORIGIN()
        return [Finding(path, f"has a NaN or infinite origin in its header ({place} mm)", fix)]
    spacing = np.linalg.norm(axes_mm, axis=0)  # (3,)
    text = " x ".join(f"{value:.4g}" for value in spacing)
    if (spacing == 0).any():
        return [Finding(path, f"has zero spacing in its header ({text} mm)", fix)]
    if abs(np.linalg.det(axes_mm / spacing)) < 1e-3:
        return [Finding(path, "has a singular affine: two of its axes point in the same direction", fix)]
    low, high = PLAUSIBLE_SPACING_MM
    if (spacing < low).any() or (spacing > high).any():
        return [Finding(path, f"has an implausible spacing of {text} mm (expected {low:g} to {high:g})", fix)]
    return []


def check_payload(path: Path) -> list[Finding]:
    """Check that all the voxels that a header promises are there, whatever else the header says.

    Raises:
        HeaderError: it has no header that can be read.
    """
    with OpenedFile(path) as opened:
        return _check_payload(opened, VolumeFile(path).header(opened=opened))


def _check_payload(opened: OpenedFile, header: Header) -> list[Finding]:
    """Compare what is there with what the header promises."""
    path = opened.path
    promised = header.payload_bytes
    if (at_payload := check_place(header.payload)) and header.payload.is_symlink():
        return at_payload
    if not header.payload.is_file():
        problem = f"needs the file {header.payload.name}, which is missing"
        return [Finding(path, problem, COPY_BOTH())]
    if header.encoding == "raw":
        there = max(header.payload.stat().st_size - header.offset, 0)
        return [_truncated(path, there, promised, "bytes")] if there < promised else []
    if header.encoding == "text":
        with header.payload.open("rb") as file:
            file.seek(header.offset)
            words = sum(len(line.split()) for line in file)
        return [_truncated(path, words, header.voxels, "values")] if words < header.voxels else []
    # Some slack, for a file may carry data behind its voxels. Much more is not what the header describes.
    limit = 2 * promised + 64 * 2**20
    try:
        there, complete = _drain(opened, header, limit)
    except (zlib.error, OSError) as error:
        return [Finding(path, f"is damaged: its compressed data cannot be read ({error})", COPY_AGAIN())]
    if there > limit:
        problem = f"decompresses to more than {limit} bytes, but its header promises {promised}"
        return [Finding(path, problem, COPY_AGAIN())]
    return [] if complete and there >= promised else [_truncated(path, there, promised, "bytes")]


def _truncated(path: Path, there: int, promised: int, unit: str) -> Finding:
    if there >= promised:
        return Finding(path, "is truncated: its compressed data stop before their checksum", COPY_AGAIN())
    return Finding(path, f"is truncated: {there} of {promised} {unit} are there", COPY_AGAIN())


def _drain(opened: OpenedFile, header: Header, limit: int) -> tuple[int, bool]:
    """Decompress a gzip or zlib stream to its end, or past ``limit``.

    Returns:
        The number of decompressed bytes, and whether the stream came to its proper end.

    Raises:
        zlib.error: it is damaged (checksum or length do not fit), or not such a stream.
    """
    total = 0
    with opening(header.payload, opened) as payload:
        file = payload.rewound()
        file.seek(header.offset)
        data = file.read(_CHUNK)
        while True:  # one turn a member: gzip files may be concatenated
            member = zlib.decompressobj(32 + zlib.MAX_WBITS)  # 32: gzip or zlib, by the first bytes
            while not member.eof:
                if not data or total > limit:
                    return total, False
                total += len(member.decompress(data))  # at most 1032 times the chunk, whatever the file says
                data = b"" if member.eof else file.read(_CHUNK)
            data = member.unused_data + file.read(_CHUNK)
            if not data.startswith(b"\x1f\x8b"):  # the end of the file, or bytes that belong to nothing
                return total, True
