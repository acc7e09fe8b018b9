"""Arrays of .npz files: as numpy reads them, or refused before anything is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mezzotint.compiler.errors import ConditionError
from mezzotint.io import npz
from mezzotint.io.settings import load_conditions

KINDS = st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(endianness="?"), hnp.floating_dtypes(sizes=(16, 32, 64)))
ARRAYS = hnp.arrays(KINDS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=4))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=ARRAYS, packed=st.booleans(), fortran=st.booleans())
def test_arrays_are_read_as_numpy_reads_them(array: Any, packed: bool, fortran: bool, tmp_path: Path) -> None:
    file = tmp_path / "c.npz"
    (np.savez_compressed if packed else np.savez)(file, c=np.asarray(array, order="F" if fortran else "C"))
    read = load_conditions(file)["c"]
    np.testing.assert_array_equal(read, array)
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("=")
    assert read.flags.writeable


def test_compressed_arrays_are_bounded_by_what_they_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "MOST_UNPACKED", 1_000)
    zeros = np.zeros(2_000, np.int8)
    np.savez(tmp_path / "stored.npz", c=zeros)
    np.savez_compressed(tmp_path / "packed.npz", c=zeros)
    assert load_conditions(tmp_path / "stored.npz")["c"].size == zeros.size
    with pytest.raises(ConditionError, match=r"compressed arrays state \d+ bytes"):
        load_conditions(tmp_path / "packed.npz")


def test_numbers_may_be_typed_and_a_file_of_such_a_name_is_read(tmp_path: Path) -> None:
    labels, shares = load_conditions(Path("class_labels=3,-1"))["class_labels"], load_conditions(Path("g=1.5,2e0"))["g"]
    assert labels.dtype == np.int64 and labels.tolist() == [3, -1]
    assert shares.dtype == np.float32 and shares.tolist() == [1.5, 2.0]
    np.savez(tmp_path / "c.npz", c=np.arange(3))
    (tmp_path / "c.npz").rename(tmp_path / "c=1,2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert load_conditions(Path("c=1,2"))["c"].tolist() == [0, 1, 2]
    for text in ("c=", "c=1,", "c=a", "c"):
        with pytest.raises(ConditionError, match="cannot be read"):
            load_conditions(Path(text))


def test_a_damaged_checksum_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "c.npz"
    np.savez(file, c=np.arange(1_000))
    with zipfile.ZipFile(file) as archive:
        place = archive.infolist()[0].header_offset + 4_000
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConditionError, match="CRC"):
        load_conditions(file)
