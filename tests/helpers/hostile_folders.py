"""Damaged and hostile folders of diffusers models, by kind. Each kind changes a copy of a folder in place."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.hostile_bundles import ODD

WEIGHTS = "diffusion_pytorch_model.safetensors"
Kind = Callable[[Path, random.Random], None]
KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


def damage(name: str, folder: Path, seed: int) -> None:
    """Change a model's folder by one damage of a kind."""
    KINDS[name](folder, random.Random(f"{name} {seed}"))


@kind
def config_value(folder: Path, rng: random.Random) -> None:
    file = folder / "config.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    data[rng.choice(sorted(data))] = rng.choice(ODD)
    file.write_text(json.dumps(data), encoding="utf-8")


@kind
def config_huge(folder: Path, rng: random.Random) -> None:
    """Sizes that would take all memory, or days to build."""
    file = folder / "config.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    key = rng.choice(("layers_per_block", "block_out_channels", "in_channels", "sample_size", "norm_num_groups"))
    data[key] = [1 << 30, 1 << 30] if key == "block_out_channels" else rng.choice((1 << 20, 1 << 31, 1 << 62))
    if rng.random() < 0.2:
        data["down_block_types"] = data["down_block_types"] * 100_000
    file.write_text(json.dumps(data), encoding="utf-8")


@kind
def config_text(folder: Path, rng: random.Random) -> None:
    file = folder / "config.json"
    what = rng.choice(("pipe", "{", "[]", '{"_class_name": "UNet2DModel"}', '{"_class_name": "os"}', "[" * 99_999))
    if what == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_text(what, encoding="utf-8")


@kind
def weights(folder: Path, rng: random.Random) -> None:
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    how = rng.choice(("header", "cut", "length", "garbage", "empty", "gone", "pipe", "device", "folder"))
    if how == "header":
        data[rng.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "length":
        data[:8] = rng.choice((1 << 40, (1 << 64) - 1, 0)).to_bytes(8, "little")
    elif how == "garbage":
        data = bytearray(rng.randbytes(500))
    elif how == "empty":
        data = bytearray()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "device":
        file.symlink_to("/dev/zero")
    elif how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(bytes(data))


@kind
def tensors(folder: Path, rng: random.Random) -> None:
    """Tensors of other shapes, types, names or values."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(arrays))
    array = arrays.pop(name)
    how = rng.choice(("shape", "nan", "name", "missing", "empty"))
    if how == "shape":
        arrays[name] = np.zeros((3, *array.shape), array.dtype)
    elif how == "nan":
        arrays[name] = np.full_like(array, np.nan)
    elif how == "name":
        arrays["../" + name] = array
    elif how == "empty":
        arrays = {"x": np.zeros(1, np.float32)}
    save_file(arrays, folder / WEIGHTS)


class _Bomb:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return Path.touch, (Path("pickle-was-loaded"),)  # type: ignore[return-value]


@kind
def pickles(folder: Path, rng: random.Random) -> None:
    """Weights as a pickle that writes a file when it is loaded."""
    import pickle

    (folder / WEIGHTS).unlink()
    name = rng.choice(("diffusion_pytorch_model.bin", WEIGHTS))
    (folder / name).write_bytes(pickle.dumps(_Bomb()))


@kind
def shards(folder: Path, rng: random.Random) -> None:
    """An index of shards that names files outside of the folder, or none."""
    places = ("../outside.safetensors", "/etc/passwd", "gone", "", "config.json")
    index: Any = {
        "metadata": {"total_size": rng.choice((1, -1, 1 << 62))},
        "weight_map": {"conv_in.weight": rng.choice(places)},
    }
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    text = rng.choice((json.dumps(index), "[]", "{}", "{", '{"weight_map": 5}'))
    (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")
