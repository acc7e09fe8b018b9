"""Ranges of quantizers along the trajectory: what is written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mezzotint.runtime.bundle.ranges import Ranges
from mezzotint.runtime.errors import BundleError


def some() -> Ranges:
    rng = np.random.default_rng(0)
    low, high, scale, seen_low, seen_high = rng.random((5, 3, 4), np.float32)
    seen_low[2] = np.nan
    return Ranges(np.array([30.0, 20.0, 10.0, 0.0]), -low, high, scale, seen_low, seen_high)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    ranges = some()
    ranges.save(tmp_path / "a")
    ranges.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Ranges.load(tmp_path / "a")
    for field in dataclasses.fields(Ranges):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(ranges, field.name))


def test_rows_and_columns_must_fit() -> None:
    ranges = some()
    for other in ({"timesteps": ranges.timesteps[:2]}, {"low": ranges.low[:2]}, {"seen_high": ranges.seen_high[:, :1]}):
        with pytest.raises(ValueError, match="quantizers, timesteps"):
            dataclasses.replace(ranges, **other)


def test_another_file_is_refused(tmp_path: Path) -> None:
    ranges = some()
    ranges.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:100])
    (tmp_path / "text").write_text("ranges")
    for name in ("cut", "text", "missing"):
        with pytest.raises(BundleError, match="not a table of ranges") as caught:
            Ranges.load(tmp_path / name)
        assert name in str(caught.value.where)
