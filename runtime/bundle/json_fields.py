"""The keys of one JSON object of a manifest, read by name and type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import BundleError, MezzotintError

T = TypeVar("T")
HINT = "compile the model again, or use the version of Mezzotint that wrote the bundle"


class Fields:
    """One JSON object of a manifest. `file` and `path` (like `kernels.layers.conv`) are for messages.

    Every method raises BundleError for a key that is missing or has a value of another type, and `finish` for a key
    that nothing has read. The error names the key, the file and what to do.
    """

    def __init__(self, data: Any, file: str, path: str = "") -> None:
        self._file = file
        self._path = path
        if not isinstance(data, Mapping):
            raise self._error(path, data, "an object")
        self._data = data
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def text(self, key: str) -> str:
        value: str = self._typed(key, str, "a text")
        return value

    def integer(self, key: str) -> int:
        value: int = self._typed(key, int, "an integer")
        return value

    def count(self, key: str) -> int:
        """Return an integer that is not negative."""
        value = self.integer(key)
        if value < 0:
            raise self._error(self._inner(key), value, "a count")
        return value

    def number(self, key: str) -> float:
        """Return an int as it is, so that writing it again gives the same text."""
        value: float = self._typed(key, (int, float), "a number")
        return value

    def flag(self, key: str) -> bool:
        value: bool = self._typed(key, bool, "true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """Return an object of any content."""
        return dict(self._typed(key, dict, "an object"))

    def texts(self, key: str) -> dict[str, str]:
        """Return an object whose values are texts."""
        values = self.table(key)
        for name, value in values.items():
            if not isinstance(value, str):
                raise self._error(self._inner(f"{key}.{name}"), value, "a text")
        return values

    def counts(self, key: str) -> dict[str, int]:
        """Return an object whose values are integers."""
        values = self.table(key)
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise self._error(self._inner(f"{key}.{name}"), value, "an integer")
        return values

    def numbers(self, key: str) -> dict[str, float]:
        """Return an object whose values are numbers."""
        values = self.table(key)
        for name, value in values.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise self._error(self._inner(f"{key}.{name}"), value, "a number")
        return values

    def each_text(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self._typed(key, list, "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise self._error(self._inner(key), values, "a list of texts")
        return tuple(values)

    def each_number(self, key: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        values = self._typed(key, list, "a list of numbers")
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            raise self._error(self._inner(key), values, "a list of numbers")
        return tuple(float(value) for value in values)

    def one(self, key: str, build: Callable[[Fields], T]) -> T:
        """Return `build` of the object at `key`."""
        return Fields(self._value(key), self._file, self._inner(key)).finish(build)

    def each(self, key: str, build: Callable[[Fields], T]) -> tuple[T, ...]:
        """Return `build` of each object of a list."""
        items = self._typed(key, list, "a list")
        places = [self._inner(f"{key}[{i}]") for i in range(len(items))]
        return tuple(Fields(item, self._file, place).finish(build) for item, place in zip(items, places, strict=True))

    def named(self, key: str, build: Callable[[Fields], T]) -> dict[str, T]:
        """Return `build` of each value of an object, by its name."""
        items = self.table(key).items()
        return {name: Fields(item, self._file, self._inner(f"{key}.{name}")).finish(build) for name, item in items}

    def parsed(self, key: str, build: Callable[[Any], T]) -> T:
        """Return `build` of the value at `key`; what it raises becomes a BundleError."""
        value = self._value(key)
        try:
            return build(value)
        except (KeyError, TypeError, ValueError, MezzotintError) as error:
            what = f"the manifest's `{self._inner(key)}` is incomplete or inconsistent: {type(error).__name__} {error}"
            raise BundleError(what, where=self._file, hint=HINT) from error

    def maybe(self, key: str, read: Callable[[str], T]) -> T | None:
        """Return `read(key)`, a method of these fields, or None for a key that is absent."""
        return read(key) if key in self._data else None

    def rest(self) -> dict[str, Any]:
        """Return the whole object, and count every key as read."""
        self._read.update(self._data)
        return dict(self._data)

    def finish(self, build: Callable[[Fields], T]) -> T:
        """Return `build` of these fields. Raises BundleError for a key that it did not read."""
        built = build(self)
        if unknown := [key for key in self._data if key not in self._read]:
            what = f"the manifest has a key that this version of Mezzotint does not know: `{self._inner(unknown[0])}`"
            raise BundleError(what, where=self._file, hint=HINT)
        return built

    def _value(self, key: str) -> Any:
        if key not in self._data:
            raise BundleError(f"the manifest has no `{self._inner(key)}`", where=self._file, hint=HINT)
        self._read.add(key)
        return self._data[key]

    def _typed(self, key: str, kind: type | tuple[type, ...], words: str) -> Any:
        value = self._value(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._error(self._inner(key), value, words)
        return value

    def _inner(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _error(self, path: str, value: Any, words: str) -> BundleError:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return BundleError(f"the manifest's `{path}` is {shown}, not {words}", where=self._file, hint=HINT)
