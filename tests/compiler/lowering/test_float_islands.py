"""Islands between quantized layers stay in float, in the graph that onnxruntime builds; nothing else is changed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Lowering
from mezzotint.compiler.graph.nodes import counts
from mezzotint.compiler.lowering import lower as lowerings
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.runtime.session import open_session
from tests.helpers.tiny import program_of

PAD = "<pads = [1, 1, 1, 1]>"
ISLAND = {
    "Conv": f"[island] c = Conv {PAD} (a, w, b) [z] epsilon = Conv {PAD} (c, w, b)",
    "Conv without a bias": f"[island] c = Conv {PAD} (a, w) [z] epsilon = Conv {PAD} (c, w, b)",
    "Gemm": f"r = Reshape (a, rows) [island] l = Gemm <transB = 1> (r, square, b) c = Reshape (l, images) "
    f"[z] epsilon = Conv {PAD} (c, w, b)",
    "MatMul and Add": f"[island] l = MatMul (a, square) c = Add (l, b) [z] epsilon = Conv {PAD} (c, w, b)",
    "MatMul": f"[island] c = MatMul (a, square) [z] epsilon = Conv {PAD} (c, w, b)",
}
FLOATS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def built(body: str, lowering: Lowering, context: Context) -> tuple[list[str], int]:
    """The float kernels of the graph that onnxruntime builds, and the LeakyRelus of the file."""
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon) {{
      [a] a = Conv {PAD} (sample, w, b) {body} }}""")
    rng = np.random.default_rng(1)
    arrays = {
        "w": rng.standard_normal((4, 4, 3, 3)).astype(np.float32) / 6,
        "square": rng.standard_normal((4, 4)).astype(np.float32) / 2,
        "b": np.full(4, 0.3, np.float32),
        "rows": np.array([-1, 4]),
        "images": np.array([-1, 4, 4, 4]),
    }
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items() if n in read
    )
    steps = (Normalize(), Observe(), ChooseScales(), InsertQdq(islands=("island",), lowering=lowering), CleanQdq())
    lowered = lower(pipeline.run_passes(program_of(ir.from_proto(proto), shape=(4, 4, 4)), steps, context))
    file, optimized = context.folder / "file.onnx", context.folder / "built.onnx"
    ir.save(lowered, file)
    open_session(file, threads=1, optimized=optimized)
    kernels = [node.op_type for node in ir.load(optimized).graph if node.op_type in FLOATS]
    return kernels, counts(lowered.graph)["LeakyRelu"]


@pytest.mark.parametrize("lowering", ["qdq", "integer"])  # with `constant` no float layer reads a DequantizeLinear
@pytest.mark.parametrize("case", ISLAND)
def test_an_island_between_quantizers_stays_in_float(context: Context, case: str, lowering: Lowering) -> None:
    kernels, _ = built(ISLAND[case], lowering, context)
    assert len(kernels) == 1


@pytest.mark.parametrize("case", ["Conv", "Conv without a bias", "Gemm"])
def test_onnxruntime_would_quantize_it(context: Context, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(lowerings, "keep_islands", lambda graph: 0)
    kernels, slopes = built(ISLAND[case], "qdq", context)
    assert (kernels, slopes) == ([], 0)


def test_an_island_with_a_float_neighbour_needs_nothing(context: Context) -> None:
    body = f"s = Sigmoid (a) [island] c = Conv {PAD} (s, w, b) t = Sigmoid (c) [z] epsilon = Conv {PAD} (t, w, b)"
    kernels, slopes = built(body, "qdq", context)
    assert (len(kernels), slopes) == (1, 0)
