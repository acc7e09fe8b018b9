"""Arrays of an .npz file, checked before any array is made: a small file can state any size, and a pickle runs code.

A member that is stored as it is cannot be larger than the file. A compressed one can, by a factor of a thousand, so the
sizes that the archive states are bounded before a byte is unpacked, and no more than that is read.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.json_text import require_file

MOST_MEMBERS = 1_000
MOST_UNPACKED = 512 << 20
"""Bytes of all compressed members of an archive."""
MOST_STORED = 8 << 30
"""Bytes of all members of an archive."""
LONGEST_NAME = 200
PIECE = 1 << 20
NUMBERS = "biuf"  # kinds of numpy: bool, signed, unsigned, floating

# What zipfile and numpy raise for damaged files, each found by trying. NotImplementedError: zip knows more compressions
# than zipfile reads.
_DAMAGES = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path, what: str, error: type[MezzotintError], hint: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file by name, in the byte order of this machine. Raise `error` for any other file.

    `what` names the content in the message, like "the conditions".
    """
    require_file(path, what, error, hint)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked(archive)
            return {name: _array(archive, member, name) for name, member in members.items()}
    except zipfile.BadZipFile as failure:
        reason = f"it is no .npz archive of plain arrays ({failure})"
        raise error(f"cannot read {what}: {reason}", where=str(path), hint=hint) from failure
    except _DAMAGES as failure:
        reason = str(failure) or type(failure).__name__
        raise error(f"cannot read {what}: {reason}", where=str(path), hint=hint) from failure


def _checked(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members by the names of their arrays. Raise ValueError for what is no archive of arrays."""
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise ValueError(f"it has {len(infos)} members, the limit is {MOST_MEMBERS}")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if name == info.filename or not name:
            raise ValueError(f"its member {info.filename!r} is no array (.npy)")
        if name in members:
            raise ValueError(f"the array {name!r} is there twice")
        if len(name) > LONGEST_NAME:
            raise ValueError(f"a name has {len(name)} characters, the limit is {LONGEST_NAME}")
        if info.flag_bits & 1:
            raise ValueError(f"the array {name!r} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"the array {name!r} is compressed with method {info.compress_type}, not with deflate")
        members[name] = info
    unpacked = sum(info.file_size for info in infos if info.compress_type != zipfile.ZIP_STORED)
    if unpacked > MOST_UNPACKED:
        raise ValueError(
            f"its compressed arrays state {unpacked} bytes, the limit is {MOST_UNPACKED}: "
            "store larger ones without compression (numpy.savez)"
        )
    if (total := sum(info.file_size for info in infos)) > MOST_STORED:
        raise ValueError(f"its arrays state {total} bytes, the limit is {MOST_STORED}")
    return members


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> npt.NDArray[Any]:
    """Return one array. Its header is read first, and has to agree with the size of the member."""
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file, name)
        count = math.prod(shape)
        header = file.tell()
        if count * dtype.itemsize != info.file_size - header:
            raise ValueError(
                f"the array {name!r} states {dtype} {list(shape)}, and has {info.file_size - header} bytes"
            )
        array = np.empty(count, dtype)
        left = array.view(np.uint8).data
        while left:
            # By pieces: zipfile would unpack the whole member into memory of its own.
            if not (number := file.readinto(left[:PIECE])):  # type: ignore[attr-defined]
                raise ValueError(f"the array {name!r} is cut off")
            left = left[number:]
    array = array.reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype=dtype.newbyteorder("=")).reshape(shape)  # of rank 0 too


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"the array {name!r} has version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"the array {name!r} has pickled objects, which could run code")
    if dtype.kind not in NUMBERS or dtype.itemsize > 8:
        raise ValueError(f"the array {name!r} is {dtype}, not numbers")
    if any(size < 1 for size in shape):
        raise ValueError(f"the array {name!r} is empty: its shape is {list(shape)}")
    return shape, fortran, dtype
