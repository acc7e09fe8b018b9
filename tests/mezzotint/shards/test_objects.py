"""Shards in an object store, on a real server of S3's protocol that these tests start."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("s3fs", reason="pip install 'mezzotint[cluster]'")
pytest.importorskip("moto.server", reason="make venv")

from mezzotint import read_shards, sample_to_folder
from mezzotint.compiler.errors import OutputError
from mezzotint.evaluate.run import evaluate_bundle
from mezzotint.io.objects import ObjectFolder, is_url
from mezzotint.runtime.errors import InputError
from tests.helpers.models import Cli, Compiled
from tests.helpers.object_server import object_server

N = 10
OPTIONS: dict[str, Any] = {"shard_size": 4, "sampler": "ddpm", "seed": 3, "threads": 1}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, object_server(patch) as url:
        yield url


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}/run"


def objects(url: str) -> dict[str, bytes | None]:
    place = ObjectFolder(url)
    return {name: place.read(name) for name in place.names()}


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", ["npz", "png"])
def test_the_objects_are_the_files_of_a_folder(hand: Compiled, url: str, tmp_path: Path, format: str) -> None:
    sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **OPTIONS)
    drawn = sample_to_folder(hand.bundle, url, N, format=format, **OPTIONS)

    assert (drawn.made, drawn.skipped) == ((0, 1, 2), ())
    assert objects(url) == files(tmp_path / "f")
    for (index, images), (wanted_index, wanted) in zip(read_shards(url), read_shards(tmp_path / "f"), strict=True):
        np.testing.assert_array_equal(index, wanted_index)
        np.testing.assert_array_equal(images, wanted)

    inside = "shard_00001.npz" if format == "npz" else "shard_00001/00000005.png"
    ObjectFolder(url).write(inside, files(tmp_path / "f")[inside][:-9])
    with pytest.raises(InputError, match="shard 1 is not whole"):
        list(read_shards(url))
    again = sample_to_folder(hand.bundle, url, N, format=format, **OPTIONS)
    assert (again.made, again.skipped) == ((1,), (0, 2))
    assert objects(url) == files(tmp_path / "f")


def test_the_command_goes_on_where_it_stopped(hand: Compiled, cli: Cli, url: str) -> None:
    words = ["sample", hand.bundle.path, "-o", url, "-n", N, "--shard-size", 4, "--threads", 1, "--json"]
    first = cli(*words, "--shards", "1")
    second = cli(*words)

    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(first.out)["output"] == url
    assert (json.loads(second.out)["made"], json.loads(second.out)["skipped"]) == ([0, 2], [1])
    other = cli(*words, "--seed", 4)
    assert (other.code, "seed was 0 and is 4 now" in other.err) == (2, True)


def test_what_is_missing_is_named_with_its_url(hand: Compiled, url: str) -> None:
    with pytest.raises(InputError, match=r"there is no sampling\.json"):
        read_shards(url)
    sample_to_folder(hand.bundle, url, N, shards=[1], **OPTIONS)
    with pytest.raises(InputError, match="2 of 3 shards are missing: 0, 2") as caught:
        read_shards(url)
    assert f"-o {url} -n 10" in (caught.value.hint or "")


def test_refusals(hand: Compiled, cli: Cli, bucket: str, url: str) -> None:
    ObjectFolder(url).write("letter.txt", b"dear")
    with pytest.raises(OutputError, match="no samples were drawn there"):
        sample_to_folder(hand.bundle, url, N, **OPTIONS)
    with pytest.raises(OutputError, match="the object store refused") as caught:
        sample_to_folder(hand.bundle, "s3://no-such-bucket/run", N, **OPTIONS)
    assert "s3://no-such-bucket/run" in (caught.value.where or "")
    for output, words in ((f"{url}/x.png", "local path"), ("nowhere://x/y", "cannot be opened")):
        answer = cli("sample", hand.bundle.path, "-o", output, "-n", 2)
        assert (answer.code, words in answer.err) == (2, True), answer.err
    assert objects(url) == {"letter.txt": b"dear"}


def test_urls_and_paths() -> None:
    assert [is_url(text) for text in ("s3://b/x", "memory://x", "C:/x", "out/x", "s3:/b", "a b://")] == [
        *(True, True),
        *(False, False, False, False),
    ]


def test_an_evaluation_below_a_url(hand: Compiled, url: str, tmp_path: Path) -> None:
    """The objects are the files of a folder; what is missing is measured again, and the rest is read."""
    wanted: dict[str, Any] = {"batch": 2, "threads": 1, "speed": False, "resamples": 5, "shard_size": 4}
    found = evaluate_bundle(hand.bundle, hand.exported, N, output=tmp_path / "f", **wanted)
    assert evaluate_bundle(hand.bundle, hand.exported, N, output=url, **wanted) == found
    assert objects(url) == files(tmp_path / "f")

    place = ObjectFolder(url)
    place.write("eval.json", b"{}")
    place.write("pairs_00001.safetensors", b"cut off")
    assert evaluate_bundle(hand.bundle, hand.exported, N, output=url, **wanted) == found
    assert objects(url) == files(tmp_path / "f")
    with pytest.raises(InputError, match="begun with other settings: seed was"):
        evaluate_bundle(hand.bundle, hand.exported, N, output=url, seed=9, **wanted)
