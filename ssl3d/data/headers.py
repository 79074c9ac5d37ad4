"""What a volume's header promises: shape, type, geometry, and where its voxels are.

Only headers are read here, so that a promise can be refused before anything is allocated and
compared with what is there. The voxels are read by nibabel and SimpleITK (:mod:`ssl3d.data.volume`),
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

from ssl3d.data.adapters import image_suffix

Encoding = Literal["raw", "deflate", "text"]

_MAX_HEADER_BYTES = 4 * 2**20
_NIFTI1_BYTES = 348


class HeaderError(ValueError):
    """A header that cannot be used; the message completes "is not a readable image: "."""


@dataclass(frozen=True)
class Header:
    """The promises of one file.

    Attributes:
        shape: size of every axis as stored, singleton axes after the third left out.
        channels: values a voxel (1 for a scalar image).
        item_bytes: bytes a value; 0 for text.
        axes_mm: (3, 3), column j is the step in mm along array axis j; None for fewer than 3 axes.
        payload: the file that holds the voxels: the file itself, or another for detached headers.
        offset: byte in ``payload`` at which the (compressed) voxels start; for a compressed
            NIfTI, whose header is compressed too, 0.
        encoding: how they are stored; "deflate" is gzip or zlib.
        lead_bytes: decompressed bytes before the first voxel.
        xform_gap: NIfTI with an sform and a qform that name the same space: how far apart the two put
            a corner of the volume, in voxels; else 0.
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

    @property
    def voxels(self) -> int:
        """Number of values."""
        return math.prod(self.shape) * self.channels

    @property
    def payload_bytes(self) -> int:
        """Decompressed bytes that must be there."""
        return self.lead_bytes + self.voxels * self.item_bytes


def read_header(path: Path) -> Header:
    """Read the header of a NIfTI, NRRD or MetaImage file.

    Raises:
        HeaderError: not such a file, or a header that makes no sense.
        OSError: the file cannot be opened.
    """
    suffix = image_suffix(path)
    if suffix is None:
        raise HeaderError("its ending is not one of a volume")
    if suffix in {".nii", ".nii.gz"}:
        return _read_nifti(path, compressed=suffix == ".nii.gz")
    return _read_nrrd(path) if suffix in {".nrrd", ".nhdr"} else _read_metaimage(path)


def _read_nifti(path: Path, compressed: bool) -> Header:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            start = file.read(_NIFTI1_BYTES)
        if len(start) < _NIFTI1_BYTES:
            raise HeaderError("it ends within its header")
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):  # of which NIfTI-2 is a subclass, CIFTI is not
            raise HeaderError(f"it is {type(image).__name__}, not NIfTI in one file")
        affine = np.asarray(image.affine, dtype=np.float64)
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
    axes = affine[:3, :3]
    if not image.header["sform_code"]:
        axes = axes * (_pixdim(start, image.header) != 0)  # nibabel has replaced zero spacings by 1
    return Header(
        shape, 1, dtype.itemsize, axes if len(shape) >= 3 else None, path,
        offset=0 if compressed else int(image.dataobj.offset),
        encoding="deflate" if compressed else "raw",
        lead_bytes=int(image.dataobj.offset) if compressed else 0,
        xform_gap=_xform_gap(image.header, shape[:3]) if len(shape) >= 3 else 0.0,
    )  # fmt: skip


def _xform_gap(header: Any, shape: tuple[int, ...]) -> float:
    """Return the distance in voxels between the corners under sform and qform; see ``Header.xform_gap``.

    Codes 1 and 2 are the subject's own space, 3 and above a template's; a file may well hold one of each.
    """
    codes = int(header["sform_code"]), int(header["qform_code"])
    if 0 in codes or (codes[0] != codes[1] and max(codes) > 2):
        return 0.0
    sform, (qform, _) = header.get_sform(), header.get_qform(coded=True)
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)], dtype=float)
    corners[:, :3] *= np.array(shape) - 1  # (8, 4)
    apart_mm = np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max()
    smallest = np.linalg.norm(sform[:3, :3], axis=0).min()
    return float(apart_mm / smallest) if smallest > 0 else 0.0  # no spacing: another finding


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
    return Header(shape, 1, size, _nrrd_axes(fields, len(shape)), payload, start, stored, lead)


def _nrrd_axes(fields: Mapping[str, str], dimension: int) -> np.ndarray | None:
    if dimension != 3:
        return None
    if "spacedirections" in fields:
        vectors = re.findall(r"\(([^)]*)\)", fields["spacedirections"])
        columns = [_floats(vector.replace(",", " ")) for vector in vectors]
        if len(columns) != 3 or any(len(column) != 3 for column in columns):
            raise HeaderError(f'its space directions are "{fields["spacedirections"]}"')
        return np.array(columns).T  # (3, 3), column j belongs to array axis j
    return np.diag(_floats(fields.get("spacings", "1 1 1")))


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
    axes = None
    if len(shape) == 3:
        spacing = _floats(fields.get("ElementSpacing") or fields.get("ElementSize") or "1 1 1")
        names = ("TransformMatrix", "Rotation", "Orientation")
        direction = next((fields[name] for name in names if name in fields), None)
        rows = np.eye(3) if direction is None else np.reshape(_floats(direction, 9), (3, 3))
        axes = rows.T * np.array(spacing)  # row i of the file is the direction of axis i
    encoding: Encoding = "text" if text else "deflate" if compressed else "raw"
    return Header(shape, channels, size, axes, payload, start, encoding)


def _detached(path: Path, name: str) -> Path:
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


def payload_of(path: Path) -> Path:
    """Return the file that holds the voxels: another than ``path`` for detached headers."""
    if image_suffix(path) not in {".mhd", ".nhdr"}:
        return path
    try:
        return read_header(path).payload
    except (HeaderError, OSError):
        return path  # the checks say what is wrong with it


def reason(error: BaseException) -> str:
    """Return the most telling line of a reader's error: nibabel writes one, ITK's last but "Reason:"."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Reason:")]
    return lines[-1].rstrip(".") if lines else type(error).__name__
