"""A cache below a URL: an entry is whole or not there, and another machine takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mezzotint import compile_model
from mezzotint.compiler.core.cache import Cache, EntryForm
from mezzotint.compiler.errors import StatsError
from mezzotint.io.objects import ObjectFolder
from mezzotint.runtime.errors import InputError
from mezzotint.shared_cache import ObjectEntries, opened_cache
from tests.helpers.models import SMALL, Compiled

FORM = EntryForm("thing", "a thing", 1)


def write(folder: Path) -> dict[str, Any]:
    (folder / FORM.arrays).write_bytes(b"arrays")
    return {"answer": 42}


def read(data: Any, folder: Path) -> tuple[int, bytes]:
    return data["answer"], (folder / FORM.arrays).read_bytes()


def test_an_entry_travels_and_is_whole(tmp_path: Path) -> None:
    objects = ObjectFolder("memory://shared-cache-1")
    here, there = (Cache(tmp_path / name, ObjectEntries(objects)) for name in ("here", "there"))
    assert there.load(FORM, "thing-1", read) is None
    here.keep(FORM, "thing-1", write)
    assert there.load(FORM, "thing-1", read) == (42, b"arrays")
    assert (tmp_path / "there" / "thing-1" / "thing.json").is_file()

    objects.write("thing-2/thing.safetensors", b"arrays")  # its writer was killed before the last object
    assert there.load(FORM, "thing-2", read) is None
    objects.write("thing-1/thing.safetensors", b"other")
    with pytest.raises(StatsError, match="changed after they were written"):
        Cache(tmp_path / "third", ObjectEntries(objects)).load(FORM, "thing-1", read)
    assert not list(tmp_path.glob("*/.mezzotint*"))


def test_compilations_share_statistics_below_a_url(hand: Compiled, tmp_path: Path) -> None:
    url = "memory://shared-cache-2"
    first, again = (
        compile_model(hand.exported, tmp_path / name, recipe="w8a8", cache=url, **SMALL) for name in ("a", "b")
    )
    assert first.manifest.digest == again.manifest.digest
    objects = ObjectFolder(url)
    facts, arrays = objects.names()
    assert facts.endswith("stats.json") and arrays.endswith("stats.safetensors")
    objects.write(arrays, b"damaged")
    with pytest.raises(StatsError, match="cannot be read"):
        compile_model(hand.exported, tmp_path / "c", recipe="w8a8", cache=url, **SMALL)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nosuch://place", "object store cannot be opened"),
        ("file:///tmp/cache", "names files of this machine"),
        (__file__, "the cache is no folder"),
    ],
)
def test_places_that_are_no_cache(place: str, words: str) -> None:
    with pytest.raises(InputError, match=words), opened_cache(place):
        pass
