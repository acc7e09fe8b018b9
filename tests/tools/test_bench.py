"""tools/bench.py gpu: refused at once without a GPU; what it measures, on the CPU provider in place of one. And
tools/bench_calls.py: each network in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.providers.names import KNOWN
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import Compiled
from tools import bench_calls, bench_gpu
from tools.bench_bars import Bars
from tools.rooms import ROOT

NO_GPU = not {KNOWN[name].provider for name in bench_gpu.GPU_PROVIDERS} & set(onnxruntime.get_available_providers())


@pytest.mark.skipif(not NO_GPU, reason="this onnxruntime has a GPU provider")
def test_without_a_gpu_provider_it_says_so_at_once_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "gpu", "--keep", str(tmp_path / "kept")]
    run = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert "no GPU provider is usable" in run.stderr and "CUDAExecutionProvider" in run.stderr
    assert "pip install onnxruntime-gpu" in run.stderr and "Traceback" not in run.stderr
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_provider_that_is_listed_and_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.raises(InputError) as refused:
        bench_gpu.usable(["cuda", "tensorrt"])
    assert "cuda: " in str(refused.value.where) and "has no TensorrtExecutionProvider" in str(refused.value.where)
    with pytest.raises(InputError, match="abacus"):
        bench_gpu.usable(["abacus"])


def test_what_is_measured(hand: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_gpu.measure(hand.bundle, hand.exported, "cpu", 2, threads=1, repeats=1)
    assert result["float_parity_db"] == result["integer_parity_db"] == [bench_gpu.ALIKE] * 3
    assert "CPUExecutionProvider" in result["integer_engine"]
    assert result["integer_nodes"] == result["integer_fallback"] == {} and len(result["call_ms"]) == 4
    bars = Bars()
    bench_gpu.report({**result, "integer_parity_db": [30.0, 19.0, 40.0], "float_fallback": {"Conv": 2}}, bars.add)
    missed = [row["what"] for row in bars.rows if not row["reached"]]
    assert "integer on cpu against the CPU, dB" in missed and "float: nodes that cpu left to the CPU" in missed
    assert '"measured": 19.0' in capsys.readouterr().out


def test_parity_sees_another_file(hand: Compiled, tmp_path: Path) -> None:
    """A weight that is 1 % off lowers the parity from infinite to about 40 dB."""
    changed = tmp_path / "changed.onnx"
    model = ir.load(hand.exported)
    last = next(node for node in reversed(list(model.graph)) if node.op_type == "Conv")
    weight = last.inputs[1]
    assert weight is not None and weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.01), name=weight.name)
    ir.save(model, changed)
    nets = [Denoiser(file, hand.bundle.signature, threads=1) for file in (hand.exported, changed)]
    x = np.random.default_rng(0).standard_normal((2, *hand.bundle.sample_shape)).astype(np.float32)
    right, off = (net(x, 3) for net in nets)
    assert 35 < bench_gpu.parity_db(right, off) < 60
    off[0, 0, 0, 0] = np.nan
    assert bench_gpu.parity_db(right, off) == -bench_gpu.ALIKE


def test_the_memory_of_a_process() -> None:
    table = "17, 512\n4, 100\n17, 256\nno numbers\n"
    assert bench_gpu.process_memory(table, 17) == pytest.approx(768 * 1.048576)
    assert bench_gpu.process_memory(table, 5) is None


def test_each_network_is_called_in_a_process_of_its_own(hand: Compiled, tmp_path: Path) -> None:
    jobs = bench_calls.jobs_of(hand.exported, [hand.bundle.path], tmp_path, with_peers=False)
    found = bench_calls.measure_calls(jobs, tmp_path, batch=2, threads=1, calls=2, rounds=1)
    name = bench_calls.own_name(hand.bundle.path, "onnxruntime")
    assert list(found) == [bench_calls.FLOAT, name]
    assert all(len(figures.seconds) == 2 and figures.memory_mb > 0 for figures in found.values())
    near = found[name].epsilon_db
    assert near is not None and 20 < near < 80 and found[bench_calls.FLOAT].epsilon_db is None
    lines = bench_calls.calls_table(found).splitlines()
    assert len(lines) == 4 and "1.00x" in lines[2] and f"{near:.1f} |" in lines[3]


def test_a_process_that_fails_says_why(hand: Compiled, tmp_path: Path) -> None:
    job = bench_calls.CallJob("missing", str(tmp_path / "missing.onnx"), str(hand.bundle.path))
    with pytest.raises(RuntimeError, match=r"missing\.onnx"):
        bench_calls.measure_calls([job], tmp_path, batch=2, threads=1, calls=1)
