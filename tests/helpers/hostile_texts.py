"""Hostile settings, by kind: texts, condition files, numbers, words and paths, each made from a seed."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

NASTY = (
    *("[bold]x[/bold]", "[/]", "[/nothing]", "\x1b[31mred\x1b[0m", "a\nerror: forged", "a\rb", "\u202egnp.x", "\x07"),
    *("\u2028", "\x9b31m", "<script>alert(1)</script>", "'\"`{}\\", "%s%n{0}$x", "x" * 5_000, "\udcff", "\x00", ""),
)
"""Names: markup, control characters, forged lines, a reversed order, code, bytes that are no UTF-8, too long."""
NUMBERS = (
    *(
        "-1",
        "0",
        "",
        " ",
        "x",
        "nan",
        "inf",
        "-inf",
        "1e3",
        "0x10",
        "1.5",
        "1e400",
        "--",
        "\u0661\u0662",
        "\u00bd",
        "1,000",
    ),
    *(
        "9" * 30,
        "9" * 5_000,
        str(2**63),
        str(-(2**63)),
        str(10**9 + 7),
        "1" + "0" * 400,
        "true",
        "[1]",
        "1\n2",
        "\x1b[1m",
    ),
)
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 62, 10**30, 10**400, 0.5, 1e308, "", "x", "\x1b[31m", [], {}, [None], [[[]]], {"": ""}),
    *(
        {"x": {}},
        [1, 2],
        ["a"],
        "[bold]m[/]",
        "x" * 9_000,
        float("nan"),
        float("inf"),
        -0.0,
        "\ud800",
        "1",
        [True],
        10**9,
    ),
)


def text(kind: str, good: bytes, seed: int) -> bytes:
    """Return a damaged text of a kind, made from a good one."""
    return TEXTS[kind](good, random.Random(f"{kind} {seed}"))


def _flipped(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _number(good: bytes, rng: random.Random) -> bytes:
    """Replace one number or word of the text."""
    words = good.split(b" ")
    number = rng.choice(
        ["9" * 5_000, "1e999", "NaN", "-Infinity", ".nan", "-1", "1" * 30, "0x" + "f" * 99, "1:" * 50 + "1"]
    )
    words[rng.randrange(len(words))] = number.encode()
    return b" ".join(words)


def _deep(good: bytes, rng: random.Random) -> bytes:
    left, right = rng.choice([("[", "]"), ('{"a":', "}"), ("- ", ""), ("{a: ", "}")])
    depth = rng.choice([50, 150, 900, 20_000])
    return (left * depth + "1" + right * depth).encode()


def _doubled_key(good: bytes, rng: random.Random) -> bytes:
    line = rng.choice([part for part in good.splitlines() if b":" in part])
    return good.replace(line, line.rstrip(b",") + b",\n" + line if b'"' in line else line + b"\n" + line)


TEXTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": _flipped,
    "cut": lambda good, rng: good[: rng.randrange(len(good))],
    "number": _number,
    "deep": _deep,
    "doubled_key": _doubled_key,
    "bytes": lambda good, rng: rng.randbytes(rng.choice([1, 40, 4_000])),
    "inserted": lambda good, rng: good[:9] + rng.choice(NASTY).encode("utf-8", "surrogatepass") + good[9:],
    "encoded": lambda good, rng: good.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-7"])) + b"\xff",
    "long": lambda good, rng: good + b" " * rng.choice([2 << 20, 40 << 20]) + b"x",
    "other": lambda good, rng: rng.choice([b"", b" ", b"[]", b"{}", b"null", b"1", b'"x"', b"true", b"---", b"\x00"]),
}
YAML = {
    "bomb": b"a0: &a0 [x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)),
    "itself": b"passes: &a [*a]",
    "tag": b"passes: !!python/object/apply:os.system [id]",
    "date": b"passes: 2026-99-99",
    "merge": b"<<: 3\npasses: [normalize]",
    "keys": b"? [a]\n: b",
    "wrong_int": b"passes: !!int x",
    "documents": b"passes: [normalize]\n---\npasses: [normalize]",
}


def odd_json(good: dict[str, Any], seed: int) -> bytes:
    """Return JSON with one value, anywhere in it, replaced by an odd one."""
    rng = random.Random(f"odd {seed}")
    data: Any = json.loads(json.dumps(good))
    place: Any = data
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    place[key] = rng.choice(ODD)
    if isinstance(place, dict) and rng.random() < 0.2:
        place[rng.choice(NASTY)] = rng.choice(ODD)
    return json.dumps(data).encode("utf-8", "surrogatepass")


def npz(kind: str, good: dict[str, npt.NDArray[Any]], seed: int) -> bytes:
    """Return a damaged or hostile .npz file of a kind."""
    rng = random.Random(f"{kind} {seed}")
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(good)
    rng.choice([np.savez, np.savez_compressed])(buffer, **arrays)
    return ARCHIVES[kind](buffer.getvalue(), good, rng)


def _bits(data: bytes, good: Any, rng: random.Random) -> bytes:
    return _flipped(data, rng)


def _zip(**members: bytes) -> bytes:
    return _zipped({f"{name}.npy": data for name, data in members.items()})


def _zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + data


def _header(data: bytes, good: Any, rng: random.Random) -> bytes:
    """State another type, shape or order than the data has, or no header at all."""
    shape = rng.choice(
        ["(2, 6)", "(10**9, 6)", "(1000000000000, 6)", "(-1, 6)", "(0, 6)", "(2.0, 6)", "()", "(2, 'x')", "(9,) * 9"]
    )
    kind = rng.choice(["<f4", "|O", "<U9", "<c8", "<M8[s]", "V9", ">f8", "f" * 999, "|b1", "<f16", "{}", "i4,f4", "[]"])
    form = rng.choice(
        [
            "{'descr': '%s', 'fortran_order': False, 'shape': %s}",
            "{'descr': '%s', 'shape': %s}",
            "(" * 500 + "%s%s",
            "%s%s",
        ]
    )
    return _zip(c=_npy(form % (kind, shape), np.zeros((2, 6), np.float32).tobytes()))


def _values(data: bytes, good: dict[str, npt.NDArray[Any]], rng: random.Random) -> bytes:
    """Keep the file whole, and give other values, types, shapes and names than the model takes."""
    c = np.ones((2, 6), np.float32)
    odd: list[Any] = [
        c * np.nan,
        c * np.inf,
        c.astype(np.float64),
        c.astype(np.int8),
        c[0],
        c[0, 0],
        c[:0],
        c[None],
        c[:, :3],
    ]
    odd += [
        c.astype(complex),
        c.astype(str),
        c.astype(object),
        c.astype(bool),
        np.zeros((2, 6), "M8[s]"),
        np.asfortranarray(c),
    ]
    arrays = {
        rng.choice(
            ["c", "c", "c", "d", "", "c.npy", *(n for n in NASTY if "\x00" not in n and len(n) < 99)]
        ): rng.choice(odd)
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=True)
            archive.writestr(f"{name}.npy".encode("utf-8", "replace").decode(), member.getvalue())
    return buffer.getvalue()


def _bomb(data: bytes, good: Any, rng: random.Random) -> bytes:
    """Pack zeros: as much as they state, or more or less than it."""
    stated = rng.choice([1 << 30, 1 << 20, 1 << 40])
    array = _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({stated}, 6), }}", bytes(16 << 20))
    packed = _zipped({"c.npy": array}, zipfile.ZIP_DEFLATED)
    other = rng.choice([len(array), 0xFFFFFFF0, 0x7FFFFFFF, 100, 0])
    return packed.replace(struct.pack("<I", len(array)), struct.pack("<I", other))


def _members(data: bytes, good: Any, rng: random.Random) -> bytes:
    array = io.BytesIO()
    np.save(array, np.ones((2, 6), np.float32))
    whole = array.getvalue()
    flagged = bytearray(_zip(c=whole))
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        flagged[flagged.index(sign) + place] |= 1  # "encrypted"
    return rng.choice(
        [
            _zipped({"c.npy": whole, "../../x.npy": whole}),
            _zipped({"c.txt": whole}),
            _zipped({"c.npy": whole}, zipfile.ZIP_BZIP2),
            _zipped({"c.npy": whole}, zipfile.ZIP_LZMA),
            _zipped({f"{i}.npy": b"" for i in range(3_000)}),
            _zipped({"c.npy": b""}),
            _zipped({}),
            bytes(flagged),
            whole,
            b"\x80\x04cos\nsystem\n(S'id'\ntR.",
        ]
    )


ARCHIVES: dict[str, Callable[[bytes, dict[str, npt.NDArray[Any]], random.Random], bytes]] = {
    "bits": _bits,
    "cut": lambda data, good, rng: data[: rng.randrange(len(data))],
    "header": _header,
    "values": _values,
    "bomb": _bomb,
    "members": _members,
}
PLACES = ("folder", "pipe", "device", "missing", "long", "below a file", "dangling", "ring", "unreadable")


def place(kind: str, folder: Path) -> str:
    """Return a path of a kind that is no file that can be read."""
    path = folder / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        return "/dev/zero"
    elif kind == "long":
        return str(folder / ("x" * 300))
    elif kind == "below a file":
        path.write_bytes(b"x")
        return str(path / "y")
    elif kind in ("dangling", "ring"):
        path.symlink_to(folder / ("nowhere" if kind == "dangling" else "odd"))
    elif kind == "unreadable":
        path.write_bytes(b"{}")
        path.chmod(0)
    return str(path)
