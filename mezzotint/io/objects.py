"""Folders in object stores, named by URLs of fsspec: s3://bucket/run, memory://run, and what else fsspec has.

An object is written by one request, so that it is there as a whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.errors import InputError

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_url(text: str) -> bool:
    """Return whether a text names an object store, and no local path."""
    return _URL.match(text) is not None


class ObjectFolder:
    """The objects below a URL, by names relative to it.

    Raises InputError for a URL whose library is missing or that has no protocol of fsspec, and for file://, whose files
    are not whole at once as objects are.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if self.url.startswith(("file:", "local:")):
            path = self.url.partition("://")[2]
            raise InputError("this names files of this machine, and no object store", where=url, hint=f"give {path}")
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            hint = "pip install 'mezzotint[cluster]' for s3://, or what the message names"
            raise InputError(f"the object store cannot be opened: {error}", where=url, hint=hint) from error
        except ValueError as error:
            hint = "use s3://BUCKET/NAME, or another protocol of fsspec"
            raise InputError(f"the object store cannot be opened: {error}", where=url, hint=hint) from error

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes | None:
        """Return an object, None where there is none. Raises OutputError where the store refuses."""
        with self._refusals(name):
            try:
                data: bytes = self._system.cat_file(self._path(name))
                return data
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object; one that is there is replaced. Raises OutputError where the store refuses."""
        with self._refusals(name):
            self._system.pipe_file(self._path(name), data)

    def exists(self, name: str) -> bool:
        """Return whether there is an object. Raises OutputError where the store refuses."""
        with self._refusals(name):
            return bool(self._system.isfile(self._path(name)))

    def names(self, below: str = "") -> list[str]:
        """Return the names of all objects below a name, sorted. Raises OutputError where the store refuses."""
        start = self._path(below) if below else self._root
        with self._refusals(below):
            found: list[Any] = self._system.find(start)
        return sorted(str(path)[len(self._root) :].lstrip("/") for path in found)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _refusals(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store has errors of its own, without a common base
            raise OutputError(
                f"the object store refused: {type(error).__name__}: {error}",
                where=f"{self.url}/{name}".rstrip("/"),
                hint="check the address, the bucket and the credentials in the environment",
            ) from error
