"""What a volume's header promises: shape, type, geometry, and where its voxels are.

Only headers are read here, so that a promise can be refused before anything is allocated and
compared with what is there. The voxels are read by nibabel and SimpleITK (:mod:`ssl3d.data.files.volume`),
which cannot be asked for this: nibabel reads a compressed file no further than it needs, so its
checksum is never seen, and SimpleITK returns zeros, without an error, for the missing part of a NIfTI.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl3d.data.files.opened import OpenedFile, opening
from ssl3d.data.files.suffixes import image_suffix

Affine = Literal["sform", "qform"]
Encoding = Literal["raw", "deflate", "text"]

_MAX_HEADER_BYTES = 4 * 2**20
_MAX_LEAD_BYTES = 64 * 2**20  # header and extensions before the voxels
_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_SNIFFED_BYTES = 1024  # by which nibabel knows a file's class


class HeaderError(ValueError):
    """A header that cannot be used; the message completes "is not a readable image: "."""


@dataclass(frozen=True)
class Header:
    """The promises of one file.

    Attributes:
        shape: size of the axes of space, then of those of time or channels, whatever their order in the file;
            singleton axes after the third are left out.
        channels: values a voxel (1 for a scalar image).
        item_bytes: bytes a value; 0 for text.
        axes_mm: (3, 3), column j is the step in mm along array axis j; None for fewer than 3 axes. Of a NIfTI
            with two affines that of the one that was asked for.
        payload: the file that holds the voxels: the file itself, or another for detached headers.
        offset: byte in ``payload`` at which the (compressed) voxels start; for a compressed
            NIfTI, whose header is compressed too, 0.
        encoding: how they are stored; "deflate" is gzip or zlib.
        lead_bytes: decompressed bytes before the first voxel.
        xform_gap: NIfTI with an sform and a qform that name the same space: how far apart the two put
            a corner of the volume, in voxels; else 0.
        origin_mm: (3,) where the first voxel is; None where ``axes_mm`` is.
        other_affine: (4, 4) that was not taken, where a NIfTI has two; else None.
    """

    shape: tuple[int, ...]
    channels: int
    item_bytes: int
    axes_mm: np.ndarray | None
    payload: Path
    offset: int
    encoding: Encoding
    lead_bytes: int = 0
    xform_gap: float = 0.0
    origin_mm: np.ndarray | None = None
    other_affine: np.ndarray | None = None

    @property
    def frames(self) -> int:
        """Number of volumes, one a time point or channel."""
        return math.prod(self.shape[3:]) * self.channels

    @property
    def voxels(self) -> int:
        """Number of values."""
        return math.prod(self.shape) * self.channels

    @property
    def payload_bytes(self) -> int:
        """Decompressed bytes that must be there."""
        return self.lead_bytes + self.voxels * self.item_bytes


def read_header(path: Path, affine: Affine | None = None) -> Header:
    """Read the header of a NIfTI, NRRD or MetaImage file.

    Args:
        path: the file.
        affine: of a NIfTI with two affines, the one that is right; None: nibabel's choice, the sform.

    Raises:
        HeaderError: not such a file, or a header that makes no sense.
        OSError: the file cannot be opened.
    """
    return read_header_of(path, image_suffix(path), affine)


def read_header_of(
    path: Path, suffix: str | None, affine: Affine | None, opened: OpenedFile | None = None
) -> Header:
    """Do what :func:`read_header` does, where the ending is known and the file may be open."""
    if suffix is None:
        raise HeaderError("its ending is not one of a volume")
    if suffix in {".nii", ".nii.gz"}:
        with opening(path, opened) as file:
            return _read_nifti(file, suffix == ".nii.gz", affine)
    return _read_nrrd(path) if suffix in {".nrrd", ".nhdr"} else _read_metaimage(path)


def open_nifti(opened: OpenedFile, compressed: bool) -> tuple[bytes, Any]:
    """Return the first 348 bytes of a NIfTI file and its nibabel image, whose voxels are read from ``opened``.

    nibabel itself opens a file to know its class, for its header and for its voxels.

    Raises:
        HeaderError: too short, or not of a class that nibabel knows.
        OSError, EOFError: it cannot be opened, or read so far.
        Exception: whatever nibabel's class says of its header.
    """
    from nibabel.imageclasses import all_image_classes

    raw = opened.rewound()
    stream = gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw
    start = stream.read(_NIFTI1_BYTES)
    if len(start) < _NIFTI1_BYTES:
        raise HeaderError("it ends within its header")
    if (lead := _voxel_offset(start)) > _MAX_LEAD_BYTES:
        raise HeaderError(f"its header says that its voxels start at byte {lead:.4g}")
    try:
        sniffed = start + stream.read(_SNIFFED_BYTES - _NIFTI1_BYTES)
    except (OSError, EOFError) as error:
        raise HeaderError("it is not NIfTI") from error
    name = str(opened.path)
    for kind in all_image_classes:
        if kind.path_maybe_image(name, (sniffed, name))[0]:
            return start, kind.from_file_map(kind.make_file_map({"image": stream}))
    raise HeaderError("it is not NIfTI")


def _read_nifti(opened: OpenedFile, compressed: bool, choice: Affine | None) -> Header:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        start, image = open_nifti(opened, compressed)
        if not isinstance(image, nibabel.Nifti1Image):  # of which NIfTI-2 is a subclass, CIFTI is not
            raise HeaderError(f"it is {type(image).__name__}, not NIfTI in one file")
        affine = nifti_affine(image, choice)
    except HeaderError:
        raise
    except EOFError as error:
        raise HeaderError("it ends within its header") from error
    except ImageFileError as error:
        raise HeaderError("it is not NIfTI") from error
    except Exception as error:  # nibabel's classes define errors of their own; each means unreadable
        raise HeaderError(reason(error)) from error
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:  # (D, H, W, 1) is an ordinary way to store 3D
        shape = shape[:-1]
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise HeaderError(f"its voxels are {dtype}, not numbers")
    sform, qform = (_xform(image.header, name) for name in AFFINES)
    taken = choice if choice is not None and (qform, sform)[choice == "sform"] is not None else None
    taken = taken or ("qform" if sform is None else "sform")
    other = qform if taken == "sform" else sform
    axes = affine[:3, :3]
    if taken == "qform":
        axes = axes * (_pixdim(start, image.header) != 0)  # nibabel has replaced zero spacings by 1
    solid = len(shape) >= 3
    return Header(
        shape, 1, dtype.itemsize, axes if solid else None, opened.path,
        offset=0 if compressed else int(image.dataobj.offset),
        encoding="deflate" if compressed else "raw",
        lead_bytes=int(image.dataobj.offset) if compressed else 0,
        xform_gap=_xform_gap(image.header, sform, qform, shape[:3]) if solid else 0.0,
        origin_mm=affine[:3, 3] if solid else None,
        other_affine=other if solid else None,
    )  # fmt: skip


AFFINES: tuple[Affine, Affine] = ("sform", "qform")


def nifti_affine(image: Any, choice: Affine | None) -> np.ndarray:
    """Return the affine (4, 4) of a nibabel image: the chosen one where it has that, else nibabel's choice."""
    chosen = _xform(image.header, choice) if choice is not None else None
    return np.asarray(image.affine if chosen is None else chosen, dtype=np.float64)


def _xform(header: Any, name: Affine) -> np.ndarray | None:
    """Return the sform or qform (4, 4) of a NIfTI header; None where its code says that there is none."""
    if not header[f"{name}_code"]:
        return None
    if name == "sform":
        return np.asarray(header.get_sform(), dtype=np.float64)
    try:
        return np.asarray(header.get_qform(), dtype=np.float64)
    except Exception:  # its numbers are no rotation; nibabel raises errors of its own
        return np.full((4, 4), np.nan)


def _xform_gap(
    header: Any, sform: np.ndarray | None, qform: np.ndarray | None, shape: tuple[int, ...]
) -> float:
    """Return the distance in voxels between the corners under sform and qform; see ``Header.xform_gap``.

    Codes 1 and 2 are the subject's own space, 3 and above a template's; a file may well hold one of each.
    """
    codes = int(header["sform_code"]), int(header["qform_code"])
    if sform is None or qform is None or (codes[0] != codes[1] and max(codes) > 2):
        return 0.0
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], dtype=float)
    corners[:, :3] *= np.array(shape) - 1  # (8, 4)
    apart_mm = np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max()
    smallest = np.linalg.norm(sform[:3, :3], axis=0).min()
    return float(apart_mm / smallest) if smallest > 0 else 0.0  # no spacing: another finding


def _voxel_offset(start: bytes) -> float:
    """Return where a NIfTI header says that its voxels start; nibabel reads and keeps all that lies before."""
    for order in "<>":
        size = int(np.frombuffer(start, f"{order}i4", 1)[0])
        if size == _NIFTI1_BYTES:
            return float(np.nan_to_num(np.frombuffer(start, f"{order}f4", 1, offset=108)[0]))
        if size == _NIFTI2_BYTES:
            return float(np.frombuffer(start, f"{order}i8", 1, offset=168)[0])
    return 0.0  # not NIfTI: nibabel says so


def _pixdim(start: bytes, header: Any) -> np.ndarray:
    """Return the three spacings as the file has them: (3,)."""
    order = header.endianness
    if header.sizeof_hdr == _NIFTI1_BYTES:
        return np.frombuffer(start, f"{order}f4", 3, offset=80)
    return np.frombuffer(start, f"{order}f8", 3, offset=112)  # NIfTI-2


_NRRD_BYTES = {
    1: "signed char|int8|int8_t|uchar|unsigned char|uint8|uint8_t",
    2: "short|short int|signed short|signed short int|int16|int16_t|"
    "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    4: "int|signed int|int32|int32_t|uint|unsigned int|uint32|uint32_t|float",
    8: "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t|"
    "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t|double",
}
_NRRD_TYPES = {name: size for size, names in _NRRD_BYTES.items() for name in names.split("|")}
_NRRD_ENCODINGS: dict[str, Encoding] = {
    "raw": "raw", "gz": "deflate", "gzip": "deflate", "txt": "text", "text": "text", "ascii": "text",
}  # fmt: skip


def _read_nrrd(path: Path) -> Header:
    """Parse an NRRD header (teem.sourceforge.net/nrrd/format.html)."""
    with path.open("rb") as file:
        if file.read(7) != b"NRRD000":
            raise HeaderError("it does not start with NRRD000")
        file.readline()
        fields: dict[str, str] = {}
        while True:
            line = file.readline(_MAX_HEADER_BYTES)
            if line.strip() == b"":  # the blank line, or the end of a detached header
                break
            if file.tell() > _MAX_HEADER_BYTES:
                raise HeaderError("its header does not end")
            key, colon, value = line.decode("utf-8", "replace").strip().partition(":")
            if colon and not key.startswith("#") and not value.startswith("="):
                fields[key.strip().lower().replace(" ", "")] = value.strip()
        start, ended = file.tell(), line != b""
    shape = tuple(_integers(_need(fields, "sizes")))
    kind, encoding = _need(fields, "type").lower(), _need(fields, "encoding").lower()
    if kind not in _NRRD_TYPES:
        raise HeaderError(f'its type is "{kind}", not a number')
    if encoding not in _NRRD_ENCODINGS:
        raise HeaderError(f'its encoding "{encoding}" is not raw, gzip or text')
    if "lineskip" in fields:
        raise HeaderError("it uses line skip")
    payload, data_file = path, fields.get("datafile")
    if data_file is not None:
        payload, start = _detached(path, data_file), 0
    elif not ended:
        raise HeaderError("it ends within its header")
    stored = _NRRD_ENCODINGS[encoding]
    size = 0 if stored == "text" else _NRRD_TYPES[kind]
    skip, lead = _integer(fields.get("byteskip", "0")), 0
    if stored == "deflate":
        lead = max(skip, 0)  # counted in the decompressed stream
    elif skip == -1:
        start = _last_bytes(payload, start, math.prod(shape) * size)
    else:
        start += skip
    space = _nrrd_space(fields, len(shape))
    axes, origin = _nrrd_geometry(fields, space) if len(space) == 3 else (None, None)
    order = [*space, *(axis for axis in range(len(shape)) if axis not in space)]
    return Header(
        _without_last_ones(tuple(shape[axis] for axis in order)), 1, size, axes, payload, start, stored, lead,
        origin_mm=origin,
    )  # fmt: skip


def _without_last_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _nrrd_space(fields: Mapping[str, str], dimension: int) -> list[int]:
    """Return which axes are those of space: three where the file has as many.

    A list of frames or a vector's components have the direction "none", or a kind of their own, and may come
    first; where every axis claims to be a direction of space, the fourth is time.
    """
    axes = list(range(dimension))
    vectors = re.findall(r"none|\([^)]*\)", fields.get("spacedirections", ""))
    kinds = fields.get("kinds", "").lower().split()
    if len(vectors) == dimension:
        axes = [axis for axis in axes if vectors[axis] != "none"]
    elif len(kinds) == dimension:
        axes = [axis for axis in axes if kinds[axis] in {"domain", "space", "???"}]
    return axes[:3]


def _nrrd_geometry(fields: Mapping[str, str], space: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (3, 3), column j along the j-th axis of space, and the origin (3,)."""
    origin = np.zeros(3)
    if "spaceorigin" in fields:
        numbers = fields["spaceorigin"].strip("()").replace(",", " ").split()
        origin = np.array(_floats(" ".join(numbers[:3])))
    if "spacedirections" not in fields:
        spacings = fields.get("spacings", "").split()
        return np.diag(_floats(" ".join(spacings[axis] for axis in space)) if spacings else [1.0] * 3), origin
    vectors = re.findall(r"none|\(([^)]*)\)", fields["spacedirections"])
    columns = [vector.replace(",", " ").split() for vector in vectors]
    if max(space) >= len(columns) or len({len(columns[axis]) for axis in space}) > 1:
        raise HeaderError(f'its space directions are "{fields["spacedirections"]}"')
    axes = [_floats(" ".join(columns[axis][:3])) for axis in space]
    return np.array(axes).T, origin


_META_TYPES = {
    "MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4, "MET_UINT": 4,
    "MET_LONG": 4, "MET_ULONG": 4, "MET_FLOAT": 4, "MET_LONG_LONG": 8, "MET_ULONG_LONG": 8, "MET_DOUBLE": 8,
}  # fmt: skip


def _read_metaimage(path: Path) -> Header:
    """Parse a MetaImage header (itk.org/Wiki/MetaIO/Documentation)."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while "ElementDataFile" not in fields:
            line = file.readline(_MAX_HEADER_BYTES)
            key, equals, value = line.decode("utf-8", "replace").partition("=")
            if not equals or file.tell() > _MAX_HEADER_BYTES:
                raise HeaderError("it has no MetaImage header (lines of Key = Value up to ElementDataFile)")
            fields[key.strip()] = value.strip()
        start = file.tell()
    shape = tuple(_integers(_need(fields, "DimSize")))
    kind = _need(fields, "ElementType")
    if kind not in _META_TYPES:
        raise HeaderError(f'its ElementType is "{kind}", not a number')
    compressed = fields.get("CompressedData", "False").lower() == "true"
    text = fields.get("BinaryData", "True").lower() == "false"
    payload = path
    if fields["ElementDataFile"].lower() != "local":
        payload, start = _detached(path, fields["ElementDataFile"]), 0
    channels, size = _integer(fields.get("ElementNumberOfChannels", "1")), 0 if text else _META_TYPES[kind]
    skip = _integer(fields.get("HeaderSize", "0"))
    if skip == -1:
        start = _last_bytes(payload, start, math.prod(shape) * channels * size)
    elif payload != path:
        start += max(skip, 0)
    axes, origin = _meta_geometry(fields, len(shape)) if len(shape) >= 3 else (None, None)
    encoding: Encoding = "text" if text else "deflate" if compressed else "raw"
    shape = _without_last_ones(shape)
    return Header(shape, channels, size, axes, payload, start, encoding, origin_mm=origin)


def _meta_geometry(fields: Mapping[str, str], dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps (3, 3) along the first three axes, and the origin (3,)."""

    def first(*names: str) -> str | None:
        return next((fields[name] for name in names if fields.get(name)), None)

    spacing, direction = (
        first("ElementSpacing", "ElementSize"),
        first("TransformMatrix", "Rotation", "Orientation"),
    )
    steps = np.ones(dimension) if spacing is None else np.array(_floats(spacing, dimension))
    rows = np.eye(dimension)  # row i of the file is the direction of axis i
    if direction is not None:
        rows = np.reshape(_floats(direction, dimension**2), (dimension, dimension))
    place = first("Offset", "Origin", "Position")
    origin = np.zeros(dimension) if place is None else np.array(_floats(place, dimension))
    return (rows.T * steps)[:3, :3], origin[:3]


def _detached(path: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise HeaderError(f'its voxels are in "{name}", outside its folder')
    payload = path.parent / name
    if not payload.is_file() and (name.upper().startswith("LIST") or "%" in name):
        raise HeaderError(f'its voxels are spread over several files ("{name}")')
    return payload


def _last_bytes(payload: Path, start: int, size: int) -> int:
    """Return where the last ``size`` bytes of ``payload`` start, at ``start`` or later."""
    return max(start, payload.stat().st_size - size) if payload.is_file() else start


def _need(fields: Mapping[str, str], key: str) -> str:
    if not fields.get(key):
        raise HeaderError(f'its header has no "{key}"')
    return fields[key]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise HeaderError(f'"{text}" in its header is not an integer') from None


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split()]
    except ValueError:
        raise HeaderError(f'"{text}" in its header is not a list of integers') from None
    if not numbers or min(numbers) < 1:
        raise HeaderError(f'its header says that its size is "{text}"')
    return numbers


def _floats(text: str, count: int = 3) -> list[float]:
    try:
        numbers = [float(part) for part in text.split()]
    except ValueError:
        raise HeaderError(f'"{text}" in its header is not a list of numbers') from None
    if len(numbers) != count:
        raise HeaderError(f'"{text}" in its header is not {count} numbers')
    return numbers


def reason(error: BaseException) -> str:
    """Return the most telling line of a reader's error: nibabel writes one, ITK's last but "Reason:"."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Reason:")]
    return lines[-1].rstrip(".") if lines else type(error).__name__
