"""Damaged and hostile bundles, by kind. Each kind changes a copy of a bundle's folder in place.

Kinds that change the manifest seal it again, as an attacker who knows the format would do: the digest is that of its
contents.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from mezzotint.runtime.bundle.bundle import CORRECTION, MANIFEST, MODEL, SCHEDULER, file_sha256
from mezzotint.runtime.bundle.manifest import manifest_digest
from tests.helpers.hostile_models import KINDS as MODEL_KINDS
from tests.helpers.hostile_models import damaged

Kind = Callable[[Path, random.Random], None]
KINDS: dict[str, Kind] = {}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 1 << 31, -(1 << 63), 1 << 64, 10**400, 0.5, -0.0, 1e308, "", "x", "\x1b[31m"),
    *([], {}, [None], [[]], {"": ""}, {"x": 1}, [1, 2, 3], ["a", "b"], "[bold]m[/]", "x" * 10_000, "\ud800", "1"),
)


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def damage(name: str, folder: Path, seed: int) -> None:
    """Change a bundle's folder by one damage of a kind."""
    KINDS[name](folder, random.Random(f"{name} {seed}"))


def reseal(folder: Path, data: Any = None, *, files: bool = True) -> None:
    """Write a manifest with the hashes of the files that it names, and the digest of its contents."""
    path = folder / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8")) if data is None else data
    if files:
        for name in data["files"]:
            if (folder / name).is_file():
                data["files"][name] = {
                    "sha256": file_sha256(folder / name),
                    "bytes": (folder / name).stat().st_size,
                }
    try:
        data["digest"] = manifest_digest(data)
    except (ValueError, TypeError, RecursionError, UnicodeEncodeError):
        data["digest"] = "0" * 64
    path.write_text(json.dumps(data), encoding="utf-8")


def _manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value inside plain data."""
    places = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        places += _places(part, (*path, key))
    return places


def _parent(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        data = data[key]
    return data


def _pick(data: Any, rng: random.Random) -> tuple[Any, ...]:
    """Return a place of the manifest: first one of its keys, then a place below, so that no key drowns."""
    key = rng.choice([key for key in data if key not in ("digest",)])
    return rng.choice(_places({key: data[key]}))


# -- manifests --------------------------------------------------------------------------------------------------------


@kind
def wrong_value(folder: Path, rng: random.Random) -> None:
    data = _manifest(folder)
    place = _pick(data, rng)
    _parent(data, place)[place[-1]] = rng.choice(ODD)
    reseal(folder, data, files=False)


@kind
def missing_key(folder: Path, rng: random.Random) -> None:
    data = _manifest(folder)
    place = _pick(data, rng)
    del _parent(data, place)[place[-1]]
    reseal(folder, data, files=False)


@kind
def unknown_key(folder: Path, rng: random.Random) -> None:
    data = _manifest(folder)
    places = [p for p in _places(data) if isinstance(_parent(data, (*p, 0)), dict)]
    _parent(data, (*rng.choice(places), 0))[rng.choice(("x", "", "digest", "\x07", "__class__"))] = rng.choice(ODD)
    reseal(folder, data, files=False)


@kind
def scaled_number(folder: Path, rng: random.Random) -> None:
    """A number is of the right type and makes no sense."""
    data = _manifest(folder)
    numbers = [p for p in _places(data) if type(_parent(data, p)[p[-1]]) in (int, float)]
    keys = sorted({p[0] for p in numbers})
    key = rng.choice(keys)
    place = rng.choice([p for p in numbers if p[0] == key])
    old = _parent(data, place)[place[-1]]
    _parent(data, place)[place[-1]] = rng.choice((0, -1, -old, old * 10**9, 10**18, 3, 1 << 40))
    reseal(folder, data, files=False)


@kind
def raw_manifest(folder: Path, rng: random.Random) -> None:
    """Texts that are no manifest, or JSON that no careful reader takes."""
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    choice = rng.choice(("nan", "digits", "deep", "twice", "text", "bytes", "cut", "list", "bom", "huge float"))
    texts: dict[str, str | bytes] = {
        "nan": text.replace('"samples": ', f'"samples": {rng.choice(("NaN", "Infinity", "-Infinity"))}, "x": '),
        "digits": text.replace('"samples": ', f'"samples": {"9" * 20_000}'),
        "deep": text.replace('"islands": {', '"islands": {"a": ' + "[" * 100_000 + "]" * 100_000 + ", "),
        "twice": text.replace('"digest":', '"digest": 5, "digest":'),
        "text": "not a manifest",
        "bytes": rng.randbytes(300),
        "cut": text[: rng.randrange(len(text))],
        "list": rng.choice(("[]", "3", "null", '"x"', "true", "", "{}")),
        "bom": "\ufeff" + text,
        "huge float": text.replace('"samples": ', '"samples": 1e999'),
    }
    changed = texts[choice]
    path = folder / MANIFEST
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode("utf-8"))


@kind
def odd_files(folder: Path, rng: random.Random) -> None:
    """`files` names paths outside of the bundle, pipes, folders, devices, or what is not there."""
    data = _manifest(folder)
    names = ["../x", "/etc/passwd", "a/../../x", "pipe", "unet", "", ".", "gone", "\x00", "x" * 5000, "C:\\x", "..\\x"]
    name = rng.choice([*names, "/dev/zero", "link", "folder link/x", "socket"])
    if name == "pipe":
        os.mkfifo(folder / "pipe")
    if name == "link":
        (folder.parent / "outside.bin").write_bytes(b"12")
        (folder / "link").symlink_to(folder.parent / "outside.bin")
    if name == "folder link/x":
        (folder.parent / "x").write_bytes(b"12")
        (folder / "folder link").symlink_to(folder.parent, target_is_directory=True)
    data["files"][name] = {"sha256": "0" * 64, "bytes": rng.choice((0, 2, 4096))}
    if name in ("link", "folder link/x"):
        data["files"][name] = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
    reseal(folder, data, files=False)


# -- other files ------------------------------------------------------------------------------------------------------


@kind
def flipped_bit(folder: Path, rng: random.Random) -> None:
    """A file is changed, and the manifest is not."""
    file = rng.choice(sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


@kind
def missing_file(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(f for f in folder.rglob("*") if f.is_file())).unlink()


@kind
def replaced_by(folder: Path, rng: random.Random) -> None:
    """A file of the bundle is a pipe, a folder, a device, or a ring of links."""
    file = folder / rng.choice((MANIFEST, MODEL, SCHEDULER, CORRECTION, "ranges.safetensors", "README.md"))
    file.unlink(missing_ok=True)
    what = rng.choice(("pipe", "folder", "device", "ring", "dangling"))
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        targets = {"device": Path("/dev/zero"), "ring": file, "dangling": folder / "gone"}
        file.symlink_to(targets[what])


@kind
def damaged_tensors(folder: Path, rng: random.Random) -> None:
    """A safetensors file with a valid hash and a damaged header or body, or other tensors."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    file = rng.choice(sorted(folder.glob("*.safetensors")))
    how = rng.choice(("flip header", "flip", "cut", "garbage", "length", "empty", "shapes", "dtypes", "names", "nan"))
    data = bytearray(file.read_bytes())
    if how == "flip header":
        data[rng.randrange(min(len(data), 8 + int.from_bytes(data[:8], "little")))] ^= 1 << rng.randrange(8)
    elif how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "garbage":
        data = bytearray(rng.randbytes(500))
    elif how == "length":
        data[:8] = rng.choice((1 << 40, (1 << 64) - 1, 0)).to_bytes(8, "little")
    elif how == "empty":
        data = bytearray()
    else:
        arrays = load_file(file)
        name = rng.choice(sorted(arrays))
        array = arrays.pop(name)
        if how == "shapes":
            arrays[name] = rng.choice((array.reshape(-1)[:1], array[None], np.zeros((0,), array.dtype)))
        elif how == "dtypes":
            arrays[name] = array.astype(rng.choice((np.int8, np.bool_, np.float16, np.float64)))
        elif how == "nan":
            arrays[name] = np.full_like(array, math.nan if array.dtype.kind == "f" else -1)
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, file)
        data = bytearray(file.read_bytes())
    file.write_bytes(bytes(data))
    reseal(folder)


@kind
def other_network(folder: Path, rng: random.Random) -> None:
    """The network is damaged, hostile, or that of another bundle; the seal is right."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    name = rng.choice(sorted(set(MODEL_KINDS) - {"many_nodes"}))
    (folder / MODEL).write_bytes(damaged(name, model, rng.randrange(1 << 30)))
    reseal(folder)


@kind
def odd_schedule(folder: Path, rng: random.Random) -> None:
    file = folder / SCHEDULER
    data = json.loads(file.read_text(encoding="utf-8"))
    if rng.random() < 0.3:
        file.write_text(rng.choice(("", "[]", "{}", "null", "{", '{"_class_name": 5}', "[" * 50_000)), encoding="utf-8")
    else:
        data[rng.choice(sorted(data))] = rng.choice(ODD)
        file.write_text(json.dumps(data), encoding="utf-8")
    reseal(folder)


@kind
def no_bundle(folder: Path, rng: random.Random) -> None:
    """The bundle is an empty folder, a file, a pipe, or a link that leads nowhere."""
    shutil.rmtree(folder)
    how = rng.choice(("empty", "file", "pipe", "gone", "ring", "device"))
    if how == "empty":
        folder.mkdir()
    elif how == "file":
        folder.write_text("a file", encoding="utf-8")
    elif how == "pipe":
        os.mkfifo(folder)
    elif how in ("ring", "device"):
        folder.symlink_to(folder if how == "ring" else Path("/dev/zero"))
