"""W4 end to end: compiled models in each spelling, their files, and what the manifest says of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.lowering import packing
from mezzotint.runtime.bundle.manifest_entries import StoredType
from mezzotint.runtime.session import Denoiser
from tests.compiler.audit.test_versions import SPELLINGS
from tests.helpers.models import SMALL, Cli
from tests.helpers.tiny import CONVS, tiny_model

PACKED = CONVS - 1  # layers whose weights are large enough; the 1x1 shortcut and the linear layers are not


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("source") / "tiny.onnx"
    ir.save(tiny_model(), file)
    return file


@pytest.fixture(scope="module")
def compiled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """`compiled(spelling, bits)`: the tiny net's bundle, made once; `plain` leaves its constants as they are."""
    made: dict[tuple[str, int, bool], Bundle] = {}

    def make(spelling: str, bits: int = 4, *, plain: bool = False) -> Bundle:
        if (spelling, bits, plain) not in made:
            options = SPELLINGS[spelling]
            wishes = {**options.get("settings", {}), "choose_scales.weight_bits": bits}
            folder = tmp_path_factory.mktemp(spelling)
            with pytest.MonkeyPatch.context() as patch:
                if plain:
                    patch.setattr(packing, "pack", lambda model: None)
                made[spelling, bits, plain] = compile_model(
                    source, folder / "b", recipe=options["recipe"], settings=wishes, **SMALL
                )
        return made[spelling, bits, plain]

    return make


def calls(bundle: Bundle) -> list[npt.NDArray[np.float32]]:
    x = np.random.default_rng(4).normal(size=(2, *bundle.sample_shape)).astype(np.float32)
    return [bundle.denoiser(1)(x, t) for t in bundle.deployment.timesteps]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_narrow_storage_computes_the_same_bits(compiled: Callable[..., Bundle], spelling: str) -> None:
    narrow, plain = compiled(spelling), compiled(spelling, plain=True)
    assert narrow.manifest.kernels == plain.manifest.kernels
    assert narrow.manifest.require_storage().types["int4"].constants == PACKED
    assert "int4" not in plain.manifest.require_storage().types
    for got, want in zip(calls(narrow), calls(plain), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_weight_that_moved_would_be_seen(compiled: Callable[..., Bundle], tmp_path: Path) -> None:
    """The twin: one row of one narrow weight is stored one integer off."""
    bundle = compiled("integer")
    model = ir.load(bundle.model_path)
    value = next(v for n, v in model.graph.initializers.items() if n.endswith("_int4"))
    q = numpy_of(value).astype(np.int8)
    q[0] = np.clip(q[0] + 1, -8, 7)
    value.const_value = ir.tensor(q.astype(ir.DataType.INT4.numpy()), name=name_of(value))
    ir.save(model, tmp_path / "moved.onnx")
    x = np.random.default_rng(4).normal(size=(2, *bundle.sample_shape)).astype(np.float32)
    got = Denoiser(tmp_path / "moved.onnx", bundle.signature, threads=1)(x, bundle.deployment.timesteps[0])
    assert not np.array_equal(got, calls(bundle)[0])


def test_the_manifest_tells_what_is_stored_how(compiled: Callable[..., Bundle]) -> None:
    bundle = compiled("integer")
    found = bundle.manifest.require_storage()
    model = ir.load(bundle.model_path)
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert found.constant_bytes == sum(t.nbytes for t in tensors)
    int4 = [t for t in tensors if t.dtype == ir.DataType.INT4]
    assert found.types["int4"] == StoredType(
        bytes=sum(t.nbytes for t in int4), constants=len(int4), values=sum(t.size for t in int4)
    )
    assert found.model_bytes == bundle.model_path.stat().st_size
    assert found.float_bytes == bundle.manifest.source.parameter_bytes
    assert found.ratio == pytest.approx(found.model_bytes / found.float_bytes, abs=1e-6)
    assert found.notes == ()
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert f"{found.ratio:.3f} of the float parameters" in card


@pytest.mark.parametrize(
    ("bits", "kind", "notes"),
    [
        (2, "int2", []),
        (3, "int4", ["weights of 3 bits are stored in 4: the file has no type between"]),
        (5, "int8", ["weights of 5 bits are stored in 8: the file has no type between"]),
    ],
)
def test_two_bits_are_real_and_three_are_not(
    compiled: Callable[..., Bundle], bits: int, kind: str, notes: list[str]
) -> None:
    four, bundle = compiled("integer"), compiled("integer", bits)
    found = bundle.manifest.require_storage()
    assert list(found.notes) == notes
    weights = four.manifest.require_storage().types["int4"].values
    assert weights <= found.types[kind].values
    if bits == 2:
        assert found.types["int2"].bytes == weights // 4
    assert bundle.manifest.kernels.integer == four.manifest.kernels.integer


def test_inspect_shows_it(compiled: Callable[..., Bundle], cli: Cli) -> None:
    bundle = compiled("integer", 3)
    shown = cli("inspect", bundle.path)
    assert shown.code == 0
    flat = " ".join(shown.out.split())
    assert "of the float parameters" in flat
    assert "int4: 0.0" in flat
    assert "weights of 3 bits are stored in 4" in flat
    assert (
        json.loads(cli("inspect", bundle.path, "--json").out)["storage"] == bundle.manifest.require_storage().to_json()
    )


MEMORY = """
import sys
from mezzotint.runtime.session import open_session
import numpy as np
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * 4096
before = resident()
session = open_session(sys.argv[1], threads=1)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_session_holds_no_more_than_float_weights_would(tmp_path: Path) -> None:
    """The bytes that the kernels read, once as folded and once as packed for them, and no float copy."""
    size = 1024
    dims = f"{size},{size},3,3"
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    wide (float[1,{size},2,2] x) => (float[1,{size},2,2] y)
    <float s = {{0.05}}, uint8 z = {{128}}, int8[{dims}] w, float ws = {{0.01}}, int8 wz = {{0}}>
    {{ q = QuantizeLinear (x, s, z) c = QLinearConv <pads = [1, 1, 1, 1]> (q, s, z, w, ws, wz, s, z)
    y = DequantizeLinear (c, s, z) }}""")
    weight = next(v for node in model.graph for v in node.inputs if v is not None and v.name == "w")
    q = np.random.default_rng(0).integers(-8, 8, (size, size, 3, 3)).astype(np.int8)
    weight.const_value = ir.tensor(q, name="w")
    model.graph.register_initializer(weight)
    packing.pack(model)
    ir.save(model, tmp_path / "w.onnx", external_data="w.onnx.data")
    assert (tmp_path / "w.onnx.data").stat().st_size == pytest.approx(q.size // 2, rel=0.001)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "w.onnx")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2.5 * q.size
