"""What `mezzotint doctor` says of a machine."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from mezzotint import doctor
from mezzotint.io import processor


def test_the_examination_is_plain_data() -> None:
    found = doctor.examine()

    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["packages"]["onnxruntime"] == version("onnxruntime")
    assert found["threads"] >= 1
    assert found["memory_gb"] > 0
    assert found["expect"]


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "torch", "diffusers", "no-such-package"))
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else "1")

    found = doctor.examine()

    assert found["packages"]["torch"] is None
    assert not found["can_compile_diffusers"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f", "avx512_vnni"}, "in hardware"),
        ({"avx2", "avx_vnni"}, "in hardware"),
        ({"avx2"}, "weight_bits=7"),
        ({"asimddp"}, "Arm"),
        ({"sse2"}, "not speed"),
        (None, "not listed"),
    ],
)
def test_expectations_follow_from_the_features(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: set[str] | None, expected: str
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"model name : any\nflags : {' '.join(flags)}\n", encoding="utf-8")
    monkeypatch.setattr(processor, "_CPUINFO", file)

    assert expected in doctor.examine()["expect"]


def test_the_advice_can_be_followed() -> None:
    from mezzotint.passes.recipes.catalog import RECIPES
    from mezzotint.passes.recipes.files import with_options

    with_options(RECIPES["w8a8"], {"choose_scales.weight_bits": 7})
